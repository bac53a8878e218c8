"""A method, an optimizer and a format are each added from one module by one line of the registry, and then work in
`check`, `train`, `export` and `inspect`; without the line, the error names what there is."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import short_run

from lorakit import config
from lorakit.cli.main import main
from lorakit.config import ConfigError
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.registry import MethodSpec, OptimizerSpec

METHOD = '''
"""LoRA-FA (arXiv 2308.03303): A stays as it was drawn, B is trained."""

from dataclasses import dataclass, replace

from lorakit.adapters import lora
from lorakit.adapters.method import NAME
from lorakit.config import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Section(LoraConfig):
    """LoRA with a frozen A."""

    method: str = "lora_fa"


def trained_weights(section, shape):
    return section.rank * shape[0]


def begin(layer, draw):
    lora.begin(layer, draw)
    layer.lora_A[NAME].weight.requires_grad_(False)


METHOD = replace(
    lora.LORA,
    begin=begin,
    factors=lambda layer: {"up": layer.lora_B[NAME].weight},
    constants=lambda layer: {"down": layer.lora_A[NAME].weight},
    fill=None,
)
'''

OPTIMIZER = """
import torch


def momentum_sgd(groups, config):
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay, **config.args)
"""

FORMAT = '''
"""Tensors by their canonical names, the scale folded into b."""

import re

from lorakit.formats.metadata import complete
from lorakit.formats.spec import FormatSpec, Spelling

NAMES = re.compile(r"((?:unet|text_encoder|text_encoder_2)\\\\..+)\\\\.(a|b)")


def tensors(weights, dtype):
    from lorakit.formats import adapter_math

    found = {}
    for name, layer in adapter_math.complete(weights).items():
        factors = layer.rescaled(1).factors()
        found |= {f"{name}.a": factors["down"], f"{name}.b": factors["up"]}
    return adapter_math.cast(found, dtype)


def write(weights, path, *, dtype, metadata):
    from lorakit.formats import files

    files.write_safetensors(path, tensors(weights, dtype), complete(weights, metadata))
    return [path]


SPEC = FormatSpec(
    ending="-plain.safetensors",
    check=lambda layers, family: None if layers == "lora" else f"the plain format cannot carry {layers}",
    tensors=tensors,
    write=write,
    recognizes=lambda names: all(NAMES.fullmatch(name) for name in names),
    spelling=Spelling(NAMES, {"a": "down", "b": "up"}, lambda stem: stem),
)
'''.replace("\\\\", "\\")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module that can be imported by its name."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return lambda name, text: (tmp_path / "modules" / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def lorakit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process and gives what it printed; it must succeed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, out + err
        return out

    return run


def check_train_export_inspect(lorakit: Callable[..., str], place: Path, to: str, **options: str) -> dict[str, str]:
    """Do all four with two steps on the bundled base; the plan, and what `inspect` says of the trained and the exported
    adapter."""
    (place / "photos").mkdir()
    photos, run = short_run.noise(place / "photos", 2), place / "run"
    settings = {"data.name": "sks toy", "data.resolution": "64", "train.steps": "2", "sample.steps": "1", **options}
    settings |= {"memory.device": "cpu", "sample.prompts": "a toy", "output.dtype": "fp32", "sample.every": "2"}
    settings |= {"sample.at_start": "false", "sample.at_end": "false", "train.validate_at_end": "false"}
    settings |= {"adapter.target_modules": "attention", "adapter.train_text_encoder": "false", "train.batch_size": "1"}
    common = [word for name, value in settings.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    plan = lorakit("check", photos, *common)
    lorakit("train", photos, "--output", run, *common)
    adapter = min(run.glob("*.safetensors"), key=lambda path: len(path.name))  # the others are named after it
    trained = lorakit("inspect", adapter)
    (exported,) = lorakit("export", adapter, "--to", to, "--output", place / "exported").split()
    return {"plan": plan, "trained": trained, "exported": lorakit("inspect", exported)}


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("lora_fa", METHOD)
    spec = MethodSpec("lora_fa:METHOD", "lora_fa:trained_weights", section="lora_fa:Section", begins_from_base=True)
    monkeypatch.setitem(registry.METHODS.own, "lora_fa", spec)
    output = check_train_export_inspect(lorakit, tmp_path, "diffusers", adapter__method="lora_fa", adapter__rank="4")
    assert "adapter: lora_fa, unet" in output["plan"]
    assert "lora_fa" in output["trained"] and "lora_fa" in output["exported"]
    with pytest.raises(ConfigError, match=r"train\.init_from makes no sense with adapter\.method = 'lora_fa'"):
        config.load(None, {"train.steps": 1, "adapter.method": "lora_fa", "train.init_from": "a"})


@pytest.mark.slow
def test_an_optimizer_is_one_function_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("momentum", OPTIMIZER)
    spec = OptimizerSpec("momentum:momentum_sgd", state_bytes=4, elementwise=True)
    monkeypatch.setitem(registry.OPTIMIZERS.own, "momentum_sgd", spec)
    options = {"optimizer__name": "momentum_sgd", "optimizer__args__nesterov": "true", "adapter__rank": "4"}
    options |= {"optimizer__learning_rate": "0.1", "optimizer__warmup_steps": "0"}  # a step of SGD is small
    output = check_train_export_inspect(lorakit, tmp_path, "diffusers", **options)
    assert "ss_optimizer = momentum_sgd" in output["trained"]
    assert "bytes of state" not in output["plan"]


@pytest.mark.slow
def test_a_format_is_one_file_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("plain_format", FORMAT)
    monkeypatch.setitem(registry.FORMATS.own, "plain", "plain_format:SPEC")
    output = check_train_export_inspect(lorakit, tmp_path, "kohya", output__formats="plain", adapter__rank="4")
    assert "plain, F32" in output["trained"] and "kohya, F16" in output["exported"]
    assert json.loads(lorakit("check", tmp_path / "photos", "--json", *CHECK, "--set", "output.formats=plain"))["plan"]


CHECK = ["--set", "data.name=sks toy", "--set", "train.steps=2"]


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("adapter.method", "lora_fa", "adapter.method = 'lora_fa': choose one of lora, rslora, dora"),
        ("optimizer.name", "momentum_sgd", "optimizer.name = 'momentum_sgd': choose one of adamw, adamw8bit"),
        ("output.formats", ("plain",), r"output.formats = \['plain'\]: choose from kohya, diffusers, peft"),
    ],
)
def test_without_the_line_the_error_names_what_there_is(key: str, name: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, {"train.steps": 1, key: name})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that declares two optimizers, one of which cannot be imported."""
    information = tmp_path / "outside-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    entries = "[lorakit.optimizers]\noutside = outside:SPEC\nbroken = no_such_module:SPEC\n"
    (information / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "from lorakit.core.registry import OptimizerSpec\nSPEC = OptimizerSpec('torch.optim:SGD', 4)\n"
    (tmp_path / "outside.py").write_text(spec)
    registry._entry_points.cache_clear()
    yield tmp_path
    registry._entry_points.cache_clear()


def test_a_package_adds_an_optimizer_by_an_entry_point(installed: Path) -> None:
    assert config.load(None, {"train.steps": 1, "optimizer.name": "outside"}).optimizer.name == "outside"
    assert registry.optimizer("outside") == OptimizerSpec("torch.optim:SGD", 4)
    with pytest.raises(LorakitError, match=r"'broken' of the entry points lorakit\.optimizers cannot be loaded"):
        registry.optimizer("broken")
