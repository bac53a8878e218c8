"""Base models: describe a folder or file without torch, and load it behind one protocol, `Family`.

May import: core, config, data, engine.
Used by: formats, inference, runs, training, cli, ui.

A family is one folder (`spec.py`: what it is, as data; `model.py`: the loaded base) and one line in
`registry.FAMILIES` or an entry point of the group `lorakit.families`. `_template/` is a commented example, `pocket/` a
bundled base of the family `sd`; `facts/` recognises other models and refuses damaged ones. Everything outside this room
knows only `BaseInfo` (a description, read without torch), `Family` (the loaded base) and `Conditioning` (encoded
texts).
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
    """A loaded base model. Every module is frozen and in eval mode; only adapters are ever trained.

    Attributes:
        info: what it was loaded from.
        prediction: what the denoiser predicts, how noise is added and how timesteps are sampled.
        device: where its parts compute.
        dtype: precision of UNet and text encoders; the VAE is always float32.
        gradient_scale: gradients are this many times too large inside the base, from the prediction backwards; whoever
            trains a weight in there divides by it (see `loading.widen`).
        denoiser: the UNet or transformer. Parts, adapters' keys and `modules()` call it "unet" in every family.
        text_encoders: "text_encoder" and, where there are more, "text_encoder_2" and "text_encoder_3" -> module.
        vae: the autoencoder.
        plain: whether it computes without `lorakit.engine`, as `memory.engine` has it. Adapters follow it.
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
        """Embeddings of texts, cut and padded as the diffusers pipeline does it, without `size_conditions`."""

    def encode_prompt(self, prompt: str) -> Conditioning:
        """The embedding of one prompt, read as web UIs read it (see `core.prompt_syntax`), however long it is."""

    def tokens(self, texts: Sequence[str | Prompt], chunks: int = 1) -> list[torch.Tensor]:
        """What `encode_tokens` takes for texts, on `device`, a row each: token ids, int64 `[B, chunks * T]`, for a text
        encoder that can be trained; what one that cannot makes of them."""

    def chunks(self, texts: Sequence[str | Prompt]) -> int:
        """The number of chunks of the longest text; 1 if the family reads only one."""

    def reserve(self, word: str, places: int) -> None:
        """Reserve as many tokens for a word as vectors are learned for it; 0 for no word."""

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Conditioning:
        """`encode_text` of texts in that form, which the host does not look at; autograd does, if asked."""

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `[B, 3, H, W]` in [-1, 1] -> (mean, std) of the latents, float32 `[B, C, h, w]`, in the UNet's scale:
        latents = mean + std * noise."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, h, w]` -> pixels `[B, 3, H, W]`, float32, about [-1, 1]."""

    def size_conditions(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, list[int]]:
        """Name in `Conditioning` -> a row, from (height, width), (top, left), (height, width); empty where the
        denoiser is not conditioned on sizes."""

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Conditioning) -> torch.Tensor:
        """What the UNet says of `noisy` `[B, C, h, w]` at `timesteps` `[B]`: float32 `[B, C, h, w]`."""

    def release(self, *components: str) -> None:
        """Move "unet", "vae" or "text_encoders" to the CPU and give their memory back. Where weights are trained the
        part stays: the optimizer, and a CUDA graph, know where things lie."""

    def acquire(self, *components: str) -> None:
        """Move them to `device`, or one text encoder by its name. All parts begin on the CPU, and come by themselves
        with what needs them: `tokens`, `encode_text`, `encode_tokens`, `encode_image`, `decode` and `predict`."""

    def pipeline(self) -> DiffusionPipeline:
        """The diffusers pipeline of these same modules, wherever they are, with its own scheduler."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """Modules that adapters may enter: "unet" and the text encoders."""


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
        storage: how the UNet's weights are kept, as `memory.base_storage` has it; it computes in `dtype` always.
        stream: whether they stay in the host's memory, as `memory.stream_base` has it.
        plain: leave diffusers' and PEFT's modules as they are. A UNet with blocks that the engine does not know is
            plain in any case.

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
    """Load a described base on the device and in the precision that the config asks for: (base, lines on the device).

    Raises:
        LorakitError: see `load`; the device is not there, or cannot do what the config asks.
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
    """A pipeline of diffusers in memory, as a base. The pipeline does not change. Both share their weights if device
    and dtype are the same, as they are by default.

    Raises:
        LorakitError: it is of no family, or its weights are not plain tensors.
    """
    return load(describe_pipeline(pipeline), device or pipeline.device, dtype or pipeline.dtype)
