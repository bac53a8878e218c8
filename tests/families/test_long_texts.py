"""Tests of texts with several chunks, and of prompts with weights, against transformers' result for each chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_sd3
import torch
from PIL import Image
from transformers import CLIPTokenizer

from lorakit import config, families
from lorakit.config import LoraConfig
from lorakit.inference import sampling
from lorakit.runs.preflight import preflight

LONG = " ".join(["photo of sks toy"] * 40)  # 160 tokens
SHORT = "a photo"


def by_hand(base: Path, text: str, part: str = "") -> torch.Tensor:
    """Return chunks of 75 ids as rows of 77, padded as the tokenizer's configuration says."""
    tokenizer = CLIPTokenizer.from_pretrained(base / f"tokenizer{part}")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[begin, *ids[at : at + 75], end] for at in range(0, max(1, len(ids)), 75)]
    return torch.tensor([row + [pad] * (77 - len(row)) for row in rows])


def test_chunks_are_encoded_separately_and_concatenated(sd1: Any, tiny_sd1: Path) -> None:
    rows = by_hand(tiny_sd1, LONG)
    assert len(rows) == sd1.chunks([LONG]) == sd1.chunks([SHORT, LONG]) == 3
    expected = torch.cat(list(sd1.text_encoders["text_encoder"](rows)[0]))
    actual = sd1.encode_tokens(sd1.tokens([LONG, SHORT], 3))["encoder_hidden_states"]
    assert actual.shape == (2, 231, 32)
    torch.testing.assert_close(actual[0], expected)
    empty = sd1.encode_text([""])["encoder_hidden_states"][0]
    torch.testing.assert_close(
        actual[1], torch.cat([sd1.encode_text([SHORT])["encoder_hidden_states"][0], empty, empty])
    )
    # A limit of one chunk truncates as diffusers does; a limit of two keeps the first two of three.
    torch.testing.assert_close(sd1.encode_text([LONG])["encoder_hidden_states"][0], expected[:77])
    torch.testing.assert_close(sd1.encode_tokens(sd1.tokens([LONG], 2))["encoder_hidden_states"][0], expected[:154])


def test_sdxl_encodes_chunks_with_both_encoders_and_pools_the_first(sdxl: Any, tiny_sdxl: Path) -> None:
    states = []
    for encoder, part in zip(sdxl.text_encoders.values(), ("", "_2"), strict=True):
        output = encoder(by_hand(tiny_sdxl, LONG, part), output_hidden_states=True)
        states.append(torch.cat(list(output.hidden_states[-2])))
    condition = sdxl.encode_prompt(LONG)
    torch.testing.assert_close(condition["encoder_hidden_states"][0], torch.cat(states, dim=-1))
    torch.testing.assert_close(condition["pooled"], output.text_embeds[:1])


def test_prompt_weights_scale_the_distance_from_the_empty_text(sd1: Any) -> None:
    plain, empty = (sd1.encode_text([text])["encoder_hidden_states"] for text in ("a photo of toy", ""))
    weighted = sd1.encode_prompt("a photo (of:1.5) [toy]")["encoder_hidden_states"]
    places = {2: 1.0, 3: 1.5, 4: 1 / 1.1}  # after the start token: a, photo, of, toy
    for place in range(77):
        weight = places.get(place, 1.0)
        expected = empty[:, place] + weight * (plain[:, place] - empty[:, place])
        torch.testing.assert_close(weighted[:, place], expected)
    assert torch.equal(sd1.encode_prompt("a photo of toy")["encoder_hidden_states"], plain)
    letters = sd1.encode_text(["a photo (toy)"])["encoder_hidden_states"]
    torch.testing.assert_close(sd1.encode_prompt(r"a photo \(toy\)")["encoder_hidden_states"], letters)


def test_break_starts_a_chunk(sd1: Any) -> None:
    both = sd1.encode_prompt("a photo BREAK <lora:x:1>of toy")["encoder_hidden_states"]
    parts = [sd1.encode_text([text])["encoder_hidden_states"] for text in ("a photo", "of toy")]
    torch.testing.assert_close(both, torch.cat(parts, dim=1))


def test_prompt_and_negative_prompt_of_unequal_length_are_repeated(sd1: Any) -> None:
    """A shorter prompt is repeated. Repeated states do not change attention, so the UNet predicts the same."""
    (text,) = sampling.embed(sd1, [SHORT], config.SampleConfig(negative_prompt=" ".join(["photo of sks toy"] * 20)))
    assert text["prompt_embeds"].shape == text["negative_prompt_embeds"].shape == (1, 154, 32)
    noisy, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    sd1.acquire("unet")
    with torch.no_grad():
        once, twice = (
            sd1.denoiser(noisy, time, states, return_dict=False)[0]
            for states in (sd1.encode_text([SHORT])["encoder_hidden_states"], text["prompt_embeds"])
        )
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vectors", [1, 4])
def test_a_learned_word_is_never_split_between_chunks(sd1: Any, attach: Any, vectors: int) -> None:
    text = " ".join(["of"] * 73 + ["sks", "toy", "sks"])
    adapter = attach(sd1, LoraConfig(rank=2, new_tokens=vectors), trigger="sks")
    assert sd1.chunks([text]) == 2
    visited = []
    hook = sd1.text_encoders["text_encoder"].register_forward_pre_hook(lambda _, args: visited.append(args[0]))
    sd1.encode_tokens(sd1.tokens([text], 2))
    hook.remove()
    counts = [int((row < 0).sum()) for row in visited[0]]
    assert counts == ([1, 1] if vectors == 1 else [0, 8]), "whole words"
    adapter.detach()
    assert sd1.chunks([text]) == 2 and sd1.chunks([" ".join(["sks"] * 75)]) == 1


