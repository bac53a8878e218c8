"""An adapter's weights under canonical names: the result of training, and the common form of all file formats.

Canonical layer names are the module paths of diffusers' UNet and of CLIP in released checkpoints, with the component as
prefix. They do not depend on the names in the installed transformers:

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj
    text_encoder_2.text_model.encoder.layers.0.mlp.fc1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from lorakit.core import registry
from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraLayer:
    """One layer with LoRA: delta W = alpha / rank * up @ down, with rank = down.shape[0].

    Attributes:
        down: `[rank, in]`, or `[rank, in, kh, kw]` for a convolution.
        up: `[out, rank]`, or `[out, rank, 1, 1]` for a convolution.
        alpha: numerator of the scale. For rank-stabilized adapters this is alpha * sqrt(rank), so that every reader
            computes the right scale alpha / rank.
        magnitude: DoRA's column magnitudes `[1, in]` (`[1, in, 1, 1]` for a convolution), on the axis that web UIs
            read, or None. W' = magnitude * V / ||V||, V = W + delta W, with the norm over every axis but the input
            axis. Other programs' files may have row magnitudes `[out, 1]`, with the norm of each row.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

    METHOD: ClassVar[str] = "lora"  # the kind of a layer without a magnitude

    @property
    def is_lora(self) -> bool:
        """Whether this is plain LoRA, without a magnitude, which every program reads."""
        return self.magnitude is None

    @property
    def method(self) -> str:
        """ "lora", or "dora" with a magnitude."""
        return self.METHOD if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of delta W; a convolution's kernel is part of the columns."""
        return len(self.up), self.down[0].numel()

    def factors(self) -> dict[str, torch.Tensor]:
        """Name -> trained tensor."""
        return {"down": self.down, "up": self.up} | ({} if self.magnitude is None else {"magnitude": self.magnitude})

    def delta(self) -> torch.Tensor:
        """delta W in float32, in the shape of the layer's own weight (without DoRA's magnitude)."""
        down, up = self.down.float(), self.up.float()
        flat = up.flatten(1) @ down.flatten(1) * self.scale
        return flat.reshape(up.shape[0], *down.shape[1:])

    def rescaled(self, scale: float) -> LoraLayer:
        """The same delta W with this scale; the difference goes into `up`."""
        return replace(self, up=self.up * (self.scale / scale), alpha=float(scale * self.rank))


