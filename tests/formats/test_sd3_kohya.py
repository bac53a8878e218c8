"""Tests of Stable Diffusion 3 adapters with kohya's names, where q, k and v are one layer. The product of the factors
is compared exactly.

The names are those of sd-scripts' networks/lora_sd3.py (the Linear modules of SingleDiTBlock, and `emb_dims`).
"""

from pathlib import Path
from typing import Any

import pytest
import sd3_files
import torch
from safetensors.torch import load_file, save_file

from lorakit import families, formats
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.formats import inspect, keys, kohya
from lorakit.formats.compatibility import read_report
from lorakit.formats.edit import merge

BLOCK = ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")
TOP = (
    "context_embedder", "t_embedder_mlp_0", "t_embedder_mlp_2", "x_embedder_proj", "y_embedder_mlp_0",
    "y_embedder_mlp_2", "final_layer_adaLN_modulation_1", "final_layer_linear",
)  # fmt: skip
TAGS = {"ss_base_model_version": "sd3_medium", "modelspec.architecture": "stable-diffusion-3/lora"}


def modules(blocks: int, dual: int) -> list[str]:
    """Return the transformer modules that sd-scripts adapts; in the last block, only two text modules."""
    result = []
    for n in range(blocks):
        text = [leaf for leaf in BLOCK if n < blocks - 1 or leaf in ("attn_qkv", "adaLN_modulation_1")]
        picture = [*BLOCK, *(("attn2_qkv", "attn2_proj") if n < dual else ())]
        result += [f"lora_unet_joint_blocks_{n}_context_block_{leaf}" for leaf in text]
        result += [f"lora_unet_joint_blocks_{n}_x_block_{leaf}" for leaf in picture]
    return result


def test_names_of_sd_scripts_are_converted_both_ways() -> None:
    """3.5 medium has 24 blocks, 13 of them with a second attention; 3.5 large has 38 without."""
    for blocks, dual in ((24, 13), (38, 0)):
        stems = [*modules(blocks, dual), *(f"lora_unet_{name}" for name in TOP)]
        names = {stem: keys.from_kohya(stem) for stem in stems}
        assert None not in names.values() and len(set(names.values())) == len(stems)
        assert keys.to_kohya_name([str(name) for name in names.values()], "sd3") == {n: s for s, n in names.items()}
    assert keys.from_kohya("lora_unet_joint_blocks_7_x_block_attn_qkv") == "unet.transformer_blocks.7.attn.to_qkv"
    assert keys.fused_parts("unet.transformer_blocks.7.attn.to_added_qkv", "sd3") == tuple(
        f"unet.transformer_blocks.7.attn.add_{part}_proj" for part in "qkv"
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Any]:
    """A single-file base, its tensors, and its description."""
    room = tmp_path_factory.mktemp("sd3")
    path = sd3_files.write(room / "x.safetensors", sd3_files.small(room / "folder"), "clip_l", "clip_g")
    return path, load_file(path), families.describe(ModelConfig(base=str(path), tokenizer=str(room / "folder")))


