"""The parts of gpu.py. Each runs in its own process, prints each figure at once and continues after a failure.

`rehearse` runs a part on a CPU, with models of one layer per block and 16 channels.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import common  # noqa: E402
import gpu_loops as loops  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from lorakit.engine import device as devices  # noqa: E402

# Group of kernels -> words in their names. A kernel belongs to the first group that matches.
KERNELS = {
    "layout": ("nchwtonhwc", "nhwctonchw", "nchw2nhwc", "nhwc2nchw", "transpose"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "dgrad", "fprop", "implicit"),
    "norm": ("norm", "rowwise", "moments", "computefused", "computeinternal"),
    "matrix": ("gemm", "cutlass", "nvjet", "xmma", "splitk"),
    "copies and pointwise": ("elementwise", "vectorized", "copy", "fill", "memcpy", "memset", "cat", "reduce"),
}
GPU_TESTS = (
    "card/on_card.py",
    "card/on_graphs.py",
    "engine/test_compile.py",
    "engine/test_cuda_graphs.py",
    "engine/test_quantized_weight.py",
    "engine/test_triton_kernels.py",
    "engine/test_weight_offload.py",
)


def row(name: str, value: Any, **more: Any) -> None:
    """Print a figure in the form that gpu.py reads."""
    if isinstance(value, float):
        value = float(f"{value:.5g}")
    print("ROW " + json.dumps({"name": name, "value": value, **more}, default=str), flush=True)


@contextlib.contextmanager
def attempt(name: str) -> Iterator[None]:
    """Record an exception in the context as a result, and continue with the part."""
    try:
        yield
    except Exception as problem:
        traceback.print_exc()
        row(f"{name} FAILED", (str(problem).splitlines() or [""])[0][:300], kind=type(problem).__name__)
    gc.collect()


class Machine:
    """The device of a part, and the dtype and width of its models."""

    def __init__(self, rehearse: bool):
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.width = 16 if rehearse else None
        # bf16 is many times slower on a CPU.
        self.dtype = torch.float32 if rehearse else torch.bfloat16

    def side(self, kind: str) -> int:
        """Return the side of the latents."""
        return 8 if self.rehearse else loops.SIDES[kind]

    def milliseconds(self, work: Callable[[], Any], count: int = 10) -> float:
        """Return the median time of a call on the device."""
        times = []
        for number in range(2 if self.rehearse else count + 3):
            loops.wait(self.device)
            start = time.perf_counter()
            work()
            loops.wait(self.device)
            if number >= (1 if self.rehearse else 3):
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def loop(
        self, kind: str, batch: int, change: Callable[[Any], None] = lambda _: None, **options: Any
    ) -> common.Loop:
        """Return lorakit's loop on a new model."""
        family = common.base(kind, self.device, self.dtype, width=self.width)
        change(family)
        data = common.encoded(family, self.side(kind), self.width)
        return common.lorakit_loop(family, data, common.settings(batch, 16, **options), print)


