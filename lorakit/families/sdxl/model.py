"""Stable Diffusion XL: two text encoders read at their penultimate layer, the second's pooled output, six time ids."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lorakit.families import loading, prediction
from lorakit.families.conditioning import Conditioning
from lorakit.families.describe import BaseInfo
from lorakit.families.loaded import LoadedFamily


class StableDiffusionXL(LoadedFamily):
    """See `families.Family`; Podell et al. 2023, arXiv 2307.01952."""

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
            first = loading.load_module(info, "text_encoder", CLIPTextModel, dtype)
            second = loading.load_module(info, "text_encoder_2", CLIPTextModelWithProjection, dtype)
            self.vae = loading.load_vae(info)
            loading.mask_everything(self.denoiser, self.vae)
            self.tokenizers = [
                loading.load_tokenizer(info, "tokenizer", first),
                loading.load_tokenizer(info, "tokenizer_2", second),
            ]
            self.scheduler = loading.load_scheduler(info)
        self.text_encoders = {"text_encoder": first, "text_encoder_2": second}
        schedule = loading.noise_schedule(self.scheduler, self.device)
        self.prediction = prediction.of_schedule(info.prediction_type, schedule)
        self._ids = [loading.TokenIds(tokenizer, self.device) for tokenizer in self.tokenizers]

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`: the penultimate hidden states of both encoders, concatenated, and the second's pooled
        output.

        With `model.clip_skip` an earlier layer, as in ComfyUI's CLIP Set Last Layer and with diffusers' `clip_skip` +
        2.
        """
        self.acquire("text_encoders")
        with torch.set_grad_enabled(grad):
            first, second = (
                encoder(loading.chunk_rows(ids, self.info.max_tokens), output_hidden_states=True)
                for encoder, ids in zip(self.text_encoders.values(), tokens, strict=True)
            )
            states = torch.cat([output.hidden_states[-self.info.clip_skip] for output in (first, second)], dim=-1)
            count = len(tokens[0])
            return Conditioning(
                encoder_hidden_states=loading.join_chunks(states, count),
                pooled=loading.first_chunks(second.text_embeds, count),
            )

    def size_conditions(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, list[int]]:
        """Original height and width, crop top and left, target height and width (arXiv 2307.01952, section 2.2)."""
        return {"time_ids": [*original, *crop, *target]}

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """See `families.Family`. The condition must have "pooled" and "time_ids"."""
        self.acquire("unet")
        # The pipeline casts the ids to the UNet's precision; training does the same.
        added = {"text_embeds": condition["pooled"].to(self.dtype), "time_ids": condition["time_ids"].to(self.dtype)}
        states = condition["encoder_hidden_states"].to(self.dtype)
        predicted = self.denoiser(noisy.to(self.dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return loading.widen(predicted, self.gradient_scale)

    def pipeline(self) -> StableDiffusionXLPipeline:
        """See `families.Family`."""
        index = self.info.configs["model_index"]
        with loading.quiet():
            pipeline = StableDiffusionXLPipeline(
                vae=self.vae,
                **self.text_encoders,
                tokenizer=self.tokenizers[0],
                tokenizer_2=self.tokenizers[1],
                unet=self.denoiser,
                scheduler=type(self.scheduler).from_config(self.scheduler.config),
                force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
                add_watermarker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
