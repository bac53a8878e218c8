"""Tests that LyCORIS' files, also with Tucker factors, are read to the delta W of LyCORIS' own package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file

from lorakit.core.errors import LorakitError
from lorakit.formats import read
from lorakit.formats.edit.resize_combine import combine, resize
from lorakit.formats.inspect import inspect

STEM, NAME = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
LINEAR, TO_Q = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
)
CLASSES = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}


def theirs(method: str, conv: bool, **options: object) -> torch.nn.Module:
    """Return one of LyCORIS' modules without zeros in it."""
    layer = torch.nn.Conv2d(24, 32, 3, padding=1) if conv else torch.nn.Linear(24, 32)
    module = CLASSES[method](STEM if conv else LINEAR, layer, lora_dim=2, alpha=3.0, **options)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return module


def save_module(folder: Path, module: torch.nn.Module) -> Path:
    path = folder / "theirs.safetensors"
    save_file({f"{module.lora_name}.{n}": t.detach().contiguous() for n, t in module.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("method", CLASSES)
def test_delta_equals_the_packages(tmp_path: Path, method: str, tucker: bool, conv: bool) -> None:
    module = theirs(method, conv, use_tucker=tucker)
    layer = read(save_module(tmp_path, module)).layers[NAME if conv else TO_Q]
    # The change that the module's forward pass adds to the layer's weight.
    weight = torch.zeros_like(module.org_module[0].weight)
    if method == "locon":
        delta = (module.get_merged_weight()[0] - module.org_module[0].weight).detach()
    else:
        delta = module.get_weight(weight.shape).detach()
    assert layer.method == ("lora" if method == "locon" else method)
    np.testing.assert_allclose(layer.delta().reshape(weight.shape).numpy(), delta.numpy(), atol=1e-6)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("method", CLASSES)
def test_a_scalar_multiplies_the_change(tmp_path: Path, method: str, conv: bool) -> None:
    module = theirs(method, conv, use_scalar=True)
    scalar = float(module.scalar.detach())
    assert abs(scalar) > 0.01
    # For LoCon, the package's difference already includes the scalar.
    shape = module.org_module[0].weight.shape
    delta = module.get_diff_weight()[0] if method == "locon" else scalar * module.get_weight(shape)
    raw = {name: tensor for name, tensor in module.named_parameters() if not name.startswith("org_")}
    raw |= {"alpha": torch.tensor(3.0)}
    file = tmp_path / "theirs.safetensors"
    save_file({f"{module.lora_name}.{name}": tensor.detach().contiguous() for name, tensor in raw.items()}, file)
    layer = read(file).layers[NAME if conv else TO_Q]
    np.testing.assert_allclose(layer.delta().reshape(delta.shape).numpy(), delta.detach().numpy(), atol=1e-6)
    report = inspect(file)
    np.testing.assert_allclose(report.strength.modules[module.lora_name], float(layer.delta().norm()), rtol=1e-4)
    assert "modules with a scalar, which other programs ignore: 1" in report.to_text()
    raw["scalar"] = torch.ones(2)
    save_file({f"{module.lora_name}.{name}": tensor.detach().contiguous() for name, tensor in raw.items()}, file)
    with pytest.raises(LorakitError, match=r"the scalar of .* is not one number beside factors"):
        read(file)
    assert inspect(file).strength.modules


@pytest.mark.parametrize("options", [{"factor": 4}, {"decompose_both": True}, {"full_matrix": True}])
def test_lokr_with_other_factors_is_read(tmp_path: Path, options: dict[str, object]) -> None:
    module = theirs("lokr", True, **options)
    layer = read(save_module(tmp_path, module)).layers[NAME]
    expected = module.get_weight((32, 24, 3, 3)).detach()
    np.testing.assert_allclose(layer.delta().reshape(expected.shape).numpy(), expected.numpy(), atol=1e-6)


def test_lokr_with_tucker_is_resized_and_combined(tmp_path: Path) -> None:
    weights = read(save_module(tmp_path, theirs("lokr", True, use_tucker=True)))
    for plain in resize(weights, energy=1), combine([(weights, 1.0)]):
        delta = plain.layers[NAME].delta().flatten(1)
        np.testing.assert_allclose(delta.numpy(), weights.layers[NAME].delta().numpy(), atol=1e-6)


def test_a_module_of_rank_0_has_no_effect(tmp_path: Path) -> None:
    tensors = {f"{STEM}.lora_down.weight": torch.ones(0, 24, 3, 3), f"{STEM}.lora_up.weight": torch.ones(32, 0, 1, 1)}
    tensors |= {f"{LINEAR}.lora_down.weight": torch.ones(2, 24), f"{LINEAR}.lora_up.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert list(read(tmp_path / "x.safetensors").layers) == [TO_Q]


BROKEN = {
    "a factor is missing": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 24), "hada_w2_a": (32, 2)},
        "has no hada_w2_b factor",
    ),
    "a side is missing": ({"lokr_w1": (4, 4)}, "has no lokr_w2 factor"),
    "transposed": (
        {"hada_w1_a": (2, 32), "hada_w1_b": (2, 24), "hada_w2_a": (32, 2), "hada_w2_b": (2, 24)},
        "do not fit together",
    ),
    "two sizes": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 24), "hada_w2_a": (32, 2), "hada_w2_b": (2, 12)},
        "the two products of .* do not fit together",
    ),
    "a kernel that does not fit": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 6), "lokr_t2": (3, 3, 3, 3)},
        "do not fit together",
    ),
    "with a magnitude": ({"lokr_w1": (4, 4), "lokr_w2": (8, 6), "dora_scale": (1, 5)}, "magnitude of .* does not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_lycoris_file_is_refused(tmp_path: Path, name: str) -> None:
    shapes, words = BROKEN[name]
    save_file({f"{LINEAR}.{part}": torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LorakitError, match=words):
        read(tmp_path / "x.safetensors")
