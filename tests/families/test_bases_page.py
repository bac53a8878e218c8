"""Tests that docs/bases.md states what each command does with small replicas of the bases."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors_by_hand
import sd3_files
import small_models
import tiny
import tiny_sd3
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorakit import config, families
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.cli import main as cli
from lorakit.core.registry import version_of
from lorakit.families.facts.distilled import complete
from lorakit.formats.saving import save_adapter
from lorakit.runs.preflight import preflight

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
U = "model.diffusion_model."
# Title -> tensors of a file, with the names that a program gives them.
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


FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
# Names of SDXL files that indicate distillation.
DISTILLED = ("sd_xl_turbo_1.0_fp16", "sdxl_lightning_1step_x0", "sdxl_lightning_4step", "Hyper-SDXL-8steps", "dreamLCM")
LIKE_CHECK = "as check"


class Page:
    """Collects the table's rows by running each command on each base."""

    def __init__(self, room: Path):
        self.room, self.rows, self.samples = room, list[str](), set[str]()
        (room / "photos").mkdir()
        for number in range(2):
            Image.effect_noise((64, 64), 40 + 20 * number).convert("RGB").save(room / "photos" / f"{number}.png")
        self.any_adapter = self.adapter("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", (8, 4))

    def adapter(self, family: str, layer: str, shape: tuple[int, ...]) -> Path:
        up = torch.ones(shape[0], 2, *(1 for _ in shape[2:]))
        weights = AdapterWeights(family, "lora", {layer: LoraLayer(torch.ones(2, *shape[1:]), up, 2.0)})
        return save_adapter(weights, self.room / f"adapter-{family}")["kohya"]

    def add(self, title: str, form: str, base: Path, **options: Path | str | bool) -> None:
        """Run each command on a base and add its row; `options` belong to the section model."""
        model = {f"model.{name}": value if isinstance(value, bool) else str(value) for name, value in options.items()}
        photos = {"data.folder": str(self.room / "photos"), "data.name": "sks toy", "memory.device": "cpu"}
        settings = config.load(None, {"model.base": str(base), "train.steps": 1, **photos, **model})
        ready = preflight(settings, fetch=True)
        arguments = ["--base", str(base)]
        for key, value in model.items():
            arguments += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
        if ready.info is None:
            columns = self.refusal(base, arguments)
        else:
            columns = self.works(ready.or_raise().info, f"{title}, {form}", arguments)
        self.rows.append(f"| {title} | {form} | {' | '.join((*columns, self.inspection(base)))} |")

    def refusal(self, base: Path, arguments: list[str]) -> list[str]:
        photos, adapter = [str(self.room / "photos"), "--subject", "sks toy"], str(self.any_adapter)
        commands = {
            "check": photos,
            "train": photos,
            "sample": [adapter, "--prompt", "x"],
            "merge": [adapter, "--output", str(self.room / "merged")],
        }
        words = [self.words(base, command, *parts, *arguments) for command, parts in commands.items()]
        assert words[0] == words[1]
        return [words[0], *(LIKE_CHECK if other == words[0] else other for other in words[2:])]

    def words(self, base: Path, *arguments: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([*arguments]) == 1, arguments
        line = errors.getvalue().strip().splitlines()[-1].removeprefix("lorakit: ")
        names = "|".join(map(re.escape, (str(base), base.name, base.stem)))
        return re.sub(rf"^(base )?({names}):? ", "", line).replace(f"{self.room}/", "")

    def works(self, info: families.BaseInfo, row: str, arguments: list[str]) -> list[str]:
        kind = f"; {info.distilled.kind}, {info.distilled.evidence}" if info.distilled else ""
        training = f"trained, as {version_of(info.family).title} that predicts {info.prediction_type}{kind}"
        needs = complete(config.SampleConfig(), info)
        sample = f"{needs.steps} steps at guidance {needs.guidance:g}"
        sample += f" ({info.distilled.scheduler})" if info.distilled else ""
        layer = next(
            name for name in info.layers if name.startswith("unet.") and name.endswith(("attn1.to_q", "attn.to_q"))
        )
        adapter = str(self.adapter(info.family, layer, info.layers[layer]))
        if info.family + row[-6:] not in self.samples:  # one file and one folder of each family
            self.samples.add(info.family + row[-6:])
            parts = [
                "--prompt",
                "x",
                "--size",
                "64",
                "--output",
                str(self.room / f"drawn {row}"),
                "--set",
                "sample.steps=1",
            ]
            assert self.run("sample", adapter, *parts, *arguments)
        output = self.room / f"merged {row}"
        assert self.run("merge", adapter, "--output", str(output), *arguments)
        assert families.describe(str(output)).loader == info.loader
        return [training, sample, "merged"]

    def run(self, *arguments: str) -> bool:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return cli.main([*arguments]) == 0

    def inspection(self, base: Path) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as output:
            code = cli.main(["inspect", str(base)])
        line = (errors if code else output).getvalue().strip().splitlines()[0]
        line = line.removeprefix("lorakit: ").replace(f"{base}: ", "").replace(f"{base.name}: ", "")
        return re.sub(r"(; it predicts.*)?, [\d.]+ MiB$", "", line).replace(f"{self.room}/", "")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    page = Page(tmp_path_factory.mktemp("bases"))
    room = page.room
    for family, title in FAMILIES.items():
        pipeline = small_models.small(family, room / family)
        file = small_models.write(room / f"{family}.safetensors", family, pipeline)
        page.add(title, "file", file, tokenizer=room / family)
    page.add("SDXL", "folder", room / "sdxl")
    page.add("Stable Diffusion 1", "folder", tiny.save_sd1(room / "tiny"))
    page.add("Stable Diffusion 3", "folder", tiny_sd3.save_sd3(room / "sd3"))
    add_variants(page, room)
    add_sd3_files(page, room)
    for title, names in FILES.items():
        page.add(title, "file", safetensors_by_hand.write(room / "x.safetensors", dict.fromkeys(names, (1, 1))))
    for title, name in {"any, pickled": "x.ckpt", "any, GGUF": "x.gguf", "a picture": "x.png"}.items():
        (room / name).touch()
        page.add(title, "file", room / name)
    for file, table in (("model_index.json", PIPELINES), ("config.json", PARTS)):
        for number, (title, content) in enumerate(table.items()):
            folder = room / f"{file}-{number}"
            folder.mkdir()
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
            page.add(title, "folder or hub id", folder)
    return page.rows


def add_variants(page: Page, room: Path) -> None:
    """Add distilled models, weights in fp8, and a file without a VAE."""
    for name in DISTILLED:
        shutil.copy(room / "sdxl.safetensors", room / f"{name}.safetensors")
        page.add(f"SDXL called {name}", "file", room / f"{name}.safetensors", tokenizer=room / "sdxl")
    lcm = shutil.copytree(room / "tiny", room / "lcm")
    scheduler = lcm / "scheduler" / "scheduler_config.json"
    content = json.loads(scheduler.read_text(encoding="utf-8"))
    scheduler.write_text(json.dumps(content | {"_class_name": "LCMScheduler"}), encoding="utf-8")
    page.add("Stable Diffusion 1, LCM by its scheduler", "folder", lcm)
    guided = shutil.copytree(room / "tiny", room / "guided")
    unet = guided / "unet" / "diffusion_pytorch_model.safetensors"
    weights, content = load_file(unet), json.loads((unet.parent / "config.json").read_text(encoding="utf-8"))
    projection = torch.ones(weights["time_embedding.linear_1.weight"].shape[1], 32)
    save_file(weights | {"time_embedding.cond_proj.weight": projection}, unet)
    (unet.parent / "config.json").write_text(json.dumps(content | {"time_cond_proj_dim": 32}), encoding="utf-8")
    page.add("Stable Diffusion 1, LCM by its UNet", "folder", guided)
    weights = load_file(room / "sd1.safetensors")
    eight = {name: t.to(torch.float8_e4m3fn) if name.startswith("model.") else t for name, t in weights.items()}
    save_file(eight, room / "fp8.safetensors")
    page.add("Stable Diffusion 1 in fp8", "file", room / "fp8.safetensors", tokenizer=room / "sd1")
    bare = {name: t for name, t in weights.items() if not name.startswith("first_stage_model.")}
    save_file(bare, room / "no_vae.safetensors")
    page.add("Stable Diffusion 1 without a VAE", "file", room / "no_vae.safetensors", tokenizer=room / "sd1")
    for title, vae in {"with model.vae": "sd1", "with SDXL's model.vae": "sdxl"}.items():
        page.add(f"the same {title}", "file", room / "no_vae.safetensors", tokenizer=room / "sd1", vae=room / vae)


def add_sd3_files(page: Page, room: Path) -> None:
    """Add Stable Diffusion 3.5 medium as a file, with text encoders in it, beside it, or missing."""
    folder = room / "sd3.5"
    pipeline = sd3_files.small(folder)
    names = ("clip_l", "clip_g", "t5xxl")
    for title, encoders in {"with all encoders": names, "without T5": names[:2]}.items():
        file = sd3_files.write(room / f"sd3-{len(encoders)}" / "sd3.safetensors", pipeline, *encoders)
        page.add(f"Stable Diffusion 3.5 {title}", "file", file, tokenizer=folder)
    page.add("the same, `model.t5 = false`", "file", room / "sd3-3" / "sd3.safetensors", tokenizer=folder, t5=False)
    bare = sd3_files.write(room / "bare" / "sd3.safetensors", pipeline)
    page.add("Stable Diffusion 3.5 without encoders", "file", bare, tokenizer=folder)
    place = sd3_files.write_encoders(room / "encoders", pipeline, *names)
    page.add("the same with `model.text_encoders`", "file", bare, tokenizer=folder, text_encoders=place)
    eight = load_file(place / "t5xxl_fp16.safetensors")
    scaled = {name: t.to(torch.float8_e4m3fn) if "DenseReluDense" in name else t for name, t in eight.items()}
    scales = {name.replace("weight", "scale_weight"): torch.ones(1) for name in eight if "DenseReluDense" in name}
    (place / "t5xxl_fp16.safetensors").unlink()
    mark = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    save_file(scaled | scales | mark, place / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    page.add("the same with T5 in scaled fp8", "file", bare, tokenizer=folder, text_encoders=place)


@pytest.mark.slow
def test_the_page_states_what_the_commands_do(rows: list[str]) -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert lines == ["| --- | --- | --- | --- | --- | --- |", *rows]
