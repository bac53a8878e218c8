"""A UNet's attention and resnet blocks in fewer operations, for training.

At batch 1 a GPU waits for the host to issue operations, so their number determines the time of a step.
`optimize_blocks` omits operations without effect, such as a division by 1 after each block and an inspection of the
processor's signature in each call. It fuses layers that read the same input into one product: q, k and v of
self-attention, k and v of cross-attention. Their weights and factors become slices of shared tensors; layers,
parameters and names stay the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from lorakit.engine import fused_lora, recompute
from lorakit.engine.onednn_linear import frozen_linear, linear
from lorakit.engine.quantized_weight import QuantizedWeight
from lorakit.engine.recompute import Recompute, get_recompute, load_for_backward, save_for_backward

# The name that PEFT gives the adapter.
_NAME = "default"
# Up to this many keys, attention in half precision is computed in float32 on a CPU.
MAX_KEYS_IN_FLOAT32 = 512


# Processors that `FusedAttention` replaces, and those that stay as they are.
_FUSED_PROCESSOR = AttnProcessor2_0
_OTHER_PROCESSORS = (JointAttnProcessor2_0,)


def unknown_block(unet: nn.Module) -> str | None:
    """The path and class of a block that this module cannot replace, because its class, processor or forward is not the
    one that the fused classes reproduce; None if there is none."""
    for path, module in unet.named_modules():
        if not isinstance(module, (ResnetBlock2D, Attention)):
            continue
        expected_class: Any = ResnetBlock2D if isinstance(module, ResnetBlock2D) else Attention
        if type(module) is not expected_class or "forward" in vars(module) or _differing_class() is expected_class:
            return f"{path}: {type(module).__name__}"
        if expected_class is Attention and type(module.processor) not in (_FUSED_PROCESSOR, *_OTHER_PROCESSORS):
            return f"{path}: {type(module.processor).__name__}"
    return None


@functools.cache
def _differing_class() -> type | None:
    """The class whose forward in the installed diffusers differs from the fused class, or None. They are compared once,
    on small blocks."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        x, time, text = torch.randn(1, 32, 4, 4), torch.randn(1, 16), torch.randn(1, 5, 24)
        sequence = x.flatten(2).transpose(1, 2)
        resnet = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16).eval()
        attention = Attention(query_dim=32, cross_attention_dim=24, heads=2, dim_head=16).eval()
        cases: list[tuple[Any, Any, tuple[torch.Tensor, ...]]] = [
            (resnet, FusedResnet, (x, time)),
            (attention, FusedAttention, (sequence, text)),
        ]
        for module, fused, inputs in cases:
            original_class = type(module)
            expected = module(*inputs)
            module.__class__ = fused
            try:
                agrees = torch.allclose(module(*inputs), expected, rtol=1e-4, atol=1e-5)
            except (AttributeError, RuntimeError, TypeError, ValueError):  # its attributes or arguments changed
                agrees = False
            if not agrees:
                return original_class
    return None


def optimize_blocks(unet: nn.Module, *, save_less: bool = False, channels_last: bool = False) -> None:
    """Replace the classes of a UNet's blocks by the fused ones. If there is an adapter, attach it first.

    Args:
        save_less: make frozen layers save less for the backward pass (`engine.recompute`); the host takes 7 % longer.
        channels_last: keep feature maps channels_last between convolutions and norms.
    """
    for path, module in unet.named_modules():
        if type(module) is ResnetBlock2D and _is_fusable_resnet(module):
            module.__class__ = FusedResnet
            module.save_less = save_less
        elif type(module) is Attention and _is_fusable_attention(module):
            module.__class__ = FusedAttention
            own = module.cross_attention_dim == module.query_dim and not module.is_cross_attention
            shared = [module.to_q, module.to_k, module.to_v] if own else [module.to_k, module.to_v]
            module.fused_qkv = FusedQKV(shared) if _can_share(shared) else None
        # The first norm of a resnet already saves the input of its shortcut.
        elif save_less and not path.endswith("conv_shortcut"):
            recompute.save_less(module)
    if channels_last:
        recompute.use_channels_last(unet)


