"""`lorakit doctor`: report what this machine supports, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lorakit.cli.threads import of_user
from lorakit.core import install, registry
from lorakit.core.cache_dir import cache_dir
from lorakit.core.messages import Message
from lorakit.core.units import count
from lorakit.runs import nvidia
from lorakit.runs.launch import available_cores

# Name of each extra -> (module, purpose). `optional_extras` adds the extras of optimizers.
EXTRAS = {
    "ui": ("gradio", "the front end, `lorakit ui`"),
    "xformers": ("xformers", "memory.attention = xformers"),
    "heic": ("pillow_heif", "photos of phones in HEIC"),
    "clip": ("clip", "CLIP's vocabulary, for single files on a machine without network"),
    "tensorboard": ("tensorboard", "output.trackers = tensorboard"),
    "ray": ("ray", "`lorakit batch --ray`, on many machines"),
    "tune": ("optuna", "`lorakit tune`"),
    "onnx": ("onnxruntime", "`lorakit caption` with a tagger in ONNX"),
    "vlm": ("torchvision", "`lorakit caption` with SmolVLM or Qwen-VL"),
}
# Bytes of free disk space that a run with its checkpoints and pictures needs.
SMALLEST_FREE_DISK = 2 * 2**30


@dataclass(frozen=True)
class Line:
    """One finding. `state` is "ok", "note" or "bad"; `fix` says what to do."""

    name: str
    state: str
    detail: str
    fix: str = ""


def examine() -> list[Line]:
    """All findings, the most important first. Imports torch."""
    return [*versions(), *devices(), *extras(), *storage()]


def to_text(lines: Sequence[Line]) -> str:
    """The findings as text for a terminal."""
    marks = {"ok": "ok  ", "note": "note", "bad": "BAD "}
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{marks[line.state]} {line.name:{width}}  {line.detail}")
        if line.fix:
            rows.append(f"     {'':{width}}  {line.fix}")
    bad = [line.name for line in lines if line.state == "bad"]
    rows.append(Message("not ready: {names}", ", ".join(bad)) if bad else "ready")
    return "\n".join(rows)


def to_json(lines: Sequence[Line]) -> dict[str, Any]:
    """The findings as JSON values."""
    return {"ready": all(line.state != "bad" for line in lines), "findings": [asdict(line) for line in lines]}


def versions(
    requirements: Sequence[str] | None = None, installed: Callable[[str], str] = importlib.metadata.version
) -> list[Line]:
    """Compare the core packages with the versions that lorakit is tested with. The first line is Python's version.

    Args:
        requirements: requirement strings; by default those of the installed lorakit.
        installed: returns a package's version, or raises PackageNotFoundError.
    """
    lines = [
        Line("python", "ok", Message("{version} on {system}", platform.python_version(), platform.platform(terse=True)))
    ]
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("lorakit") or []
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line("lorakit", "note", "runs from a folder, not installed: versions cannot be compared"))
            return lines
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, requirement.specifier
        try:
            version = installed(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(
                Line(
                    name, "bad", Message("missing; lorakit needs {bounds}", bounds), install.command(f"{name}{bounds}")
                )
            )
            continue
        lines.append(
            Line(name, "ok", version)
            if bounds.contains(version, prereleases=True)
            else Line(
                name,
                "bad",
                Message("{version}; tested with {bounds}", version, bounds),
                install.command(f"{name}{bounds}"),
            )
        )
    return lines


def devices() -> list[Line]:
    """Report each device, whether this torch was built for it, whether it supports bf16, and the attention kernels."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return [Line("device", "bad", Message("torch does not import: {error}", error), install.command(nvidia.TORCH))]
    lines = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines += cuda_lines(
                f"cuda:{index}",
                properties.name,
                properties.total_memory,
                (properties.major, properties.minor),
                torch.cuda.get_arch_list(),
                torch.cuda.is_bf16_supported(including_emulation=False),
            )
        from torch.backends import cuda

        kernels = {
            "flash": cuda.flash_sdp_enabled(),
            "memory-efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
        }
        lines.append(Line("attention", "ok", "sdpa: " + ", ".join(name for name, on in kernels.items() if on)))
    elif torch.backends.mps.is_available():
        lines.append(Line("device", "note", "mps (Apple): trains in fp32; not tested by us"))
    else:
        lines.append(cpu_line(torch.get_num_threads()))
        lines.append(Line("precision", "ok", "fp32 (bf16 runs too, at less memory)"))
        lines.append(Line("attention", "ok", "sdpa"))
    return lines


