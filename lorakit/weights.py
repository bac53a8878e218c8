"""An adapter's weights in no program's spelling: what training makes, what every export format is written from.

Canonical layer names are the module paths of diffusers' UNet and of CLIP as real checkpoints spell it, with the
component in front, whatever the installed transformers calls its modules:

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj
    text_encoder_2.text_model.encoder.layers.0.mlp.fc1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def canonical(component: str, module: str) -> str:
    """Canonical layer name of a module path: the component in front, and CLIP's `text_model.` always there.

    transformers calls the same module `encoder.layers.0` or `text_model.encoder.layers.0`, by its version and class;
    published checkpoints, and every program that reads adapters, have the longer name.
    """
    if component.startswith("text_encoder") and not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    return f"{component}.{module}"


@dataclass(frozen=True)
class Layer:
    """One adapted layer: delta W = alpha / rank * up @ down, with rank = down.shape[0].

    Attributes:
        down: `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
        up: `[out, rank]`, or `[out, rank, 1, 1]` for a convolution.
        alpha: numerator of the scale; rank-stabilised adapters carry alpha * sqrt(rank) here, so that alpha / rank is
            the true scale for every reader.
        magnitude: DoRA's column magnitudes `[1, in]` (`[1, in, 1, 1]` for a convolution), the axis web UIs read, or
            None. W' = magnitude * V / ||V||, V = W + delta W, the norm taken over every axis but the input axis.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """delta W in float32, in the shape of the layer's own weight (without DoRA's magnitude)."""
        down, up = self.down.float(), self.up.float()
        flat = up.flatten(1) @ down.flatten(1) * self.scale
        return flat.reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class AdapterWeights:
    """All layers of an adapter, and what they belong to.

    Attributes:
        family: "sd1", "sd2" or "sdxl".
        method: "lora", "rslora" or "dora".
        layers: canonical name -> Layer.
        metadata: what a file said of itself (empty for weights that come from training).
    """

    family: str
    method: str
    layers: dict[str, Layer]
    metadata: dict[str, str] = field(default_factory=dict)
