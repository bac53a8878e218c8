"""Stable Diffusion XL as a single file."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.families import single_file, unet
from lorakit.families.spec import Configs, FileLayout, Shapes

SIDE, SCALING, TIME_IDS = 1024, 0.13025, 6


def _configs(shapes: Mapping[str, Shapes], prediction: str, zero_snr: bool) -> Configs:
    parts = {
        "unet": unet.config(shapes["unet"], SIDE),
        "vae": single_file.vae_config(shapes.get("vae", {}), SIDE, scaling_factor=SCALING, force_upcast=True),
        "text_encoder": single_file.text_config(shapes["text_encoder"], openclip=False),
        "text_encoder_2": single_file.text_config(shapes["text_encoder_2"], openclip=True, projection=True),
    }
    width = shapes["unet"]["add_embedding.linear_1.weight"][1]
    parts["unet"] |= {
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": width,
        "addition_time_embed_dim": (width - parts["text_encoder_2"]["projection_dim"]) // TIME_IDS,
    }
    euler = {**single_file.SCHEDULE, "prediction_type": prediction, "steps_offset": 1, "timestep_spacing": "leading"}
    parts["scheduler"] = (
        single_file.ddim(prediction, zero_snr) if zero_snr else {"_class_name": "EulerDiscreteScheduler", **euler}
    )
    index = single_file.model_index("StableDiffusionXLPipeline", parts, force_zeros_for_empty_prompt=True)
    return parts | {"model_index": index}


SDXL_FILE = FileLayout(
    parts={
        "unet": unet.FILE,
        "vae": single_file.VAE,
        "text_encoder": single_file.clip("conditioner.embedders.0.transformer."),
        "text_encoder_2": single_file.openclip("conditioner.embedders.1.model."),
    },
    marks=("conditioner.embedders.1.model.",),
    configs=_configs,
    scaling_factor=SCALING,
    vae_names=r"xl|pony|illustrious|noob",
)
