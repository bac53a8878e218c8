"""The example family, loaded: one UNet, one CLIP text encoder, one VAE. `families.Family` documents each method."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from lorakit.families import loading, prediction
from lorakit.families.conditioning import Conditioning
from lorakit.families.describe import BaseInfo


class ExampleDiffusion:
    """See `families.Family`. `families.load` sets `plain` afterwards."""

    plain = False

    def __init__(
        self,
        info: BaseInfo,
        device: torch.device | str,
        dtype: torch.dtype,
        storage: str = "full",
        stream: bool = False,
    ):
        # `load_unet` takes the class from the spec and obeys memory.base_storage and memory.stream_base. Everything
        # stays on the CPU until `acquire`. Change: the class of each text encoder, and one tokenizer for each.
        self.info, self.device, self.dtype = info, torch.device(device), dtype
        with loading.quiet():
            self.denoiser = loading.load_unet(info, self.device, dtype, storage, stream)
            encoder = loading.load_module(info, "text_encoder", CLIPTextModel, dtype)
            self.vae = loading.load_vae(info)
            self.tokenizer = loading.load_tokenizer(info, "tokenizer", encoder)
            self.scheduler = loading.load_scheduler(info)
        self.text_encoders: dict[str, Any] = {"text_encoder": encoder}
        self.gradient_scale = loading.gradient_scale(dtype)
        # Noise, training target and timesteps. Change: `prediction.Flow` for flow matching; see families/sd3/model.py.
        schedule = loading.noise_schedule(self.scheduler, self.device)
        self.prediction = prediction.of_schedule(info.prediction_type, schedule)
        self._ids = loading.TokenIds(self.tokenizer, self.device)

    def encode_text(self, texts: list[str]) -> Conditioning:
        """See `families.Family`."""
        return self.encode_tokens(self.tokens(texts))

    # Work of the host that depends on the text alone. A CUDA graph replays `encode_tokens` and not this.
    def tokens(self, texts: list[str]) -> list[torch.Tensor]:
        """See `families.Family`."""
        return [self._ids(texts)]

    # Change: which hidden states the denoiser attends to, and what it reads beside them (see families/sdxl/model.py).
    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`."""
        self.acquire("text_encoders")
        with torch.set_grad_enabled(grad):
            return Conditioning(encoder_hidden_states=self.text_encoders["text_encoder"](tokens[0])[0])

    # The next two scale latents as the VAE's configuration says. Other autoencoders than AutoencoderKL need their own.
    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `families.Family`."""
        self.acquire("vae")
        return loading.encode_image(self.vae, pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `families.Family`."""
        self.acquire("vae")
        return loading.decode(self.vae, latents)

    # Change: return numbers where the denoiser is conditioned on picture sizes, as SDXL's is.
    def time_ids(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> None:
        """None: the denoiser is not conditioned on sizes."""
        return None

    # One call of the denoiser. Change: its arguments. Keep `widen`: it applies `gradient_scale` in float16.
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """See `families.Family`."""
        self.acquire("unet")
        states = condition["encoder_hidden_states"].to(self.dtype)
        predicted = self.denoiser(noisy.to(self.dtype), timesteps, states, return_dict=False)[0]
        return loading.widen(predicted, self.gradient_scale)

    def release(self, *parts: str) -> None:
        """See `families.Family`."""
        loading.move(self._parts(), parts, loading.HOST)

    def acquire(self, *parts: str) -> None:
        """See `families.Family`."""
        loading.move(self._parts(), parts, self.device)

    # Samples are drawn and exported files are checked with it. Change: the pipeline class and its parts.
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

    # What adapters may enter. The denoiser is always "unet", whatever its class is.
    def modules(self) -> dict[str, torch.nn.Module]:
        """See `families.Family`."""
        return {"unet": self.denoiser, **self.text_encoders}

    def _parts(self) -> dict[str, list[torch.nn.Module]]:
        return loading.by_name(self.denoiser, self.vae, self.text_encoders)