@dataclass(frozen=True)
class LohaLayer:
    """One layer with LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS): the elementwise product of two low-rank
    matrices.

    delta W = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b). As in files, a convolution's kernel is part of the columns.

    Attributes:
        w1_a, w2_a: `[out, rank]`.
        w1_b, w2_b: `[rank, in * kh * kw]`.
        alpha: numerator of the scale.
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None  # of DoRA, as in `LoraLayer`; only in other programs' files

    method = "loha"
    is_lora = False

    @property
    def rank(self) -> int:
        """Number of rows of each `b`."""
        return int(self.w1_b.shape[0])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of delta W."""
        return int(self.w1_a.shape[0]), int(self.w1_b.shape[1])

    def factors(self) -> dict[str, torch.Tensor]:
        """LyCORIS' name -> trained tensor."""
        tensors = {f"hada_{part}": getattr(self, part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return tensors | ({} if self.magnitude is None else {"magnitude": self.magnitude})

    def delta(self) -> torch.Tensor:
        """delta W `[out, in * kh * kw]` in float32."""
        first, second = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return first * second * self.scale

    def rescaled(self, scale: float) -> LohaLayer:
        """The same delta W with this scale; the difference goes into `w2_a`."""
        return replace(self, w2_a=self.w2_a * (self.scale / scale), alpha=float(scale * self.rank))


@dataclass(frozen=True)
class LokrLayer:
    """One layer with LoKr (Yeh et al. 2023, arXiv 2309.14859; LyCORIS): a Kronecker product of two small matrices.

    delta W = scale * kron(w1, w2). Each of them may be a product of two factors. The scale is alpha / rank, or 1 if
    neither is factorized, because there is no rank then.

    Attributes:
        w1: one matrix `[a, c]`, or its factors `[a, rank]` and `[rank, c]`, with a * b = out and c * d = in.
        w2: one matrix `[b, d * kh * kw]`, or its factors `[b, rank]` and `[rank, d * kh * kw]`.
        alpha: numerator of the scale.
        kernel: kernel size `(kh, kw)` of a convolution, if known: files keep it in a w2 that is not factorized.
    """

    w1: tuple[torch.Tensor, ...]
    w2: tuple[torch.Tensor, ...]
    alpha: float
    kernel: tuple[int, ...] = ()
    magnitude: torch.Tensor | None = None  # of DoRA, as in `LoraLayer`; only in other programs' files

    method = "lokr"
    is_lora = False

    @property
    def rank(self) -> int:
        """Rank of the factorized matrix; 1 if neither is factorized."""
        return next((int(pair[1].shape[0]) for pair in (self.w1, self.w2) if len(pair) == 2), 1)

    @property
    def is_full(self) -> bool:
        """Whether neither matrix is factorized."""
        return len(self.w1) == len(self.w2) == 1

    @property
    def scale(self) -> float:
        """alpha / rank, or 1."""
        return 1.0 if self.is_full else self.alpha / self.rank

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of delta W."""
        return (
            int(self.w1[0].shape[0] * self.w2[0].shape[0]),
            int(self.w1[-1].shape[1] * self.w2[-1].shape[1]),
        )

    def factors(self) -> dict[str, torch.Tensor]:
        """LyCORIS' name -> trained tensor; a convolution's w2 that is not factorized is `[b, d, kh, kw]`."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parts in (("lokr_w1", self.w1), ("lokr_w2", self.w2)):
            tensors |= {name: parts[0]} if len(parts) == 1 else {f"{name}_a": parts[0], f"{name}_b": parts[1]}
        if self.kernel and "lokr_w2" in tensors:
            tensors["lokr_w2"] = tensors["lokr_w2"].reshape(len(self.w2[0]), -1, *self.kernel)
        return tensors | ({} if self.magnitude is None else {"magnitude": self.magnitude})

    def delta(self) -> torch.Tensor:
        """delta W `[out, in * kh * kw]` in float32."""
        first, second = (
            parts[0].float() if len(parts) == 1 else parts[0].float() @ parts[1].float() for parts in (self.w1, self.w2)
        )
        product = first[:, None, :, None] * second[None, :, None, :]
        return product.reshape(self.size) * self.scale

    def rescaled(self, scale: float) -> LokrLayer:
        """The same delta W with this scale; w1 absorbs the difference. A layer that is not factorized has scale 1 and
        keeps it."""
        if self.is_full:
            return self
        first, *rest = self.w1
        return replace(self, w1=(first * (self.scale / scale), *rest), alpha=float(scale * self.rank))


@dataclass(frozen=True)
class ForeignLayer:
    """One layer that is not LoRA, LoHa or LoKr.

    It belongs to a method that lorakit reads but does not train (full differences, norms, GLoRA, (IA)^3, OFT, BOFT), or
    to one whose `MethodSpec` names a new kind of layer.

    Attributes:
        method: its name in LyCORIS, or `MethodSpec.layers`.
        parts: name in LyCORIS' files, or in `MethodSpec.factors` -> tensor.
        alpha: as in the file: GLoRA's numerator of the scale, OFT's constraint.
        change: (weight in float32, layer, strength) -> the difference to add to the weight.
        with_bias: whether `change` also applies to the bias of the layer, as a weight with one column.
    """

    method: str
    parts: Mapping[str, torch.Tensor]
    alpha: float
    change: Callable[[torch.Tensor, ForeignLayer, float], torch.Tensor]
    with_bias: bool = False

    magnitude = None
    is_lora = False
    rank, scale = 1, 1.0

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of delta W, if the layer stores delta W itself."""
        return len(self.delta()), self.delta()[0].numel()

    def factors(self) -> dict[str, torch.Tensor]:
        """LyCORIS' name -> tensor."""
        return dict(self.parts)

    def delta(self) -> torch.Tensor:
        """delta W in float32, if it does not depend on the base's weight."""
        is_full = self.parts.get("diff", self.parts.get("w_norm"))
        if is_full is None:
            raise LorakitError(
                "{method} is computed from the weights of a base and has no change without it: merge it into "
                "its base first, then extract a LoRA from the merged model",
                self.method,
            )
        return is_full.float()

    def rescaled(self, scale: float) -> ForeignLayer:
        """The layer itself: it has no scale."""
        return self


AnyLayer = LoraLayer | LohaLayer | LokrLayer | ForeignLayer


def from_factors(factors: Mapping[str, torch.Tensor], scale: float) -> AnyLayer:
    """Build a layer from its tensors, named as in `factors()`.

    PiSSA has `down` and `up`, and their initial values `down_0` and `up_0` from the base. The difference from the
    original base is up @ down - up_0 @ down_0 = (up - up_0) @ down + up_0 @ (down - down_0). That is LoRA of twice the
    rank, and no large numbers are subtracted from each other.
    """
    for kind, spec in registry.own_kinds().items():
        if factors.keys() == set(spec.factors):
            return ForeignLayer(kind, dict(factors), 0.0, registry.resolve(spec.change))
    if "hada_w1_a" in factors:
        w1_a, w1_b, w2_a, w2_b = (factors[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return LohaLayer(w1_a, w1_b, w2_a, w2_b, scale * len(w1_b))
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        w1, w2 = (
            (factors[name],) if name in factors else (factors[f"{name}_a"], factors[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
        kernel = tuple(w2[0].shape[2:])
        layer = LokrLayer(w1, tuple(part.flatten(1) for part in w2), 1.0, kernel)
        return replace(layer, alpha=scale * layer.rank)
    down, up = factors["down"], factors["up"]
    if "down_0" in factors:
        import torch  # this module can be imported without torch

        down_0, up_0 = factors["down_0"], factors["up_0"]
        down, up = torch.cat([down, down - down_0]), torch.cat([up - up_0, up_0], dim=1)
    return LoraLayer(down, up, scale * len(down), factors.get("magnitude"))


def delta_norm(factors: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Frobenius norm of delta W. For LoRA it is computed from the small Gram matrices of the two factors."""
    if "up" not in factors:
        norm: torch.Tensor = from_factors(factors, scale).delta().norm()
        return norm
    down, up = factors["down"].flatten(1), factors["up"].flatten(1)
    return ((down @ down.T) * (up.T @ up)).sum().clamp(min=0).sqrt() * abs(scale)


def factorization(width: int) -> tuple[int, int]:
    """Split a layer's width into two factors as equal as possible, the smaller first, as LoKr does (LyCORIS
    functional/general.py, `factorization` without a factor)."""
    small = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return small, width // small


@dataclass(frozen=True)
class AdapterWeights:
    """All layers of an adapter, with family and method.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sd3".
        method: how it was trained, a name of `registry.METHODS`.
        layers: canonical name -> layer.
        metadata: metadata of the file (empty for weights from training).
        embeddings: word -> text encoder ("text_encoder", "text_encoder_2") -> vectors `[n, width]` of the word.
        biases: canonical name -> difference of the layer's bias; only in other programs' files.
    """

    family: str
    method: str
    layers: dict[str, AnyLayer]
    metadata: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
