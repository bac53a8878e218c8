"""Tests of textual inversion alone: only a word is trained, and lorakit and diffusers read its file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import short_run
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lorakit import adapters, config, families, formats
from lorakit.cli.main import main
from lorakit.config import ConfigError
from lorakit.config.embedding import EmbeddingConfig
from lorakit.core.errors import LorakitError, Stopped
from lorakit.formats import inspect, saving, verify
from lorakit.inference import sampling
from lorakit.runs.preflight import preflight
from lorakit.training import run as train, selfcheck
from lorakit.training.trainable import _init_word, _lost_tokens

STEPS = {"train.steps": 1, "data.name": "sks toy", "adapter.method": "embedding"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = short_run.noise(tmp_path_factory.mktemp("photos"), 2)
    return folder


OWN: dict[str, Any] = {"adapter__method": "embedding", "adapter__new_tokens": 2, "train__save_every": 2}


@pytest.fixture(scope="module")
def result(tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    return train.train(short_run.run_config(tiny_sd1, photos, tmp_path_factory.mktemp("runs") / "run", 4, **OWN))


def test_a_run_trains_only_the_word_and_checks_its_file(result: train.Result, sd1: Any) -> None:
    checks = ["file", "in diffusers", "unet", "text encoder"]
    assert [finding.name for finding in result.findings if finding.passed] == [f"embedding {name}" for name in checks]
    assert result.adapter.name == "sks.safetensors"
    vectors = load_file(result.adapter)
    assert vectors.keys() == {"emb_params"}
    table, tokenizer = sd1.modules()["text_encoder"].get_input_embeddings().weight, sd1.pipeline().tokenizer
    ids = tokenizer("toy", add_special_tokens=False).input_ids
    change = (vectors["emb_params"] - table[[ids[0], ids[1 % len(ids)]]]).abs()
    assert 0 < change.max() <= 4 * 1.1e-2, "AdamW moves a number by about the rate in a step"


@pytest.mark.slow
def test_a_stopped_embedding_run_continues_to_the_same_bits(
    result: train.Result, tiny_sd1: Path, photos: Path, tmp_path: Path
) -> None:
    steps: list[int] = []
    with pytest.raises(Stopped):
        train.train(
            short_run.run_config(tiny_sd1, photos, tmp_path / "cut", 4, **OWN),
            listeners=[lambda event: steps.append(0) if event.kind == "step" else None],
            stop=lambda: len(steps) >= 2,
        )
    resumed = load_file(train.resume(tmp_path / "cut").adapter)
    assert torch.equal(load_file(result.adapter)["emb_params"], resumed["emb_params"])


def test_diffusers_and_lorakit_encode_the_files_word_equally(result: train.Result, tiny_sd1: Path) -> None:
    file = result.adapter
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.load_textual_inversion(str(file), token="<sks>")
    theirs, _ = pipeline.encode_prompt("a photo of a <sks> toy", "cpu", 1, False)
    family = families.load(families.describe(tiny_sd1), "cpu", torch.float32)
    prompt = ["a photo of a sks toy"]
    before = family.encode_text(prompt)["encoder_hidden_states"]
    adapter = adapters.apply(family, formats.read(file, embedding=True))
    ours = family.encode_text(prompt)["encoder_hidden_states"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-3)
    adapter.detach()
    assert torch.equal(family.encode_text(prompt)["encoder_hidden_states"], before)


def test_an_embedding_is_sampled_and_its_checkpoint_is_exported(
    result: train.Result, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sampling.from_file(
        result.adapter,
        str(tiny_sd1),
        ["a sks toy"],
        [0.0, 1.0],
        config.SampleConfig(steps=1),
        folder=tmp_path / "drawn",
    )
    assert paths[1].read_bytes() != paths[2].read_bytes()
    checkpoint = str(result.folder / "checkpoints" / "step-000002")
    command = ["export", checkpoint, "--to", "peft", "--output", str(tmp_path)]
    assert main(command) == 0
    assert inspect.inspect(tmp_path / "step-000002.safetensors").trigger == "sks"
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    assert main(["resize", str(result.adapter), "--rank", "1", "--output", str(tmp_path / "r")]) == 1
    error = capsys.readouterr().err
    assert "this is a textual-inversion embedding, not an adapter, and has no layers to convert or merge" in error
    assert "put it as it is into your program's folder of embeddings" in error


def test_an_embedding_is_installed_in_the_embeddings_folder(
    result: train.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("models/Lora", "embeddings"):
        (tmp_path / folder).mkdir(parents=True)
    command = ["install-adapter", str(result.adapter), "--into", "a1111", "--at", str(tmp_path)]
    assert main(command) == main(command) == 0
    assert (tmp_path / "embeddings" / "sks.safetensors").read_bytes() == result.adapter.read_bytes()
    (tmp_path / "embeddings" / "sks.safetensors").write_bytes(b"another")
    assert main(command) == 1 and "is another embedding of that name" in capsys.readouterr().err


def test_a_changed_embedding_fails_the_check(result: train.Result, tmp_path: Path) -> None:
    weights = formats.read(result.adapter, embedding=True)
    assert verify.verify_file(result.adapter, weights, []) == []
    changed = copy.deepcopy(weights)
    changed.embeddings["sks"]["text_encoder"][0, 0] += 1
    (finding,) = verify.verify_file(result.adapter, changed, [])
    assert "differs from the trained one" in str(finding)
    assert not selfcheck.file_findings("embedding", result.adapter, changed, [])[0].passed
    changed.embeddings["sks"]["text_encoder"][0, 0] = float("nan")
    with pytest.raises(LorakitError, match="the vectors of 'sks' are not finite"):
        saving.save(changed, tmp_path, "sks", ["kohya"], "fp16", {})
    assert not any(tmp_path.iterdir())


def test_sdxl_has_vectors_for_both_text_encoders(sdxl: Any, tiny_sdxl: Path, tmp_path: Path) -> None:
    family = copy.deepcopy(sdxl)
    section = EmbeddingConfig(new_tokens=3)
    adapter = adapters.attach(family, section, trigger="sks", init_word="toy")
    assert {name.partition(".")[0] for name in adapter.parameters()} == {"text_encoder", "text_encoder_2"}
    assert adapter.state().keys() == {"text_encoder.token", "text_encoder_2.token"}
    for part in adapter.parameters().values():
        part.data += torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
    weights = adapter.weights()
    paths = saving.save(weights, tmp_path, "sks", ["kohya"], "fp16", {})
    adapter.detach()
    assert {name: len(rows) for name, rows in load_file(paths["embedding"]).items()} == {"clip_l": 3, "clip_g": 3}
    assert verify.verify_file(paths["embedding"], weights, []) == []
    loaded = families.load(families.describe(tiny_sdxl), "cpu", torch.float32)
    finding = selfcheck.read_word_by_diffusers("embedding", paths["embedding"], loaded, weights)
    assert finding.passed and finding.detail.endswith(": 2"), finding
    for name, module in loaded.modules().items():
        before = family.modules()[name].state_dict()
        assert all(torch.equal(part, before[key]) for key, part in module.state_dict().items()), "taken out again"
    assert "<sks>_1" not in loaded.pipeline().tokenizer.get_vocab()
    weights.embeddings["sks"]["text_encoder_2"][0, 0] += 1
    finding = selfcheck.read_word_by_diffusers("embedding", paths["embedding"], loaded, weights)
    assert not finding.passed and finding.detail.startswith("text_encoder_2: its vectors are not")


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str, str, int]] = {
    "a1111": ({"emb_params": (2, 768)}, "sd1", "cat", 2),
    "sd2": ({"emb_params": (1, 1024)}, "sd2", "cat", 1),
    "sdxl": ({"clip_g": (2, 1280), "clip_l": (2, 768)}, "sdxl", "cat", 2),
    "diffusers": ({"<cat-toy>": (768,)}, "sd1", "<cat-toy>", 1),
}


@pytest.mark.parametrize(("shapes", "family", "word", "count"), OTHERS.values(), ids=OTHERS)
def test_embeddings_of_other_programs_are_read_and_described(
    shapes: dict[str, tuple[int, ...]], family: str, word: str, count: int, tmp_path: Path
) -> None:
    path = tmp_path / "cat.safetensors"
    save_file({name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    weights = formats.read(path, embedding=True)
    assert (weights.family, list(weights.embeddings), len(weights.layers)) == (family, [word], 0)
    assert all(len(rows) == count and rows.ndim == 2 for rows in weights.embeddings[word].values())
    report = inspect.inspect(path)
    assert (report.kind, report.family, report.trigger) == ("embedding", family, word)
    assert f"vectors: {count};" in report.notes[0] and "the name of the file, cat" in report.notes[0]
    assert report.to_text()


def test_an_embedding_that_fits_no_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file({"emb_params": torch.ones(1, 5)}, path)
    with pytest.raises(LorakitError, match="vectors of width 5, which no base known here has"):
        formats.read(path, embedding=True)
    assert "vectors of width 5" in inspect.inspect(path).notes[0]
    save_file({"emb_params": torch.ones(1, 768), "strange": torch.ones(1, 768)}, path)
    with pytest.raises(LorakitError, match="an embedding of a kind that lorakit does not read"):
        formats.read(path, embedding=True)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "toy"),
        ({"data.name": "sks small toy"}, "toy"),
        ({"adapter.init_word": "dog"}, "dog"),
        ({"adapter.init_word": "a photo of"}, "a photo of"),
        ({"data.name": "sks"}, ""),
    ],
)
def test_the_vectors_start_from_the_noun_or_the_configured_word(sd1: Any, options: dict[str, Any], word: str) -> None:
    settings = config.load(None, STEPS | options)
    assert _init_word(settings) == word
    family = copy.deepcopy(sd1)
    adapter = adapters.attach(family, settings.adapter, trigger="sks", init_word=word)
    ids = family.pipeline().tokenizer(word or "sks", add_special_tokens=False).input_ids
    table = family.modules()["text_encoder"].get_input_embeddings().table.weight
    assert torch.equal(adapter.parameters()["text_encoder.token"], table[ids[:1]])
    line = f"begin as 1 of the {len(ids)} tokens of {word!r}: adapter.new_tokens = {len(ids)} takes all"
    assert _lost_tokens(settings, adapter).removeprefix("the trigger's vectors ") == (line if word and ids[1:] else "")
    assert len(ids) > 1 or " " not in word


REFUSALS: dict[str, dict[str, Any]] = {
    "unknown option adapter.rank with adapter.method = 'embedding': leave it out": {"adapter.rank": 8},
    "unknown option adapter.target_modules with": {"adapter.target_modules": "linear"},
    "unknown option adapter.train_text_encoder with": {"adapter.train_text_encoder": True},
    "unknown option adapter.dropout with": {"adapter.dropout": 0.1},
    "adapter.new_tokens = 0: must be between 1 and 32": {"adapter.new_tokens": 0},
    "adapter.new_tokens needs a trigger of letters and digits": {"data.name": "s.k dog"},
    "adapter.new_tokens learns one trigger": {"data.concepts": "folders"},
    "optimizer.text_encoder_learning_rate has no effect": {"optimizer.text_encoder_learning_rate": 1e-3},
    "optimizer.text_encoder_2_learning_rate has no effect": {"optimizer.text_encoder_2_learning_rate": 1e-3},
    "optimizer.text_encoder_stop has no effect": {"optimizer.text_encoder_stop": 0.5},
    "train.prior has no effect": {"train.prior": "teacher"},
    "output.formats has no effect": {"output.formats": ("peft",)},
    "output.dtype has no effect": {"output.dtype": "bf16"},
    "train.max_weight_norm needs a method whose change is": {"train.max_weight_norm": 1.0},
    "optimizer.loraplus_lr_ratio is for": {"optimizer.loraplus_lr_ratio": 4.0},
    "train.init_from makes no sense": {"train.init_from": "x.safetensors"},
}


@pytest.mark.parametrize(("message", "options"), REFUSALS.items(), ids=REFUSALS)
def test_unfit_options_of_an_embedding_are_refused_in_one_line(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(None, STEPS | options)
    assert [line for line in str(error.value).splitlines() if message in line] == str(error.value).splitlines()


def test_the_method_replaces_the_presets_and_the_plan_counts_vectors(photos: Path) -> None:
    changes = {"adapter.method": "embedding", "data.name": "sks toy", "data.folder": str(photos)}
    settings = config.load("subject-pocket", changes | {"adapter.new_tokens": 2})
    assert (settings.optimizer.learning_rate, settings.train.prior, settings.adapter_formats) == (2e-3, "none", ())
    ready = preflight(settings)
    assert ready.problems == () and ready.plan is not None
    assert ready.plan.modules == {"text_encoder": (0, 2 * 128)}
    sd15 = config.load("subject-sd15", changes)
    assert (sd15.train.prior, sd15.train.steps_per_image) == ("none", 100)