def factors(weights: dict[str, torch.Tensor], rank: int = 4, *, split: bool = False) -> dict[str, torch.Tensor]:
    """Return an adapter of all modules as sd-scripts writes it; with `split`, q, k and v have separate factors."""
    draw, result = torch.Generator().manual_seed(3), {}
    stems = [*modules(2, 1), *(f"lora_unet_{name}" for name in TOP)]
    for stem, key in {**{stem: key_of(stem, weights) for stem in stems}, **TEXT}.items():
        shape = weights[key].shape
        count = 3 if split and "qkv" in stem else 1
        down = torch.randn((count * rank, *shape[1:]), generator=draw)
        up = torch.randn((shape[0], count * rank), generator=draw)
        if count > 1:
            up *= torch.block_diag(*[torch.ones(shape[0] // 3, rank)] * 3)
        result[f"{stem}.lora_down.weight"] = down
        result[f"{stem}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        result[f"{stem}.alpha"] = torch.tensor(2.0)
    return result


def key_of(stem: str, weights: dict[str, torch.Tensor]) -> str:
    """Return the base's tensor for a kohya name: exactly one tensor has that name with underscores."""
    (key,) = [k for k in weights if f"lora_unet_{k[22:].removesuffix('.weight').replace('.', '_')}" == stem]
    return key


TEXT = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"{sd3_files.L}text_model.encoder.layers.0.mlp.fc1.weight",
    "lora_te2_text_model_encoder_layers_2_mlp_fc2": f"{sd3_files.G}text_model.encoder.layers.2.mlp.fc2.weight",
}


def products(adapter: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return base tensor -> change that the adapter adds: alpha / rank times the product."""
    result = {}
    for name, down in adapter.items():
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            up = adapter[f"{stem}.lora_up.weight"].double().flatten(1)
            key = TEXT.get(stem) or key_of(stem, weights)
            product = up @ down.double().flatten(1) * float(adapter[f"{stem}.alpha"]) / len(down)
            result[key] = product.reshape(weights[key].shape)
    return result


@pytest.mark.parametrize("split", [False, True])
def test_merging_a_file_of_sd_scripts_adds_its_products(split: bool, base: Any, tmp_path: Path) -> None:
    """The merge is compared tensor by tensor with a single file, including modulations, whose halves are swapped."""
    _, weights, info = base
    adapter = factors(weights, split=split)
    save_file(adapter, tmp_path / "a.safetensors", TAGS)
    read = formats.read(tmp_path / "a.safetensors")
    assert read.family == "sd3"
    merged = load_file(merge.merge(read, info, tmp_path / "m.safetensors"))
    expected = products(adapter, weights)
    assert merged.keys() == weights.keys()
    for key, weight in weights.items():
        target = weight.double() + expected[key] if key in expected else weight.double()
        torch.testing.assert_close(merged[key].double(), target, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_reading_and_writing_gives_the_same_file(split: bool, base: Any, tmp_path: Path) -> None:
    _, weights, _ = base
    adapter = factors(weights, split=split)
    save_file(adapter, tmp_path / "a.safetensors", TAGS)
    repeat = kohya.tensors(formats.read(tmp_path / "a.safetensors"), "fp32")
    assert repeat.keys() == adapter.keys()
    if not split:
        assert all(torch.equal(repeat[name], adapter[name]) for name in adapter)
    before, after = products(adapter, weights), products(repeat, weights)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("absent", ["", "to_q", "to_k"])
def test_three_layers_are_written_as_one(scales: tuple[float, ...], absent: str, base: Any, tmp_path: Path) -> None:
    """lorakit trains separate factors for each of the three layers, and not always all three."""
    _, weights, _ = base
    layers = {
        f"unet.transformer_blocks.0.attn.{name}": LoraLayer(torch.randn(2, 128), torch.randn(128, 2), 2 * scale)
        for name, scale in zip(("to_q", "to_k", "to_v"), scales, strict=True)
        if name != absent
    }
    trained = AdapterWeights("sd3", "lora", layers, {})
    tensors = kohya.tensors(trained, "fp32")
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert {name.removeprefix(f"{stem}.") for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    zeros = torch.zeros(128, 128)
    deltas = [layers[n].delta() if (n := f"unet.transformer_blocks.0.attn.to_{p}") in layers else zeros for p in "qkv"]
    product = products(tensors, weights)[f"{sd3_files.U}joint_blocks.0.x_block.attn.qkv.weight"]
    torch.testing.assert_close(product, torch.cat(deltas).double(), rtol=1e-5, atol=1e-5)
    save_file(tensors, tmp_path / "a.safetensors", TAGS)
    back = formats.read(tmp_path / "a.safetensors").layers
    assert back.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(back[name].delta(), layer.delta(), rtol=1e-5, atol=1e-5)
        assert back[name].rank == 2


@pytest.mark.parametrize(
    "spelling",
    ["lora_transformer_transformer_blocks_0_attn_add_k_proj", "lycoris_transformer_blocks_0_attn_add_k_proj"],
)
def test_other_programs_names_are_read(spelling: str, tmp_path: Path) -> None:
    """OneTrainer's and SimpleTuner's names, as ComfyUI reads them, and ComfyUI's own names with dots."""
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    other = {f"{spelling}.lora_down.weight": down, f"{spelling}.lora_up.weight": up}
    save_file(other, tmp_path / "a.safetensors")
    (layer,) = formats.read(tmp_path / "a.safetensors").layers.items()
    assert layer[0] == "unet.transformer_blocks.0.attn.add_k_proj"
    torch.testing.assert_close(layer[1].delta(), up @ down)
    dotted = "diffusion_model.joint_blocks.0.context_block.attn.qkv"
    tall = torch.cat([torch.zeros(128, 4), up, torch.zeros(128, 4)])
    save_file({f"{dotted}.lora_A.weight": down, f"{dotted}.lora_B.weight": tall}, tmp_path / "b.safetensors")
    (layer,) = formats.read(tmp_path / "b.safetensors").layers.items()
    assert layer[0] == "unet.transformer_blocks.0.attn.add_k_proj"
    torch.testing.assert_close(layer[1].delta(), up @ down)


def test_inspect_reports_the_family_and_the_readers(base: Any, tmp_path: Path) -> None:
    save_file(factors(base[1]), tmp_path / "a.safetensors", TAGS)
    report = inspect.inspect(tmp_path / "a.safetensors")
    assert report.family == "sd3" and report.model in (None, "", "Stable Diffusion 3")
    complete = [name for name, reading in report.readers.items() if reading.complete]
    assert complete == ["forge", "comfyui", "sd-scripts"]
    assert formats.read(tmp_path / "a.safetensors").layers.keys() >= {
        "unet.transformer_blocks.1.norm1_context.linear", "unet.transformer_blocks.0.attn2.to_v", "unet.proj_out",
    }  # fmt: skip


def test_layers_that_cannot_be_split_into_q_k_v_are_refused(tmp_path: Path) -> None:
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    kron = {f"{stem}.lokr_w1": torch.randn(4, 4), f"{stem}.lokr_w2": torch.randn(96, 32)}
    save_file(kron, tmp_path / "a.safetensors", TAGS)
    with pytest.raises(LorakitError, match="is lokr on q, k and v in one layer, which has no counterpart on each"):
        formats.read(tmp_path / "a.safetensors")
    odd = {f"{stem}.lora_down.weight": torch.ones(2, 128), f"{stem}.lora_up.weight": torch.ones(64, 2)}
    save_file(odd, tmp_path / "c.safetensors", TAGS)
    with pytest.raises(LorakitError, match="has 64 rows, which are not 3 equal shares: the file is damaged"):
        formats.read(tmp_path / "c.safetensors")
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    pair = {f"{name}.lora_{side}.weight": torch.randn(2, 2) for name in (stem, t5) for side in ("down", "up")}
    pair[f"{stem}.lora_up.weight"] = torch.randn(6, 2)
    save_file(pair, tmp_path / "b.safetensors", TAGS)
    with pytest.raises(LorakitError, match=r"names of layers that lorakit does not read \(1\), e.g. lora_te3_encoder"):
        formats.read(tmp_path / "b.safetensors")


def test_hadamard_products_and_full_differences_are_split(tmp_path: Path) -> None:
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    sizes = {"a": (384, 3), "b": (3, 128)}
    parts = {f"hada_w{n}_{side}": torch.randn(*sizes[side]) for n in (1, 2) for side in "ab"}
    save_file({f"{stem}.{name}": t for name, t in parts.items()}, tmp_path / "a.safetensors", TAGS)
    delta = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    diff = torch.randn(384, 128)
    save_file({f"{stem}.diff": diff, f"{stem}.diff_b": diff[:, 0].clone()}, tmp_path / "b.safetensors", TAGS)
    for file, expected in (("a", delta), ("b", diff)):
        read = formats.read(tmp_path / f"{file}.safetensors")
        deltas = [read.layers[f"unet.transformer_blocks.0.attn.to_{part}"].delta() for part in "qkv"]
        torch.testing.assert_close(torch.cat(deltas), expected)
    biases = [read.biases[f"unet.transformer_blocks.0.attn.to_{part}"] for part in "qkv"]
    assert torch.equal(torch.cat(biases), diff[:, 0])
    repeat = kohya.tensors(read, "fp32")
    assert torch.equal(repeat[f"{stem}.diff"], diff) and torch.equal(repeat[f"{stem}.diff_b"], diff[:, 0])


JOINT, TEXT_PART = "transformer.transformer_blocks.0.attn", "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("stems", "factors", "expected"),
    [
        ([f"{JOINT}.to_{part}" for part in "qkv"], ("lora_A", "lora_B"), "unet 3/3"),
        ([f"{JOINT}.add_{part}_proj" for part in "qv"], ("lora_A", "lora_B"), "unet 1/2; drops it, as one of q and k"),
        ([f"{JOINT}.to_k", f"{JOINT}.to_out.0"], ("lora_A", "lora_B"), "unet 1/2; drops it, as one of q and k"),
        (["transformer.norm_out.linear"], ("lora_A", "lora_B"), "reads none of it"),
        ([f"{JOINT}.to_q", TEXT_PART], ("lora_A", "lora_B"), "unet 1/1, text_encoder 0/1; no rule for text_encoder"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv"], ("lora_down", "lora_up"), "unet 1/1"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv"], ("lora_down", "lora_up"), "reads none of it"),
        (["lora_transformer_transformer_blocks_0_attn_to_q"], ("lora_down", "lora_up"), "reads none of it"),
        (["lycoris_transformer_blocks_0_attn_to_q"], ("lora_down", "lora_up"), "unet 1/1"),
    ],
)
def test_reading_of_stable_diffusion_cpp_is_reported(stems: list[str], factors: tuple[str, str], expected: str) -> None:
    """The expectation follows src/name_conversion.cpp and the loops over q, k and v in adapter/lora.hpp."""
    down, up = factors
    shapes = {f"{stem}.{down}.weight": (4, 64) for stem in stems} | {f"{stem}.{up}.weight": (64, 4) for stem in stems}
    assert read_report(shapes, "sd3")["sd.cpp"].line().startswith(expected)
