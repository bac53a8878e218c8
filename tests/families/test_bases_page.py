"""docs/bases.md says what comes of each base: held against what a run over replicas gives."""

import json
from pathlib import Path

import pytest
import safetensors_by_hand
import small_models
import tiny
import tiny_sd3

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.core.registry import version_of

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
U = "model.diffusion_model."
# Title -> tensors of a file, under the names of each program.
FILES = {
    "FLUX.1": [f"{U}double_blocks.0.img_attn.qkv.weight"],
    "FLUX.1, diffusers' names": [
        "transformer_blocks.0.attn.to_q.weight",
        "single_transformer_blocks.0.attn.to_q.weight",
    ],
    "FLUX.2": ["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
    "Chroma": [f"{U}double_blocks.0.img_attn.qkv.weight", f"{U}distilled_guidance_layer.in_proj.weight"],
    "Kolors' UNet": ["encoder_hid_proj.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "SDXL's refiner": [f"{U}label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
    "PixArt": ["blocks.0.cross_attn.kv_linear.weight", "x_embedder.proj.weight"],
    "Sana": ["blocks.0.mlp.inverted_conv.conv.weight"],
    "HunyuanDiT": ["blocks.0.default_modulation.1.weight", "blocks.0.attn1.Wqkv.weight"],
    "AuraFlow": ["model.double_layers.0.attn.w1q.weight"],
    "Stable Cascade": [f"{U}clip_txt_pooled_mapper.weight"],
    "Stable Video Diffusion": [f"{U}input_blocks.1.0.time_stack.in_layers.0.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight"],
    "ControlNet, diffusers' names": [
        "controlnet_cond_embedding.conv_in.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    ],
    "IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "ESRGAN upscaler": ["model.1.sub.0.RDB1.conv1.0.weight"],
    "LoRA": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    "embedding": ["emb_params"],
    "VAE": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "CLIP": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "T5": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "CLIP's image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "Wan": ["blocks.0.self_attn.q.weight"],
}
PIPELINES = {
    **{title: {"_class_name": f"{title}Pipeline"} for title in ("Flux", "Flux2", "Kolors", "Sana", "AuraFlow")},
    "Kolors' own repository": {"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["kolors", "ChatGLMModel"]},
    "SDXL's refiner": {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
    "PixArt": {"_class_name": "PixArtSigmaPipeline"},
    "HunyuanDiT": {"_class_name": "HunyuanDiTPipeline"},
    "Stable Cascade": {"_class_name": "StableCascadeDecoderPipeline"},
    "SVD": {"_class_name": "StableVideoDiffusionPipeline"},
    "AnimateDiff": {"_class_name": "AnimateDiffPipeline"},
    "SD upscaler": {"_class_name": "StableDiffusionUpscalePipeline"},
    "AltDiffusion": {"_class_name": "StableDiffusionPipeline", "text_encoder": ["alt", "RobertaSeriesModel"]},
}
PARTS = {
    "ControlNet": {"_class_name": "ControlNetModel"},
    "motion module": {"_class_name": "MotionAdapter"},
    "VAE": {"_class_name": "AutoencoderKL"},
    "UNet": {"_class_name": "UNet2DConditionModel"},
    "FLUX transformer": {"_class_name": "FluxTransformer2DModel"},
    "CLIP": {"architectures": ["CLIPTextModel"]},
    "T5": {"architectures": ["T5EncoderModel"]},
}


def outcome(path: Path, tokenizer: Path | None = None) -> str:
    try:
        info = families.describe(ModelConfig(base=str(path), tokenizer=str(tokenizer or "")))
    except LorakitError as error:
        return str(error).replace(f"base {path} ", "").replace(f"base {path.name} ", "").replace(f"{path.name} ", "")
    return f"trained, as {version_of(info.family).title} that predicts {info.prediction_type}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    room, lines = tmp_path_factory.mktemp("bases"), []
    for family, title in {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}.items():
        pipeline = small_models.small(family, room / family)
        file = small_models.write(room / f"{family}.safetensors", family, pipeline)
        lines.append(f"| {title} | file | {outcome(file, room / family)} |")
    lines.append(f"| SDXL | folder | {outcome(room / 'sdxl')} |")
    lines.append(f"| Stable Diffusion 1 | folder | {outcome(tiny.save_sd1(room / 'tiny'))} |")
    lines.append(f"| Stable Diffusion 3 | folder | {outcome(tiny_sd3.save_sd3(room / 'sd3'))} |")
    for title, names in FILES.items():
        file = safetensors_by_hand.write(room / "x.safetensors", dict.fromkeys(names, (1, 1)))
        lines.append(f"| {title} | file | {outcome(file)} |")
    for title, name in {"any, pickled": "x.ckpt", "any, GGUF": "x.gguf", "a picture": "x.png"}.items():
        (room / name).touch()
        lines.append(f"| {title} | file | {outcome(room / name)} |")
    for file, table in (("model_index.json", PIPELINES), ("config.json", PARTS)):
        for number, (title, content) in enumerate(table.items()):
            folder = room / f"{file}-{number}"
            folder.mkdir()
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
            lines.append(f"| {title} | folder or hub id | {outcome(folder)} |")
    return lines


@pytest.mark.slow
def test_the_page_says_what_a_run_gives(rows: list[str]) -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert lines == ["| --- | --- | --- |", *rows]
