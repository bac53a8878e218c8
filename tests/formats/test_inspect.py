"""Tests that `lorakit inspect` describes each file and identifies every wrong one."""

import hashlib
import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import random_adapters
import torch
from safetensors.torch import load_file, save_file

from lorakit.cli import main as cli
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.formats import read, save
from lorakit.formats.edit.resize_combine import resize
from lorakit.formats.inspect import inspect

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn."
SHAPES = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (16, 768),
    **{f"{TEXT}{part}_proj": (12, 12) for part in ("q", "k", "v", "out")},
}
METADATA = {"modelspec.trigger_phrase": "sks toy", "ss_output_name": "toy"}


@pytest.fixture(params=["kohya", "diffusers", "peft"])
def exported(request, tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1", alpha=2)
    return request.param, save(weights, tmp_path, "toy", [request.param], "fp16", METADATA)[request.param]


def test_an_adapter_in_each_format_is_described(exported):
    fmt, path = exported
    report = inspect(path)
    assert (report.kind, report.family, report.method, report.dtype) == ("adapter", "sd1", "lora", "F16")
    assert report.trigger == "sks toy" and report.metadata["ss_output_name"] == "toy"
    assert report.components["unet"].modules == 2 and report.components["text_encoder"].modules == 4
    assert report.components["unet"].ranks == [4]
    assert report.components["unet"].alphas == ([] if fmt == "diffusers" else [2.0])
    expected = {"kohya": {"a1111", "forge", "comfyui", "invokeai", "sd-scripts", "sd.cpp", "diffusers"}}
    expected |= {"diffusers": {"diffusers", "peft"}, "peft": {"peft"}}
    assert {key for key, reading in report.readers.items() if reading.complete} == expected[fmt]
    text = report.to_text()
    assert ": an adapter, " in text and "sks toy" in text and "AUTOMATIC1111" in text
    document = json.loads(json.dumps(report.to_json()))
    assert document["components"]["unet"]["modules"] == 2 and document["readers"]["diffusers"]["complete"] is (
        fmt != "peft"
    )


@pytest.mark.parametrize(
    ("kind", "subjects", "trigger", "noun"),
    [
        ("subject", {"sks red toy": 5}, "sks", "red toy"),
        ("subject", {"sks dog": 2, "ohwx cat": 3}, "sks, ohwx", "dog, cat"),
        ("style", {"sks style": 5}, "sks", ""),
        ("subject", {"sks": 5}, "sks", ""),
    ],
)
def test_the_trigger_is_one_word_and_the_rest_is_the_class(kind, subjects, trigger, noun, tmp_path):
    metadata = {
        "modelspec.trigger_phrase": ", ".join(subjects),
        "lorakit.config": json.dumps({"data": {"kind": kind}}),
        "ss_tag_frequency": json.dumps({"photos": subjects}),
    }
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", metadata)["kohya"]
    rows = inspect(path).to_text().splitlines()
    facts = {row[2:17].strip(): row[18:] for row in rows if row.startswith("  ")}
    assert facts["in prompts"].partition("  ")[0] == ", ".join(subjects)
    assert (facts["trigger"], facts.get("class", "")) == (trigger, noun)


def test_a_phrase_of_another_program_is_not_split(tmp_path):
    metadata = {"modelspec.trigger_phrase": "long hair, ada", "ss_tag_frequency": '{"10_ada": {"long hair": 3}}'}
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", metadata)["kohya"]
    text = inspect(path).to_text()
    assert "  trigger         long hair, ada\n" in text and "\n  class " not in text


def test_dora_and_sdxl_are_recognized(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sdxl", method="dora")
    report = inspect(save(weights, tmp_path, "toy", ["kohya"], "bf16", {})["kohya"])
    assert (report.family, report.method, report.dtype) == ("sdxl", "dora", "BF16")
    assert report.family_evidence == "metadata"


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
def test_the_family_follows_from_shapes_without_metadata(tmp_path, width, family):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(2, width), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert (report.family, report.family_evidence) == (family, f"attends to text of width {width}")
    assert read(tmp_path / "a.safetensors").family == family


def test_failures_name_targets_that_do_not_read_everything(tmp_path):
    weights = random_adapters.adapter(SHAPES, "sd1", method="dora")
    report = inspect(save(weights, tmp_path, "toy", ["kohya"], "fp16", {})["kohya"])
    assert report.failures(["a1111", "ComfyUI"]) == []
    failures = report.failures(["a1111", "diffusers"])
    assert len(failures) == 1 and failures[0].startswith("diffusers: unet 0/2, text_encoder 0/4; ignores dora_scale")
    with pytest.raises(LorakitError, match="unknown target 'x'"):
        report.failures(["x"])


def test_the_command_fails_if_a_target_does_not_read_everything(tmp_path, capsys):
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", {})["kohya"]
    command = ["inspect", str(path), "--targets", "a1111,forge,comfyui,invokeai,diffusers"]
    assert cli.main(command) == 0
    tensors = load_file(path)
    good, bad = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_te_encoder_layers_0_self_attn_q_proj"
    save_file({name.replace(good, bad): tensor for name, tensor in tensors.items()}, path)
    capsys.readouterr()
    assert cli.main(command) == 1
    assert f"comfyui: unet 2/2, text_encoder 3/4; no rule for {bad}" in capsys.readouterr().err
    assert cli.main(["inspect", str(path)]) == 0


def rewritten(change):
    """Return a function that changes a file's tensors and keeps its header's metadata."""

    def apply(path):
        metadata = safetensors_header.read(path).metadata
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)

    return apply


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
MUTATIONS = {
    "one key renamed": (
        lambda tensors: tensors.update({f"{TO_K}.lora_dwn.weight": tensors.pop(f"{TO_K}.lora_down.weight")}),
        "its down factor is missing",
    ),
    "one alpha missing": (lambda tensors: tensors.pop(f"{TO_K}.alpha"), "its alpha is missing"),
    "one tensor transposed": (
        lambda tensors: tensors.update({f"{TO_K}.lora_up.weight": tensors[f"{TO_K}.lora_up.weight"].T}),
        "do not fit together",
    ),
    "rank-stabilised, but not scaled": (
        lambda tensors: [tensor.fill_(9) for name, tensor in tensors.items() if name.endswith(".alpha")],
        "it is rank-stabilised and should be scaled by 3, its alpha says 1",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_fails_every_target(tmp_path, capsys, name):
    change, words = MUTATIONS[name]
    metadata = METADATA | {"lorakit.config": json.dumps({"adapter": {"method": "rslora", "rank": 9}})}
    weights = random_adapters.adapter(SHAPES, "sd1", rank=9, alpha=27, method="rslora")
    path = save(weights, tmp_path, "toy", ["kohya"], "fp32", metadata)["kohya"]
    readers = ["a1111", "forge", "comfyui", "invokeai", "sd-scripts", "sd.cpp", "diffusers"]
    command = ["inspect", str(path), "--targets"]
    assert cli.main([*command, ",".join(readers)]) == 0
    rewritten(change)(path)
    for reader in readers:
        capsys.readouterr()
        assert cli.main([*command, reader]) == 1
        assert capsys.readouterr().err.startswith(f"lorakit: {reader}: ")
    assert any(words in reading.line() for reading in inspect(path).readers.values())


def test_a_folded_or_resized_rank_stabilised_scale_passes(tmp_path):
    """After a format without alphas, or as plain LoRA of another rank, the adapter is no longer rank-stabilised."""
    metadata = METADATA | {"lorakit.config": json.dumps({"adapter": {"method": "rslora", "rank": 9}})}
    weights = random_adapters.adapter(SHAPES, "sd1", rank=9, alpha=27, method="rslora")
    assert inspect(save(weights, tmp_path, "one", ["peft"], "fp32", metadata)["peft"]).failures(["peft"]) == []
    path = save(weights, tmp_path, "one", ["diffusers"], "fp32", metadata)["diffusers"]
    assert inspect(path).failures(["diffusers"]) == []
    copy = read(path)
    for number, changed in enumerate([copy, resize(copy, rank=4), resize(weights, rank=9)]):
        path = save(changed, tmp_path, f"again{number}", ["kohya"], "fp32", copy.metadata)["kohya"]
        report = inspect(path)
        assert (report.method, report.failures(["a1111"])) == ("lora", [])


def test_inspect_does_not_load_torch(tmp_path):
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", {})["kohya"]
    code = (
        f"import sys; from lorakit.formats import inspect as i; i.inspect({str(path)!r}); print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"


NOT_ADAPTERS = {
    "a whole model (a checkpoint), not an adapter": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
        "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
    },
    "a UNet alone, not an adapter": {
        "conv_in.weight": (8, 4, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 1024),
    },
    "a VAE, not an adapter": {"decoder.conv_in.weight": (4, 4, 3, 3), "encoder.conv_in.weight": (4, 3, 3, 3)},
    "a text encoder, not an adapter": {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)},
    "a textual-inversion embedding, not an adapter": {"emb_params": (2, 768)},
    "a ControlNet, not an adapter": {"control_model.input_blocks.0.0.weight": (8, 8)},
    "an IP-Adapter (it takes a picture as prompt), not an adapter that lorakit reads": {
        "image_proj.proj.weight": (64, 32),
        "ip_adapter.0.to_q_lora.down.weight": (4, 32),
        "ip_adapter.0.to_q_lora.up.weight": (32, 4),
        "ip_adapter.1.to_k_ip.weight": (32, 64),
    },
    "not an adapter for Stable Diffusion": {"transformer.h.0.attn.weight": (8, 8)},
}
# Text that `read` adds to its refusal.
ADVICE = {
    "a textual-inversion embedding, not an adapter": ", and has no layers to convert or merge: put it as it is into "
    "your program's folder of embeddings, or draw with it by lorakit sample"
}


@pytest.mark.parametrize("description", NOT_ADAPTERS)
def test_other_files_than_adapters_are_identified(tmp_path, description):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in NOT_ADAPTERS[description].items()}, path)
    report = inspect(path)
    assert report.description == description and report.readers == {}
    assert report.family == {"a whole": "sdxl", "a UNet ": "sd2", "a textu": "sd1"}.get(description[:7])
    assert description in report.to_text()
    with pytest.raises(LorakitError) as error:
        read(path)
    assert str(error.value) == f"{path}: this is {description}{ADVICE.get(description, '')}"
    with pytest.raises(LorakitError, match="no program reads it as an adapter"):
        report.failures(["a1111"])


