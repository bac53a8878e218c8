"""Tests of the self-check at the end of a run: a right file passes every check, each wrong one fails at least one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import adapters, config, families, formats
from lorakit.core import safetensors_header
from lorakit.core.messages import Message
from lorakit.training import selfcheck
from lorakit.ui import texts

SIZE, PROMPT = (64, 64), "a photo of sks toy"
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
Tensors = dict[str, torch.Tensor]


def unscaled(tensors: Tensors) -> None:
    """Set alpha to the configured value, where alpha * sqrt(rank) is right."""
    for name in [name for name in tensors if name.endswith(".alpha")]:
        tensors[name] = tensors[name] / 2


MUTATIONS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "one key renamed": (
        lambda t: t.update({f"{STEM}.lora_dwn.weight": t.pop(f"{STEM}.lora_down.weight")}),
        "has no down factor",
    ),
    "one alpha missing": (lambda t: t.pop(f"{STEM}.alpha"), f"{STEM}.alpha: missing"),
    "one tensor transposed": (
        lambda t: t.update({f"{STEM}.lora_up.weight": t[f"{STEM}.lora_up.weight"].T.contiguous()}),
        "do not fit together",
    ),
    "rank-stabilised, but not scaled": (unscaled, "delta W is off by 50 %"),
}


@pytest.fixture(scope="module")
def trained(tiny_sd1: Path) -> dict[str, Any]:
    """A rank-stabilised adapter of rank 4 in a base, and the facts that the end of a run passes to the self-check."""
    info = families.describe(tiny_sd1)
    family = families.load(info, "cpu", torch.float32)
    adapter = adapters.attach(family, config.LoraConfig(method="rslora", rank=4, train_text_encoder=True))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    memory, weights = selfcheck.probe(family, PROMPT, SIZE), adapter.weights()
    adapter.detach()
    base = selfcheck.probe(family, PROMPT, SIZE)
    return {
        "weights": weights,
        "base_probe": base,
        "memory_probe": memory,
        "load": lambda: families.load(info, "cpu", family.dtype),
    }


def findings(trained: dict[str, Any], folder: Path, change: Callable[[Tensors], Any]) -> list[selfcheck.Finding]:
    """Return the self-check's findings for a kohya file whose tensors were changed after saving."""
    path = formats.save(trained["weights"], folder, "toy", ["kohya"], "fp32", {})["kohya"]
    metadata, tensors = safetensors_header.read(path).metadata, load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    looks = selfcheck.examine({"kohya": path}, **trained, prompt=PROMPT, size=SIZE, dtype="fp32")
    return [finding for _, each, _ in looks for finding in each]


def test_a_correct_file_passes_every_check(trained: dict[str, Any], tmp_path: Path) -> None:
    actual = findings(trained, tmp_path, lambda tensors: None)
    assert selfcheck.failures(actual) == []
    assert [finding.name for finding in actual] == [
        "kohya file",
        "kohya in diffusers",
        "kohya unet",
        "kohya text encoder",
    ]


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_fails_the_check(trained: dict[str, Any], tmp_path: Path, name: str) -> None:
    change, words = MUTATIONS[name]
    failed = selfcheck.failures(findings(trained, tmp_path, change))
    assert [finding.name for finding in failed] == ["kohya file"]
    assert words in failed[0].detail


def test_diffusers_detects_a_wrong_scale(trained: dict[str, Any], tmp_path: Path) -> None:
    """The check with diffusers shares no code with the exporter, so it detects a wrong scale alone."""
    path = formats.save(trained["weights"], tmp_path, "toy", ["kohya"], "fp32", {})["kohya"]
    tensors = load_file(path)
    unscaled(tensors)
    save_file(tensors, path)
    finding = selfcheck.read_by_diffusers("kohya", path, trained["load"](), trained["weights"], 1e-3)
    assert not finding.passed and "delta W is off by 50 %" in finding.detail


@pytest.mark.parametrize("language", ["zh-Hant", "zh-Hans", "ja"])
def test_each_check_is_translated_in_the_log(trained: dict[str, Any], tmp_path: Path, language: str) -> None:
    for finding in findings(trained, tmp_path, lambda tensors: None):
        line = texts.sayer(language).translate(Message("ok: {name}: {detail}", finding.name, finding.detail))
        assert not re.search(r"\b(ok|file|in|unet|text|encoder|modules|output)\b", line), line
