"""Tests of the memory estimate against exact counts of tensor bytes from benchmarks/memory.py."""

import gzip
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from lorakit import config
from lorakit.adapters import targets
from lorakit.core.errors import LorakitError
from lorakit.families import ldm
from lorakit.runs import memory_estimate, plan

KEYS = Path(__file__).parents[1] / "formats" / "keys"
GIB = 2**30


@dataclass
class Info:
    """The facts about a base that determine memory, from the shapes of a real model."""

    name: str
    layers: dict[str, tuple[int, ...]] = field(init=False)
    downscale: int = 8
    text_tokens: int = 77
    bytes: dict[str, int] = field(default_factory=lambda: {"vae": memory_estimate.VAE_BYTES})
    variants: dict[str, str | None] = field(default_factory=dict)
    slots: dict[str, dict[str, ldm.Slot]] | None = None
    sources: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return {"sd15": "sd1"}.get(self.name, self.name)

    def __post_init__(self) -> None:
        with gzip.open(KEYS / f"{self.name}.tsv.gz", "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file]
        self.layers = {row[0]: tuple(int(side) for side in row[-1].split("x")) for row in rows}


def settings_for(resolution: int, modules: str = "attention", **changes: Any) -> config.Config:
    values = {"train__steps": 1, "memory__device": "cuda", "data__resolution": resolution} | changes
    settings = {name.replace("__", "."): value for name, value in values.items()}
    return config.load(None, settings | {"adapter.target_modules": modules})


def trained(settings: config.Config, info: Info) -> dict[str, tuple[int, int]]:
    adapter = settings.adapter
    selected = targets.select(info.family, info.layers, adapter.target_modules, adapter.train_text_encoder)
    return plan.count_weights(selected, info.layers, settings.adapter)


# Peak of live tensor bytes of a bf16 step with rank 16, in GiB. `checkpointing` is a switch or a limit in GiB.
@pytest.mark.parametrize(
    ("name", "resolution", "batch", "modules", "checkpointing", "storage", "counted"),
    [
        ("sd15", 512, 1, "attention", False, "full", 2.15),
        ("sd15", 512, 1, "attention", True, "full", 1.81),
        ("sd15", 512, 1, "attention", True, "int8", 1.01),
        ("sd15", 512, 1, "attention", True, "nf4", 0.64),
        ("sd15", 512, 1, "linear", True, "nf4", 0.73),
        ("sd15", 512, 1, "linear+conv", False, "full", 2.49),
        ("sd15", 512, 4, "attention", False, "full", 3.64),
        ("sd15", 512, 4, "attention", True, "full", 2.29),
        ("sd15", 512, 4, "linear", 3.0, "full", 2.82),
        ("sd2", 768, 1, "attention", False, "full", 2.78),
        ("sd2", 768, 1, "attention", True, "full", 2.02),
        ("sdxl", 512, 1, "attention", True, "full", 5.24),
        ("sdxl", 1024, 1, "attention", False, "full", 8.90),
        ("sdxl", 1024, 1, "attention", True, "full", 5.59),
        ("sdxl", 1024, 1, "attention", True, "int8", 3.23),
        ("sdxl", 1024, 1, "attention", True, "nf4", 2.11),
        ("sdxl", 1024, 1, "linear", True, "nf4", 2.45),
        ("sdxl", 1024, 1, "linear+conv", False, "full", 9.61),
        ("sdxl", 1024, 2, "linear", True, "full", 6.48),
        ("sdxl", 1024, 1, "attention", 8.0, "full", 7.81),
        ("sdxl", 1024, 1, "attention", 7.0, "full", 6.80),
        ("sdxl", 1024, 1, "attention", 5.0, "int8", 4.81),
        ("sd15", 512, 1, "attention", True, "full streamed", 0.291),
        ("sd15", 512, 1, "attention", True, "int8 streamed", 0.2802),
        ("sdxl", 1024, 1, "attention", True, "full streamed", 0.945),
        ("sdxl", 1024, 1, "attention", True, "int8 streamed", 0.908),
    ],
)
def test_a_steps_memory_is_predicted_within_5_percent(
    name: str, resolution: int, batch: int, modules: str, checkpointing: bool | float, storage: str, counted: float
) -> None:
    info, runtime = Info(name), memory_estimate.RUNTIME_BYTES["cuda"] / GIB
    within = {} if isinstance(checkpointing, bool) else {"memory__limit_gib": checkpointing + runtime}
    kind, _, streamed = storage.partition(" ")
    settings = settings_for(
        resolution,
        modules,
        train__batch_size=batch,
        memory__base_storage=kind,
        memory__stream_base=bool(streamed),
        **(within or {"memory__gradient_checkpointing": checkpointing}),
    )
    parts = memory_estimate.training(settings, info, trained(settings, info), "cuda")
    step = sum(parts.values()) / GIB - runtime
    assert step == pytest.approx(counted, rel=1 / 20)
    assert not within or counted <= step <= checkpointing


# MiB that the trained text encoders save for each text, counted by benchmarks/memory.py in bf16.
@pytest.mark.parametrize(
    ("name", "modules", "counted"),
    [
        ("sd15", "attention", 20.5),
        ("sd15", "linear", 27.3),
        ("sd2", "attention", 38.4),
        ("sd2", "linear", 55.8),
        ("sdxl", "attention", 87.1),
        ("sdxl", "linear", 124.2),
    ],
)
def test_a_texts_memory_is_predicted_at_most_two_fifths_too_high(name: str, modules: str, counted: float) -> None:
    info = Info(name)

    def activations(**changes: Any) -> float:
        settings = settings_for(512, modules, **changes)
        return memory_estimate.training(settings, info, trained(settings, info), "cuda")["activations"] / 2**20

    reading = {"adapter__train_text_encoder": True}
    text = activations(**reading) - activations()
    assert counted <= text <= 1.4 * counted
    # Each photo and each picture of the class has a text.
    more = {"train__batch_size": 3, "train__prior": "teacher"}
    assert activations(**more, **reading) - activations(**more) == pytest.approx(6 * text, rel=1e-6)
    # 2 random texts for each photo, and the empty prompt.
    random = {"train__batch_size": 3, "train__text_prior_weight": 1.0}
    assert activations(**random, **reading) - activations(train__batch_size=3) == pytest.approx(10 * text, rel=1e-6)


def test_a_memory_limit_includes_the_texts() -> None:
    info, blocks = Info("sdxl"), []
    for train_texts in (False, True):
        settings = settings_for(
            1024, train__batch_size=4, memory__limit_gib=16.0, adapter__train_text_encoder=train_texts
        )
        modules = {name: weights for name, weights in trained(settings, info).items() if train_texts or name == "unet"}
        blocks.append(memory_estimate.recomputed_blocks(settings, info, modules, "cuda"))
    assert len(blocks[1]) > len(blocks[0]) > 0


def test_layers_save_less_on_cuda_only() -> None:
    info, settings = Info("sd15"), settings_for(512)
    card, cpu = (
        memory_estimate.training(settings, info, trained(settings, info), device) for device in ("cuda", "cpu")
    )
    half = 2 if settings.memory.mixed_precision == "auto" else 1
    assert card["activations"] * half < 0.7 * cpu["activations"]


def test_a_limit_recomputes_no_more_blocks_than_needed() -> None:
    info = Info("sdxl")

    def blocks_for(limit: float | None, **more: object) -> list[str]:
        settings = settings_for(1024, **({"memory__limit_gib": limit} if limit else {}), **more)
        return memory_estimate.recomputed_blocks(settings, info, trained(settings, info), "cuda")

    everything = blocks_for(None, memory__gradient_checkpointing=True)
    # SDXL's UNet has 70 transformer blocks and 17 resnets.
    assert len(everything) == len(set(everything)) == 87 and all(map(memory_estimate.BLOCK.fullmatch, everything))
    assert blocks_for(None) == blocks_for(24) == []
    steps = [blocks_for(limit) for limit in (9, 8, 7, 6.5)]
    assert [len(blocks) for blocks in steps] == sorted(len(blocks) for blocks in steps) and steps[0]
    assert all(more[: len(less)] == less for less, more in itertools.pairwise(steps))
    settings = settings_for(1024, memory__limit_gib=8)
    assert sum(memory_estimate.training(settings, info, trained(settings, info), "cuda").values()) <= 8 * GIB
    rest = sum(memory_estimate._rest(settings, info, trained(settings, info), "cuda").values())
    fewer = memory_estimate._activations(
        settings, memory_estimate._blocks(settings, info), "cuda", set(blocks_for(8)[:-1])
    )
    assert rest + fewer > 8 * GIB


def test_a_limit_that_cannot_be_met_is_an_error() -> None:
    info, settings = Info("sdxl"), settings_for(1024, memory__limit_gib=4, train__batch_size=2)
    with pytest.raises(LorakitError) as caught:
        memory_estimate.training(settings, info, trained(settings, info), "cuda")
    assert str(caught.value) == (
        "memory.limit_gib = 4: a step takes 6.7 GiB even if every block is computed again; raise it, or set "
        "memory.base_storage = 'nf4', memory.stream_base = true, "
        "train.batch_size = 1 with train.gradient_accumulation_steps = 2, or a lower data.resolution (now 1024)"
    )


def test_without_a_limit_a_step_fits_the_gpus_free_memory() -> None:
    info, settings = Info("sdxl"), settings_for(1024)
    modules = trained(settings, info)

    def limited(gib: float | None, changed: config.Config = settings, device: str = "cuda") -> config.MemoryConfig:
        available = None if gib is None else int(gib * GIB)
        return memory_estimate.limit_to(available, changed, info, modules, device).memory

    assert limited(16) == limited(None) == limited(8, device="cpu") == settings.memory
    assert limited(8).limit_gib == 8 and not limited(8).gradient_checkpointing
    assert limited(4) == replace(settings.memory, gradient_checkpointing=True)
    own = [{"memory__limit_gib": 7.0}, {"memory__gradient_checkpointing": True}, {"memory__compile": True}]
    for changed in (settings_for(1024, **more) for more in own):
        assert limited(6, changed) == changed.memory
    blocks = [
        len(memory_estimate.recomputed_blocks(replace(settings, memory=limited(gib)), info, modules, "cuda"))
        for gib in (16, 9, 8, 7, 4)
    ]
    assert blocks == sorted(blocks) and blocks[0] == 0 and blocks[1] > 0 and blocks[-1] == 87
    assert settings_for(1024, memory__limit_gib="auto") == settings


def test_encoding_and_samples_have_their_own_peaks() -> None:
    """SDXL at 1024 px with gradient checkpointing and an NF4 base needs at most 3.3 GiB in any phase."""
    info = Info("sdxl")
    saving = {"memory__gradient_checkpointing": True, "memory__base_storage": "nf4"}
    settings = settings_for(1024, **saving)
    peaks = memory_estimate.peaks(settings, info, trained(settings, info), "cuda")
    texts = 2 * (123_060_480 + 694_659_840)  # weights of both text encoders, from their published sizes
    runtime = memory_estimate.RUNTIME_BYTES["cuda"]
    assert peaks["encoding"] == pytest.approx(texts + runtime, rel=0.03)
    assert peaks["training"] == sum(memory_estimate.training(settings, info, trained(settings, info), "cuda").values())
    activations = memory_estimate.training(settings, info, trained(settings, info), "cuda")["activations"]
    assert (peaks["samples"] - activations) / GIB == pytest.approx(2.82, abs=0.05)
    without = settings_for(1024, memory__cuda_graphs=False, **saving)
    assert (
        memory_estimate.peaks(without, info, trained(without, info), "cuda")["samples"]
        == peaks["samples"] - activations
    )
    drawing_settings = settings_for(1024, train__prior="images", **saving)
    adapter = memory_estimate.training(drawing_settings, info, trained(drawing_settings, info), "cuda")[
        "adapter and optimizer"
    ]
    assert (
        memory_estimate.peaks(drawing_settings, info, trained(drawing_settings, info), "cuda")["encoding"]
        == peaks["samples"] - adapter - activations
    )


def test_trained_encoders_stay_on_the_device_during_samples() -> None:
    info = Info("sdxl")
    settings = settings_for(1024, adapter__train_text_encoder=True)
    frozen, trained_modules = trained(settings_for(1024), info), trained(settings, info)
    texts = 2 * (123_060_480 + 694_659_840)
    step = memory_estimate.training(settings, info, trained_modules, "cuda")
    without = memory_estimate.training(settings_for(1024), info, frozen, "cuda")
    # CUDA graphs keep the activations.
    growth = sum(step[part] - without[part] for part in ("adapter and optimizer", "activations"))
    more = memory_estimate.peaks(settings, info, trained_modules, "cuda")["samples"]
    less = memory_estimate.peaks(settings_for(1024), info, frozen, "cuda")["samples"]
    assert more - less - growth == pytest.approx(texts, rel=0.03)


def test_a_half_precision_vae_on_disk_is_float32_in_memory() -> None:
    settings = settings_for(4096)
    full, half = Info("sd15"), Info("sd15")
    half.bytes["vae"] //= 2
    half.variants["vae"] = "fp16"
    # A single file contains both parts, and its precision does not matter.
    shapes = {"encoder": (memory_estimate.VAE_BYTES // 8,), "decoder": (1, memory_estimate.VAE_BYTES // 8)}
    single = Info("sd15", slots={"vae": {name: ldm.Slot(name, shape) for name, shape in shapes.items()}})
    bases = full, half, single
    encoding_bytes = [
        memory_estimate.peaks(settings, info, trained(settings, info), "cuda")["encoding"] for info in bases
    ]
    assert encoding_bytes[0] == encoding_bytes[1] == encoding_bytes[2]


def test_on_a_cpu_components_stay_and_pictures_are_not_tiled() -> None:
    info, settings = Info("sd15"), settings_for(512)
    step = memory_estimate.training(settings, info, trained(settings, info), "cpu")
    peaks = memory_estimate.peaks(settings, info, trained(settings, info), "cpu")
    assert peaks["encoding"] == step["base"] + step["runtime"] + memory_estimate.ENCODING * 512**2
    assert peaks["samples"] - peaks["encoding"] == 512 * 512**2 + step["adapter and optimizer"]


def test_advice_names_only_available_options() -> None:
    open_ways = settings_for(512, train__batch_size=4, train__gradient_accumulation_steps=2)
    assert memory_estimate.advice("step 3", open_ways) == (
        "step 3: not enough memory on the device; cheapest first, set memory.gradient_checkpointing = true, "
        "memory.base_storage = 'nf4', memory.stream_base = true, "
        "train.batch_size = 1 with train.gradient_accumulation_steps = 8, or a lower data.resolution (now 512)"
    )
    limited = memory_estimate.advice("step 3", settings_for(512, memory__limit_gib=6))
    assert "cheapest first, set a lower memory.limit_gib (now 6), memory.base_storage = 'nf4'" in limited
    last = settings_for(512, memory__gradient_checkpointing=True, memory__base_storage="int8")
    assert memory_estimate.advice("step 3", replace(last, memory=replace(last.memory, stream_base=True))) == (
        "step 3: not enough memory on the device; cheapest first, set a lower data.resolution (now 512)"
    )
    # On devices other than CUDA no weights can be streamed.
    assert "memory.stream_base" in memory_estimate.advice("step 3", last)
    assert "memory.stream_base" not in memory_estimate.advice("step 3", last, "mps")
    plain = memory_estimate.advice("step 3", replace(last, memory=replace(last.memory, engine="plain")))
    assert "memory.stream_base" not in plain and "memory.base_storage" not in plain


def test_tiling_constants_equal_those_of_families() -> None:
    from lorakit.families import tiled_vae

    assert (memory_estimate.ENCODING, memory_estimate.DECODING) == (tiled_vae.ENCODING, tiled_vae.DECODING)
