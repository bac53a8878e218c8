"""Base models: describe a folder or file without torch, and load it behind one protocol, `Family`.

May import: core, config, data, engine.
Used by: formats, inference, runs, training, cli, ui.

A family is one folder (`spec.py`: its facts as data; `model.py`: the loaded base) and one entry in `registry.FAMILIES`
or an entry point of the group `lorakit.families`. `_template/` is a commented example, `pocket/` the bundled base of
the family `sd`; `facts/` recognizes other models and refuses damaged ones. Code outside this room uses only `BaseInfo`
(a description, read without torch), `Family` (the loaded base) and `Conditioning` (encoded texts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lorakit.core import registry
from lorakit.families.describe import IN_MEMORY, BaseInfo, describe, of_pipeline, pin, unsuited
from lorakit.families.facts.pipeline import describe as describe_pipeline, with_pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from diffusers import DiffusionPipeline

    from lorakit.config import Config
    from lorakit.core.prompt_syntax import Prompt
    from lorakit.families.conditioning import Conditioning
    from lorakit.families.prediction import Prediction

__all__ = [
    "IN_MEMORY",
    "BaseInfo",
    "Family",
    "describe",
    "describe_pipeline",
    "from_pipeline",
    "load",
    "load_as_configured",
    "of_pipeline",
    "pin",
    "unsuited",
    "with_pipeline",
]


class Family(Protocol):
    """A loaded base model. Every module is frozen and in eval mode, unless a run trains the whole model.

    Attributes:
        info: what it was loaded from.
        prediction: the prediction type, with noise schedule and sampling of timesteps.
        device: the device that its parts run on.
        dtype: precision of UNet and text encoders; the VAE is always float32.
        gradient_scale: factor of all gradients inside the base, from the prediction backwards. Whoever trains a weight
            there divides by it (see `loading.widen`).
        denoiser: the UNet or transformer. Components, adapter keys and `modules()` call it "unet" in every family.
        text_encoders: "text_encoder" and, if there are more, "text_encoder_2" and "text_encoder_3" -> module.
        vae: the autoencoder.
        plain: whether it runs without `lorakit.engine` (`memory.engine`). Adapters follow it.
    """

    info: BaseInfo
    prediction: Prediction
    device: torch.device
    dtype: torch.dtype
    gradient_scale: float | torch.Tensor
    denoiser: torch.nn.Module
    text_encoders: dict[str, torch.nn.Module]
    vae: torch.nn.Module
    plain: bool

    def encode_text(self, texts: list[str]) -> Conditioning:
        """Embeddings of texts, truncated and padded as in the diffusers pipeline, without `size_conditions`."""

    def encode_prompt(self, prompt: str) -> Conditioning:
        """The embedding of one prompt of any length, in the syntax of web UIs (see `core.prompt_syntax`)."""

    def tokens(self, texts: Sequence[str | Prompt], chunks: int = 1) -> list[torch.Tensor]:
        """The input of `encode_tokens` for texts, on `device`, one row each. For a trainable text encoder these are
        token ids, int64 `[B, chunks * T]`; for others, their output."""

    def chunks(self, texts: Sequence[str | Prompt]) -> int:
        """The number of chunks of the longest text; 1 if the family uses only one."""

    def reserve(self, word: str, places: int) -> None:
        """Reserve `places` tokens for a word, one for each learned vector; 0 for no word."""

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """`encode_text` for the output of `tokens`, without reading it on the host; with gradients if `grad`."""

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `[B, 3, H, W]` in [-1, 1] -> (mean, std) of the latents, float32 `[B, C, h, w]`, scaled for the UNet:
        latents = mean + std * noise."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, h, w]` -> pixels `[B, 3, H, W]`, float32, about [-1, 1]."""

    def size_conditions(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, list[int]]:
        """Size conditions from (height, width), (top, left) and (height, width): name in `Conditioning` -> one row.
        Empty if the denoiser has none."""

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """The denoiser's prediction for `noisy` `[B, C, h, w]` at `timesteps` `[B]`: float32 `[B, C, h, w]`."""

    def release(self, *components: str) -> None:
        """Move "unet", "vae" or "text_encoders" to the CPU and free their device memory. A part with trained weights
        stays: the optimizer and CUDA graphs hold its addresses."""

    def acquire(self, *components: str) -> None:
        """Move "unet", "vae", "text_encoders" or one text encoder to `device`. All parts start on the CPU; `tokens`,
        `encode_text`, `encode_tokens`, `encode_image`, `decode` and `predict` move what they need."""

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline of the same modules, on their current devices, with its own scheduler."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """The modules that can be adapted: "unet" and the text encoders."""


def load(
    info: BaseInfo,
    device: torch.device | str,
    dtype: torch.dtype,
    storage: str = "full",
    stream: bool = False,
    plain: bool = False,
) -> Family:
    """Load a described base: UNet and text encoders in `dtype`, the VAE in float32, from local files only.

    Args:
        storage: how the denoiser's weights are stored (`memory.base_storage`); it always computes in `dtype`.
        stream: whether they stay in host memory (`memory.stream_base`).
        plain: leave diffusers' and PEFT's modules unchanged. A UNet with blocks that the engine does not know is always
            plain.

    Raises:
        LorakitError: a file is missing, damaged, or does not fit its configuration.
    """
    from lorakit.engine import fused_blocks, onednn_linear

    family: Family = registry.resolve(info.spec.loader)(info, device, dtype, storage, stream)
    family.plain = plain or fused_blocks.unknown_block(family.denoiser) is not None
    if not family.plain and family.device.type == "cpu" and storage == "full" and not stream:
        onednn_linear.use_onednn_linear(family.denoiser)
    return family


def load_as_configured(info: BaseInfo, config: Config) -> tuple[Family, list[str]]:
    """Load a described base on the configured device, in the configured precision. Return (base, messages about the
    device).

    Raises:
        LorakitError: see `load`; or the device is not available or does not support the config.
    """
    from lorakit.engine import device as devices

    memory = config.memory
    device = devices.device(memory)
    lines = devices.prepare(memory, device)
    dtype, stream = devices.dtype(memory, device), devices.streams(memory, device)
    return load(info, device, dtype, memory.base_storage, stream, config.engine_is_off), lines


def from_pipeline(
    pipeline: DiffusionPipeline, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Family:
    """Use a diffusers pipeline in memory as a base. The pipeline does not change. Both share weights if device and
    dtype are the same, which is the default.

    Raises:
        LorakitError: it belongs to no family, or its weights are not plain tensors.
    """
    return load(describe_pipeline(pipeline), device or pipeline.device, dtype or pipeline.dtype)
