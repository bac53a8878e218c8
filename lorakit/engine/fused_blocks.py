"""A UNet's attention and resnets for training: the same sums in fewer operations.

At batch 1 a card waits for the host to issue operations, so their number is what a step costs. `slim` takes away those
that change nothing (a division by 1 after each block, a look at the processor's signature on each call), and lets
layers that read the same input share their products: q, k and v of self-attention, k and v of cross-attention. Their
weights and factors become slices of common tensors; layers, parameters and names stay what they were.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from lorakit.engine import fused_lora
from lorakit.engine.onednn_linear import frozen_linear, linear
from lorakit.engine.recompute import Recipe, keep, kept, norm_silu, recipe, spare

# Keys up to which attention in half precision is computed in float32 on a CPU.
SHORT = 512


def slim(unet: nn.Module, *, frugal: bool = False) -> None:
    """Let the blocks of a UNet compute as this file has it, its adapter, if any, being attached already.

    Args:
        frugal: let frozen layers keep less for the backward pass, as `adapters.frugal` has it; they take the host 7 %
            longer.
    """
    for path, module in unet.named_modules():
        if type(module) is ResnetBlock2D and _is_plain_resnet(module):
            module.__class__ = LeanResnet
            module.__dict__["activated"] = norm_silu if frugal else _norm_silu
        elif type(module) is Attention and _is_plain_attention(module):
            module.__class__ = LeanAttention
            own = module.cross_attention_dim == module.query_dim and not module.is_cross_attention
            shared = [module.to_q, module.to_k, module.to_v] if own else [module.to_k, module.to_v]
            module.__dict__["group"] = Group(shared) if _can_share(shared) else None
        # The first norm of a resnet keeps what its shortcut is given.
        elif frugal and not path.endswith("conv_shortcut"):
            spare(module)


class Group:
    """Layers that read the same input, with the same shape, rank and scale.

    Attributes:
        weight: their weights, frozen, `[G * out, in]`.
        down, up: their factors, `[G * r, in]` and `[G, out, r]`, float32; None where they carry no adapter.
    """

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._bases = [getattr(layer, "base_layer", layer) for layer in layers]
        weights = [base.weight for base in self._bases]
        _share(weights)
        self.weight = _together(weights).flatten(0, 1)
        self.down: torch.Tensor | None = None
        self.up: torch.Tensor | None = None
        self.place: fused_lora.Place | None = None
        self._holders: list[nn.Module] = []
        if isinstance(layers[0], fused_lora.FusedLinear):
            downs, ups = ([getattr(layer, name)[_NAME] for layer in layers] for name in ("lora_A", "lora_B"))
            self._holders = downs + ups
            for found in (downs, ups):
                _share([matrix.weight for matrix in found])
        self.find()

    def find(self) -> None:
        """Look where the factors are now, one layer's behind the other's."""
        self._factors: list[Any] = self._weights()
        if self._factors:
            count = len(self.layers)
            self.down, self.up = _together(self._factors[:count]).flatten(0, 1), _together(self._factors[count:])

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """`[B, T, in]` -> one `[B, T, out]` for each layer; None where they are to be asked one by one."""
        if torch.compiler.is_compiling():
            return self._plainly(x)
        if not self.holds():
            return None
        count, rows = len(self.layers), x.reshape(-1, x.shape[-1])
        first = self.layers[0]
        if self.down is None or first._disable_adapters:
            together = frozen_linear(rows, self.weight, None)
            made = together.view(*x.shape[:-1], count, -1).unbind(-2)
            return made
        if any(fused_lora.plain_adapter(layer, x) is None for layer in self.layers):
            return None
        assert self.up is not None
        place, again = fused_lora.used(self.place, x), recipe(x)
        # Where the gradients have a place, autograd only has to know that there is something to train.
        factors = self._factors if place is None else self._factors[:1]
        made = GroupedLora.apply(rows, self.weight, self.down, self.up, first.scaling[_NAME], again, place, *factors)
        return tuple(part.view(*x.shape[:-1], -1) for part in made)

    def _plainly(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The same in operations that a compiler takes apart by itself; whether it `holds` cannot be asked there."""
        first, count = self.layers[0], len(self.layers)
        parts = functional.linear(x, self.weight).chunk(count, dim=-1)
        if self.down is None or first._disable_adapters:
            return tuple(parts)
        if any(fused_lora.plain_adapter(layer, x) is None for layer in self.layers):
            return None
        inner = functional.linear(x, torch.cat(self._factors[:count]).to(x.dtype)).chunk(count, dim=-1)
        scale = first.scaling[_NAME]
        ups = [up.to(x.dtype) for up in self._factors[count:]]
        return tuple(a + functional.linear(b, up) * scale for a, b, up in zip(parts, inner, ups, strict=True))

    def holds(self) -> bool:
        """Whether the layers still compute with the common tensors: whoever moved or replaced one did not know them."""
        weight = self._bases[0].weight
        if weight.untyped_storage() is not self.weight.untyped_storage() or weight.requires_grad:
            return False
        if self.down is None:
            return True
        same = all(now is before for now, before in zip(self._weights(), self._factors, strict=True))
        return same and self._factors[0].untyped_storage() is self.down.untyped_storage()

    def _weights(self) -> list[Any]:
        # `module.weight` would look in three places first.
        return [holder._parameters["weight"] for holder in self._holders]


