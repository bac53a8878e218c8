"""Compare the memory that `lorakit check` predicts for a training step with the memory of the step's tensors.

    python benchmarks/memory.py [--quick] [--real] [--json FILE]

The step runs on the true architectures with fake tensors, which have shapes and lifetimes but no values. Each storage
counts from its allocation until its last reference is gone. The result is the exact peak of live tensor bytes, even
for SDXL at 1024 px on a laptop, in seconds. It does not include the kernels' workspace, the allocator's rounding and
the CUDA context. `--real` also runs one SD1.5 step with values on the CPU; both counts must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit import adapters, config
from lorakit.adapters import targets
from lorakit.core.layer_names import canonical
from lorakit.engine import device as devices, quantized_kernels, quantized_weight
from lorakit.families import tiled_vae
from lorakit.runs import memory_estimate, plan
from lorakit.training.optimizer_step import OptimizerStep

GIB, MIB = 2**30, 2**20
# Name, resolution, batch, target modules, gradient checkpointing, storage of the base (and "streamed" if it is).
# A number for gradient checkpointing is a memory limit in GiB, which decides how many blocks use it.
CASES = [
    ("sd15", 512, 1, "attention", False, "full"),
    ("sd15", 512, 1, "attention", True, "full"),
    ("sd15", 512, 1, "attention", True, "int8"),
    ("sd15", 512, 1, "attention", True, "nf4"),
    ("sdxl", 1024, 1, "attention", False, "full"),
    ("sdxl", 1024, 1, "attention", True, "full"),
    ("sdxl", 1024, 1, "attention", True, "int8"),
    ("sdxl", 1024, 1, "attention", True, "nf4"),
    ("sd15", 512, 1, "linear", True, "nf4"),
    ("sdxl", 1024, 1, "linear", True, "nf4"),
    ("sd15", 512, 1, "linear+conv", False, "full"),
    ("sd15", 512, 4, "attention", False, "full"),
    ("sd15", 512, 4, "attention", True, "full"),
    ("sd21", 768, 1, "attention", False, "full"),
    ("sd21", 768, 1, "attention", True, "full"),
    ("sdxl", 512, 1, "attention", True, "full"),
    ("sdxl", 1024, 1, "linear+conv", False, "full"),
    ("sdxl", 1024, 2, "linear", True, "full"),
    ("sdxl", 1024, 1, "attention", 8.0, "full"),
    ("sdxl", 1024, 1, "attention", 7.0, "full"),
    ("sdxl", 1024, 1, "attention", 5.0, "int8"),
    ("sd15", 512, 4, "linear", 3.0, "full"),
    ("sd15", 512, 1, "attention", True, "full streamed"),
    ("sd15", 512, 1, "attention", True, "int8 streamed"),
    ("sdxl", 1024, 1, "attention", True, "full streamed"),
    ("sdxl", 1024, 1, "attention", True, "int8 streamed"),
]
# The VAE of SD1.5, SD2.1 and SDXL.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}

# Width, layers and activation function of the text encoders. The last output is not counted, nor its projection.
CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G = (768, 12, "quick_gelu"), (1024, 23, "gelu"), (1280, 32, "gelu")
TEXT_ENCODERS = {"sd15": [CLIP_L], "sd21": [OPEN_CLIP_H], "sdxl": [CLIP_L, OPEN_CLIP_G]}


@dataclass
class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations create in its context: `now` and the `peak`.

    With a `device` it counts only the storages on that device.
    """

    now: int = 0
    peak: int = 0
    device: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results."""
        if quantized_weight.QuantizedWeight in types:
            return NotImplemented  # the weight is dequantized first, and the full tensor must be counted
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._storages or self.device not in ("", tensor.device.type):
            return
        self._storages.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size).atexit = False

    def _gone(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def fake(on: bool = True) -> Iterator[None]:
    """Create fake tensors in this context, if `on`."""
    with FakeTensorMode() if on else contextlib.nullcontext():
        yield
    quantized_kernels._value_pairs.cache_clear()


def main() -> None:
    """Measure, predict, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SD1.5 only, four cases")
    parser.add_argument("--real", action="store_true", help="one SD1.5 step with values too, to check the count")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    arguments = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows = []
    print(f"{'bf16, rank 16':<46}{'weights':>9}{'step':>9}{'predicted':>11}{'off':>8}   GiB")
    for case in CASES[:4] if arguments.quick else CASES:
        settings = run_config(*case[1:])
        measured, predicted = measure(case[0], settings), predict(case[0], settings)
        how = {False: "", True: "checkpointing, "}.get(case[4], f"within {case[4]:g} GiB, ")
        name = f"{case[0]} {case[1]} px x {case[2]}, {case[3]}, {how}{case[5]}"
        off = predicted / measured["peak"] - 1
        print(
            f"{name:<46}{measured['base'] / GIB:>9.2f}{measured['peak'] / GIB:>9.2f}{predicted / GIB:>11.2f}{off:>8.1%}"
        )
        rows.append({"name": name, "value": measured["peak"] / GIB, "unit": "GiB", "ratio": 1 + off})
        if "traffic" in measured:
            print(f"{'  copied from the host in the step':<46}{measured['traffic'] / GIB:>18.2f}")
            rows.append({"name": f"{name}, copied", "value": measured["traffic"] / GIB, "unit": "GiB", "ratio": None})
    if arguments.real:
        settings = run_config(512, 1, "attention", True, "nf4")
        counted, real = (measure("sd15", settings, real=real)["peak"] for real in (False, True))
        print(f"sd15, checkpointing, nf4: {counted:,} bytes on fake tensors, {real:,} with values")
        rows.append({"name": "sd15 with values", "value": real / GIB, "unit": "GiB", "ratio": counted / real})
    for side in (512, 1024):
        for what, count in encoding(side).items():
            print(f"autoencoder, {what} {side} px: {count / GIB:.2f} GiB, {count / side**2:.0f} bytes a pixel")
            rows.append({"name": f"{what} {side} px", "value": count / GIB, "unit": "GiB", "ratio": None})
    for name, modules in [(name, modules) for name in TEXT_ENCODERS for modules in ("attention", "linear")]:
        counted, predicted = reading(name, run_config(512, 1, modules, False, "full"))
        print(f"{name}, {modules}: a text takes {counted / MIB:.1f} MiB, predicted {predicted / MIB:.1f}")
        rows.append(
            {"name": f"text, {name}, {modules}", "value": counted / MIB, "unit": "MiB", "ratio": predicted / counted}
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def run_config(resolution: int, batch: int, modules: str, checkpointing: bool | float, storage: str) -> config.Config:
    """Return the config of a measured step."""
    kind, _, streamed = storage.partition(" ")
    settings = {
        "train.steps": 1,
        "train.batch_size": batch,
        "data.resolution": resolution,
        "adapter.target_modules": modules,
        "memory.device": "cuda",
        "memory.mixed_precision": "bf16",
        "memory.base_storage": kind,
        "memory.stream_base": bool(streamed),
    }
    if isinstance(checkpointing, bool):
        settings["memory.gradient_checkpointing"] = checkpointing
    else:
        # The limit of a card also includes the CUDA context and kernels; this benchmark counts only tensors.
        settings["memory.limit_gib"] = checkpointing + memory_estimate.RUNTIME_BYTES["cuda"] / GIB
    return config.load(None, settings)


def predict(name: str, settings: config.Config) -> int:
    """Return the prediction of `lorakit check` for the same step, without the memory of Python and torch."""
    parts = memory_estimate.training(settings, *outlined(name, settings), "cuda")
    return sum(size for part, size in parts.items() if part != "runtime")


def outlined(name: str, settings: config.Config) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return the facts of a base on which its memory depends, and component -> (adapted layers, trained weights)."""
    family = {"sd15": "sd1", "sd21": "sd2"}.get(name, name)
    info = SimpleNamespace(family=family, layers=layers(name), downscale=8, text_tokens=77, bytes={})
    selected = targets.select(info.family, info.layers, settings.adapter.target_modules, False)
    return info, plan.count_weights(selected, info.layers, settings.adapter)


def encoding(side: int) -> dict[str, int]:
    """Return the bytes that the VAE needs for a picture in addition to its weights: whole and in strips.

    For strips only the bytes on the device are counted. Fake tensors can be on CUDA without a card.
    """
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE).eval().requires_grad_(False)
    peaks = {}
    for strip, device in (("", "cpu"), (" by strips", "cuda")):
        with fake(), Live(device=device) as live, torch.no_grad():
            give_values(vae)
            for part in vae.modules():
                for name, old in part._parameters.items():
                    if old is not None:
                        new = torch.empty(old.shape, device=device)
                        part._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
            inside = {"encoding": torch.empty(1, 3, side, side), "decoding": torch.empty(1, 4, side // 8, side // 8)}
            for what, picture in inside.items():
                before = live.peak = live.now
                if strip:
                    (tiled_vae.encode if what == "encoding" else tiled_vae.decode)(vae, picture)
                else:
                    (vae.encode if what == "encoding" else vae.decode)(picture)
                peaks[f"{what}{strip}"] = live.peak - before
    return peaks


def reading(name: str, settings: config.Config) -> tuple[int, int]:
    """Return the bytes that trained text encoders save for the backward pass for each text: counted and predicted."""
    settings = replace(settings, adapter=replace(settings.adapter, train_text_encoder=True))
    dtype = devices.PRECISIONS[settings.memory.mixed_precision]
    encoders = {}
    for number, (width, depth, activation) in enumerate(TEXT_ENCODERS[name]):
        shape = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            hidden_act=activation,
        )
        with torch.device("meta"):
            encoders["text_encoder" + "_2" * number] = CLIPTextModel(shape).to(dtype).eval().requires_grad_(False)
    info, _ = outlined(name, settings)
    info.layers |= {
        canonical(key, path): tuple(layer.weight.shape)
        for key, encoder in encoders.items()
        for path, layer in encoder.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    unet = outline(name, settings, dtype)
    family = SimpleNamespace(
        info=info, denoiser=unet, text_encoders=encoders, plain=False, modules=lambda: {"unet": unet, **encoders}
    )
    adapters.attach(family, settings.adapter)
    counted = 0
    with fake(), common.attention_as_on_a_card():
        for encoder in encoders.values():
            del encoder.get_submodule("embeddings").position_ids  # a buffer on the meta device
            give_values(encoder)
            places, live = torch.arange(77)[None], {}
            for texts in (1, 2):
                with Live() as live[texts]:
                    states = encoder(torch.zeros(texts, 77, dtype=torch.long), position_ids=places)[0]
                    result = states.sum()
                    del states
                    live[texts].peak = live[texts].now
                    del result
            counted += live[2].peak - live[1].peak
    selected = targets.select(info.family, info.layers, settings.adapter.target_modules, True)
    modules = plan.count_weights(selected, info.layers, settings.adapter)
    without = {key: value for key, value in modules.items() if key == "unet"}
    predicted = [memory_estimate.training(settings, info, each, "cuda")["activations"] for each in (modules, without)]
    return counted, predicted[0] - predicted[1]


def measure(name: str, settings: config.Config, *, real: bool = False) -> dict[str, int]:
    """Return the bytes of one optimizer step: {"peak", "base"}, and "traffic" from the host if the base is streamed.

    One step before it creates the optimizer's state. With streaming, two more steps record the order of the weights.
    The part of a streamed base in host memory is not counted.
    """
    dtype = devices.PRECISIONS[settings.memory.mixed_precision]
    batch, side = settings.train.batch_size, settings.data.resolution // 8
    unet = outline(name, settings, dtype)
    family = SimpleNamespace(
        info=SimpleNamespace(family="sdxl" if name == "sdxl" else "sd1"),
        denoiser=unet,
        text_encoders={},
        plain=False,
        gradient_scale=1.0,
        modules=lambda: {"unet": unet},
        device=torch.device("cpu"),
        dtype=dtype,
    )
    base = quantized_weight.storage_nbytes(unet)
    adapter = adapters.attach(family, settings.adapter)
    blocks = memory_estimate.recomputed_blocks(settings, *outlined(name, settings), "cuda")
    with fake(not real), common.attention_as_on_a_card(), Live() as live:
        give_values(unet)
        stream = None
        if settings.memory.stream_base:
            stream = quantized_weight.store_layers(unet, settings.memory.base_storage, "cpu", offload=True)
            base = sum(p.nbytes for p in unet.parameters() if not isinstance(p, quantized_weight.QuantizedWeight))
            base -= sum(p.nbytes for p in adapter.parameters().values())
        host = 0 if stream is None else stream.host_bytes
        adapters.optimize_blocks(family, save_less=memory_estimate.use_save_less(settings, "cuda"))
        devices.gradient_checkpointing(family, blocks)
        noisy = torch.randn(batch, 4, side, side)
        states = torch.randn(batch, 77, common.unet_config(name)["cross_attention_dim"])
        added = {"text_embeds": torch.randn(batch, 1280).to(dtype), "time_ids": torch.ones(batch, 6).to(dtype)}
        more = {"added_cond_kwargs": added} if name == "sdxl" else {}
        steps = torch.full((batch,), 500)

        def loss(index: int) -> torch.Tensor:
            predicted = unet(noisy.to(dtype), steps, states.to(dtype), return_dict=False, **more)[0]
            return (predicted.float() - noisy).square().mean()

        step: Any = SimpleNamespace(family=family, adapter=adapter, loss=loss, generators={})
        update = OptimizerStep(settings, step, 2, print)
        for number in range(2 if stream is None else 4):
            live.peak = live.now
            copied = 0 if stream is None else stream.bytes_copied
            update(number)
        result = {"peak": live.peak - host, "base": base}
        if stream is not None:
            result["traffic"] = stream.bytes_copied - copied
    return result


def outline(name: str, settings: config.Config, dtype: torch.dtype) -> Any:
    """Return the frozen UNet on the meta device, with the storage of the config unless it is streamed."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**common.unet_config(name)).to(dtype).eval().requires_grad_(False)
    if settings.memory.base_storage != "full" and not settings.memory.stream_base:
        quantized_weight.store_layers(unet, settings.memory.base_storage, "meta")
    return unet


def give_values(module: Any) -> None:
    """Move a module from the meta device to the CPU with small random values, or with none on fake tensors."""

    def fill(old: torch.Tensor) -> torch.Tensor:
        if old.dtype.is_floating_point:
            return torch.randn(old.shape, dtype=old.dtype).mul_(0.02)
        return torch.zeros(old.shape, dtype=old.dtype)

    for part in module.modules():
        for name, old in part._parameters.items():
            if isinstance(old, quantized_weight.QuantizedWeight):
                new = quantized_weight.QuantizedWeight(fill(old.qdata), fill(old.scales), old.scheme, tuple(old.shape))
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
            elif old is not None:
                part._parameters[name] = torch.nn.Parameter(fill(old), requires_grad=old.requires_grad)
        assert not [name for name, buffer in part._buffers.items() if buffer is not None], "no buffers are expected"


def layers(name: str) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> weight shape of a UNet's layers, as `families.describe` does."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**common.unet_config(name))
    return {
        canonical("unet", path): tuple(layer.weight.shape)
        for path, layer in unet.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }


if __name__ == "__main__":
    main()
