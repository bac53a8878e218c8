"""Tests that lorakit's own header parser gives the result of the safetensors library for every dtype."""

import pytest
import torch
from safetensors.torch import save_file

from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError


def test_the_header_of_a_saved_file_is_read(tmp_path):
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a.alpha": torch.tensor(2.5), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"key": "ü"})
    head = safetensors_header.read(tmp_path / "x.safetensors")
    assert head.shapes() == {"b": (2, 3), "a.alpha": (), "c": (0,)}
    assert head.metadata == {"key": "ü"} and head.tensors["b"].dtype == "BF16"
    assert head.tensors["b"].end - head.tensors["b"].start == 12


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_of_every_dtype(tmp_path, dtype, shape):
    tensors = {"m.alpha": torch.full(shape, 12, dtype=dtype), "m.weight": torch.zeros(3), "n.alpha": torch.zeros(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    head = safetensors_header.read(tmp_path / "x.safetensors")
    assert safetensors_header.scalars(head, ".alpha") == {"m.alpha": 12.0}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "adapter"),
        (["unet.mid_block.x.lora_A.weight"], "adapter"),
        (["unet.mid_block.x.lora.down.weight"], "adapter"),
        (["unet.mid_block.x.processor.to_q_lora.down.weight"], "adapter"),
        (["base_model.model.mid_block.x.lora_A.weight"], "adapter"),
        (["lora_unet_x.hada_w1_a", "lora_unet_y.lora_down.weight"], "adapter"),
        (["lora_unet_x.lokr_w1"], "adapter"),
        (["lora_unet_x.oft_blocks", "lora_unet_y.lora_down.weight"], "lycoris"),
        (["lora_unet_x.w_norm"], "lycoris"),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.x"], "checkpoint"),
        (["down_blocks.0.resnets.0.conv1.weight"], "unet"),
        (["encoder.conv_in.weight"], "vae"),
        (["first_stage_model.decoder.x"], "vae"),
        (["encoder.layers.0.mlp.fc1.weight"], "text encoder"),
        (["emb_params"], "embedding"),
        (["clip_l", "clip_g"], "embedding"),
        (["control_model.input_blocks.0.0.weight"], "controlnet"),
        (["lora_controlnet", "input_blocks.1.1.proj_in.up"], "controlnet"),
        (["something.else"], "unknown"),
    ],
)
def test_files_are_classified_by_tensor_names(names, expected):
    assert safetensors_header.kind(dict.fromkeys(names, (8, 8))) == expected


def test_an_embedding_may_be_named_after_its_token():
    assert safetensors_header.kind({"sks": (2, 768)}) == "embedding"
    assert safetensors_header.kind({"sks": (2, 100)}) == "unknown"


def test_tensors_equal_the_librarys_in_file_order(tmp_path):
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8]
    tensors = {f"t{number}": torch.arange(6).reshape(2, 3).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors |= {"none": torch.zeros(0), "one": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    head = safetensors_header.read(tmp_path / "x.safetensors")
    actual = dict(safetensors_header.tensors(head, tensors))
    assert list(actual) == sorted(tensors, key=lambda name: head.tensors[name].start)
    for name, tensor in tensors.items():
        assert actual[name].dtype is tensor.dtype and torch.equal(actual[name].float(), tensor.float()), name
        assert safetensors_header.dtype_name(tensor) == head.tensors[name].dtype


def test_a_truncated_file_and_an_unknown_dtype_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    head = safetensors_header.read(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LorakitError, match="became shorter while it was read: start again"):
        list(safetensors_header.tensors(head, ["a"]))
    info = safetensors_header.TensorInfo("F3", (1000,), head.tensors["a"].start, head.tensors["a"].end)
    head = safetensors_header.Header(path, {"a": info}, {}, head.data_start)
    with pytest.raises(LorakitError, match="a is in F3, which cannot be read here"):
        list(safetensors_header.tensors(head, ["a"]))


def test_values_of_a_full_tensor(tmp_path):
    tensors = {
        "h": torch.tensor([0.5, -2.0]),
        "b": torch.tensor([1.5, 3.0]).bfloat16(),
        "u": torch.tensor([1, 2]).byte(),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    head = safetensors_header.read(tmp_path / "x.safetensors")
    assert [safetensors_header.values(head, name) for name in ("h", "b", "u")] == [[0.5, -2.0], [1.5, 3.0], []]
