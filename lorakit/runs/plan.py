"""The plan of a run: its steps, memory and time, from the config, the base's layer shapes and the photos. No torch.

Layer shapes give the exact number of multiplications; memory and time follow from them with factors that were fitted
once, named below with where they come from. They are estimates and are called so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.adapters import targets
from lorakit.config import (
    DEVICE_MISSING,
    OFFLOAD_NEEDS_CUDA,
    AdapterConfig,
    Config,
    lr_schedule,
    sample_prompts,
)
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.core.units import count, duration, gibibytes, millions
from lorakit.data import captions, holdout
from lorakit.families.facts.distilled import complete
from lorakit.runs import launch, memory_estimate, nvidia, plan_lines, whole_model
from lorakit.runs.plan_lines import run_length

if TYPE_CHECKING:
    from lorakit.data.checks import Report
    from lorakit.families.describe import BaseInfo

# A training step in forward passes: 1 forward and 1.2 backward (only the adapter has weight gradients), and with
# gradient checkpointing another 0.7.
PASSES, PASSES_WITH_CHECKPOINTING = 2.2, 2.95
# On a CPU: the share of a large matrix product's speed that a UNet reaches, and the fixed cost of a layer's kernels in
# a forward pass, in seconds. Fitted to a UNet of 132 layers at batch 1, 8 and 16, one thread of an EPYC of 2023.
CPU_SHARE, CPU_LAYER_SECONDS = 0.55, 1.4e-4
# Smaller latents gain little from a second thread: 105 steps of the bundled base took 47 s on one and 43 s on two.
THREADED_SIDE = 32
# Steps below which a run is said to be short: what the bundled base took, as docs/pocket.md tells it.
MIN_STEPS = 200
SHORT_RUN = Message(
    "note: fewer than {few} steps teach little (the bundled base needed 200 for 16 pictures, 400 for 5 "
    "photos); make the run longer",
    MIN_STEPS,
)
COMPILED_ON_A_CPU = "memory.compile: a CPU compiles for minutes, and its steps were no faster when measured"
ASSUMED_STATE = (
    "optimizer: {name} is not known to lorakit; the memory estimate assumes {bytes} bytes of state for each weight"
)
SAME_SIZE = (
    "data.lower_resolutions: {one} and {two} are one size in this base, whose sides are multiples of {multiple}: leave "
    "one out"
)
STRENGTH = "strength: rank {rank}, alpha {alpha:g}, effective scale {scale:g}"
SIZES = ("base {size}", "adapter and optimizer {size}", "activations {size}", "runtime {size}")
MEMORY = "memory: about {total} on {device} ({parts}); {encoding} to encode the photos, {samples} to draw samples"
LONG_TEXTS = (
    "texts: all are padded to {tokens} tokens, as the longest needs; a pass of the UNet computes {share:.1%} more "
    "than with {short}; data.max_tokens = 75 would cut them"
)
# Events at regular intervals, for example sample grids, happen this many times in a run unless an option sets the
# interval.
PARTS = 5
# Share of the host's memory above which weights that are pinned in it leave others too little.
MAX_RAM_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """The plan of a run, made before the run starts.

    Attributes:
        modules: component -> (number of adapted layers, number of trained weights).
        photo_count, holdout_count: number of photos trained on, and number held out for validation.
        rows: rows of one epoch: each photo counts once for each repeat and resolution.
        batches: batches of one epoch; all images of a batch have the same size.
        steps: optimizer steps of the run.
        length: how `steps` was computed, in words.
        epochs: number of epochs.
        memory: part -> bytes at the peak of a training step, estimated.
        peaks: phase ("encoding", "training", "samples") -> bytes, estimated.
        seconds: estimated duration, or None if no reliable estimate exists.
        device: the device on which the run will train, as far as it can be determined without torch.
        recomputed: blocks of the UNet with gradient checkpointing.
        limit_gib: `memory.limit_gib`, which made these blocks use checkpointing.
        first_step: 0, or the step at which the run resumes.
        prior: how the run preserves the rest of the model, or "".
        triggers: how prompts name the subjects, or "".
        busy: that other programs use the CPU, or "".
        notes: how properties that the base does not declare were decided, one message each.
        layers: parts and layers with their own rank, alpha or learning rate, one line for each size and rate.
        host, ram: bytes of host memory for base weights that are not on the device, and total host memory; 0 if
            unknown.
    """

    base: str
    family: str
    prediction_type: str
    method: str
    rank: int
    alpha: float
    scale: float
    modules: dict[str, tuple[int, int]]
    photo_count: int
    holdout_count: int
    batches: int
    steps: int
    length: str
    epochs: float
    memory: dict[str, int]
    peaks: dict[str, int]
    seconds: float | None
    device: str
    rows: int = 0
    recomputed: int = 0
    limit_gib: float | None = None
    notes: tuple[str, ...] = ()
    host: int = 0
    ram: int = 0
    layers: tuple[str, ...] = ()
    first_step: int = 0
    prior: str = ""
    triggers: str = ""
    busy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `plan.json` and `--json`."""
        facts = {"photos" if key == "photo_count" else key: fact for key, fact in dataclasses.asdict(self).items()}
        return facts | {"modules": {part: {"modules": m, "parameters": p} for part, (m, p) in self.modules.items()}}

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        weights = "{part} {modules} ({weights} weights)"
        parts = [(part, count(number, "module"), millions(size)) for part, (number, size) in self.modules.items()]
        trained = join(", ", [Message(weights, *values) for values in parts])
        holdout = "photos: {count} to train on, {held} held out for validation"
        validation = holdout if self.holdout_count else "photos: {count} to train on, none held out"
        photos = [self.photo_count, *([self.holdout_count] if self.holdout_count else [])]
        strength = Message(STRENGTH, self.rank, self.alpha, self.scale)
        return [
            Message("base: {name} ({family}, predicts {kind})", self.base, self.family, self.prediction_type),
            *self.notes,
            Message(validation, *photos),
            *([self.triggers] if self.triggers else []),
            Message("adapter: {method}, {parts}", self.method, trained),
            *([strength] if self.rank else []),
            *self.layers,
            Message("length: {length}", self.length),
            *([SHORT_RUN] if self.steps < MIN_STEPS else []),
            *([Message("prior: {prior}", self.prior)] if self.prior else []),
            self._memory(),
            *self._limited(),
            *([self._on_host()] if self.host else []),
            *([self.busy] if self.busy else []),
            self._time(),
        ]

    def _memory(self) -> str:
        total, encoding, samples = (
            gibibytes(size) for size in (sum(self.memory.values()), self.peaks["encoding"], self.peaks["samples"])
        )
        templates = {template.removesuffix(" {size}"): template for template in SIZES}
        parts = join(", ", [Message(templates[part], gibibytes(size)) for part, size in self.memory.items()])
        return Message(MEMORY, total, self.device, parts, encoding, samples)

    def _time(self) -> str:
        if self.seconds is None:
            return "time: measured in the first steps"
        left = self.steps - self.first_step
        line = Message("time: about {time} (estimate)", duration(self.seconds * left / self.steps))
        return (
            Message("{time}, for the {left} left of {all}", line, count(left, "step"), self.steps)
            if self.first_step
            else line
        )

    def _limited(self) -> list[str]:
        if self.limit_gib is None:
            return []
        line = "limit: {blocks} of the UNet computed again in the backward pass, for {limit:g} GiB"
        return [Message(line, count(self.recomputed, "block"), self.limit_gib)]

    def _on_host(self) -> str:
        """The host memory that the run needs."""
        line = Message("host: {size} of memory for the base's weights", gibibytes(self.host))
        if not self.ram:
            return line
        much = self.host > MAX_RAM_SHARE * self.ram
        way = "; that is much: keep them smaller with memory.base_storage" if much else ""
        return Message("{host}, of {ram}{way}", line, gibibytes(self.ram), way)


