"""Tests of single files from other programs: unused keys, scaled fp8, EMA and other shapes; check and load agree."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from refusal import refusal
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core import safetensors_header
from lorakit.families import weight_files

FP8 = torch.float8_e4m3fn
U, FIRST = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Family -> folder in diffusers layout, tensors of its single file."""
    room = tmp_path_factory.mktemp("forms")
    bases = {}
    for family in ("sd1", "sd2", "sdxl"):
        pipeline = small_models.small(family, room / family)
        bases[family] = (
            room / family,
            load_file(small_models.write(room / f"{family}.safetensors", family, pipeline)),
        )
    return bases


def write(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "x.safetensors", metadata or None)
    return tmp_path / "x.safetensors"


def describe(file: Path, folder: Path, **options: Any) -> families.BaseInfo:
    return families.describe(ModelConfig(base=str(file), tokenizer=str(folder), **options))


def same_weights(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    parts = [(actual.vae, expected.vae), *zip(actual.modules().values(), expected.modules().values(), strict=True)]
    for one, other in parts:
        other_state = other.state_dict()
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(tensor, other_state[name], rtol=tolerance, atol=tolerance, msg=name)


EXTRAS: dict[str, dict[str, list[str]]] = {
    "sd1": {
        "said": [f"{FIRST}loss.logvar", f"{FIRST}loss.discriminator.main.0.weight", "model_ema.decay", "callbacks.x"],
        "quiet": [
            "cond_stage_model.transformer.text_projection.weight",
            "cond_stage_model.logit_scale",
            "alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "posterior_mean_coef1",
            "sqrt_recipm1_alphas_cumprod",
        ],
    },
    "sdxl": {
        "said": ["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "conditioner.embedders.0.extra.weight"],
        "quiet": [
            "conditioner.embedders.0.transformer.text_projection.weight",
            "conditioner.embedders.1.logit_scale",
            "denoiser.sigmas",
            "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
        ],
    },
    "sd2": {"said": ["cond_stage_model.model.visual.proj"], "quiet": ["cond_stage_model.model.attn_mask", "logvar"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", EXTRAS)
def test_unused_keys_are_ignored_and_reported(family: str, base_files: Any, tmp_path: Path) -> None:
    folder, tensors = base_files[family]
    message, quiet = EXTRAS[family]["said"], EXTRAS[family]["quiet"]
    info = describe(write(tmp_path, tensors | {name: torch.zeros(2, 2) for name in [*message, *quiet]}), folder)
    (note,) = [note for note in info.notes if "ignored" in note]
    assert note.startswith("keys that are not of such a model, ignored: ")
    for name in message:
        assert f"{'.'.join(name.split('.')[:-1][:2])}.*" in note
    assert not [name for name in quiet if name in note]
    same_weights(
        families.load(info, "cpu", torch.float32), families.load(families.describe(folder), "cpu", torch.float32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["scale_weight", "weight_scale", "rows", "blocks", "int8"])
def test_eight_bit_weights_are_multiplied_by_their_scale(layout: str, base_files: Any, tmp_path: Path) -> None:
    folder, tensors = base_files["sd1"]
    scaled: dict[str, torch.Tensor] = {f"{U}scaled_fp8": torch.zeros(2, dtype=FP8)}
    expected, changed = dict(tensors), 0
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if not (name.startswith(U) and "attn" in name and name.endswith(".weight") and tensor.ndim == 2):
            scaled[name] = tensor
            continue
        rows = {"rows": (len(tensor), 1), "blocks": (len(tensor), 2, 1)}.get(layout, ())
        cells = tensor.reshape(len(tensor), rows[1], -1) if rows else tensor
        largest = cells.abs().amax(-1, keepdim=True).reshape(rows) if rows else tensor.abs().max()
        scale = largest / (127 if layout == "int8" else 448)
        spread = scale.reshape(len(tensor), -1, 1) if rows else scale
        codes = cells / spread
        codes_on_disk = codes.round().to(torch.int8) if layout == "int8" else codes.to(FP8)
        scaled[name] = codes_on_disk.reshape(tensor.shape)
        scaled[f"{stem}.{'scale_weight' if layout == 'scale_weight' else 'weight_scale'}"] = scale
        if layout == "scale_weight":
            scaled[f"{stem}.scale_input"] = torch.ones(())
        else:
            scaled[f"{stem}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        expected[name] = (codes_on_disk.float() * spread).reshape(tensor.shape)
        assert (expected[name] - tensor).abs().max() < 0.07 * tensor.abs().max()
        changed += 1
    assert changed == 16 * 8
    info = describe(write(tmp_path, scaled), folder)
    assert not [note for note in info.notes if "ignored" in note]
    (tmp_path / "plain").mkdir()
    plain = describe(write(tmp_path / "plain", expected), folder)
    same_weights(*(families.load(i, "cpu", torch.float32) for i in (info, plain)), tolerance=1e-7)


def test_an_unsupported_quantization_is_refused_before_loading(base_files: Any, tmp_path: Path) -> None:
    _, tensors = base_files["sd1"]
    key = f"{U}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    packed = tensors | {key: torch.zeros(512, 1, dtype=torch.uint8), f"{key}.absmax": torch.ones(16)}
    assert f"x.safetensors has {key} in U8, a quantization not read here" in refusal(write(tmp_path, packed))
    integers = tensors | {key: torch.ones(tensors[key].shape, dtype=torch.int8)}  # a scale would turn them into weights
    (tmp_path / "int8").mkdir()
    assert f"has {key} in I8, a quantization not read here" in refusal(write(tmp_path / "int8", integers))
    stem = f"{U}somewhere.to_q"
    lost = refusal(write(tmp_path, tensors | {f"{stem}.scale_weight": torch.ones(())}))
    assert f"has {stem}.scale_weight, a scale that belongs to no weight" in lost


@pytest.mark.parametrize(
    "key",
    [
        f"{U}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        f"{U}output_blocks.3.0.in_layers.0.bias",
        f"{FIRST}decoder.up.1.block.0.conv2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
    ],
)
def test_a_missing_tensor_is_named_before_anything_is_loaded(key: str, base_files: Any, tmp_path: Path) -> None:
    tensors = dict(base_files["sd1"][1])
    del tensors[key]
    assert "which its other blocks have: get the whole checkpoint" in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP8, 0.07), (torch.float8_e5m2, 0.14)])
def test_sd2_in_fp8_is_recognized_by_its_bias_too(
    dtype: torch.dtype, tolerance: float, base_files: Any, tmp_path: Path
) -> None:
    _, tensors = base_files["sd2"]
    name = f"{U}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, kind in ((0.02, "epsilon"), (0.25, "v_prediction")):
        bias = spread * torch.tensor([1.0, -1.0] * (len(tensors[name]) // 2))
        every = {k: t.to(dtype) if t.is_floating_point() else t for k, t in (tensors | {name: bias}).items()}
        file = write(tmp_path, every)
        assert families.describe(file).prediction_type == kind
        read = safetensors_header.values(safetensors_header.read(file), name)
        assert torch.equal(torch.tensor(read), bias.to(dtype).float())


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_every_value_of_fp8_is_read_without_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"x": codes}, tmp_path / "x.safetensors")
    values = safetensors_header.values(safetensors_header.read(tmp_path / "x.safetensors"), "x")
    assert torch.equal(torch.tensor(values).nan_to_num(9e9), codes.float().nan_to_num(9e9))


def test_a_single_scale_may_have_any_shape() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(FP8)
    for scale in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
        assert torch.equal(weight_files.dequantize(weight, scale), weight.float() * 2)


# diffusers' configurations of published distilled models, with the widths of `small_models.SMALL`.
DISTILLED: dict[str, tuple[str, dict[str, Any]]] = {
    "SSD-1B": (
        "sdxl",
        {
            "transformer_layers_per_block": (1, [2, 2], [4, 4]),
            "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "Vega": (
        "sdxl",
        {
            "transformer_layers_per_block": (1, [1, 1], [2, 2]),
            "reverse_transformer_layers_per_block": ([2, 2, 2], [1, 1, 1], 1),
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "KOALA-700M": (
        "sdxl",
        {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
    ),
    "KOALA-1B": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)}),
    "BK-SDM-small": ("sd1", {"layers_per_block": 1, "mid_block_type": None}),
    "BK-SDM-tiny": (
        "sd1",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "down_block_types": (small_models.CROSS,) * 3,
            "block_out_channels": (32, 64, 64),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_models_are_recognized_by_their_shapes(name: str, base_files: Any, tmp_path: Path) -> None:
    family, changes = DISTILLED[name]
    folder, tensors = base_files[family]
    unet = small_models.unet(family, **small_models.SMALL[family] | changes)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(U)}
    file = write(tmp_path, rest | {f"{U}{key}": tensor.detach() for key, tensor in small_models.unet_tensors(unet)})
    info = describe(file, folder)
    loaded = families.load(info, "cpu", torch.float32)
    expected, actual = unet.state_dict(), loaded.denoiser.state_dict()
    assert expected.keys() == actual.keys() and info.family == family
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    condition = loaded.encode_text(["a photo"])
    if family == "sdxl":
        condition = condition.with_rows(time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]]))
    assert loaded.predict(torch.randn(1, 4, 8, 8), torch.tensor([10]), condition).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "EDM's noise (EDMDPMSolverMultistepSch"),
        ({"_class_name": "EDMEulerScheduler"}, "EDM's noise (EDMEulerScheduler)"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching (FlowMatchEulerDiscreteScheduler)"),
        ({"use_flow_sigmas": True}, "flow matching ("),
        ({"beta_schedule": "linear"}, "another noise schedule (beta_schedule linear)"),
        ({"beta_end": 0.02}, "another noise schedule (beta_end 0.02)"),
        ({"num_train_timesteps": 4000}, "another noise schedule (num_train_timesteps 4000)"),
    ],
)
def test_a_scheduler_with_another_schedule_is_refused(
    changes: dict[str, Any], words: str, base_files: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(base_files["sdxl"][0], tmp_path / "base")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    assert f"was trained with {words}" in refusal(folder)
    path.write_text((base_files["sdxl"][0] / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert families.describe(folder).prediction_type == "epsilon"


def test_a_file_whose_metadata_names_another_prediction_is_refused(base_files: Any, tmp_path: Path) -> None:
    file = write(tmp_path, base_files["sd1"][1], **{"modelspec.prediction_type": "rectified_flow"})
    assert "x.safetensors predicts 'rectified_flow', as its metadata says, which lorakit does not train" in refusal(
        file
    )
