"""Stable Diffusion 1.x and 2.x: one text encoder, its last hidden states, no size conditions.

With `model.clip_skip`, the states of an earlier layer after the final layer norm. A1111 ("Clip skip") and sd-scripts
(`clip_skip`) count layers in the same way; diffusers' `clip_skip` is one less.
"""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from lorakit.families import loading, prediction
from lorakit.families.conditioning import Conditioning
from lorakit.families.describe import BaseInfo
from lorakit.families.loaded import LoadedFamily


class StableDiffusion(LoadedFamily):
    """See `families.Family`."""

    def __init__(
        self,
        info: BaseInfo,
        device: torch.device | str,
        dtype: torch.dtype,
        storage: str = "full",
        stream: bool = False,
    ):
        super().__init__(info, device, dtype)
        with loading.quiet():
            self.denoiser = loading.load_unet(info, self.device, dtype, storage, stream)
            encoder = loading.load_module(info, "text_encoder", CLIPTextModel, dtype)
            self.vae = loading.load_vae(info)
            loading.mask_everything(self.denoiser, self.vae)
            self.tokenizer = loading.load_tokenizer(info, "tokenizer", encoder)
            self.scheduler = loading.load_scheduler(info)
        self.text_encoders = {"text_encoder": encoder}
        schedule = loading.noise_schedule(self.scheduler, self.device)
        self.prediction = prediction.of_schedule(info.prediction_type, schedule)
        self._ids = [loading.TokenIds(self.tokenizer, self.device)]

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`."""
        self.acquire("text_encoders")
        with torch.set_grad_enabled(grad):
            encoder, rows = self.text_encoders["text_encoder"], loading.chunk_rows(tokens[0], self.info.max_tokens)
            if self.info.clip_skip == 1:
                states = encoder(rows)[0]
            else:
                states = encoder(rows, output_hidden_states=True).hidden_states[-self.info.clip_skip]
                states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
            return Conditioning(encoder_hidden_states=loading.join_chunks(states, len(tokens[0])))

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """See `families.Family`."""
        self.acquire("unet")
        states = condition["encoder_hidden_states"].to(self.dtype)
        predicted = self.denoiser(noisy.to(self.dtype), timesteps, states, return_dict=False)[0]
        return loading.widen(predicted, self.gradient_scale)

    def pipeline(self) -> StableDiffusionPipeline:
        """See `families.Family`."""
        with loading.quiet():
            pipeline = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoders["text_encoder"],
                tokenizer=self.tokenizer,
                unet=self.denoiser,
                scheduler=type(self.scheduler).from_config(self.scheduler.config),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
