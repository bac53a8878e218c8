"""Tests that one folder and one line of the registry add a family. A copy of `families/_template` works in `check`,
`train`, `export` and `inspect`, with size conditions and a learned word. Without the line, the error names the class of
the base and all families. Every fact in a family's folder is needed: without it a test fails."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import short_run
import tiny
import torch

from lorakit import adapters, config, families
from lorakit.cli.main import main
from lorakit.core import registry
from lorakit.families import _template, hub
from lorakit.families._template.spec import SPEC
from lorakit.families.spec import TextEncoder
from lorakit.formats import compatibility, identify

RENAMED = {"lorakit.families._template": "aurora", "ExampleDiffusion": "AuroraDiffusion", "example": "aurora"}
RENAMED |= {"Example Diffusion": "Aurora"}
# The copy's denoiser takes the picture's size under a name that no other family uses.
SIZES = """
    def size_conditions(self, original, crop, target):
        return {"picture_size": [*target]}
"""
NO_SIZES = """
    def size_conditions(self, original, crop, target):
        return {}
"""
PREDICT = 'states = condition["encoder_hidden_states"].to(self.dtype)'
READ_SIZES = f"{PREDICT} * (1 + condition['picture_size'].to(self.dtype).sum(1)[:, None, None] / 1e4)"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package with a renamed copy of the template; return the "module:attribute" of its spec."""
    package = tmp_path / "modules" / "aurora"
    package.mkdir(parents=True)
    for path in Path(_template.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name, other in RENAMED.items():
            text = text.replace(name, other)
        if path.name == "model.py":
            assert PREDICT in text
            text = text.replace(PREDICT, READ_SIZES) + SIZES
        (package / path.name).write_text(text, encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "aurora"]:
        monkeypatch.delitem(sys.modules, name)  # the copy of another test
    monkeypatch.syspath_prepend(str(package.parent))
    return "aurora.spec:SPEC"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of the copied family."""
    folder = tiny.save_sd1(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = "AuroraDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture
def lorakit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in this process and returns exit status and all output."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, "".join(capsys.readouterr())

    return run


def options(base: Path) -> list[str]:
    settings = {"model.base": str(base), "data.name": "sks toy", "data.resolution": "64", "adapter.rank": "4"}
    settings |= {"train.steps": "2", "optimizer.learning_rate": "1e-3", "train.batch_size": "1"}
    settings |= {"sample.prompts": "a toy", "sample.steps": "1"}
    settings |= {"sample.every": "2", "train.validate_every": "2", "memory.device": "cpu", "output.dtype": "fp32"}
    settings |= {"adapter.train_text_encoder": "true", "adapter.new_tokens": "1", "train.prior": "teacher"}
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return short_run.noise(tmp_path / "photos", 2)


@pytest.mark.slow
def test_a_family_needs_one_folder_and_one_line(
    family: str,
    base: Path,
    photos: Path,
    lorakit: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.FAMILIES.own, "aurora", family)

    def successful(*arguments: object) -> str:
        code, printed = lorakit(*arguments)
        assert code == 0, printed
        return printed

    assert "base: base (aurora" in successful("check", photos, *options(base))
    run = tmp_path / "run"
    successful("train", photos, "--output", run, *options(base))
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    adapter = run / "sks-toy.safetensors"
    trained = successful("inspect", adapter)
    assert re.search(r"for +Aurora \(evidence: metadata\)", trained) and "ss_base_model_version = aurora_v1" in trained
    for name in ("diffusers", "peft"):  # diffusers reads PEFT's names
        exported = successful("export", adapter, "--to", name, "--output", tmp_path / name).splitlines()[0]
        assert re.search(r"for +Aurora(.|\n)+format +(peft|PEFT)", successful("inspect", exported))


def test_missing_size_conditions_fail_in_the_denoiser(
    family: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "modules" / "aurora" / "model.py"
    model.write_text(model.read_text(encoding="utf-8") + NO_SIZES, encoding="utf-8")
    monkeypatch.setitem(registry.FAMILIES.own, "aurora", family)
    loaded = families.load(families.describe(base), "cpu", torch.float32)
    condition = loaded.encode_text(["a"]).with_sizes(loaded.size_conditions((64, 64), (0, 0), (64, 64)))
    with pytest.raises(KeyError, match="picture_size"):
        loaded.predict(torch.zeros((1, 4, 8, 8)), torch.tensor([1]), condition)


def test_a_text_encoder_missing_from_the_spec_learns_no_word(
    family: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config.LoraConfig(rank=2, new_tokens=1, train_text_encoder=False)
    for encoders, parts in {SPEC.text_encoders: ["text_encoder"], (): []}.items():
        monkeypatch.setitem(registry.FAMILIES.own, "aurora", family)
        loaded = families.load(families.describe(base), "cpu", torch.float32)
        monkeypatch.setitem(
            registry.FAMILIES.own, "aurora", replace(registry.FAMILIES["aurora"], text_encoders=encoders)
        )
        adapter = adapters.attach(loaded, section, trigger="sks")
        words = [name for name in adapter.parameters() if name.endswith(".token")]
        adapter.detach()
        assert words == [f"{part}.token" for part in parts]


def test_the_hub_fetches_the_parts_that_a_spec_names(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["prior/diffusion_pytorch_model.safetensors", "prior/config.json", "text_encoder_7/model.safetensors"]
    parts += ["text_encoder_7/config.json", "tokenizer_7/vocab.json"]
    assert hub.base_files("a/b", ["model_index.json", *parts]) == ["model_index.json"]
    spec = replace(SPEC, denoiser="prior", text_encoders=(TextEncoder("text_encoder_7"),))
    monkeypatch.setitem(registry.FAMILIES.own, "example", spec)
    assert sorted(hub.base_files("a/b", ["model_index.json", *parts])) == sorted(["model_index.json", *parts])


def test_without_its_line_the_base_is_refused(
    family: str, base: Path, photos: Path, lorakit: Callable[..., tuple[int, str]]
) -> None:
    code, printed = lorakit("check", photos, *options(base))
    assert code != 0
    there = "Stable Diffusion 1, Stable Diffusion 2, Stable Diffusion XL, Stable Diffusion 3"
    assert re.search(rf"base \S+ is an AuroraDiffusionPipeline; lorakit trains {there}", printed)


def test_a_familys_own_denoiser_name_is_read_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "prior.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = {f"{layer}.lora_A.weight": (4, 8), f"{layer}.lora_B.weight": (8, 4)}
    assert not identify.modules(shapes)
    monkeypatch.setitem(registry.FAMILIES.own, "example", replace(SPEC, denoiser="prior"))
    assert identify.modules(shapes)[layer].canonical == layer.replace("prior", "unet")
    assert compatibility._component(layer) == "unet"
