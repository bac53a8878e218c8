"""Predicted memory beside exact counts of what tensors take, made by benchmarks/memory.py."""

import gzip
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lorakit import config, footprint, plan
from lorakit.adapters import targets

KEYS = Path(__file__).parent / "export" / "keys"
GIB = 2**30


@dataclass
class Info:
    """As much of a base as memory depends on: the shapes of a real model."""

    name: str
    layers: dict[str, tuple[int, ...]] = field(init=False)
    downscale: int = 8
    text_tokens: int = 77
    bytes: dict[str, int] = field(default_factory=lambda: {"vae": footprint.VAE_BYTES})
    variants: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with gzip.open(KEYS / f"{self.name}.tsv.gz", "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
        self.layers = {row[0]: tuple(int(side) for side in row[-1].split("x")) for row in rows}


def chosen(resolution: int, modules: str = "attention", **changes: Any) -> config.Config:
    known = {"train__steps": 1, "memory__device": "cuda", "data__resolution": resolution} | changes
    settings = {name.replace("__", "."): value for name, value in known.items()}
    return config.load(None, settings | {"adapter.target_modules": modules})


def trained(settings: config.Config, info: Info) -> dict[str, tuple[int, int]]:
    selected = targets.select(info.layers, settings.adapter.target_modules, False)
    return plan.count_weights(selected, info.layers, settings.adapter)


# Peak of live tensor bytes of a step in bf16, rank 16, in GiB, and whether it checkpoints.
@pytest.mark.parametrize(
    ("name", "resolution", "batch", "modules", "checkpointing", "storage", "counted"),
    [
        ("sd15", 512, 1, "attention", False, "full", 2.43),
        ("sd15", 512, 1, "attention", True, "full", 1.86),
        ("sd15", 512, 1, "attention", True, "int8", 1.07),
        ("sd15", 512, 1, "attention", True, "nf4", 0.69),
        ("sd15", 512, 1, "linear", True, "nf4", 0.75),
        ("sd15", 512, 1, "linear+conv", False, "full", 2.83),
        ("sd15", 512, 4, "attention", False, "full", 4.75),
        ("sd15", 512, 4, "attention", True, "full", 2.51),
        ("sd2", 768, 1, "attention", False, "full", 3.32),
        ("sd2", 768, 1, "attention", True, "full", 2.06),
        ("sdxl", 512, 1, "attention", True, "full", 5.26),
        ("sdxl", 1024, 1, "attention", False, "full", 10.49),
        ("sdxl", 1024, 1, "attention", True, "full", 5.64),
        ("sdxl", 1024, 1, "attention", True, "int8", 3.28),
        ("sdxl", 1024, 1, "attention", True, "nf4", 2.16),
        ("sdxl", 1024, 1, "linear", True, "nf4", 2.51),
        ("sdxl", 1024, 1, "linear+conv", False, "full", 12.18),
        ("sdxl", 1024, 2, "linear", True, "full", 6.60),
        ("sd15", 512, 1, "attention", True, "full streamed", 0.337),
        ("sd15", 512, 1, "attention", True, "int8 streamed", 0.303),
        ("sdxl", 1024, 1, "attention", True, "full streamed", 0.990),
        ("sdxl", 1024, 1, "attention", True, "int8 streamed", 0.945),
    ],
)
def test_a_step_is_predicted_within_a_fifteenth(
    name: str, resolution: int, batch: int, modules: str, checkpointing: bool, storage: str, counted: float
) -> None:
    info = Info(name)
    kind, _, streamed = storage.partition(" ")
    settings = chosen(
        resolution,
        modules,
        train__batch_size=batch,
        memory__gradient_checkpointing=checkpointing,
        memory__base_storage=kind,
        memory__stream_base=bool(streamed),
    )
    parts = footprint.training(settings, info, trained(settings, info), "cuda")
    assert (sum(parts.values()) - parts["runtime"]) / GIB == pytest.approx(counted, rel=1 / 15)


def test_encoding_and_samples_have_peaks_of_their_own() -> None:
    """SDXL at 1024 px with all that saves memory: no phase of the run needs more than 4 GiB."""
    info = Info("sdxl")
    saving = {"memory__gradient_checkpointing": True, "memory__base_storage": "nf4"}
    settings = chosen(1024, **saving)
    found = footprint.peaks(settings, info, trained(settings, info), "cuda")
    texts = 2 * (123_060_480 + 694_659_840)  # weights of both text encoders, from their published sizes
    runtime = footprint.RUNTIME_BYTES["cuda"]
    assert found["encoding"] == pytest.approx(texts + runtime, rel=0.03)
    assert found["training"] == sum(footprint.training(settings, info, trained(settings, info), "cuda").values())
    assert found["samples"] / GIB == pytest.approx(3.75, abs=0.05)
    drawn = chosen(1024, train__prior="images", **saving)
    assert footprint.peaks(drawn, info, trained(drawn, info), "cuda")["encoding"] > found["encoding"] + 1.2 * GIB


def test_an_autoencoder_in_half_precision_on_disk_is_whole_in_memory() -> None:
    settings = chosen(4096)
    whole, half = Info("sd15"), Info("sd15")
    half.bytes["vae"] //= 2
    half.variants["vae"] = "fp16"
    found = [footprint.peaks(settings, info, trained(settings, info), "cuda")["encoding"] for info in (whole, half)]
    assert found[0] == found[1]


def test_on_a_cpu_everything_stays_and_pictures_are_whole() -> None:
    info, settings = Info("sd15"), chosen(512)
    step = footprint.training(settings, info, trained(settings, info), "cpu")
    found = footprint.peaks(settings, info, trained(settings, info), "cpu")
    assert found["encoding"] == step["base"] + step["runtime"] + footprint.ENCODING * 512**2
    assert found["samples"] - found["encoding"] == 512 * 512**2 + step["adapter and optimizer"]


def test_ways_out_are_only_those_that_are_open() -> None:
    open_ways = chosen(512, train__batch_size=4, train__gradient_accumulation_steps=2)
    assert footprint.advice("step 3", open_ways) == (
        "step 3: not enough memory on the device; cheapest first, set memory.gradient_checkpointing = true, "
        "memory.base_storage = 'nf4', memory.stream_base = true, "
        "train.batch_size = 1 with train.gradient_accumulation_steps = 8, or a lower data.resolution (now 512)"
    )
    last = chosen(512, memory__gradient_checkpointing=True, memory__base_storage="int8")
    assert footprint.advice("step 3", replace(last, memory=replace(last.memory, stream_base=True))) == (
        "step 3: not enough memory on the device; cheapest first, set a lower data.resolution (now 512)"
    )
    # Elsewhere than on a card there is nowhere to stream from.
    assert "memory.stream_base" in footprint.advice("step 3", last)
    assert "memory.stream_base" not in footprint.advice("step 3", last, "mps")


def test_strips_take_what_the_room_of_families_says() -> None:
    from lorakit.families import strips

    assert (footprint.ENCODING, footprint.DECODING) == (strips.ENCODING, strips.DECODING)
