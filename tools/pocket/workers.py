"""Training on several one-thread processes: on a few CPU cores two of them beat one process with two threads."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn


@dataclass
class Worker:
    """One of `world` equal processes of one machine. Rank 0 alone writes."""

    rank: int = 0
    world: int = 1
    folder: Path = Path()  # of this launch: where the workers show each other their numbers
    barrier: Barrier | None = None

    @property
    def device(self) -> torch.device:
        """A GPU serves one worker; several workers are for CPU cores."""
        return torch.device("cuda" if self.world == 1 and torch.cuda.is_available() else "cpu")

    def autocast(self, bf16: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Replace every float32 tensor by its mean over the workers, equal to the bit in all of them.

        Through files that all of them map: one machine needs no network for it, and no threads of a network library
        that may outlive the process.
        """
        if self.world == 1:
            return
        buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size = buffer.numel()
        self._shared(self.rank, size).copy_(buffer)
        self.wait()
        mean = torch.stack([self._shared(rank, size) for rank in range(self.world)]).mean(dim=0)
        self.wait()  # nobody writes again while another still reads
        for tensor, piece in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def _shared(self, rank: int, size: int) -> Tensor:
        return torch.from_file(str(self.folder / f"{rank}-{size}"), shared=True, size=size)

    def wait(self) -> None:
        """Until all workers are here."""
        if self.barrier is not None:
            self.barrier.wait()

    def say(self, text: str) -> None:
        if self.first:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _enter(
    rank: int, world: int, folder: Path, barrier: Barrier, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    target(Worker(rank, world, folder, barrier), *args)


def launch(target: Callable[..., None], processes: int, *args: Any) -> None:
    """Run `target(worker, *args)` in this process, or in `processes` new ones that average their gradients."""
    if processes == 1:
        target(Worker(), *args)
        return
    barrier = torch.multiprocessing.get_context("spawn").Barrier(processes)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_enter, (processes, Path(folder), barrier, target, args), nprocs=processes)


def save(value: object, file: Path) -> None:
    """Save the state atomically."""
    partial = file.with_suffix(file.suffix + ".partial")
    torch.save(value, partial)
    partial.replace(file)


@dataclass
class Run:
    """Base class of all stages: AdamW, schedule, average of the weights, progress, and a state file to resume from."""

    worker: Worker
    modules: dict[str, nn.Module]
    file: Path
    total: int  # pictures, over all workers
    batch: int  # per worker
    rate: float
    seed: int
    bf16: bool = True
    decay: float = 0.999
    save_seconds: float = 120.0
    every: int = 1  # steps between two meetings of the workers
    position: int = 0
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self._last_save = self._last_report = self._tick = time.monotonic()
        if self.file.exists():
            state = torch.load(self.file, map_location=self.worker.device, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = [t.to(p.device) for t, p in zip(state["average"], self.parameters, strict=True)]
            self.position, self.seconds = state["position"], state["seconds"]
            self.worker.say(f"{self.file.stem}: going on at {self.position} of {self.total}")

    @property
    def is_finished(self) -> bool:
        return self.position >= self.total

    @property
    def generator(self) -> torch.Generator:
        """A function of seed, position and worker: a resumed run draws what it would have drawn."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.position) * 64 + self.worker.rank)

    def step(self, loss: Tensor) -> None:
        """Backward, update, and agree with the other workers.

        With `every` 1 they average their gradients. With more, each goes its own way for so many steps and then they
        average their weights: on busy cores they would else wait for each other in every step.
        """
        self.optimizer.zero_grad()
        loss.backward()
        if self.every == 1:
            self.worker.average([p.grad for p in self.parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (self.position + 1) / (0.03 * self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, self.position / self.total)))
        self.optimizer.step()
        self.position += self.batch * self.worker.world
        step = self.position // (self.batch * self.worker.world)
        synchronized = step % self.every == 0 or self.is_finished
        if synchronized:
            weights = [p.detach() for p in self.parameters]
            if self.every > 1:
                self.worker.average(weights)
            decay = min(self.decay, (1 + step) / (10 + step)) ** self.every
            torch._foreach_lerp_(self.average, weights, 1 - decay)
        self._after(synchronized)

    def _after(self, synchronized: bool) -> None:
        now = time.monotonic()
        self.seconds, self._tick = self.seconds + now - self._tick, now
        if not self.worker.first:
            return
        if now - self._last_report > 20 or self.is_finished:
            self._last_report = now
            tail = " ".join(f"{name} {value:.4f}" for name, value in self.numbers.items())
            self.worker.say(
                f"{self.file.stem}: {self.position}/{self.total} {self.position / max(self.seconds, 1e-6):.0f}/s {tail}"
            )
        if synchronized and (now - self._last_save > self.save_seconds or self.is_finished):
            self._last_save = now
            self.save()

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        values = {
            "modules": state,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "position": self.position,
            "seconds": self.seconds,
        }
        save(values, self.file)

    def note(self, **numbers: float) -> None:
        """Smoothed numbers for the progress line."""
        for name, value in numbers.items():
            self.numbers[name] = 0.98 * self.numbers.get(name, value) + 0.02 * value

    def use_average(self) -> None:
        """Put the averaged weights into the modules: what is exported."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(mean)
