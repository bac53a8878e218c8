"""Tests of the plan: exact counts, estimates near published figures, and sentences that a beginner understands."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit import config
from lorakit.core.errors import LorakitError
from lorakit.runs import nvidia, plan, plan_lines
from lorakit.ui import texts

# List of a real model's keys -> family of its adapters.
FAMILY_OF = {"sd15": "sd1", "sd2": "sd2", "sdxl": "sdxl"}
KEYS = Path(__file__).parents[1] / "formats" / "keys"
GIB = 2**30


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return canonical layer name -> weight shape of a real model."""
    with gzip.open(KEYS / f"{name}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return {row[0]: tuple(int(side) for side in row[-1].split("x")) for row in rows}


@dataclass
class Info:
    """The fields of a base that `families.describe` returns."""

    layers: dict[str, tuple[int, ...]]
    family: str = "sd1"
    title: str = "sd15"
    prediction_type: str = "epsilon"
    downscale: int = 8
    bucket_multiple: int = 64
    max_tokens: int = 77
    text_tokens: int = 77
    bytes: dict[str, int] = field(default_factory=dict)
    variants: dict[str, str | None] = field(default_factory=dict)
    slots: None = None
    sources: dict[str, Any] = field(default_factory=dict)
    distilled: None = None
    notes: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def sd15() -> Info:
    return Info(shapes("sd15"))


@pytest.fixture(scope="module")
def sdxl() -> Info:
    return Info(shapes("sdxl"), "sdxl", "sdxl")


def report(*sizes: tuple[int, int] | None) -> Any:
    """Return a check's report with a photo for each size; a photo with size None is unreadable."""
    items = [
        SimpleNamespace(
            photo=SimpleNamespace(relative=f"{n}.png", repeats=1), bucket=size, buckets=(size,) * (size is not None)
        )
        for n, size in enumerate(sizes)
    ]
    return SimpleNamespace(items=items, photos=[item.photo for item in items if item.bucket], class_photos=[], chunks=1)


def make(info: Info, sizes: list[tuple[int, int] | None], **changes: Any) -> plan.Plan:
    """Return a plan; the default device is CUDA, so that no speed is measured."""
    values = {"memory__device": "cuda", "train__holdout": 0} | changes
    overrides = {name.replace("__", "."): value for name, value in values.items()}
    return plan.make(config.from_tables({}, overrides), info, report(*sizes))


SQUARE = (512, 512)


# -- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps", "text"),
    [
        ({"train__steps_per_image": 25}, 400, "16 photos x 25 steps each = 400 steps"),
        (
            {"train__steps_per_image": 25, "train__batch_size": 8},
            400,
            "16 photos x 25 steps each = 400 steps of 8 photos",
        ),
        (
            {"train__steps": 100, "train__batch_size": 2, "train__gradient_accumulation_steps": 3},
            100,
            "100 steps of 6 photos, each of 16 photos seen 37.5 times",
        ),
        ({"train__epochs": 10}, 160, "10 epochs x 16 batches of 16 photos = 160 steps"),
        ({"train__epochs": 10, "train__batch_size": 5}, 40, "10 epochs x 4 batches of 16 photos = 40 steps"),
        (
            {"train__epochs": 10, "train__batch_size": 5, "train__gradient_accumulation_steps": 3},
            14,
            "10 epochs x 4 batches of 16 photos / 3 accumulated = 14 steps (epochs: 10.5)",
        ),
        (
            {"train__epochs": 3, "train__gradient_accumulation_steps": 4},
            12,
            "3 epochs x 16 batches of 16 photos / 4 accumulated = 12 steps",
        ),
    ],
)
def test_length_is_exact_and_reported_in_words(sd15: Info, changes: dict[str, Any], steps: int, text: str) -> None:
    result = make(sd15, [SQUARE] * 16, **changes)
    assert result.steps == steps
    assert result.length == text
    assert f"length: {text}" in result.lines()


def test_a_run_that_is_too_short_to_teach_much_says_so(sd15: Info) -> None:
    short, long = (make(sd15, [SQUARE] * 10, train__steps_per_image=each) for each in (19, 20))
    assert plan.SHORT_RUN in short.lines() and plan.SHORT_RUN not in long.lines()


