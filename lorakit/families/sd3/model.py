"""Stable Diffusion 3 and 3.5: a flow-matching transformer, two CLIP encoders and optionally T5."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5TokenizerFast

from lorakit.families import loading
from lorakit.families.conditioning import Conditioning
from lorakit.families.describe import BaseInfo
from lorakit.families.loaded import LoadedFamily
from lorakit.families.prediction import Flow

if TYPE_CHECKING:
    from lorakit.core.prompt_syntax import Prompt

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"


class StableDiffusion3(LoadedFamily):
    """See `families.Family`; Esser et al. 2024, arXiv 2403.03206.

    It predicts noise - x on the line z = (1 - sigma) x + sigma noise, at timesteps of 1000 sigma (see
    `prediction.Flow`).
    """

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
            self.text_encoders = {
                name: loading.load_module(info, name, CLIPTextModelWithProjection, dtype) for name in CLIPS
            }
            self.tokenizers = {
                name.replace("text_encoder", "tokenizer"): loading.load_tokenizer(
                    info, name.replace("text_encoder", "tokenizer"), encoder
                )
                for name, encoder in self.text_encoders.items()
            }
            self._t5_tokens = info.text_tokens - info.max_tokens
            self._ids = [
                loading.TokenIds(tokenizer, self.device, chunked=False) for tokenizer in self.tokenizers.values()
            ]
            self._t5_ids: loading.TokenIds | None = None
            if T5 in info.configs:
                self.text_encoders[T5] = loading.load_module(info, T5, T5EncoderModel, dtype)
                tokenizer = T5TokenizerFast.from_pretrained(info.tokenizer("tokenizer_3"), local_files_only=True)
                self.tokenizers["tokenizer_3"] = tokenizer
                self._t5_ids = loading.TokenIds(tokenizer, self.device, self._t5_tokens, chunked=False)
            self.vae = loading.load_vae(info)
            self.scheduler = loading.load_scheduler(info)
        self.prediction = Flow(float(self.scheduler.config.shift))

    def tokens(self, texts: Sequence[str | Prompt], chunks: int = 1) -> list[torch.Tensor]:
        """See `families.Family`: the token ids of both CLIPs, and T5's last hidden states (zeros without T5)."""
        first, second = (ids(texts) for ids in self._ids)
        if self._t5_ids is None:
            shape = (len(texts), self._t5_tokens, self.info.cross_dim)
            return [first, second, torch.zeros(shape, device=self.device, dtype=self.dtype)]
        self.acquire(T5)
        with torch.no_grad():
            return [first, second, self.text_encoders[T5](self._t5_ids(texts))[0]]

    def _weights(self, prompt: Prompt, chunks: int) -> torch.Tensor:
        clip = super()._weights(prompt, chunks)
        long = torch.ones(self._t5_tokens, device=clip.device) if self._t5_ids is None else self._t5_ids.weights(prompt)
        return torch.cat([clip, long])

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`: the penultimate hidden states of both CLIPs, concatenated and padded with zeros to
        T5's width, then T5's states; and both pooled outputs."""
        *ids, long = tokens
        self.acquire(*CLIPS)
        with torch.set_grad_enabled(grad):
            first, second = (
                self.text_encoders[name](rows, output_hidden_states=True) for name, rows in zip(CLIPS, ids, strict=True)
            )
            clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            states = torch.cat([functional.pad(clip, (0, long.shape[-1] - clip.shape[-1])), long], dim=1)
            pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
            return Conditioning(encoder_hidden_states=states, pooled=pooled)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """See `families.Family`. The condition must have "pooled"."""
        self.acquire("unet")
        prediction = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            pooled_projections=condition["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return loading.widen(prediction, self.gradient_scale)

    def release(self, *parts: str) -> None:
        """See `families.Family`."""
        super().release(*self._named(parts))

    def acquire(self, *parts: str) -> None:
        """See `families.Family`."""
        super().acquire(*self._named(parts))

    def pipeline(self) -> StableDiffusion3Pipeline:
        """See `families.Family`."""
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        with loading.quiet():
            pipeline = StableDiffusion3Pipeline(
                transformer=self.denoiser,
                scheduler=type(self.scheduler).from_config(self.scheduler.config),
                vae=self.vae,
                **(absent | self.text_encoders | self.tokenizers),
            )
        # Other pipelines take one prompt; this one takes one for each encoder, by default the same.
        pipeline.encode_prompt = functools.partial(pipeline.encode_prompt, prompt_2=None, prompt_3=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def modules(self) -> dict[str, Any]:
        """See `families.Family`: T5 is never trained."""
        return {"unet": self.denoiser, **{name: self.text_encoders[name] for name in CLIPS}}

    def _parts(self) -> dict[str, list[Any]]:
        # T5 is never trained and is the largest part, so it is moved separately.
        parts = loading.by_name(self.denoiser, self.vae, {name: self.text_encoders[name] for name in CLIPS})
        return parts | {T5: [self.text_encoders[T5]] if T5 in self.text_encoders else []}

    @staticmethod
    def _named(parts: tuple[str, ...]) -> tuple[str, ...]:
        return (*parts, T5) if "text_encoders" in parts else parts