def test_lycoris_methods_are_identified(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    blocks = {f"{stem}.oft_blocks": torch.zeros(4, 2, 2), f"{stem}.alpha": torch.tensor(0.0)}
    save_file(blocks, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert (report.kind, report.method) == ("adapter", "OFT")
    assert read(tmp_path / "x.safetensors").layers["unet.mid_block.attentions.0.proj_in"].method == "OFT"


def test_base_folders_are_described(tiny_sd1, tiny_sdxl):
    assert inspect(tiny_sd1).description == "a base model in diffusers layout (StableDiffusionPipeline)"
    assert (inspect(tiny_sd1).kind, inspect(tiny_sd1).family) == ("base", "sd1")
    assert inspect(tiny_sdxl).family == "sdxl" and inspect(tiny_sdxl).bytes > 100_000


def broken(kind, path, good):
    raw = good.read_bytes()
    if kind == "pickle":
        torch.save({"a": torch.zeros(2)}, path)
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    else:
        content = {
            "empty": b"",
            "half": raw[: len(raw) // 2 + len(raw) // 4],
            "header only": raw[:100],
            "seven bytes": raw[:7],
            "page": b"<!DOCTYPE html><html>not found</html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "text": b"hello " * 100,
            "longer": raw + b"x",
            "bad json": raw[:8] + b"{{" + raw[10:],
        }
        path.write_bytes(content[kind])


BROKEN = {
    "pickle": r"this is a pickle \(.ckpt/.pt\): it can run code when opened; convert it",
    "old pickle": r"this is a pickle",
    "zip": r"this is a zip archive: unpack it and give the file in it",
    "empty": r"the file is empty",
    "half": r"cut off: \d+ of \d+ bytes are there \(\d+ %\): download it again",
    "header only": r"cut off inside its header \(100 bytes\): download it again",
    "seven bytes": r"not a safetensors file",
    "page": r"this is a web page, not a model: the download failed",
    "pointer": r"this is a Git LFS pointer, not the file itself",
    "text": r"not a safetensors file",
    "longer": r"damaged: 1 bytes follow its last tensor",
    "bad json": r"damaged: its safetensors header does not parse",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_or_foreign_file_is_named(tmp_path, kind):
    good = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "good", ["kohya"], "fp16", {})["kohya"]
    path = tmp_path / "x.safetensors"
    broken(kind, path, good)
    for open_it in (inspect, read):
        with pytest.raises(LorakitError, match=BROKEN[kind]):
            open_it(path)


def test_a_part_of_a_peft_folder_needs_its_config(tmp_path):
    folder = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["peft"], "fp16", {})["peft"]
    assert inspect(folder / "unet" / "adapter_model.safetensors").components["unet"].modules == 2
    alone = (folder / "unet" / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    for open_it in (inspect, read):
        with pytest.raises(LorakitError, match=r"adapter_config.json, which has its alpha, is not beside it"):
            open_it(alone)


def test_a_missing_adapter_is_reported(tmp_path):
    for open_it in (inspect, read):
        with pytest.raises(LorakitError, match="no such file"):
            open_it(tmp_path / "x.safetensors")
    with pytest.raises(LorakitError, match=r"neither a PEFT folder nor a base model \(no model_index.json\)"):
        inspect(tmp_path)
    with pytest.raises(LorakitError, match=r"holds 0 .safetensors files and no PEFT adapter: name the file itself"):
        read(tmp_path)


def test_a_folder_with_one_adapter_file_is_read(tmp_path):
    save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "pytorch_lora_weights", ["kohya"], "fp16", {})
    assert inspect(tmp_path).kind == "adapter" and set(read(tmp_path).layers) == set(SHAPES)


def test_a_broken_peft_config_is_refused(tmp_path):
    save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["peft"], "fp16", {})
    (tmp_path / "toy-peft" / "unet" / "adapter_config.json").write_text("{")
    with pytest.raises(LorakitError, match=r"adapter_config.json: cannot be read as a JSON object"):
        inspect(tmp_path / "toy-peft")
    with pytest.raises(LorakitError, match=r"adapter_config.json: cannot be read as a JSON object"):
        read(tmp_path / "toy-peft")


def test_the_first_lines_and_the_hashes_are_right(tmp_path, capsys):
    """A1111 defines AutoV2 as the SHA-256 of the file, and AutoV3 as the SHA-256 of all bytes after the header."""
    tags = {"ss_tag_frequency": json.dumps({"10_a": {"zib hat": 9, "red": 2}, "5_b": {"red": 1, "blue": 30}})}
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", tags)["kohya"]
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    report = inspect(path)
    file_hash, tensors = (hashlib.sha256(part).hexdigest() for part in (raw, data))
    assert report.hashes == {"AutoV2": file_hash[:10], "AutoV3": tensors[:12]}
    first = report.to_text().splitlines()[1:4]
    assert first[0].split()[:4] == ["for", "Stable", "Diffusion", "1"]
    assert (
        first[1].split("  ")[1] == "in prompts"
        and "blue, zib hat, red" in first[1]
        and "<lora:toy:1>" in first[1]
        and "every number is finite" in first[2]
    )


def test_nan_fails_every_target(tmp_path, capsys):
    path = save(random_adapters.adapter(SHAPES, "sd1"), tmp_path, "toy", ["kohya"], "fp16", {})["kohya"]
    rewritten(lambda tensors: tensors[f"{TO_K}.lora_up.weight"].fill_(float("nan")))(path)
    report = inspect(path)
    assert report.damage == f"{TO_K}.lora_up.weight holds NaN or infinity"
    assert report.failures(["a1111"]) == [f"a1111: the file is damaged: {report.damage}"]
    assert "no program can use it" in report.to_text() and "NO: " in report.to_text()


@pytest.mark.parametrize(
    ("names", "description", "model"),
    [
        (["net.blocks.0.self_attn.q_proj.weight"], "a Cosmos or Anima model, not an adapter", "Cosmos or Anima"),
        (["model.diffusion_model.patchify_proj.weight"], "an LTX-Video model, not an adapter", "LTX-Video"),
        (["x_pad_token", "noise_refiner.0.attention.qkv.weight"], "a Z-Image model, not an adapter", "Z-Image"),
        (["noise_refiner.0.attention.qkv.weight"], "a Lumina Image model, not an adapter", "Lumina Image"),
        (["condition_embedder.text_embedder.linear_1.weight"], "a Wan model, not an adapter", "Wan"),
        (["adaln_single.linear.weight", "pos_embed.proj.weight"], "a PixArt model, not an adapter", "PixArt"),
        (["encoder_hid_proj.weight", "conv_in.weight"], "a Kolors model, not an adapter", "Kolors"),
        (["pos_embed.pos_embed", "proj_out.bias"], "Stable Diffusion 3's transformer alone, not an adapter", ""),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet alone, not an adapter", ""),
    ],
)
def test_the_base_of_another_model_is_named(tmp_path, names, description, model):
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert (report.description, report.model, report.family) == (description, model, None)
    assert (f"for             {model} (evidence: names of its tensors)" in report.to_text()) == bool(model)


def test_a_base_that_cannot_be_trained_gets_a_note(tmp_path):
    names = ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight")
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    (note,) = inspect(tmp_path / "x.safetensors").notes
    assert note.startswith("it cannot be trained as it is: x.safetensors is SDXL's refiner")


@pytest.mark.parametrize(
    ("file", "content", "description", "model"),
    [
        ("model_index.json", {"_class_name": "WanPipeline"}, "a base model in diffusers layout (WanPipeline)", "Wan"),
        ("config.json", {"_class_name": "ControlNetModel"}, "a ControlNet, not an adapter", ""),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "a UNet alone, not an adapter", ""),
    ],
)
def test_the_folder_of_another_model_is_named(tmp_path, file, content, description, model):
    (tmp_path / file).write_text(json.dumps(content))
    report = inspect(tmp_path)
    assert (report.description, report.model) == (description, model)