class FusedQKV:
    """G layers that read the same input and have the same shape, rank and scale, computed in one product.

    Attributes:
        layers: the layers.
        weight: their frozen weights, `[G * out, in]`.
        down, up: their factors, `[G * r, in]` and `[G, out, r]`, float32; None without an adapter.
        half_copies: set by `FlatParameters` for a base in half precision.
    """

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._bases = [getattr(layer, "base_layer", layer) for layer in layers]
        weights = [base.weight for base in self._bases]
        _share_memory(weights)
        self.weight = _stacked_view(weights).flatten(0, 1)
        self.down: torch.Tensor | None = None
        self.up: torch.Tensor | None = None
        self.half_copies: fused_lora.HalfCopies | None = None
        self._holders: list[nn.Module] = []
        if isinstance(layers[0], fused_lora.FusedLinear):
            downs, ups = ([getattr(layer, name)[_NAME] for layer in layers] for name in ("lora_A", "lora_B"))
            self._holders = downs + ups
            for matrices in (downs, ups):
                _share_memory([matrix.weight for matrix in matrices])
        self._factors: list[Any] = []
        self.refresh()

    def refresh(self) -> bool:
        """Read the addresses of the factors again, after they moved. Return whether they are still adjacent."""
        self._factors, count = self._weights(), len(self.layers)
        sides = [self._factors[:count], self._factors[count:]] if self._factors else []
        if not all(map(_are_neighbours, sides)):
            return False
        if sides:
            self.down, self.up = _stacked_view(sides[0]).flatten(0, 1), _stacked_view(sides[1])
        return True

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """`[B, T, in]` -> one `[B, T, out]` for each layer; None if the caller must call the layers one by one."""
        if torch.compiler.is_compiling():
            return self._traceable(x)
        if not self.is_valid():
            return None
        count, rows = len(self.layers), x.reshape(-1, x.shape[-1])
        first = self.layers[0]
        if self.down is None or first._disable_adapters:
            product = frozen_linear(rows, self.weight, None)
            return product.view(*x.shape[:-1], count, -1).unbind(-2)
        if any(fused_lora.single_adapter(layer, x) is None for layer in self.layers):
            return None
        assert self.up is not None
        half_copies, x_recompute = fused_lora.active_copies(self.half_copies, x), get_recompute(x)
        # With half-precision copies, one parameter is enough to tell autograd that there are gradients to compute.
        factors = self._factors if half_copies is None else self._factors[:1]
        scale = first.scaling[_NAME]
        result = FusedQKVLora.apply(rows, self.weight, self.down, self.up, scale, x_recompute, half_copies, *factors)  # type: ignore[no-untyped-call]
        return tuple(part.view(*x.shape[:-1], -1) for part in result)

    def _traceable(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The same in operations that a compiler can trace; it cannot trace `is_valid`."""
        first, count = self.layers[0], len(self.layers)
        parts = functional.linear(x, self.weight).chunk(count, dim=-1)
        if self.down is None or first._disable_adapters:
            return tuple(parts)
        if any(fused_lora.single_adapter(layer, x) is None for layer in self.layers):
            return None
        inner = functional.linear(x, torch.cat(self._factors[:count]).to(x.dtype)).chunk(count, dim=-1)
        scale = first.scaling[_NAME]
        ups = [up.to(x.dtype) for up in self._factors[count:]]
        return tuple(a + functional.linear(b, up) * scale for a, b, up in zip(parts, inner, ups, strict=True))

    def is_valid(self) -> bool:
        """Whether the layers' weights are still slices of the shared tensors. They are not after a weight was moved or
        replaced."""
        weight = self._bases[0].weight
        if weight.untyped_storage() is not self.weight.untyped_storage() or weight.requires_grad:
            return False
        if self.down is None:
            return True
        same = all(current is factor for current, factor in zip(self._weights(), self._factors, strict=True))
        return same and self._factors[0].untyped_storage() is self.down.untyped_storage()

    def _weights(self) -> list[Any]:
        # `module.weight` would look into three dicts.
        return [holder._parameters["weight"] for holder in self._holders]


class FusedQKVLora(torch.autograd.Function):
    """`LoraLinear` and `HalfLoraLinear` of `engine.fused_lora` for the G layers of a `FusedQKV`, without bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        x_recompute: Recompute,
        half_copies: fused_lora.HalfCopies | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """G tensors `[N, out]`. `down` and `up` are views of the parameters `factors`: first all A, then all B."""
        ctx.scale, ctx.half_copies, inner = scale, half_copies, None
        if x.dtype is torch.float32:
            result = linear(x, _merge_weights(weight, down, up, scale))
        else:
            down, up = (down.to(x.dtype), up.to(x.dtype)) if half_copies is None else (half_copies.down, half_copies.up)
            inner = x @ down.t()
            result = x @ weight.t()
            _per_layer(result, up).baddbmm_(_per_layer(inner, up), up.transpose(1, 2), alpha=scale)
        save_for_backward(ctx, x_recompute, inner, weight, down, up)
        return result.view(len(x), len(up), -1).unbind(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the factors; those of the factors are float32."""
        x, inner, weight, down, up = load_for_backward(ctx)
        x, scale, half_copies = x.reshape(-1, x.shape[-1]), ctx.scale, ctx.half_copies
        full = x.dtype is torch.float32
        gradient = torch.cat(gradients, dim=-1)
        to_inner = gradient.new_empty(len(x), len(down))
        torch.bmm(_per_layer(gradient, up), up, out=_per_layer(to_inner, up))
        to_x = None
        if ctx.needs_input_grad[0] and full:
            to_x = linear(gradient, _merge_weights(weight, down, up, scale).t())
        elif ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(to_inner, down, alpha=scale)
        inner = linear(x, down) if full else inner
        if half_copies is not None:
            half_copies.to_down.addmm_(to_inner.t(), x, alpha=scale)
            half_copies.to_up.baddbmm_(_per_layer(gradient, up).transpose(1, 2), _per_layer(inner, up), alpha=scale)
            return to_x, *[None] * 7
        to_down = linear(to_inner.t(), x.t()).float()
        to_up = torch.bmm(_per_layer(gradient, up).transpose(1, 2), _per_layer(inner, up)).float()
        if scale != 1:
            to_down, to_up = to_down * scale, to_up * scale
        return to_x, *[None] * 6, *to_down.view(len(up), -1, x.shape[-1]).unbind(), *to_up.unbind()


class FusedAttention(Attention):  # type: ignore[misc]
    """diffusers' attention, for the cases that occur in the UNets of Stable Diffusion.

    Attributes:
        fused_qkv: the layers that read the same input, or None if they cannot be fused.
    """

    fused_qkv: FusedQKV | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """`[B, T, C]` and, for cross-attention, text `[B, S, D]` -> `[B, T, C]`."""
        if attention_mask is not None or rest or type(self.processor) is not AttnProcessor2_0:
            result: torch.Tensor = super().forward(hidden_states, encoder_hidden_states, attention_mask, **rest)
            return result
        own = encoder_hidden_states is None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        fused = self.fused_qkv
        applies = fused is not None and fused.layers[-1] is self.to_v and len(fused.layers) == (3 if own else 2)
        shared = fused(source) if fused is not None and applies else None
        if shared is None:
            shared = (*((self.to_q(source),) if own else ()), self.to_k(source), self.to_v(source))
        if not own:
            shared = (self.to_q(hidden_states), *shared)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in shared)
        attended = _attention(query, key, value).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](attended))  # type: ignore[no-any-return]


class FusedResnet(ResnetBlock2D):  # type: ignore[misc]
    """diffusers' resnet block, for the cases that occur in the UNets of Stable Diffusion.

    Attributes:
        save_less: recompute the outputs of its norms in the backward pass.
    """

    save_less: bool = False

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """`[B, C, h, w]` and the embedded timestep `[B, D]` -> `[B, C', h, w]`."""
        norm_silu = recompute.norm_silu if self.save_less else _norm_silu
        hidden = self.conv1(norm_silu(input_tensor, self.norm1))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(norm_silu(hidden, self.norm2)))
        shortcut: torch.Tensor = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return shortcut + hidden  # type: ignore[no-any-return]


def _norm_silu(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return functional.silu(norm(x))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt d) v, `[B, heads, T, d]`.

    On a CPU torch's half-precision kernels take up to ten times as long as those for float32 if the sequence is short,
    and less time if it is long.
    """
    if query.device.type == "cpu" and query.dtype is not torch.float32 and key.shape[-2] <= MAX_KEYS_IN_FLOAT32:
        result = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return result.to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value)


def _is_fusable_attention(module: Any) -> bool:
    changes = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "residual_connection", "add_k_proj")
    if type(module.processor) is not AttnProcessor2_0:
        return False
    return module.rescale_output_factor == 1 and not any(getattr(module, name, None) for name in changes)


