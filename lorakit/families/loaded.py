"""The shared part of all loaded families. The model.py of each family adds the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core import prompt_syntax
from lorakit.core.errors import LorakitError
from lorakit.families import loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from lorakit.core.prompt_syntax import Prompt
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning
    from lorakit.families.describe import BaseInfo


DAMAGED = "the base holds NaN or infinity in {name}: it is damaged; get the base again"


class LoadedFamily:
    """The shared part of `families.Family`: token ids, VAE, and the devices of the parts.

    A subclass loads `denoiser`, `text_encoders`, `vae`, `prediction` and `_ids`, and defines `encode_tokens`, `predict`
    and `pipeline`.

    Attributes:
        plain: set by `families.load`.
    """

    plain = False
    denoiser: Any
    text_encoders: dict[str, Any]
    vae: AutoencoderKL
    _ids: list[loading.TokenIds]

    def __init__(self, info: BaseInfo, device: torch.device | str, dtype: torch.dtype):
        self.info, self.device, self.dtype = info, torch.device(device), dtype
        self.gradient_scale: float | torch.Tensor = loading.gradient_scale(dtype)

    def encode_text(self, texts: list[str]) -> Conditioning:
        """See `families.Family`."""
        return self.encode_tokens(self.tokens(texts))

    def encode_prompt(self, prompt: str) -> Conditioning:
        """See `families.Family`.

        A weight moves a token's states away from or towards those of an empty text at the same position, as in ComfyUI
        (comfy/sd1_clip.py, ClipTokenWeightEncoder).
        """
        parsed = prompt_syntax.parse(prompt)
        chunks = self.chunks([parsed])
        condition, weights = self.encode_tokens(self.tokens([parsed], chunks)), self._weights(parsed, chunks)
        if bool((weights == 1).all()):
            return condition
        states = condition["encoder_hidden_states"]
        empty = self.encode_tokens(self.tokens([""], chunks))["encoder_hidden_states"]
        weighted = empty + (states - empty) * weights[:, None].to(states.dtype)
        return condition.with_rows(encoder_hidden_states=torch.where(weights[:, None] == 1, states, weighted))

    def tokens(self, texts: Sequence[str | Prompt], chunks: int = 1) -> list[torch.Tensor]:
        """See `families.Family`."""
        return [ids(texts, chunks) for ids in self._ids]

    def chunks(self, texts: Sequence[str | Prompt]) -> int:
        """See `families.Family`."""
        return max((ids.chunks(text) for ids in self._ids for text in texts), default=1)

    def reserve(self, word: str, places: int) -> None:
        """See `families.Family`."""
        for ids in self._ids:
            ids.reserve(word, places)

    def _weights(self, prompt: Prompt, chunks: int) -> torch.Tensor:
        """The weight of each state that the denoiser attends to."""
        return self._ids[0].weights(prompt, chunks)

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """See `families.Family`."""
        raise NotImplementedError

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `families.Family`."""
        self.acquire("vae")
        return loading.encode_image(self.vae, pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `families.Family`."""
        self.acquire("vae")
        return loading.decode(self.vae, latents)

    def size_conditions(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, list[int]]:
        """Return {}: the denoiser is not conditioned on sizes."""
        return {}

    def release(self, *parts: str) -> None:
        """See `families.Family`."""
        loading.move(self._parts(), parts, loading.HOST)

    def acquire(self, *parts: str) -> None:
        """See `families.Family`."""
        loading.move(self._parts(), parts, self.device)

    def modules(self) -> dict[str, Any]:
        """See `families.Family`."""
        return {"unet": self.denoiser, **self.text_encoders}

    def _parts(self) -> dict[str, list[Any]]:
        return loading.by_name(self.denoiser, self.vae, self.text_encoders)


def require_finite(family: Family) -> None:
    """Raise LorakitError for a base with NaN or infinity, before hours are spent on class images."""
    for part, module in family.modules().items():
        for name, weight in module.named_parameters():
            is_plain = type(weight.data) is torch.Tensor and weight.is_floating_point()
            if is_plain and not bool(torch.isfinite(weight.detach()).all()):
                raise LorakitError(DAMAGED, f"{part}.{name}")
