"""NVIDIA cards of this machine, and whether the installed torch supports them. torch is not imported."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.core import install
from lorakit.core.messages import Message

# Where a driver shows: Linux, WSL 2, Windows.
DRIVER_FILES = (
    Path("/proc/driver/nvidia/version"),
    Path("/usr/lib/wsl/lib/libcuda.so.1"),
    Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"),
)
TORCH = "torch>=2.6,<2.14"
# PyTorch's builds by CUDA version (RELEASE.md, "PyTorch CUDA Support Matrix", 2.9 to 2.14): CUDA 13 begins with Turing
# and needs driver 580; 12.6 has Maxwell to Hopper and runs on older drivers.
CURRENT, LEGACY = "cu130", "cu126"
CURRENT_CAPABILITY, CURRENT_DRIVER = (7, 5), 580
BF16_CAPABILITY = (8, 0)
INDEX = "https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Card:
    """A card as its driver describes it.

    Attributes:
        capability: (major, minor) compute capability, or None if the driver is too old to report it.
        driver: driver version, for example "581.29".
    """

    name: str
    driver: str
    capability: tuple[int, int] | None = None


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed, by its files. A card is there then, most likely."""
    return any(path.exists() for path in DRIVER_FILES) or shutil.which("nvidia-smi") is not None


def is_hidden() -> bool:
    """Whether the environment hides every card from torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def visible() -> list[str]:
    """The cards that torch may use, each as `CUDA_VISIBLE_DEVICES` names it."""
    numbers = [str(number) for number in range(len(cards()))]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is None:
        return numbers
    return [card for card in hidden.split(",") if card not in ("", "-1")][: len(numbers)]


@functools.cache
def cards(timeout: float = 20.0) -> list[Card]:
    """The output of nvidia-smi; empty if it is missing, fails or takes longer than `timeout` seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):
        try:
            result = subprocess.run(
                [program, f"--query-gpu={fields}", "--format=csv,noheader"],
                capture_output=True,
                timeout=timeout,
                check=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return [_card(line) for line in result.stdout.splitlines() if line.count(",")]
    return []


def free_bytes(timeout: float = 5.0) -> int | None:
    """Free bytes of the card, of several cards the least; None if nvidia-smi does not report them."""
    program = shutil.which("nvidia-smi")
    if program is None or is_hidden():
        return None
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, timeout=timeout, check=True, text=True)
        return min(int(line) * 2**20 for line in result.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


@dataclass(frozen=True)
class Reading:
    """The state of a card: bytes used and total, utilization in percent, temperature in degrees Celsius. A value that
    the driver does not report is None."""

    name: str
    used: int | None
    total: int | None
    load: int | None
    temperature: int | None


class Monitor:
    """Readings of all cards, updated in a separate thread at most every `every` seconds, so that no caller waits for a
    hanging driver. Without nvidia-smi there are no readings, and no thread starts."""

    FIELDS = "name,memory.used,memory.total,utilization.gpu,temperature.gpu"

    def __init__(self, every: float = 2.0):
        self.every, self._due, self._readings = every, 0.0, list[Reading]()
        self._lock = threading.Lock()

    def latest(self) -> list[Reading]:
        """The last readings, at once; newer ones are on their way where these are old."""
        program = shutil.which("nvidia-smi")
        if program is not None and time.monotonic() >= self._due and self._lock.acquire(blocking=False):
            threading.Thread(target=self._read, args=(program,), daemon=True).start()
        return self._readings

    def _read(self, program: str) -> None:
        query = [program, f"--query-gpu={self.FIELDS}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(query, capture_output=True, timeout=20, check=True, text=True, errors="replace")
            self._readings = [_reading(line) for line in result.stdout.splitlines() if line.count(",") == 4]
        except (OSError, subprocess.SubprocessError):
            self._readings = []
        finally:
            self._due = time.monotonic() + self.every
            self._lock.release()


def _reading(line: str) -> Reading:
    name, *rest = (field.strip() for field in line.split(","))
    used, total, load, temperature = (int(text) if text.isdigit() else None for text in rest)
    mib = 2**20
    return Reading(name, used and used * mib, total and total * mib, load, temperature)


def torch_version() -> str:
    """Version of the installed torch; "" without torch."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_has_cuda() -> bool:
    """Whether the torch that is installed is a CUDA or ROCm build, by its file version.py; True where that says
    nothing."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path((spec.origin if spec else None) or "").with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "+cpu" not in torch_version()
    builds = dict(re.findall(r"^(cuda|hip)\b[^=\n]*= *(.*)$", text, re.MULTILINE))
    return not builds or any(value.strip() != "None" for value in builds.values())


def torch_command(machine: list[Card] | None = None) -> str:
    """The command that replaces this torch with a build that supports the cards.

    Args:
        machine: the cards; by default the driver is asked.
    """
    machine = cards() if machine is None else machine
    legacy = any(_needs_legacy(card) for card in machine)
    index = f"--force-reinstall --index-url {INDEX}{LEGACY if legacy else CURRENT}"
    return install.command(TORCH, options=index)


def is_expected() -> bool:
    """Whether a torch that is built for it should see a card here."""
    return torch_has_cuda() and has_driver() and not is_hidden()


def unused() -> str | None:
    """A line for a person whose card this torch cannot use because it is a CPU build, or None."""
    if sys.platform == "darwin" or is_hidden() or not torch_version() or torch_has_cuda() or not has_driver():
        return None
    return Message(
        "an NVIDIA driver is installed, but torch {version} is built without CUDA: it computes on the CPU, "
        "many times slower; for the card: {command}",
        torch_version(),
        torch_command(),
    )


def _needs_legacy(card: Card) -> bool:
    """Whether the card or its driver is too old for the current CUDA build, and not too new for the legacy one."""
    major = card.driver.partition(".")[0]
    old_driver = major.isdigit() and int(major) < CURRENT_DRIVER
    if card.capability is None:
        return old_driver
    return card.capability < CURRENT_CAPABILITY or (old_driver and card.capability < (10, 0))


def _card(line: str) -> Card:
    """A card from one line of nvidia-smi's CSV; its name may hold no comma."""
    name, driver, *rest = (field.strip() for field in line.split(","))
    match = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
    return Card(name, driver, (int(match[1]), int(match[2])) if match else None)


def lacks_bf16() -> bool:
    """Whether it is sure that no card here computes in bf16, which begins with Ampere."""
    capabilities = [card.capability for card in cards()]
    return bool(capabilities) and all(each is not None and each < BF16_CAPABILITY for each in capabilities)