def make(config: Config, info: BaseInfo, report: Report) -> Plan:
    """The plan of a run on a base, from the report of `data.checks.check`.

    Raises:
        LorakitError: with all of `problems`, or no photo is left to train on.
    """
    repeats, sizes, holdout_count = _training_sizes(config, report)
    if not repeats:
        raise LorakitError("no photo can be used for training; the table of the check says what is wrong with each")
    if wrong := problems(config, info):
        raise LorakitError(join("\n", wrong))
    text_tokens = info.text_tokens
    if report.chunks > 1:
        info = dataclasses.replace(info, text_tokens=text_tokens + (report.chunks - 1) * info.max_tokens)
    selected = targets.adapted(info.family, info.layers, config.adapter)
    modules = _modules(config, info, selected)
    config, device, limit_note = _limited(config, info, modules)
    batches = sum(math.ceil(count / config.train.batch_size) for count in Counter(sizes).values())
    steps, length = run_length(config, repeats, batches)
    host = memory_estimate.host_bytes(config, info, device)
    return Plan(
        base=info.title,
        notes=(
            *info.notes,
            *([_price(config, info, text_tokens)] if info.text_tokens > text_tokens else []),
            *([COMPILED_ON_A_CPU] if config.memory.compile and device == "cpu" else []),
            *filter(None, [lr_schedule.problem(config.optimizer, steps)]),
            *([plan_lines.averaging(config.train.ema_decay, steps)] if config.train.ema_decay else []),
            *limit_note,
            *(_assumed_state(config.optimizer.name) + whole_model.note(config)),
        ),
        family=info.family,
        prediction_type=info.prediction_type,
        method=config.adapter.method,
        rank=config.adapter.rank,
        alpha=config.adapter.effective_alpha,
        scale=config.adapter.scale,
        modules=modules,
        layers=plan_lines.layers(config, selected),
        prior=plan_lines.prior(config, report),
        triggers=plan_lines.triggers(config, report),
        photo_count=len(repeats),
        rows=len(sizes),
        holdout_count=holdout_count,
        batches=batches,
        steps=steps,
        length=length,
        epochs=steps * config.train.gradient_accumulation_steps / batches,
        memory=memory_estimate.training(config, info, modules, device),
        peaks=memory_estimate.peaks(config, info, modules, device),
        seconds=estimate_seconds(config, info, steps, not report.class_photos) if device == "cpu" else None,
        device=device,
        busy=plan_lines.busy() if device == "cpu" else "",
        recomputed=len(memory_estimate.recomputed_blocks(config, info, modules, device)),
        limit_gib=config.memory.limit_gib,
        host=host,
        ram=_ram() if host else 0,
    )