def test_the_cost_of_compiling_on_a_cpu_is_reported(sd15: Info) -> None:
    changes: dict[str, Any] = {"train__steps": 10, "memory__compile": True}
    plan_of = {device: make(sd15, [SQUARE], memory__device=device, **changes) for device in ("cpu", "cuda")}
    assert plan.COMPILED_ON_A_CPU in plan_of["cpu"].lines() and plan.COMPILED_ON_A_CPU not in plan_of["cuda"].lines()


def test_photos_of_one_batch_have_one_size(sd15: Info) -> None:
    result = make(sd15, [SQUARE] * 5 + [(640, 384)] * 3, train__epochs=1, train__batch_size=4)
    assert result.batches == 2 + 1
    assert result.steps == 3


def test_an_incomplete_batch_is_counted_with_its_photos(sd15: Info) -> None:
    """Six photos have three sizes. A batch of four then holds two, and three steps show each photo once."""
    length = make(sd15, [SQUARE, (640, 384), (384, 640)] * 2, train__steps=6, train__batch_size=4).length
    assert length == "6 steps of 2 photos, each of 6 photos seen 2 times"


@pytest.mark.parametrize("steps, problem", [(10, "comes to 50% of optimizer.learning_rate"), (20, "100%"), (21, "")])
def test_a_warm_up_as_long_as_the_run_is_reported(sd15: Info, steps: int, problem: str) -> None:
    lines = make(sd15, [SQUARE], train__steps=steps, optimizer__warmup_steps=20).lines()
    warmup = [line for line in lines if line.startswith("optimizer.warmup_steps = 20: ")]
    assert len(warmup) == bool(problem) and all(problem in line for line in warmup)


def test_one_photo_is_written_in_the_singular(sd15: Info) -> None:
    assert make(sd15, [SQUARE], train__steps_per_image=25).length == "1 photo x 25 steps each = 25 steps"
    assert make(sd15, [SQUARE], train__epochs=1).length == "1 epoch x 1 batch of 1 photo = 1 step"
    assert make(sd15, [SQUARE], train__steps=1).length == "1 step, each of 1 photo seen once"


def test_holdout_photos_are_not_trained_on(sd15: Info) -> None:
    result = make(sd15, [SQUARE] * 20, train__steps_per_image=1, train__holdout=0.1)
    assert (result.photo_count, result.holdout_count, result.steps) == (18, 2, 18)
    assert "photos: 18 to train on, 2 held out for validation" in result.lines()
    nine = make(sd15, [SQUARE] * 9, train__steps_per_image=1, train__holdout=0.1)
    assert (nine.photo_count, nine.holdout_count) == (9, 0)
    assert "photos: 9 to train on, none held out" in nine.lines()


def test_unreadable_photos_do_not_count(sd15: Info) -> None:
    assert make(sd15, [SQUARE, None, SQUARE], train__steps_per_image=1).photo_count == 2


def test_no_photo_is_an_error(sd15: Info) -> None:
    with pytest.raises(LorakitError, match="no photo can be used for training"):
        make(sd15, [None], train__steps=1)


def test_no_layer_is_an_error() -> None:
    with pytest.raises(LorakitError, match=r"adapter\.target_modules = 'attention' selects no layer of this base"):
        make(Info({"unet.conv_in": (8, 4, 3, 3)}), [SQUARE], train__steps=1)


# -- what is trained ------------------------------------------------------------------------------------------------


def test_published_counts_of_trained_weights(sd15: Info, sdxl: Info) -> None:
    assert make(sd15, [SQUARE], train__steps=1).modules == {"unet": (128, 3_188_736)}
    assert make(sdxl, [SQUARE], train__steps=1).modules == {"unet": (560, 23_224_320)}


def test_dora_adds_a_magnitude_for_each_input(sd15: Info) -> None:
    plain = make(sd15, [SQUARE], train__steps=1).modules["unet"][1]
    dora = make(sd15, [SQUARE], train__steps=1, adapter__method="dora").modules["unet"][1]
    inputs = sum(shape[1] for name, shape in sd15.layers.items() if ".attn" in name)
    assert dora - plain == inputs


