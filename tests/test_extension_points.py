"""One module and one line of the registry add a method, an optimizer or a format.

They then work in `check`, `train`, `export` and `inspect`. Without the line, the error lists the choices.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import short_run
import torch

from lorakit import adapters, config, families, formats
from lorakit.cli.main import main
from lorakit.config import ConfigError
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.registry import MethodSpec, OptimizerSpec
from lorakit.formats import compatibility, verify
from lorakit.formats.edit.merge_folder import merge_folder
from lorakit.training import selfcheck

pytestmark = pytest.mark.usefixtures("short_validation", "copied_modules")

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

OWN_LAYERS = '''
"""Column scales: W' = W * (1 + s), with one number s for each input. Its layers have a tensor of their own."""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from lorakit.adapters.method import NAME, Method, parameter
from lorakit.config import AdapterConfig


@dataclass(frozen=True, kw_only=True)
class Section(AdapterConfig):
    """No options but those of every method."""

    method: str = "column_scale"


class ScaledLinear(Linear):
    def update_layer(self, adapter_name, *args, **kwargs):
        super().update_layer(adapter_name, *args, **kwargs)
        self.scales = nn.ParameterDict({NAME: torch.zeros(self.in_features)})

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters:
            return self.base_layer(x)
        return self.base_layer((x * (1 + self.scaling[NAME] * self.scales[NAME])).to(x.dtype))


def peft(config, modules):
    peft_config = LoraConfig(r=1, target_modules=modules, init_lora_weights=False)
    peft_config._register_custom_module({nn.Linear: ScaledLinear})
    return peft_config


def begin(layer, draw):
    layer.scales[NAME] = parameter(torch.zeros(layer.in_features), layer)


def fill(layer, weights):
    layer.scales[NAME] = parameter(weights.factors()["column_scale"], layer)


def trained_weights(section, shape):
    return shape[1]


def change(weight, layer, strength):
    return strength * weight * layer.parts["column_scale"]