def cpu_line(threads: int) -> Line:
    """The finding if torch computes on the CPU. Its state is "bad" if the machine has an NVIDIA card or its driver."""
    total = available_cores()
    detail = f"cpu, {count(threads, 'thread')}"
    set_to = Message("OMP_NUM_THREADS is set to {value}", of_user()) if of_user() else ""
    why = set_to or "the other cores were busy when the command started"
    detail += Message(" of {total}: {why}", total, why) if threads < total else ""
    if nvidia.is_hidden() or not nvidia.has_driver():
        return Line("device", "ok", detail)
    cards = nvidia.cards()
    names = (
        ", ".join(Message("{name} with driver {driver}", card.name, card.driver) for card in cards)
        or "an NVIDIA driver"
    )
    command = nvidia.torch_command(cards)
    if not nvidia.torch_has_cuda():
        return Line(
            "device",
            "bad",
            Message("{device}; {names} is installed, but this torch is built without CUDA", detail, names),
            command,
        )
    return Line(
        "device",
        "bad",
        Message("{device}; {names} is installed, but torch does not find it: update its driver", detail, names),
        command,
    )


def cuda_lines(
    device: str, name: str, memory: int, capability: tuple[int, int], architectures: Sequence[str], bf16: bool
) -> list[Line]:
    """Findings about one CUDA device.

    Args:
        device: e.g. "cuda:0".
        name: the card's name.
        memory: memory in bytes.
        capability: (major, minor) compute capability of the device.
        architectures: architectures of this torch build (`torch.cuda.get_arch_list()`).
        bf16: whether the device supports bf16 without emulation.
    """
    architecture = f"sm_{capability[0]}{capability[1]}"
    lines = [Line(device, "ok", f"{name}, {memory / 2**30:.0f} GiB, {architecture}")]
    if not _runs_on(capability, architectures):
        built = ", ".join(architectures) or "no CUDA device"
        fix = nvidia.torch_command([nvidia.Card(name, "", capability)])
        lines.append(
            Line(
                f"{device} kernels",
                "bad",
                Message("this torch is built for {built}, not for {name}", built, architecture),
                fix,
            )
        )
    lines.append(Line(f"{device} bf16", "ok", "yes") if bf16 else Line(f"{device} bf16", "note", "no; fp16 is used"))
    return lines


def optional_extras() -> dict[str, tuple[str, str]]:
    """`EXTRAS` and the extras of optimizers: name -> (module, purpose)."""
    modules: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for name, spec in registry.OPTIMIZERS.items():
        if spec.extra:
            modules[spec.extra] = spec.package
            names.setdefault(spec.extra, []).append(name)
    return EXTRAS | {
        extra: (modules[extra], f"optimizer.name = {', '.join(optimizers)}") for extra, optimizers in names.items()
    }


def extras(find: Callable[[str], Any] = importlib.util.find_spec) -> list[Line]:
    """Report for each extra whether it is installed, or the command that installs it."""
    lines = []
    for extra, (module, purpose) in optional_extras().items():
        if find(module) is not None:
            lines.append(Line(f"extra {extra}", "ok", Message("{module} is installed, for {purpose}", module, purpose)))
        else:
            fix = install.hint(extra)
            lines.append(
                Line(
                    f"extra {extra}",
                    "note",
                    Message("{module} is missing; it is needed only for {purpose}", module, purpose),
                    fix,
                )
            )
    return lines


def storage(folder: Path | None = None) -> list[Line]:
    """Report the free disk space for runs, and the size of the cache."""
    folder = Path.cwd() if folder is None else folder
    free = shutil.disk_usage(folder).free
    fits = free >= SMALLEST_FREE_DISK
    lines = [Line("disk", "ok" if fits else "bad", Message("{size:.1f} GiB free in {folder}", free / 2**30, folder))]
    cache = cache_dir()
    lines.append(
        Line("cache", "ok", Message("{folder}: {size:.0f} MiB; it may be deleted", cache, folder_size(cache) / 2**20))
    )
    return lines


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build for these architectures runs on a device of this compute capability.

    Machine code (sm_) runs on devices of the same major version and the same or a higher minor version. PTX (compute_)
    runs on devices of the same or any higher version.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[1] == "compute" and capability >= built:
            return True
        if match[1] == "sm" and capability[0] == built[0] and capability[1] >= built[1]:
            return True
    return False