def _limited(config: Config, info: BaseInfo, modules: Mapping[str, tuple[int, int]]) -> tuple[Config, str, list[str]]:
    """The config with what `memory.limit_gib = "auto"` comes to, the device, and a note where that is not enough."""
    device = guess_device(config.memory.device)
    available = nvidia.free_bytes() if device == "cuda" and config.memory.limit_gib is None else None
    limited = memory_estimate.limit_to(available, config, info, modules, device)
    all_recomputed = limited.memory.gradient_checkpointing and not config.memory.gradient_checkpointing
    return limited, device, [Message(memory_estimate.TOO_LARGE, gibibytes(available or 0))] if all_recomputed else []


def _price(config: Config, info: BaseInfo, text_tokens: int) -> str:
    """The additional cost of long texts, relative to texts of a given number of tokens."""
    side = config.data.resolution // info.downscale
    long, short = (
        forward_flop(info.family, info.layers, side, side, count) for count in (info.text_tokens, text_tokens)
    )
    return Message(LONG_TEXTS, info.text_tokens, long / short - 1, text_tokens)


def _assumed_state(name: str) -> list[str]:
    """The size of an optimizer's state, where that is a guess."""
    spec = registry.optimizer(name)
    return [ASSUMED_STATE.format(name=name, bytes=spec.state_bytes)] if spec.is_guess else []


