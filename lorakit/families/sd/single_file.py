"""Stable Diffusion 1.x and 2.x as single files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.core import safetensors_header
from lorakit.core.messages import Message
from lorakit.families import ldm, single_file, unet
from lorakit.families.spec import EPSILON, VELOCITY, Configs, FileLayout, Shapes

SCALING = 0.18215
# SD1 has eight heads of any width.
SD1_HEADS = 8
# SD2 reads its text encoder before the last of the published model's 24 layers; diffusers leaves that out.
SD2_LAYERS = 23
_VAE_NAMES = r"ft-?(mse|ema)|840000|560000|kl-?f8|sd-?v?[12](?!\d{3})|stable-diffusion-v[12]|orangemix"
_REFINER = {
    f"{ldm.UNET}label_emb.0.0.weight": "SDXL's refiner, which no adapter is trained on: give the SDXL base",
}


def _configs(
    shapes: Mapping[str, Shapes], prediction: str, zero_snr: bool, *, heads: int | None, side: int, openclip: bool
) -> Configs:
    parts = {
        "unet": unet.config(shapes["unet"], side, heads) | ({"upcast_attention": True} if openclip else {}),
        "vae": single_file.vae_config(shapes.get("vae", {}), side, scaling_factor=SCALING, force_upcast=False),
        "text_encoder": single_file.text_config(shapes["text_encoder"], openclip=openclip),
    }
    parts["scheduler"] = single_file.ddim(prediction, zero_snr)
    if prediction == EPSILON and not zero_snr:
        pndm = {"skip_prk_steps": True, "set_alpha_to_one": False}
        config = {**single_file.SCHEDULE, "prediction_type": prediction, "steps_offset": 1}
        parts["scheduler"] = {"_class_name": "PNDMScheduler", **config, **pndm}
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return parts | {"model_index": single_file.model_index("StableDiffusionPipeline", parts, **absent)}


def _sd1_configs(shapes: Mapping[str, Shapes], prediction: str, zero_snr: bool) -> Configs:
    return _configs(shapes, prediction, zero_snr, heads=SD1_HEADS, side=512, openclip=False)


def _sd2_configs(shapes: Mapping[str, Shapes], prediction: str, zero_snr: bool) -> Configs:
    side = 768 if prediction == VELOCITY else 512
    return _configs(shapes, prediction, zero_snr, heads=None, side=side, openclip=True)


def _sd2_guess(header: safetensors_header.Header) -> ldm.Prediction:
    """SD2 was published in two versions with the same keys and shapes. In the v-prediction one, the last norm1.bias has
    a larger standard deviation, by which ComfyUI distinguishes them."""
    shapes = header.shapes()
    if shapes[f"{ldm.UNET}input_blocks.0.0.weight"][1] != 4:
        return ldm.Prediction(EPSILON, False, ldm.NOTHING_SAYS, certain=False)
    pattern = rf"{re.escape(ldm.UNET)}output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias"
    biases = {int(match[1]): name for name in shapes if (match := re.fullmatch(pattern, name))}
    values = (safetensors_header.values(header, biases[max(biases)]) if biases else []) or [0.0]
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    above = spread > 0.09
    evidence = Message(
        "as its last norm1.bias spreads by {spread:.3f}, above 0.09"
        if above
        else "as its last norm1.bias spreads by {spread:.3f}, not above 0.09",
        spread,
    )
    return ldm.Prediction(VELOCITY if above else EPSILON, False, evidence, certain=False)


SD1_FILE = FileLayout(
    parts={
        "unet": unet.FILE,
        "vae": single_file.VAE,
        "text_encoder": single_file.clip("cond_stage_model.transformer."),
    },
    marks=("cond_stage_model.transformer.",),
    configs=_sd1_configs,
    scaling_factor=SCALING,
    vae_names=_VAE_NAMES,
    others=_REFINER,
)
_SD2_TEXT = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
SD2_FILE = FileLayout(
    parts={
        "unet": unet.FILE,
        "vae": single_file.VAE,
        "text_encoder": single_file.openclip(*_SD2_TEXT, used_layers=SD2_LAYERS),
    },
    marks=_SD2_TEXT,
    configs=_sd2_configs,
    scaling_factor=SCALING,
    vae_names=_VAE_NAMES,
    others=_REFINER,
    guess=_sd2_guess,
)