def _is_fusable_resnet(module: Any) -> bool:
    sampler = module.upsample is not None or module.downsample is not None
    embeds = module.time_emb_proj is not None and not module.skip_time_act and module.time_embedding_norm == "default"
    acts = type(module.nonlinearity) is nn.SiLU and all(type(n) is nn.GroupNorm for n in (module.norm1, module.norm2))
    return embeds and acts and not sampler and module.output_scale_factor == 1


def _can_share(layers: list[Any]) -> bool:
    """Whether the layers are all linear or all LoRA, with the same shape, rank and scale, and without bias."""
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    if any(not isinstance(base, nn.Linear) or isinstance(base.weight, QuantizedWeight) for base in bases):
        return False
    if any(base.bias is not None or base.weight.shape != bases[0].weight.shape for base in bases):
        return False
    if all(isinstance(layer, nn.Linear) for layer in layers):
        return True
    if any(type(layer) is not fused_lora.FusedLinear or list(layer.lora_A) != [_NAME] for layer in layers):
        return False
    return len({(len(layer.lora_A[_NAME].weight), layer.scaling[_NAME]) for layer in layers}) == 1


def _share_memory(tensors: list[Any]) -> None:
    """Move tensors of equal shape into one allocation, one after the other."""
    for tensor, part in zip(tensors, torch.stack([tensor.detach() for tensor in tensors]), strict=True):
        tensor.data = part


def _stacked_view(tensors: list[Any]) -> torch.Tensor:
    """View tensors that share memory as one tensor `[G, ...]`."""
    first = tensors[0].detach()
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), first.storage_offset())  # type: ignore[no-any-return]


def _are_neighbours(tensors: list[Any]) -> bool:
    """Whether the tensors are adjacent in one allocation."""
    first = tensors[0]
    return all(
        tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + number * first.numel()
        for number, tensor in enumerate(tensors)
    )


def _per_layer(rows: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`[N, G * n]` viewed as `[G, N, n]`."""
    return rows.view(len(rows), len(up), -1).transpose(0, 1)


def _merge_weights(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A of each layer, `[G * out, in]`."""
    per_layer = weight.view(*up.shape[:2], -1)
    return torch.baddbmm(per_layer, up, down.view(len(up), -1, per_layer.shape[-1]), alpha=scale).flatten(0, 1)