METHOD = Method(peft, begin, lambda layer: {"column_scale": layer.scales[NAME]}, fill)
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
    """Return a function that writes an importable module."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return lambda name, text: (tmp_path / "modules" / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def lorakit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command in this process, asserts its success and returns its output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, out + err
        return out

    return run


def check_train_export_inspect(
    lorakit: Callable[..., str], base: Path, place: Path, to: str, **options: str
) -> dict[str, str]:
    """Run the four commands with two steps on a tiny base.

    Return the plan, and the output of `inspect` for the trained and the exported adapter.
    """
    (place / "photos").mkdir()
    photos, run = short_run.noise(place / "photos", 2), place / "run"
    settings = {"data.name": "sks toy", "data.resolution": "64", "train.steps": "2", "sample.steps": "1", **options}
    settings |= {"memory.device": "cpu", "sample.prompts": "a toy", "output.dtype": "fp32", "sample.every": "2"}
    settings |= {"sample.at_start": "false", "sample.at_end": "false", "train.validate_at_end": "false"}
    settings |= {"train.validate_every": "2", "model.base": str(base)}
    settings |= {"adapter.target_modules": "attention", "adapter.train_text_encoder": "false", "train.batch_size": "1"}
    common = [word for name, value in settings.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    plan = lorakit("check", photos, *common)
    lorakit("train", photos, "--output", run, *common)
    adapter = min(run.glob("*.safetensors"), key=lambda path: len(path.name))  # other files have longer names
    trained = lorakit("inspect", adapter)
    (exported,) = lorakit("export", adapter, "--to", to, "--output", place / "exported").split()
    return {"plan": plan, "trained": trained, "exported": lorakit("inspect", exported)}


@pytest.mark.slow
def test_a_method_is_one_file_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("lora_fa", METHOD)
    spec = MethodSpec("lora_fa:METHOD", "lora_fa:trained_weights", section="lora_fa:Section", begins_from_base=True)
    monkeypatch.setitem(registry.METHODS.own, "lora_fa", spec)
    output = check_train_export_inspect(
        lorakit, tiny_sd1, tmp_path, "diffusers", adapter__method="lora_fa", adapter__rank="4"
    )
    assert "adapter: lora_fa, unet" in output["plan"]
    assert "lora_fa" in output["trained"] and "lora_fa" in output["exported"]
    with pytest.raises(ConfigError, match=r"train\.init_from makes no sense with adapter\.method = 'lora_fa'"):
        config.load(None, {"train.steps": 1, "adapter.method": "lora_fa", "train.init_from": "a"})


OWN_SPEC = MethodSpec(
    "column_scale:METHOD",
    "column_scale:trained_weights",
    section="column_scale:Section",
    layers="column_scale",
    factors=("column_scale",),
    change="column_scale:change",
)


def write_read_apply(base: Path, place: Path) -> None:
    """Write an adapter with random weights, verify, read, apply and merge it, and compare the predictions."""
    family = families.load(families.describe(base), "cpu", torch.float32)
    section = config.ADAPTER_SECTIONS["column_scale"](target_modules="attention", train_text_encoder=False)
    adapter = adapters.attach(family, section)
    draw = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    probed, weights = selfcheck.probe(family, "a toy", (64, 64)).prediction, adapter.weights()
    adapter.detach()
    untouched = selfcheck.probe(family, "a toy", (64, 64)).prediction
    formats.save(weights, place, "scaled", ("kohya",), "fp32", {})
    file = place / "scaled.safetensors"
    assert verify.verify_file(file, weights, weights.layers) == []
    adapters.apply(family, formats.read(file), 1.0).set_strength(1)
    assert not torch.allclose(probed, untouched, atol=1e-4)
    torch.testing.assert_close(selfcheck.probe(family, "a toy", (64, 64)).prediction, probed)
    merged = merge_folder(formats.read(file), base, place / "merged")
    family = families.load(families.describe(merged), "cpu", torch.float32)
    torch.testing.assert_close(selfcheck.probe(family, "a toy", (64, 64)).prediction, probed, rtol=1e-3, atol=1e-4)
    adapters.attach(family, section).load(formats.read(file))


@pytest.fixture
def column_scale(module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[MethodSpec], None]:
    """Return a function that registers the method `column_scale` with a spec."""
    module("column_scale", OWN_LAYERS)
    monkeypatch.delitem(sys.modules, "column_scale", raising=False)
    return lambda spec: monkeypatch.setitem(registry.METHODS.own, "column_scale", spec)


def test_a_method_can_have_its_own_layers(
    column_scale: Callable[[MethodSpec], None], lorakit: Callable[..., str], tiny_sd1: Path, tmp_path: Path
) -> None:
    column_scale(OWN_SPEC)
    write_read_apply(tiny_sd1, tmp_path)
    text = lorakit("inspect", tmp_path / "scaled.safetensors")
    assert "column_scale" in text and text.count("  NO  ") == len(compatibility.CONSUMERS)
    assert registry.FORMATS["kohya"].check("column_scale", "sd1") is None
    refusal = "the diffusers format cannot carry column_scale: export it as kohya, or merge it into a base"
    assert registry.FORMATS["diffusers"].check("column_scale", "sd1") == refusal
    warning = compatibility.warning("column_scale", "kohya")
    assert warning is not None and warning.startswith("column_scale in the kohya format is honoured by no program; ")


@pytest.mark.parametrize(
    "wrong",
    [{"factors": ()}, {"change": ""}, {"layers": "lora"}, {"trained_weights": "lorakit.adapters.targets:lora_weights"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_method_with_a_wrong_spec_fails(
    column_scale: Callable[[MethodSpec], None], tiny_sd1: Path, tmp_path: Path, wrong: dict[str, object]
) -> None:
    column_scale(replace(OWN_SPEC, **wrong))  # type: ignore[arg-type]
    with pytest.raises((LorakitError, ValueError, KeyError, AssertionError)):
        write_read_apply(tiny_sd1, tmp_path)


@pytest.mark.slow
def test_a_method_with_its_own_layers_is_one_file_and_one_line(
    column_scale: Callable[[MethodSpec], None], lorakit: Callable[..., str], tiny_sd1: Path, tmp_path: Path
) -> None:
    column_scale(OWN_SPEC)
    output = check_train_export_inspect(lorakit, tiny_sd1, tmp_path, "kohya", adapter__method="column_scale")
    assert "adapter: column_scale, unet" in output["plan"]
    assert "column_scale" in output["trained"] and "column_scale" in output["exported"]


@pytest.mark.slow
def test_an_optimizer_is_one_function_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("momentum", OPTIMIZER)
    spec = OptimizerSpec("momentum:momentum_sgd", state_bytes=4, elementwise=True)
    monkeypatch.setitem(registry.OPTIMIZERS.own, "momentum_sgd", spec)
    options = {"optimizer__name": "momentum_sgd", "optimizer__args__nesterov": "true", "adapter__rank": "4"}
    options |= {"optimizer__learning_rate": "0.1", "optimizer__warmup_steps": "0"}  # two steps of SGD
    output = check_train_export_inspect(lorakit, tiny_sd1, tmp_path, "diffusers", **options)
    assert "ss_optimizer = momentum_sgd" in output["trained"]
    assert "bytes of state" not in output["plan"]


@pytest.mark.slow
def test_a_format_is_one_file_and_one_line(
    module: Callable[[str, str], None],
    lorakit: Callable[..., str],
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module("plain_format", FORMAT)
    monkeypatch.setitem(registry.FORMATS.own, "plain", "plain_format:SPEC")
    output = check_train_export_inspect(
        lorakit, tiny_sd1, tmp_path, "kohya", output__formats="plain", adapter__rank="4"
    )
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
def test_without_the_line_the_error_lists_the_choices(key: str, name: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, {"train.steps": 1, key: name})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a package with entry points for two optimizers, one of which cannot be imported."""
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