def problems(config: Config, info: BaseInfo) -> list[str]:
    """The reasons why no plan is possible for a base, independent of the photos, one message each.

    The adapter would have no layer, a step does not fit into `memory.limit_gib`, or weights would be streamed to a
    device that computes in host memory.
    """
    result = list[str]()
    device = guess_device(config.memory.device)
    if config.memory.stream_base and not may_be_cuda(config.memory.device):
        result.append(Message(OFFLOAD_NEEDS_CUDA, device))
    if line := _resolution_problem(config, info):
        result.append(line)
    selected = targets.adapted(info.family, info.layers, config.adapter)
    if not selected and not config.adapter.words_only:
        result.append(targets.no_layer(config.adapter))
        return result
    result += targets.pattern_problems(config, info.family, info.layers)
    try:
        memory_estimate.recomputed_blocks(config, info, _modules(config, info, selected), device)
    except LorakitError as error:
        result.append(str(error))
    return result


def _resolution_problem(config: Config, info: BaseInfo) -> str | None:
    """Two resolutions that are one for a base, or None."""
    multiple, by_square = info.bucket_multiple, dict[int, int]()
    for side in config.data.resolutions:
        square = max(1, round(side / multiple)) * multiple
        if other := by_square.setdefault(square, side) - side:
            return Message(SAME_SIZE, side + other, side, multiple)
    return None


def _modules(config: Config, info: BaseInfo, selected: Sequence[str]) -> dict[str, tuple[int, int]]:
    return whole_model.count(config, info, count_weights(selected, info.layers, config.adapter))


def count_weights(
    selected: Sequence[str], shapes: Mapping[str, Sequence[int]], adapter: AdapterConfig
) -> dict[str, tuple[int, int]]:
    """Component -> (adapted layers, trained weights), the vectors of new words among them."""
    totals: dict[str, tuple[int, int]] = {}
    for name in selected:
        component = name.partition(".")[0]
        before = totals.get(component, (0, 0))
        own = targets.layer_config(adapter, name)
        totals[component] = before[0] + 1, before[1] + targets.trained(own, shapes[name])
    for name, shape in shapes.items() if adapter.new_tokens else ():
        component, _, layer = name.partition(".")
        if layer == "text_model.encoder.layers.0.self_attn.q_proj":
            layers, weights = totals.get(component, (0, 0))
            totals[component] = layers, weights + adapter.new_tokens * shape[1]
    return totals


def forward_flop(
    family: str, shapes: Mapping[str, Sequence[int]], height: int, width: int, text_tokens: int = 77
) -> float:
    """Floating-point operations of one forward pass of a family's denoiser for one image with the given number of
    latent cells.

    Each weight counts twice for each position at which it is applied. Attention of n positions to m positions of width
    c counts 4 n m c. The results equal those of torch's FLOP counter for the real models: SD1.5 at 512 px 0.803e12,
    SDXL at 1024 px 6.761e12.
    """
    return sum(map(memory_estimate.flop, registry.family_of(family).layer_uses(shapes, height, width, text_tokens)))