def card(machine: Machine) -> None:
    """Print versions and speeds, and check that attention is right."""
    row("versions", f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if not machine.rehearse:
        facts = torch.cuda.get_device_properties(0)
        row(
            "card",
            facts.name,
            memory_gib=round(facts.total_memory / 2**30, 1),
            capability=f"{facts.major}.{facts.minor}",
        )
    row("matrix products, bf16", loops.matrix_speed(machine.device, 0.5) / 1e12, unit="TFLOP/s")
    with attempt("attention"):
        problem = devices.attention_problem(devices._sdpa, machine.device, torch.bfloat16)
        row("attention is right, forward and backward", problem is None, problem=problem)
    places = 64 if machine.rehearse else 1
    for heads, size, queries, keys in (
        (8, 40, 4096, 4096),
        (8, 40, 4096, 77),
        (10, 64, 4096, 4096),
        (20, 64, 1024, 77),
    ):
        with attempt(f"attention {size} {queries} {keys}"):
            shapes = [(1, heads, n // places or 1, size) for n in (queries, keys, keys)]
            leaves = [torch.randn(s, device=machine.device).bfloat16().requires_grad_() for s in shapes]
            towards = torch.randn(shapes[0], device=machine.device).bfloat16()

            def both(leaves: list[Any] = leaves, towards: Any = towards) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(functional.scaled_dot_product_attention(*leaves), leaves, towards)

            equal = all(torch.equal(a, b) for a, b in zip(both(), both(), strict=True))
            row(f"attention {size} x {queries} x {keys}", machine.milliseconds(both), unit="ms", same_bits_twice=equal)
    _dequantized(machine)
    for channels, side in ((320, 64), (1280, 16)):
        x = torch.randn(1, channels // places or 1, side, side, device=machine.device).bfloat16()
        weight = torch.randn(len(x[0]), len(x[0]), 3, 3, device=machine.device).bfloat16()
        for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            with attempt(f"convolution {channels} {name}"):
                a, w = (tensor.contiguous(memory_format=layout) for tensor in (x, weight))
                took = machine.milliseconds(lambda a=a, w=w: functional.conv2d(a, w, None, 1, 1))
                row(f"convolution {channels} x {side} {name}", took, unit="ms")


def _dequantized(machine: Machine) -> None:
    """Time NF4 dequantization of an SDXL weight with each kernel, and a product in int8 and in the model's dtype."""
    from lorakit.engine import kernels, quantized_kernels, quantized_weight

    side = 64 if machine.rehearse else 2560
    weight = torch.randn(4 * side, side, device=machine.device).to(machine.dtype)
    nf4, int8 = (quantized_weight.quantize(weight, scheme) for scheme in ("nf4", "w8a8"))
    quickest = quantized_kernels._quickest(machine.dtype, machine.device).__name__
    compiled = [quantized_kernels.by_bitsandbytes] * quantized_kernels._has_kernels_for(machine.device)
    interpreted = [quantized_kernels.by_triton] * kernels.uses_triton(machine.device)
    for kernel in (*compiled, *interpreted, quantized_kernels.by_torch):
        with attempt(f"nf4 {kernel.__name__}"):
            took = machine.milliseconds(lambda kernel=kernel: kernel(nf4.qdata, nf4.scales))
            row(f"nf4 {kernel.__name__}", took, unit="ms", weights=weight.numel(), is_used=quickest == kernel.__name__)
    x = torch.randn(4096, side, device=machine.device).to(machine.dtype)
    for name, factor in ((str(machine.dtype), weight), ("int8", int8)):
        with attempt(f"product {name}"):
            row(f"product {name}", machine.milliseconds(lambda factor=factor: x @ factor.t()), unit="ms")
    row("kernels of Triton are used", kernels.uses_triton(machine.device))


def tests(machine: Machine) -> None:
    """Run the tests with the marker `gpu`: CUDA graphs, kernels, quantized weights and offload."""
    import xml.etree.ElementTree as tree

    report = Path(tempfile.mkdtemp()) / "junit.xml"
    files = [str(ROOT / "tests" / name) for name in GPU_TESTS]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=", "-o", "filterwarnings="]
    command += ["-p", "no:cacheprovider"]
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["-n", "4"]
    result = subprocess.run([*command, f"--junitxml={report}", *files], cwd=ROOT, capture_output=True, text=True)
    print(result.stdout[-9000:], result.stderr[-2000:])
    row("pytest -m gpu", (result.stdout.strip().splitlines() or ["?"])[-1], code=result.returncode)
    for case in tree.parse(report).iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            row(f"FAILED: {case.get('name')}", (problem.get("message") or "")[:400])


def bits(machine: Machine) -> None:
    """Train the bundled model twice with CUDA graphs and once without; compare the adapters, check that it captures."""
    import short_run
    from safetensors.torch import load_file

    from lorakit.training import run as train

    cases: dict[str, dict[str, Any]] = {
        "bf16": {"memory__mixed_precision": "bf16"},
        "fp32, deterministic": {"memory__mixed_precision": "fp32", "train__deterministic": True},
        "fp16": {"memory__mixed_precision": "fp16"},
        "bf16 nf4, checkpointing": {
            "memory__mixed_precision": "bf16",
            "memory__base_storage": "nf4",
            "memory__gradient_checkpointing": True,
        },
        "bf16 text encoder, convolutions, teacher": {
            "memory__mixed_precision": "bf16",
            "adapter__train_text_encoder": True,
            "adapter__target_modules": "linear+conv",
            "train__prior": "teacher",
        },
    }
    for title, changes in list(cases.items())[: 1 if machine.rehearse else None]:
        with attempt(title), tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "photos").mkdir()
            short_run.noise(folder / "photos", 8)
            adapters, times, lines = [], [], list[str]()
            for number, graphs in enumerate((True, True, False)):
                options = {"memory__device": machine.device.type, "memory__cuda_graphs": graphs, **changes}
                settings = short_run.run_config(
                    Path("pocket"), folder / "photos", folder / str(number), 2 if machine.rehearse else 20, **options
                )
                start = time.perf_counter()
                result = train.train(settings)
                times.append(round(time.perf_counter() - start, 1))
                adapters.append(load_file(result.adapter))
                if graphs:
                    log = (result.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
                    lines += [m for m in (json.loads(line).get("message", "") for line in log) if "CUDA graph" in m]
            off = [_difference(adapters[0], other) for other in adapters[1:]]
            without = any("without" in line or "are off" in line for line in lines)
            captured = "not captured" if without or not lines else "captured"
            row(title, captured, off_twice=off[0], off_without_graphs=off[1], seconds=times, lines=sorted(set(lines)))


def runs_sd15(machine: Machine) -> None:
    """Run the presets for SD1.5 completely."""
    import gpu_runs

    gpu_runs.runs(machine, "sd1")


def runs_sdxl(machine: Machine) -> None:
    """Run the presets for SDXL completely."""
    import gpu_runs

    gpu_runs.runs(machine, "sdxl")


def _difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    pairs = [(one[name].float(), two[name].float()) for name in two]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def sd15(machine: Machine) -> None:
    """Time steps of SD1.5 at 512 px."""
    steps(machine, "sd15")


def sdxl(machine: Machine) -> None:
    """Time steps of SDXL at 1024 px."""
    steps(machine, "sdxl")


def steps(machine: Machine, kind: str) -> None:
    """Time lorakit with and without CUDA graphs, the plain loop and the scripts' loop, one after the other."""
    peak = loops.matrix_speed(machine.device, 0.3)
    asking = SimpleNamespace(rank=16, stream=False, compile=False, convolutions=False, quick=True)
    for batch in (1,) if machine.rehearse else (1, 4):
        makers = loops.makers(kind, batch, asking, machine.device, machine.width, machine.side(kind))
        order: dict[str, Callable[[], common.Loop]] = {
            "lorakit": makers["lorakit"],
            "lorakit without graphs": lambda batch=batch: machine.loop(kind, batch, **{"memory.cuda_graphs": False}),
            "peft": makers["peft"],
            "script": makers["script"],
        }
        flop = loops.PASSES * batch * loops.forward_flop(kind, machine.width, machine.side(kind))
        for name, make in order.items():
            with attempt(f"{kind} b{batch} {name}"):
                loops.clear(machine.device)
                loop, first = _warm(machine, make)
                took = machine.milliseconds(lambda loop=loop: loop(1), 8)
                memory = {} if machine.rehearse else {r["name"].split()[-1]: r["value"] for r in loops.memory_rows("")}
                share = round(1e3 * flop / took / peak, 4)
                rate = round(1e3 * batch / took, 3)
                facts = {"first_step_s": first, "images_per_second": rate, "of_matrix_speed": share}
                row(f"{kind} b{batch} {name}", took, unit="ms a step", **facts, **memory)
                del loop


def profile(machine: Machine) -> None:
    """Profile a step: the time of its kernels by group, and how long the card is busy."""
    from torch.profiler import ProfilerActivity, profile as profiler

    cases: list[tuple[str, int, str, dict[str, Any]]] = [
        ("sd15", 1, "", {}),
        ("sdxl", 1, "", {}),
        ("sd15", 1, ", channels first", {"memory.channels_last": "off"}),
    ]
    for kind, batch, change, options in cases[: 1 if machine.rehearse else None]:
        title = f"{kind} b{batch}{change}"
        with attempt(f"profile {title}"):
            loop = machine.loop(kind, batch, **options)
            loop(1 if machine.rehearse else 4)
            wall = machine.milliseconds(lambda loop=loop: loop(1), 5)
            activity = ProfilerActivity.CPU if machine.rehearse else ProfilerActivity.CUDA
            with profiler(activities=[activity]) as record:
                loop(1)
                loops.wait(machine.device)
            groups: dict[str, tuple[int, float]] = {}
            names: dict[str, tuple[int, float]] = {}
            for event in record.events():
                if not machine.rehearse and not str(event.device_type).endswith("CUDA"):
                    continue
                name = event.name.lower()
                group = next((g for g, words in KERNELS.items() if any(word in name for word in words)), "other")
                took = event.self_cpu_time_total if machine.rehearse else event.time_range.elapsed_us()
                for table, key in ((groups, group), (names, f"{group}: {event.name[:120]}")):
                    count, total = table.get(key, (0, 0.0))
                    table[key] = count + 1, total + took
            busy, kernels = sum(t for _, t in groups.values()) / 1e3, sum(n for n, _ in groups.values())
            row(f"{title} busy", busy, unit="ms", kernels=kernels, step_ms=round(wall, 2))
            for group, (count, total) in sorted(groups.items(), key=lambda item: -item[1][1]):
                row(f"{title} {group}", total / 1e3, unit="ms", kernels=count)
            longest = sorted(names.items(), key=lambda item: -item[1][1])[:25]
            row(f"{title} longest", len(names), unit="kernels", us={name: [n, round(t)] for name, (n, t) in longest})
            del loop


def memory(machine: Machine) -> None:
    """Compare measured with predicted peak memory, and time a step with each memory option."""
    import memory as counted

    cases: list[tuple[str, int, int, str, bool | float, str]] = [
        ("sd15", 512, 1, "attention", False, "full"),
        ("sdxl", 1024, 1, "attention", False, "full"),
        ("sdxl", 1024, 1, "attention", 8.0, "full"),
        ("sdxl", 1024, 1, "linear", True, "nf4"),
        ("sdxl", 1024, 1, "linear", True, "int8"),
        ("sdxl", 1024, 1, "attention", False, "w8a8"),
        ("sdxl", 1024, 1, "linear", True, "full streamed"),
        ("sd15", 512, 4, "attention", False, "full"),
        ("sd15", 512, 1, "linear", True, "nf4"),
    ]
    for case in cases[: 1 if machine.rehearse else None]:
        name, side, batch, modules, checkpointing, storage = case
        saving = {True: "checkpointing", False: "no checkpointing"}.get(checkpointing, f"within {checkpointing} GiB")
        title = f"{name} {side} b{batch} {modules} {saving} {storage}"
        with attempt(title):
            loops.clear(machine.device)
            settings = counted.run_config(side, batch, modules, checkpointing, storage)
            loop = _saving_loop(machine, name, settings)
            loop(2 if machine.rehearse else 4)
            took = machine.milliseconds(lambda loop=loop: loop(1), 5)
            predicted = round(counted.predict(name, settings) / 2**30, 3)
            figures = {} if machine.rehearse else {r["name"].split()[-1]: r["value"] for r in loops.memory_rows("")}
            row(title, took, unit="ms a step", predicted_gib=predicted, **figures)
            del loop


def _saving_loop(machine: Machine, name: str, settings: Any) -> common.Loop:
    """Return lorakit's loop with the memory options of the config."""
    import memory as counted

    from lorakit import adapters
    from lorakit.engine import quantized_weight
    from lorakit.runs import memory_estimate
    from lorakit.training.loss_step import LossStep
    from lorakit.training.optimizer_step import OptimizerStep

    family = common.base(name, machine.device, machine.dtype, width=machine.width)
    options = settings.memory
    if options.base_storage != "full" or options.stream_base:
        quantized_weight.store_layers(
            family.denoiser, options.base_storage, machine.device, offload=options.stream_base
        )
        if not machine.rehearse:  # the peak must not include the weights from before quantization
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    adapter = adapters.attach(family, settings.adapter, seed=0)
    adapters.optimize_blocks(family, save_less=memory_estimate.use_save_less(settings, "cuda"))
    outline = counted.outlined(name, settings)
    blocks = [] if machine.rehearse else memory_estimate.recomputed_blocks(settings, *outline, "cuda")
    devices.gradient_checkpointing(family, blocks)
    adapter.train(True)
    settings = replace(settings, train=replace(settings.train, steps=1000))
    data = common.encoded(family, machine.side(name), machine.width)
    return common.steps_of(OptimizerStep(settings, LossStep(family, adapter, data, settings.train), 1000, print))


def variants(machine: Machine) -> None:
    """Time `cudnn.benchmark`, channels first, each SDPA kernel, torch instead of Triton, and an 8-bit optimizer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from lorakit.engine import kernels as choice

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
    kernels["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    asking = SimpleNamespace(rank=16, stream=False, compile=False, convolutions=True, quick=True)
    for kind in ("sd15",) if machine.rehearse else ("sd15", "sdxl"):
        makers = loops.makers(kind, 1, asking, machine.device, machine.width, machine.side(kind))
        for name, make in makers.items():
            with attempt(f"{kind} {name}"):
                _timed(machine, f"{kind} b1 {name}", make)
        for name, kernel in kernels.items() if not machine.rehearse else ():
            with attempt(f"{kind} attention by {name}"), sdpa_kernel(kernel):
                _timed(machine, f"{kind} b1 attention by {name}", makers["lorakit"])
        choice.allow_triton(False)
        with attempt(f"{kind} without Triton"):
            _timed(machine, f"{kind} b1 without Triton", makers["lorakit"])
        choice.allow_triton(True)
        with attempt(f"{kind} adamw8bit"):
            _timed(
                machine,
                f"{kind} b1 adamw8bit",
                lambda kind=kind: machine.loop(kind, 1, **{"optimizer.name": "adamw8bit"}),
            )


def compiled(machine: Machine) -> None:
    """Time the first and later steps with compiled blocks in the CUDA graph."""
    if machine.rehearse:
        row("compile", "skipped: it takes minutes on a CPU")
        return
    for kind in ("sd15", "sdxl"):
        with attempt(f"compile {kind}"):
            _timed(machine, f"{kind} b1 compiled", lambda kind=kind: machine.loop(kind, 1, **{"memory.compile": True}))


def _warm(machine: Machine, make: Callable[[], common.Loop]) -> tuple[common.Loop, float]:
    """Create a loop and warm it up; return it and the seconds until its first step ended."""
    start = time.perf_counter()
    loop = make()
    loop(1)
    loops.wait(machine.device)
    first = round(time.perf_counter() - start, 2)
    loop(1 if machine.rehearse else 3)
    return loop, first


def _timed(machine: Machine, title: str, make: Callable[[], common.Loop]) -> None:
    loop, first = _warm(machine, make)
    row(title, machine.milliseconds(lambda: loop(1), 8), unit="ms a step", first_step_s=first)


def shallow(kind: str, width: int | None = None, full: Callable[..., dict[str, Any]] = common.unet_config) -> Any:
    """Return the configuration of a UNet with one layer per block, for a rehearsal."""
    settings = full(kind, width) | {"layers_per_block": 1}
    return settings | ({"transformer_layers_per_block": 1} if kind == "sdxl" else {})


PARTS: dict[str, Callable[[Machine], None]] = {
    "card": card,
    "tests": tests,
    "bits": bits,
    "runs-sd15": runs_sd15,
    "runs-sdxl": runs_sdxl,
    "sd15": sd15,
    "sdxl": sdxl,
    "profile": profile,
    "memory": memory,
    "variants": variants,
    "compile": compiled,
}


def run(part: str, *, rehearse: bool) -> None:
    """Run the part with this name."""
    if rehearse:
        common.unet_config = shallow
    PARTS[part](Machine(rehearse))