def test_text_encoders_are_counted_separately(sdxl: Info) -> None:
    result = make(sdxl, [SQUARE], train__steps=1, adapter__train_text_encoder=True)
    assert list(result.modules) == ["unet", "text_encoder", "text_encoder_2"]
    assert result.modules["text_encoder"][0] == 12 * 4


def test_the_scale_is_reported(sd15: Info) -> None:
    assert make(sd15, [SQUARE], train__steps=1).scale == 1
    half = make(sd15, [SQUARE], train__steps=1, adapter__rank=16, adapter__alpha=8)
    assert half.scale == 0.5
    assert "strength: rank 16, alpha 8, effective scale 0.5" in half.lines()
    stabilised = make(sd15, [SQUARE], train__steps=1, adapter__rank=16, adapter__method="rslora")
    assert stabilised.scale == 4


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side", "tera"), [("sd15", 64, 0.803), ("sd2", 96, 2.149), ("sdxl", 128, 6.761)])
def test_operations_of_a_forward_pass_equal_torchs_count(name: str, side: int, tera: float) -> None:
    assert plan.forward_flop(FAMILY_OF[name], shapes(name), side, side) / 1e12 == pytest.approx(tera, abs=6e-4)


# Exact live bytes of a bf16 step at batch size 1 (weights, adapter, saved activations and transients), in GiB.
@pytest.mark.parametrize(
    ("name", "resolution", "targets", "checkpointing", "gib", "off"),
    [
        ("sd15", 512, "attention", False, 2.38, 0.15),
        ("sd15", 512, "linear+conv", False, 2.53, 0.15),
        ("sd15", 512, "attention", True, 1.82, 0.10),
        ("sdxl", 1024, "attention", False, 10.10, 0.15),
        ("sdxl", 1024, "linear+conv", False, 11.36, 0.15),
        ("sdxl", 1024, "attention", True, 5.34, 0.20),
        ("sdxl", 512, "attention", False, 6.16, 0.15),
    ],
)
def test_estimated_memory_is_near_the_exact_count(
    name: str, resolution: int, targets: str, checkpointing: bool, gib: float, off: float
) -> None:
    """The bytes were counted with PEFT's own layers. lorakit's layers save less if blocks are not recomputed."""
    result = make(
        Info(shapes(name)),
        [SQUARE],
        train__steps=1,
        data__resolution=resolution,
        adapter__target_modules=targets,
        memory__gradient_checkpointing=checkpointing,
    )
    step = sum(result.memory.values()) - result.memory["runtime"]
    assert step / GIB == pytest.approx(gib, rel=off)
    assert checkpointing or step / GIB < gib


def test_a_memory_limit_and_its_cost_are_reported(sdxl: Info) -> None:
    settings = {"train__steps": 1, "data__resolution": 1024}
    unlimited, wide, narrow = (
        make(sdxl, [SQUARE], **settings, **limit) for limit in ({}, {"memory__limit_gib": 12}, {"memory__limit_gib": 8})
    )
    assert not [line for line in unlimited.lines() if line.startswith("limit: ")]
    assert "limit: 0 blocks of the UNet computed again in the backward pass, for 12 GiB" in wide.lines()
    count = narrow.recomputed
    assert f"limit: {count} blocks of the UNet computed again in the backward pass, for 8 GiB" in narrow.lines()
    assert 0 < count < 87 and sum(narrow.memory.values()) <= 8 * GIB < sum(wide.memory.values())
    assert narrow.to_json()["recomputed"] == count and narrow.to_json()["limit_gib"] == 8


