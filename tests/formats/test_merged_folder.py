"""Tests that a merge writes the merged weights and all other needed files, but no unmerged copy of the weights."""

import json
import shutil
from pathlib import Path

import pytest
import random_adapters
import torch
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.core.errors import LorakitError
from lorakit.formats.edit import merge, merge_folder

UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"
# Clones of published repositories have these files.
TWINS = [
    *("v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt", "model.onnx", "v1-inference.yaml", "README.md"),
    *("unet/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack", "unet/model.onnx", "unet/weights.pb"),
    *("unet/openvino_model.xml", "unet/openvino_model.bin", "unet/model.onnx_data", "unet/model.safetensors"),
    *("unet/diffusion_pytorch_model.bin.index.json", "unet/.cache", "text_encoder/pytorch_model.bin"),
    *("text_encoder/flax_model.msgpack", "text_encoder/tf_model.h5", "text_encoder/openvino_model.xml"),
    *("vae_decoder/model.onnx", "vae_decoder/openvino_model.bin", "unet_onnx/model.onnx", "lora/style.safetensors"),
    *("vae/diffusion_pytorch_model.bin", "safety_checker/model.onnx", ".git/config"),
]
NEEDED = ["LICENSE.md", "safety_checker/config.json", "feature_extractor/preprocessor_config.json"]


@pytest.fixture
def clone(tiny_sd1: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_sd1, tmp_path / "clone")
    for name in ("outside", "far"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    for name in (*TWINS, *NEEDED, "safety_checker/pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for stem in (UNET, TEXT):
        half = {name: tensor.half() for name, tensor in load_file(folder / f"{stem}.safetensors").items()}
        save_file(half, folder / f"{stem}.fp16.safetensors", {"format": "pt"})
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "../outside": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_merged_clone_has_no_unmerged_copy_of_its_weights(clone: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in families.describe(clone).layers.items() if "attn1.to_q" in name}
    weights = random_adapters.adapter(shapes, "sd1", rank=2, alpha=2)
    target = merge.merge(weights, families.describe(clone), tmp_path / "far" / "merged")
    assert not (tmp_path / "far" / "outside").exists()
    expected = {*names(tiny_sd1), *NEEDED, "safety_checker/pytorch_model.bin"}
    assert names(target) == expected | {f"{stem}.fp16.safetensors" for stem in (UNET, TEXT)}
    index = json.loads((target / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["image_encoder"] == index["../outside"] == [None, None]
    for infix in ("", ".fp16"):
        before, after = (load_file(folder / f"{UNET}{infix}.safetensors") for folder in (clone, target))
        assert {name for name in before if not torch.equal(before[name], after[name])} == {
            f"{name.removeprefix('unet.')}.weight" for name in shapes
        }


def test_a_safety_checker_in_safetensors_is_copied_without_its_pickle(clone: Path, tmp_path: Path) -> None:
    (clone / "safety_checker" / "model.safetensors").touch()
    assert {path.name for path in merge_folder.part_files(clone / "safety_checker")} == {
        "config.json",
        "model.safetensors",
    }


def test_shards_under_any_name_are_merged(clone: Path, tmp_path: Path) -> None:
    tensors = load_file(clone / f"{UNET}.safetensors")
    keys = sorted(tensors)
    parts = {"part-a.safetensors": keys[::2], "part-b.safetensors": keys[1::2]}
    for name, inside in parts.items():
        save_file({key: tensors[key] for key in inside}, clone / "unet" / name)
    index = {"weight_map": {key: name for name, inside in parts.items() for key in inside}}
    (clone / f"{UNET}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for infix in ("", ".fp16"):
        (clone / f"{UNET}{infix}.safetensors").unlink()
    layer = next(name for name in families.describe(clone).layers if "attn1.to_q" in name)
    weights = random_adapters.adapter({layer: families.describe(clone).layers[layer]}, "sd1", rank=2, alpha=2)
    target = merge.merge(weights, families.describe(clone), tmp_path / "merged")
    assert {path.name for path in (target / "unet").glob("*.safetensors")} == set(parts)
    after = {key: tensor for name in parts for key, tensor in load_file(target / "unet" / name).items()}
    assert [key for key in keys if not torch.equal(after[key], tensors[key])] == [
        f"{layer.removeprefix('unet.')}.weight"
    ]


def test_a_failed_merge_leaves_no_folder(clone: Path, tmp_path: Path) -> None:
    weights = random_adapters.adapter({"unet.nowhere": (8, 8)}, "sd1")
    with pytest.raises(LorakitError, match=r"the base has no layer unet\.nowhere"):
        merge.merge(weights, families.describe(clone), tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"clone", "far", "outside"}