class GroupedLora(torch.autograd.Function):
    """`fused.LoraLinear` and `fused.HalfLoraLinear` for the G layers of a `Group`, without bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        again: Recipe,
        place: fused_lora.Place | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """G times `[N, out]`; `factors` are the parameters of which `down` and `up` are made, A's then B's."""
        ctx.scale, ctx.place, inner = scale, place, None
        if x.dtype is torch.float32:
            made = linear(x, _summed(weight, down, up, scale))
        else:
            down, up = (down.to(x.dtype), up.to(x.dtype)) if place is None else (place.down, place.up)
            inner = x @ down.t()
            made = x @ weight.t()
            _each(made, up).baddbmm_(_each(inner, up), up.transpose(1, 2), alpha=scale)
        keep(ctx, again, inner, weight, down, up)
        return made.view(len(x), len(up), -1).unbind(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the factors; theirs in float32."""
        x, inner, weight, down, up = kept(ctx)
        x, scale, place = x.reshape(-1, x.shape[-1]), ctx.scale, ctx.place
        full = x.dtype is torch.float32
        gradient = torch.cat(gradients, dim=-1)
        to_inner = gradient.new_empty(len(x), len(down))
        torch.bmm(_each(gradient, up), up, out=_each(to_inner, up))
        to_x = None
        if ctx.needs_input_grad[0] and full:
            to_x = linear(gradient, _summed(weight, down, up, scale).t())
        elif ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(to_inner, down, alpha=scale)
        inner = linear(x, down) if full else inner
        if place is not None:
            place.to_down.addmm_(to_inner.t(), x, alpha=scale)
            place.to_up.baddbmm_(_each(gradient, up).transpose(1, 2), _each(inner, up), alpha=scale)
            return to_x, *[None] * 7
        to_down = linear(to_inner.t(), x.t()).float()
        to_up = torch.bmm(_each(gradient, up).transpose(1, 2), _each(inner, up)).float()
        if scale != 1:
            to_down, to_up = to_down * scale, to_up * scale
        return to_x, *[None] * 6, *to_down.view(len(up), -1, x.shape[-1]).unbind(), *to_up.unbind()


class LeanAttention(Attention):
    """diffusers' attention as the UNets of Stable Diffusion use it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """`[B, T, C]`, and the text `[B, S, D]` -> `[B, T, C]`."""
        if attention_mask is not None or rest or type(self.processor) is not AttnProcessor2_0:
            made: torch.Tensor = super().forward(hidden_states, encoder_hidden_states, attention_mask, **rest)
            return made
        own = encoder_hidden_states is None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        group = self.group
        known = group is not None and group.layers[-1] is self.to_v and len(group.layers) == (3 if own else 2)
        shared = group(source) if known else None
        if shared is None:
            shared = (*((self.to_q(source),) if own else ()), self.to_k(source), self.to_v(source))
        if not own:
            shared = (self.to_q(hidden_states), *shared)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in shared)
        attended = _attention(query, key, value).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](attended))  # type: ignore[no-any-return]


class LeanResnet(ResnetBlock2D):
    """diffusers' resnet as the UNets of Stable Diffusion use it."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[B, C, h, w]` and the embedded timestep `[B, D]` -> `[B, C', h, w]`."""
        hidden = self.conv1(self.activated(input_tensor, self.norm1))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.activated(hidden, self.norm2)))
        short: torch.Tensor = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return short + hidden


_NAME = "default"


def _norm_silu(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return functional.silu(norm(x))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt d) v, `[B, heads, T, d]`. On a CPU torch's kernels for half precision take up to ten times
    as long as those for float32 where the sequence is short, and less where it is long."""
    if query.device.type == "cpu" and query.dtype is not torch.float32 and key.shape[-2] <= SHORT:
        made = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return made.to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value)


def _is_plain_attention(module: Any) -> bool:
    changes = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection", "add_k_proj")
    if type(module.processor) is not AttnProcessor2_0:
        return False
    return module.rescale_output_factor == 1 and not any(getattr(module, name, None) for name in changes)


def _is_plain_resnet(module: Any) -> bool:
    sampler = module.upsample is not None or module.downsample is not None
    embeds = module.time_emb_proj is not None and not module.skip_time_act and module.time_embedding_norm == "default"
    acts = type(module.nonlinearity) is nn.SiLU and all(type(n) is nn.GroupNorm for n in (module.norm1, module.norm2))
    return embeds and acts and not sampler and module.output_scale_factor == 1


def _can_share(layers: list[Any]) -> bool:
    """Whether layers are all plain, or all plain LoRA, with the same shape, rank and scale, and without bias."""
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    # A weight that is kept in few bits is a tensor of another type.
    if any(not isinstance(base, nn.Linear) or type(base.weight) is not nn.Parameter for base in bases):
        return False
    if any(base.bias is not None or base.weight.shape != bases[0].weight.shape for base in bases):
        return False
    if all(isinstance(layer, nn.Linear) for layer in layers):
        return True
    if any(type(layer) is not fused_lora.FusedLinear or list(layer.lora_A) != [_NAME] for layer in layers):
        return False
    return len({(len(layer.lora_A[_NAME].weight), layer.scaling[_NAME]) for layer in layers}) == 1


def _share(tensors: list[Any]) -> None:
    """Put tensors of equal shape into one piece of memory, one behind the other."""
    for tensor, part in zip(tensors, torch.stack([tensor.detach() for tensor in tensors]), strict=True):
        tensor.data = part


def _together(tensors: list[Any]) -> torch.Tensor:
    """`[G, ...]`: what was shared, as one tensor."""
    first = tensors[0].detach()
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def _each(rows: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`[N, G * n]` seen as `[G, N, n]`."""
    return rows.view(len(rows), len(up), -1).transpose(0, 1)


def _summed(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A of each layer, `[G * out, in]`."""
    apart = weight.view(*up.shape[:2], -1)
    return torch.baddbmm(apart, up, down.view(len(up), -1, apart.shape[-1]), alpha=scale).flatten(0, 1)
