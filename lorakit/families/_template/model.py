"""The example family, loaded: one UNet, one CLIP text encoder, one VAE. `families.Family` documents each method."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from lorakit.families import loading, prediction
from lorakit.families.conditioning import Conditioning
from lorakit.families.describe import BaseInfo
from lorakit.families.loaded import LoadedFamily


class ExampleDiffusion(LoadedFamily):
    """See `families.Family`.

    `LoadedFamily` has what most families share. Override:

    - `tokens` for a text encoder that is never trained;
    - `size_conditions` where the denoiser is conditioned on picture sizes;
    - `encode_image` and `decode` for other autoencoders than AutoencoderKL;
    - `modules` and `_parts` where a part is loaded and released separately (see families/sd3/model.py).
    """

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
        super().__init__(info, device, dtype)
        with loading.quiet():
            self.denoiser = loading.load_unet(info, self.device, dtype, storage, stream)
            encoder = loading.load_module(info, "text_encoder", CLIPTextModel, dtype)
            self.vae = loading.load_vae(info)
            self.tokenizer = loading.load_tokenizer(info, "tokenizer", encoder)
            self.scheduler = loading.load_scheduler(info)
        self.text_encoders = {"text_encoder": encoder}
        # Noise, training target and timesteps. Change: `prediction.Flow` for flow matching; see families/sd3/model.py.
        schedule = loading.noise_schedule(self.scheduler, self.device)
        self.prediction = prediction.of_schedule(info.prediction_type, schedule)
        self._ids = [loading.TokenIds(self.tokenizer, self.device)]

    # Change: the hidden states that the denoiser attends to, and its other inputs (see families/sdxl/model.py).
    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`."""
        self.acquire("text_encoders")
        with torch.set_grad_enabled(grad):
            states = self.text_encoders["text_encoder"](loading.chunk_rows(tokens[0], self.info.max_tokens))[0]
            return Conditioning(encoder_hidden_states=loading.join_chunks(states, len(tokens[0])))

    # One call of the denoiser. Change: its arguments. Keep `widen`: it applies `gradient_scale` in float16.
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """See `families.Family`."""
        self.acquire("unet")
        states = condition["encoder_hidden_states"].to(self.dtype)
        predicted = self.denoiser(noisy.to(self.dtype), timesteps, states, return_dict=False)[0]
        return loading.widen(predicted, self.gradient_scale)

    # Used to draw samples and to check exported files. Change: the pipeline class and its parts.
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