def fill(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
    (folder / "0.txt").write_text(LONG, encoding="utf-8")
    return folder


def settings(base: Path, photos: Path, **changes: Any) -> config.Config:
    short = {"model.base": str(base), "data.folder": str(photos), "data.name": "sks toy", "data.resolution": 64}
    short |= {"train.steps": 1, "memory.device": "cpu", "adapter.rank": 2, "optimizer.learning_rate": 1e-2}
    return config.load(None, short | {name.replace("__", "."): value for name, value in changes.items()})


def test_check_reports_long_texts_their_cost_and_truncation(tiny_sd1: Path, tmp_path: Path) -> None:
    photos = fill(tmp_path / "photos")
    result = preflight(settings(tiny_sd1, photos))
    assert result.problems == () and result.report is not None and result.plan is not None
    note = "texts of more than 75 tokens: 1 of 4, read in up to 3 chunks of 75, as web UIs read them"
    assert note in result.report.notes and result.report.chunks == 3
    (price,) = [line for line in result.plan.notes if line.startswith("texts:")]
    assert "padded to 231 tokens" in price and "than with 77" in price
    result = preflight(settings(tiny_sd1, photos, data__max_tokens=150))
    assert any("its text has 160 tokens, 150 fit; cut off:" in line for line in result.warnings)
    result = preflight(settings(tiny_sd1, photos, data__max_tokens=75))
    assert any("its text has 160 tokens, 75 fit; cut off:" in line for line in result.warnings)
    assert result.plan is not None and not any(line.startswith("texts:") for line in result.plan.notes)
    with pytest.raises(config.ConfigError, match=r"data\.max_tokens = 100: texts are read in chunks of 75"):
        settings(tiny_sd1, photos, data__max_tokens=100)


@pytest.mark.parametrize("changes", [{}, {"adapter__new_tokens": 2, "adapter__train_text_encoder": True}])
def test_a_run_encodes_long_captions_completely(tiny_sd1: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    from test_silent_failures import loaded

    photos = fill(tmp_path / "photos")
    _, _, step, _ = loaded(settings(tiny_sd1, photos, train__prior="teacher", **changes))
    assert step.encoded.conditions["encoder_hidden_states"].shape[1] == 231
    assert step.encoded.class_conditions["encoder_hidden_states"].shape[1] == 231
    assert torch.isfinite(step.loss(0))


def test_sd3_encodes_one_chunk_with_clip_and_all_with_t5(tmp_path: Path) -> None:
    base = tiny_sd3.save_sd3(tmp_path / "sd3")
    family = families.load(families.describe(base), "cpu", torch.float32)
    assert family.chunks([LONG]) == 1
    torch.testing.assert_close(
        family.encode_prompt(LONG)["encoder_hidden_states"], family.encode_text([LONG])["encoder_hidden_states"]
    )
    plain, heavy, empty = (family.encode_prompt(text)["encoder_hidden_states"] for text in ("toy", "(toy:2)", ""))
    torch.testing.assert_close(heavy[:, 1], 2 * plain[:, 1] - empty[:, 1])
    torch.testing.assert_close(heavy[:, 77], 2 * plain[:, 77] - empty[:, 77])
    assert torch.equal(heavy[:, 0], plain[:, 0])
    photos = fill(tmp_path / "photos")
    problems = preflight(settings(base, photos, data__max_tokens=150, output__formats=["diffusers"])).problems
    assert any("CLIP reads 75 tokens of a text in base sd3" in line for line in problems)
    warnings = preflight(settings(base, photos, sample__prompts=[LONG], output__formats=["diffusers"])).warnings
    assert any(line.startswith('prompt "photo') and "CLIP reads 75 of 160 tokens" in line for line in warnings)


def test_text_that_a_sample_ignores_is_reported(tiny_sd1: Path, tmp_path: Path) -> None:
    prompts = ["<lora:x:1> a toy, (red:1.3) --s 2", LONG]
    warnings = preflight(settings(tiny_sd1, fill(tmp_path / "photos"), sample__prompts=prompts)).warnings
    assert [line for line in warnings if line.startswith("prompt")] == [
        'prompt "<lora:x:1> a toy, (red:1.3)": <lora:x:1> is left out: the adapter is named beside the prompt'
    ]