def estimate_seconds(config: Config, info: BaseInfo, steps: int, draws_class: bool = True) -> float:
    """Duration in seconds on this CPU: training, class images and sample grids. Loading and validation are left out as
    small.

    Args:
        draws_class: False where the class images are the user's own.
    """
    train, sample = config.train, complete(config.sample, info)
    sides = [side // info.downscale for side in config.data.resolutions]
    flops = [forward_flop(info.family, info.layers, side, side, info.text_tokens) for side in sides]
    flop = sum(flops) / len(flops)
    speed = CPU_SHARE * (_threads() if min(sides) >= THREADED_SIDE else 1) * _matmul_speed()
    overhead = CPU_LAYER_SECONDS * sum(name.startswith("unet.") for name in info.layers)
    passes = PASSES_WITH_CHECKPOINTING if config.memory.gradient_checkpointing else PASSES
    asks_base = train.prior == "teacher" or train.prior_target == "base"
    with_prior = passes if train.prior == "none" else 2 * passes + asks_base
    step_seconds = train.gradient_accumulation_steps * (
        train.batch_size * flop * with_prior / speed + overhead * passes
    )
    # A picture takes two passes, with and without the prompt, for each denoising step; samples are drawn one by one and
    # class images many at a time, where the fixed cost no longer counts.
    pass_of_two = 2 * flops[0] / speed
    grids = sample.at_start + sample.at_end + max(steps - 1, 0) // interval(sample.every, steps)
    grid = 0.0
    texts = list(sample.prompts or captions.sample_prompts(config.data))
    for prompt in sample_prompts.parse_all(texts, sample, sample_prompts.default_size(sample, config.data.resolution)):
        share = math.prod(prompt.size) / config.data.resolution**2
        grid += complete(prompt.sample, info).steps * (pass_of_two * share + overhead)
    class_images = train.class_images * pass_of_two if train.prior == "images" and draws_class else 0
    seconds: float = steps * step_seconds + grids * grid + sample.steps * class_images
    return seconds


def interval(every: int, steps: int) -> int:
    """Steps between two validations, checkpoints or sample grids, from the option's value."""
    return every or max(1, math.ceil(steps / PARTS))


def guess_device(option: str) -> str:
    """The device that `memory.device = "auto"` most likely means. torch is not imported."""
    if option != "auto":
        return option.partition(":")[0]
    if may_be_cuda(option) and nvidia.has_driver():
        return "cuda"
    return "mps" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def may_be_cuda(option: str) -> bool:
    """False if `memory.device` cannot mean CUDA. With "auto" the answer may be True without a card."""
    return option.startswith("cuda") or (option == "auto" and not _no_cuda())


def device_problem(option: str) -> str | None:
    """The reason why `memory.device` is not available, as far as it can be determined without torch, or None."""
    number = option.partition(":")[2]
    beyond = number and nvidia.cards() and int(number) >= len(nvidia.cards())
    no_cuda = option.startswith("cuda") and (_no_cuda() or beyond)
    if not no_cuda and not (option == "mps" and sys.platform != "darwin"):
        return None
    return Message(DEVICE_MISSING, option, nvidia.torch_version())


def _no_cuda() -> bool:
    """Whether it is sure, without torch, that there is no CUDA device."""
    return nvidia.is_hidden() or not nvidia.torch_has_cuda() or sys.platform == "darwin"


def _training_sizes(config: Config, report: Report) -> tuple[list[int], list[tuple[int, int]], int]:
    """The repeats of each photo that is not held out; (width, height) of all rows of a pass; how many are held out."""
    buckets = {item.photo.relative: item.buckets for item in report.items}
    trained, holdout_photos = holdout.split(report.photos, config.train.holdout, config.train.seed)
    sizes: list[tuple[int, int]] = [size for photo in trained for size in buckets[photo.relative] * photo.repeats]
    return [photo.repeats for photo in trained], sizes, len(holdout_photos)


@functools.cache
def _matmul_speed(seconds: float = 0.1) -> float:
    """Floating-point operations a second of float32 matrix products on one core: the upper quartile of many short ones.

    Each takes a tenth of a millisecond, so that on a busy machine most have a core of their own. BLAS computes a matrix
    of 64x64 in one thread; threads that wait for each other on busy cores were up to fifty times as slow.
    """
    import numpy

    matrices = numpy.ones((32, 64, 64), numpy.float32)
    numpy.matmul(matrices, matrices)
    times, end = list[float](), time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        numpy.matmul(matrices, matrices)
        times.append(time.perf_counter() - start)
    return 2.0 * 32 * 64**3 / max(sorted(times)[len(times) // 4], 1e-9)


def _threads() -> int:
    """The number of threads that can compute at once: OMP_NUM_THREADS, and at most the cores of this process."""
    value, available = os.environ.get(launch.THREADS, ""), launch.available_cores()
    return min(int(value), available) if value.isdecimal() and int(value) else available


def _ram() -> int:
    """Bytes of memory of this machine, or 0: Windows tells it in another way."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