def test_the_gpus_free_memory_limits_a_step(sdxl: Info, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train__steps": 1, "data__resolution": 1024, "memory__device": "cuda"}
    for free, count in ((8.07 * GIB, range(1, 87)), (24 * GIB, [0]), (4 * GIB, [87]), (None, [0])):
        monkeypatch.setattr(nvidia, "free_bytes", lambda free=free: free and int(free))
        result = make(sdxl, [SQUARE], **settings)
        assert result.recomputed in count
        assert any("for 8 GiB" in line for line in result.lines()) is (free == 8.07 * GIB)
        assert any("the card has 4.0 GiB free" in line for line in result.lines()) is (free == 4 * GIB)


def test_the_gpus_free_memory_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(nvidia.shutil, "which", lambda _: str(program))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvidia.free_bytes() is None
    for output, free in (("8000\n6000", 6000 * 2**20), ("[N/A]", None), ("", None)):
        monkeypatch.setattr(nvidia.subprocess, "run", lambda *_, output=output, **__: SimpleNamespace(stdout=output))
        assert nvidia.free_bytes() == free
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert nvidia.free_bytes() is None


def test_memory_grows_with_the_batch_and_with_a_prior(sd15: Info) -> None:
    one = make(sd15, [SQUARE], train__steps=1).memory["activations"]
    assert make(sd15, [SQUARE], train__steps=1, train__batch_size=4).memory["activations"] == pytest.approx(4 * one)
    assert make(sd15, [SQUARE], train__steps=1, train__prior="teacher").memory["activations"] == pytest.approx(2 * one)


def test_full_precision_takes_twice_the_memory(sd15: Info) -> None:
    half = make(sd15, [SQUARE], train__steps=1).memory
    full = make(sd15, [SQUARE], train__steps=1, memory__mixed_precision="fp32").memory
    assert full["base"] == 2 * half["base"]


def test_on_a_cpu_the_time_is_an_estimate_that_grows_with_the_work(sd15: Info, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e11)
    result = make(sd15, [SQUARE], train__steps=100, memory__device="cpu")
    more = make(sd15, [SQUARE], train__steps=200, memory__device="cpu")
    assert result.seconds is not None and more.seconds is not None
    step = 2.2 * 0.803e12 / (plan.CPU_SHARE * 1e11)
    assert more.seconds - result.seconds == pytest.approx(100 * step, rel=0.02)
    assert result.lines()[-1].startswith("time: about ") and result.lines()[-1].endswith(" (estimate)")


@pytest.mark.parametrize(("side", "speedup"), [(512, 4), (64, 1)])
def test_small_pictures_gain_nothing_from_further_threads(
    sd15: Info, monkeypatch: pytest.MonkeyPatch, side: int, speedup: int
) -> None:
    seconds = {}
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e9)  # slow, so that the fixed costs do not count
    for threads in (1, 4):
        monkeypatch.setattr(plan, "_threads", lambda threads=threads: threads)
        result = make(sd15, [SQUARE], train__steps=100, memory__device="cpu", data__resolution=side)
        seconds[threads] = result.seconds
    assert seconds[1] / seconds[4] == pytest.approx(speedup, rel=0.02)


def test_the_speed_of_this_machine_is_measured_quickly() -> None:
    assert 1e8 < plan._matmul_speed(seconds=0.02) < 1e14


