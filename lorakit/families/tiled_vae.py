"""Run the autoencoder strip by strip on pictures that do not fit on the device, with the result of the full picture.

A convolution reads only neighbours, so a strip of rows with a margin is enough. Group norm needs mean and variance of
the full picture, which a separate pass computes. Attention, at an eighth of the size, gets the full picture and some of
the queries at a time. Activations between layers are kept on the host. The device holds one strip and the small middle
block, an eighth of the memory for the full picture.

Tiles that are encoded separately and blended have other norms, and so other latents, than the full picture; strips do
not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from lorakit.engine import device_memory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

# Bytes of the largest activation of a strip; a handful of them are on the device at a time.
STRIP = 32 * 2**20
# Bytes per pixel to encode and decode the full picture, without the weights, if the first layer has 128 channels as in
# Stable Diffusion (counted by benchmarks/memory.py).
ENCODING, DECODING = 2560, 3072


def fits(vae: AutoencoderKL, pixels: int, bytes_per_pixel: int) -> bool:
    """Whether the device has memory for so many pixels at once. Only CUDA is checked; other devices have no other
    memory to use instead."""
    if vae.device.type != "cuda":
        return True
    free = device_memory.free_bytes(vae.device)
    return pixels * bytes_per_pixel * vae.config.block_out_channels[0] / 128 < 0.9 * free  # type: ignore[no-any-return]


def encode(vae: AutoencoderKL, pixels: torch.Tensor, strip: int = STRIP) -> torch.Tensor:
    """Pixels `[B, 3, H, W]` -> the posterior's mean and log variance `[B, 2 C, h, w]`, float32 on the VAE's device."""
    return torch.cat([_encode(vae, picture[None].cpu().float(), strip) for picture in pixels])


def decode(vae: AutoencoderKL, latents: torch.Tensor, strip: int = STRIP) -> torch.Tensor:
    """The VAE's latents `[B, C, h, w]` -> pixels `[B, 3, H, W]`, float32 on the CPU."""
    return torch.cat([_decode(vae, latent[None].cpu().float(), strip) for latent in latents])


def _encode(vae: AutoencoderKL, x: torch.Tensor, strip: int) -> torch.Tensor:
    encoder = vae.encoder
    x = _layer(x, encoder.conv_in, strip)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(x, resnet, strip)
        for sampler in block.downsamplers or ():
            x = _layer(x, sampler.conv, strip)
    x = _middle(x.to(vae.device), encoder.mid_block, strip).cpu()
    x = _layer(x, encoder.conv_out, strip, norm=encoder.conv_norm_out).to(vae.device)
    return x if vae.quant_conv is None else vae.quant_conv(x)


def _decode(vae: AutoencoderKL, x: torch.Tensor, strip: int) -> torch.Tensor:
    decoder = vae.decoder
    x = x if vae.post_quant_conv is None else vae.post_quant_conv(x.to(vae.device)).cpu()
    x = _layer(x, decoder.conv_in, strip)
    x = _middle(x.to(vae.device), decoder.mid_block, strip).cpu()
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(x, resnet, strip)
        for sampler in block.upsamplers or ():
            x = _layer(x, sampler.conv, strip, doubled=True)
    return _layer(x, decoder.conv_out, strip, norm=decoder.conv_norm_out)


def _middle(x: torch.Tensor, block: Any, strip: int) -> torch.Tensor:
    x = block.resnets[0](x, None)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = resnet(_attend(x, attention, strip), None)
    return x


def _attend(x: torch.Tensor, attention: Attention, strip: int) -> torch.Tensor:
    """Self-attention over a picture's positions. The queries are split, because some kernels for such wide heads
    materialize the attention matrix."""
    places = attention.group_norm(x.flatten(2)).transpose(1, 2)
    query, key, value = (
        projection(places).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for projection in (attention.to_q, attention.to_k, attention.to_v)
    )
    some = query.split(max(1, strip // (4 * places.shape[1])), dim=2)
    values = torch.cat([functional.scaled_dot_product_attention(part, key, value) for part in some], dim=2)
    output = attention.to_out[0](values.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
    return (output + x) / attention.rescale_output_factor  # type: ignore[no-any-return]


def _resnet(x: torch.Tensor, resnet: ResnetBlock2D, strip: int) -> torch.Tensor:
    inner = _layer(x, resnet.conv1, strip, norm=resnet.norm1)
    residual = x if resnet.conv_shortcut is None else _layer(x, resnet.conv_shortcut, strip)
    return _layer(
        inner, resnet.conv2, strip, norm=resnet.norm2, residual=residual, factor=1 / resnet.output_scale_factor
    )


def _layer(
    x: torch.Tensor,
    conv: Any,
    strip: int,
    *,
    norm: nn.GroupNorm | None = None,
    residual: torch.Tensor | None = None,
    factor: float = 1.0,
    doubled: bool = False,
) -> torch.Tensor:
    """(conv(silu(norm(x))) + residual) * factor for a picture on the host, a few rows at a time. With `doubled` the
    picture is upsampled by 2 first."""
    device, scale = conv.weight.device, 2 if doubled else 1
    channel = None if norm is None else _affine(x, norm, device, strip)
    height, width = x.shape[2] * scale, x.shape[3] * scale
    (size, stride, margin) = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    # diffusers' downsampler has no padding: it pads one row below and one column to the right itself.
    after = 1 if stride == 2 and margin == 0 else margin
    out_height, out_width = ((side + margin + after - size) // stride + 1 for side in (height, width))
    output = x.new_empty(1, conv.out_channels, out_height, out_width)
    rows = max(1, strip // (4 * max(conv.in_channels * stride**2, conv.out_channels) * out_width))
    for start in range(0, out_height, rows):
        end = min(start + rows, out_height)
        first, last = start * stride - margin, (end - 1) * stride - margin + size
        top, bottom = max(first, 0), min(last, height)
        piece = x[:, :, top // scale : -(-bottom // scale)].to(device)
        if channel is not None:
            piece = functional.silu(piece * channel[0] + channel[1])
        if doubled:
            piece = functional.interpolate(piece, scale_factor=2.0, mode="nearest")
            piece = piece.narrow(2, top % 2, bottom - top)
        piece = functional.pad(piece, (margin, after, top - first, last - bottom))
        piece = functional.conv2d(piece, conv.weight, conv.bias, stride)
        if residual is not None:
            piece = (piece + residual[:, :, start:end].to(device)) * factor
        output[:, :, start:end] = piece
    return output


def _affine(x: torch.Tensor, norm: nn.GroupNorm, device: torch.device, strip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group norm as a factor and an offset for each channel, `[1, C, 1, 1]`, from sums over the whole picture."""
    groups, count = norm.num_groups, x[0].numel() // norm.num_groups
    total, squares = torch.zeros(2, groups, dtype=torch.float64, device=device)
    for piece in x.split(max(1, strip // (4 * x.shape[1] * x.shape[3])), dim=2):
        values = piece.to(device).reshape(groups, -1)
        total += values.sum(1, dtype=torch.float64)
        squares += values.square().sum(1, dtype=torch.float64)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).add(norm.eps).sqrt()
    repeats = x.shape[1] // groups
    factor = norm.weight.double() / deviation.repeat_interleave(repeats)
    offset = norm.bias.double() - mean.repeat_interleave(repeats) * factor
    return factor.float().reshape(1, -1, 1, 1), offset.float().reshape(1, -1, 1, 1)
