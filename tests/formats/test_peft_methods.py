"""Tests that merged (IA)^3, OFT and BOFT adapters equal the results of PEFT's own layers."""

import json

import pytest
import torch
from peft import BOFTConfig, IA3Config, OFTConfig, get_peft_model
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import save_file

from lorakit.adapters.weights import AdapterWeights
from lorakit.core.errors import LorakitError
from lorakit.formats import inspect, kohya, peft, read
from lorakit.formats.edit.merge_folder import Merger
from lorakit.formats.facts import peft_config

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "mid_block.resnets.0.conv1"


def base() -> torch.nn.Module:
    """Return a module that has only a few layers, with a UNet's names."""
    root = torch.nn.Module()
    leaves = {
        ATTENTION: torch.nn.Linear(24, 32, bias=False),
        OUT: torch.nn.Linear(32, 24),
        CONV: torch.nn.Conv2d(8, 16, 3),
    }
    for path, leaf in leaves.items():
        module = root
        *parents, last = path.split(".")
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        module.add_module(last, leaf)
    return root


TARGETS = ["to_q", "to_out.0", "conv1"]
CONFIGS = {
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "ia3 on inputs": IA3Config(target_modules=TARGETS, feedforward_modules=["to_out.0", "conv1"]),
    "oft": OFTConfig(target_modules=TARGETS, oft_block_size=8),
    "oft by its rank": OFTConfig(target_modules=TARGETS, r=4, oft_block_size=0, use_cayley_neumann=False),
    "oft, few terms": OFTConfig(target_modules=TARGETS, oft_block_size=8, num_cayley_neumann_terms=3),
    "oft, two terms": OFTConfig(target_modules=TARGETS, oft_block_size=8, num_cayley_neumann_terms=2),
    "oft, one block": OFTConfig(target_modules=TARGETS, oft_block_size=8, block_share=True),
    "coft": OFTConfig(target_modules=TARGETS, oft_block_size=8, coft=True, eps=0.05, use_cayley_neumann=False),
    "boft": BOFTConfig(target_modules=TARGETS, boft_block_size=4),
}