def test_the_speed_is_that_of_products_that_did_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products, of which three wait for a core: they take 9, 9, 1, 1 and 9 s."""
    times = iter([0, 0, 9, 9, 9, 18, 18, 18, 19, 19, 19, 20, 20, 20, 29, 29])
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert plan._matmul_speed.__wrapped__(seconds=29) == 2 * 32 * 64**3


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("64", 5), ("", 5), ("0", 5), ("4,2", 5)])
def test_the_threads_that_will_train_are_counted(monkeypatch: pytest.MonkeyPatch, value: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)), raising=False)
    assert plan._threads() == threads


@pytest.mark.parametrize(
    ("load", "line"),
    [
        (3.5, "busy: this machine has a load of 3.5 on 2 cores now; the run takes longer while that lasts"),
        (2.0, ""),
    ],
)
def test_a_plan_says_that_the_machine_is_busy(
    sd15: Info, monkeypatch: pytest.MonkeyPatch, load: float, line: str
) -> None:
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e11)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    result = make(sd15, [SQUARE], train__steps=1, memory__device="cpu")
    assert result.busy == line
    assert (line in result.lines()) == bool(line)
    if line:
        assert texts.sayer("ja").translate(result.busy).startswith("混雑")


@pytest.mark.parametrize("problem", [OSError, None])
def test_a_system_that_tells_no_load_is_not_called_busy(monkeypatch: pytest.MonkeyPatch, problem: object) -> None:
    def fail() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", fail)
    if problem is None:
        monkeypatch.delattr(os, "getloadavg")
    assert plan_lines.busy() == ""


def test_on_a_gpu_no_time_is_estimated(sd15: Info) -> None:
    result = make(sd15, [SQUARE], train__steps=1)
    assert result.seconds is None
    assert result.lines()[-1] == "time: measured in the first steps"


@pytest.mark.parametrize(
    ("build", "hidden", "driver", "system", "device"),
    [
        ("2.13.0+cpu", None, True, ("linux", "x86_64"), "cpu"),
        ("2.13.0", None, True, ("linux", "x86_64"), "cuda"),
        ("2.13.0", None, False, ("linux", "x86_64"), "cpu"),
        ("2.13.0", "", True, ("linux", "x86_64"), "cpu"),
        ("2.13.0", None, False, ("darwin", "arm64"), "mps"),
        ("2.13.0", None, False, ("darwin", "x86_64"), "cpu"),
    ],
)
def test_the_device_is_found_without_torch(
    monkeypatch: pytest.MonkeyPatch, build: str, hidden: str | None, driver: bool, system: tuple[str, str], device: str
) -> None:
    monkeypatch.setattr(nvidia, "torch_has_cuda", lambda: not build.endswith("+cpu"))
    monkeypatch.setattr(nvidia, "DRIVER_FILES", (Path("/proc/self" if driver else "/nowhere/at/all"),))
    monkeypatch.setattr(plan.sys, "platform", system[0])
    monkeypatch.setattr(plan.platform, "machine", lambda: system[1])
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert plan.guess_device("auto") == device
    assert plan.guess_device("mps") == "mps"
    # Without the driver's file a GPU is still possible: on Windows, or from another maker.
    assert plan.may_be_cuda("auto") == (device == "cuda" or (system[0], build, hidden) == ("linux", "2.13.0", None))
    assert plan.may_be_cuda("cuda") and not plan.may_be_cuda("cpu")


def test_streaming_weights_without_cuda_is_refused(sd15: Info, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "torch_has_cuda", lambda: False)
    for device, text in (("cpu", "cpu"), ("mps", "mps"), ("auto", "(cpu|mps)")):
        with pytest.raises(LorakitError, match=f"needs a CUDA card to copy weights to, and this is {text}: set it to"):
            make(sd15, [SQUARE], train__steps=1, memory__device=device, memory__stream_base=True)


def test_the_required_host_memory_is_reported(sdxl: Info, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = make(sdxl, [SQUARE], train__steps=1)
    assert resident.host == resident.ram == 0 and not any(line.startswith("host:") for line in resident.lines())
    for ram, tail in (
        (64, ", of 64.0 GiB"),
        (8, ", of 8.0 GiB; that is much: keep them smaller with memory.base_storage"),
        (0, ""),
    ):
        monkeypatch.setattr(plan, "_ram", lambda ram=ram: ram * GIB)
        result = make(sdxl, [SQUARE], train__steps=1, memory__stream_base=True)
        assert f"host: 4.8 GiB of memory for the base's weights{tail}" in result.lines()
        assert result.memory["base"] < 0.2 * GIB and result.host == pytest.approx(4.77 * GIB, rel=0.01)
    assert make(sdxl, [SQUARE], train__steps=1, memory__stream_base=True, memory__base_storage="int8").host < 2.4 * GIB


def test_the_memory_of_this_machine_is_measured_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan._ram() > 2**28
    monkeypatch.delattr(plan.os, "sysconf")
    assert plan._ram() == 0


# -- the complete plan ----------------------------------------------------------------------------------------------


def test_json_has_the_facts_of_the_lines(sd15: Info) -> None:
    result = make(sd15, [SQUARE] * 4, train__steps_per_image=2)
    document = json.loads(json.dumps(result.to_json()))
    assert document["modules"] == {"unet": {"modules": 128, "parameters": 3_188_736}}
    assert (document["steps"], document["photos"], document["seconds"]) == (8, 4, None)
    assert [line.partition(":")[0] for line in result.lines()] == [
        *("base", "photos", "adapter", "strength", "length", "note", "memory", "time")
    ]
    assert "adapter: lora, unet 128 modules (3.19 M weights)" in result.lines()


def test_planning_needs_no_torch() -> None:
    script = "import sys, lorakit.runs.plan; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"