def as_merged(weights: AdapterWeights, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    merger = Merger(weights, 1.0)
    return {name: merger("unet", name, tensor) for name, tensor in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_equals_pefts_merge(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)  # this function compiles a CUDA kernel
    torch.manual_seed(0)
    module = base()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = get_peft_model(module, CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_" in name or "ia3_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "unet")
    merged = model.merge_and_unload().state_dict()
    weights = read(tmp_path)
    ours = as_merged(weights, module_of(before))
    assert ours.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(ours[name], tensor, atol=1e-5), name
        assert "bias" in name or not torch.allclose(ours[name], before[name], atol=1e-4)
    report = inspect.inspect(tmp_path)
    assert report.method == {"i": "IA3", "o": "OFTv2", "c": "OFTv2", "b": "PEFT's BOFT"}[kind[0]]
    assert report.readers["peft"].complete and not report.readers["comfyui"].complete
    for writer in (peft,) if kind == "ia3 on inputs" else (kohya, peft):
        with pytest.raises(LorakitError, match="merge it into a base"):
            writer.tensors(weights, "fp16")


def module_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    module = base()
    module.load_state_dict(state)
    return module


def save_folder(folder, tensors, config):
    folder.mkdir(parents=True)
    names = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_ia3_without_a_bias_is_exported_as_lycoris(tmp_path):
    scales = 1 + 0.1 * torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    save_folder(tmp_path / "unet", {f"{ATTENTION}.ia3_l": scales}, {"peft_type": "IA3"})
    tensors = kohya.tensors(read(tmp_path), "fp32")
    stem = f"lora_unet_{ATTENTION.replace('.', '_')}"
    assert torch.allclose(tensors[f"{stem}.weight"], scales.flatten() - 1)
    assert not tensors[f"{stem}.on_input"].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_oft_of_onetrainer_equals_pefts(tmp_path, scaled):
    """The file has kohya's names for the same rotations; `scaled_oft` divides by the square root of their count."""
    numbers = 0.2 * torch.randn(3, 28, generator=torch.Generator().manual_seed(0))
    stem = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {f"{stem}.oft_R.weight": numbers} | ({f"{stem}.oft_R.scaled_oft": torch.tensor(1)} if scaled else {})
    save_file(tensors, tmp_path / "x.safetensors")
    layer = torch.nn.Linear(24, 32, bias=False)
    model = get_peft_model(torch.nn.Sequential(layer), OFTConfig(target_modules=["0"], oft_block_size=8))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        model.get_submodule("base_model.model.0.oft_R.default").weight.copy_(numbers / (28**0.5 if scaled else 1))
    merged = Merger(read(tmp_path / "x.safetensors"), 1.0)("unet", f"{ATTENTION}.weight", before)
    assert torch.allclose(merged, model.merge_and_unload()[0].weight, atol=1e-5)
    readers = inspect.inspect(tmp_path / "x.safetensors").readers
    assert not any(reading.complete for reading in readers.values())


@pytest.mark.parametrize("shared", [False, True])
def test_older_oft_rotates_outputs_and_is_exported_as_lycoris(tmp_path, shared):
    """PEFT 0.8 to 0.13 computes W^T R for each block of outputs, with R = (1 - S)(1 + S)^-1 and S = (B - B^T) / 2. With
    `block_share` all blocks share one rotation."""
    blocks = 0.2 * torch.randn(1 if shared else 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = {"peft_type": "OFT", "r": 4, "block_share": shared}
    save_folder(tmp_path / "unet", {f"{ATTENTION}.oft_r": blocks}, config)
    blocks = blocks.expand(4, -1, -1)
    weight = base().get_submodule(ATTENTION).weight.detach()
    skew, one = (blocks - blocks.mT) / 2, torch.eye(8)
    turn = torch.block_diag(*((one - s) @ (one + s).inverse() for s in skew))
    weights = read(tmp_path)
    assert torch.allclose(Merger(weights, 1.0)("unet", f"{ATTENTION}.weight", weight), (weight.T @ turn).T, atol=1e-5)
    stem = f"lora_unet_{ATTENTION.replace('.', '_')}"
    assert torch.allclose(kohya.tensors(weights, "fp32")[f"{stem}.oft_blocks"], -blocks / 2)
    assert "0.15 or older" in inspect.inspect(tmp_path).readers["peft"].line()


def test_boft_with_several_stages_equals_pefts(tmp_path):
    """With its CUDA extension, PEFT applies several stages. The permutations come from PEFT's own functions."""
    draw = torch.Generator().manual_seed(0)
    turns, scales = 0.2 * torch.randn(3, 8, 4, 4, generator=draw), 1 + 0.1 * torch.randn(24, 1, generator=draw)
    save_folder(tmp_path / "unet", {f"{OUT}.boft_R": turns, f"{OUT}.boft_s": scales}, {"peft_type": "BOFT"})
    theirs = boft_layer.BOFTLayer(torch.nn.Linear(32, 24))
    matrix = torch.eye(32)
    for stage in range(3):
        order = theirs.perm2mat(theirs.block_butterfly_perm(32, int(8 / 2**stage), 2, 2))
        matrix = order @ torch.block_diag(*theirs.cayley_batch(turns[stage])) @ order.T @ matrix
    weight = base().get_submodule(OUT).weight.detach()
    merged = Merger(read(tmp_path), 1.0)("unet", f"{OUT}.weight", weight)
    assert torch.allclose(merged, (matrix @ weight.T).T * scales, atol=1e-5)


def test_unsupported_methods_are_refused_with_advice(tmp_path):
    save_folder(tmp_path / "unet", {f"{ATTENTION}.hra_u": torch.ones(24, 8)}, {"peft_type": "HRA", "r": 8})
    for command in read, inspect.inspect:
        with pytest.raises(LorakitError, match=r"PEFT's HRA, which lorakit does not read: merge it .* lorakit extract"):
            command(tmp_path)


@pytest.mark.parametrize("terms", ["many", 10**6])
def test_the_number_of_cayley_neumann_terms_is_limited(tmp_path, terms):
    config = {"peft_type": "OFT", "oft_block_size": 8, "num_cayley_neumann_terms": terms}
    with pytest.raises(LorakitError, match=r"num_cayley_neumann_terms in its config is .*no usable number"):
        peft_config.require_numbers(tmp_path, config)
