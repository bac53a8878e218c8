"""Complete runs on a card: their results, their waits for the card, and which modules are on it.

The make-believe card (`card.py`) uses the CPU's kernels, so its runs must equal runs on the CPU. A real card draws
other random numbers than a CPU. Its runs are compared with runs without CUDA graphs on the same card, with
deterministic kernels.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import short_run
import tiny
import tiny_sd3

from lorakit import families
from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.families import loading
from lorakit.training import loop, run as train
from lorakit.training.optimizer_step import OptimizerStep

# The make-believe card has counters and limits that a real card does not have.
card: Any = getattr(torch.cuda, "card", None)
counted = pytest.mark.skipif(card is None, reason="needs the make-believe card, which counts")
pytestmark = [
    pytest.mark.usefixtures("short_validation", "copied_modules"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
# A real card multiplies in TF32, and AdamW turns small differences of gradients into large ones of weights.
CLOSE = 2e-3 if card is not None else 1e-2
EXACT: dict[str, object] = {} if card is not None else {"train__deterministic": True}
STEPS = 4
PASS = "CUDA graphs are on: each batch shape is captured at its first step, at most 16"
GRAPH = f"{PASS}, and clipping with the optimizer step"
GRAPHS_OFF = "CUDA graphs are off: "
# Parts of the messages about a failed capture.
FAILED = ("CUDA graphs are off, training", "runs without a CUDA graph")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> tiny base."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd1": tiny.save_sd1(folder / "sd1"),
        "sdxl": tiny.save_sdxl(folder / "sdxl", shallow=True),
        "sd3": tiny_sd3.save_sd3(folder / "sd3"),
    }


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos: two batches of two photos and one of one photo."""
    return short_run.noise(tmp_path_factory.mktemp("photos"), 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test its own cache; remove the card's memory limit after each test."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    yield
    if card is not None:
        card.set_room(-1)


def run_config(base: Path, photos: Path, folder: Path, device: str = "cuda", **changes: object) -> Config:
    short = {"memory__mixed_precision": "fp32", "sample__prompts": ("a photo of sks toy",)}
    changes = short | {"memory__device": device} | changes
    return short_run.run_config(base, photos, folder, STEPS, **changes)


def log_values(run: Path, event: str = "message", field: str = "message") -> list[str]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry[field] for entry in log if entry["event"] == event]


ALL: dict[str, object] = {"sample__at_start": True, "sample__at_end": True, "train__validate_at_end": True}
NO_SAMPLES: dict[str, object] = {"sample__at_start": False, "sample__at_end": False, "sample__every": STEPS + 1}
NO_PICTURES: dict[str, object] = {**NO_SAMPLES, "train__validate_every": 2 * STEPS}
PRIOR_IMAGES: dict[str, object] = {"train__prior": "images", "train__class_images": 3}
TEXT_ENCODER: dict[str, object] = {"adapter__train_text_encoder": True}
# (family, changes to the config, message about CUDA graphs).
CASES: list[tuple[str, dict[str, object], str]] = [
    ("sd1", {"optimizer__lr_scheduler": "cosine", "optimizer__warmup_steps": 2, **PRIOR_IMAGES, **ALL}, GRAPH),
    ("sd1", {"memory__gradient_checkpointing": True, "memory__base_storage": "nf4"}, GRAPH),
    ("sdxl", {"adapter__target_modules": "linear+conv", "train__gradient_accumulation_steps": 2}, GRAPH),
    ("sdxl", {"adapter__new_tokens": 2, "adapter__method": "dora"}, GRAPH),
    (
        "sd1",
        {
            "adapter__dropout": 0.3,
            "optimizer__name": "lion",
            "train__prior": "teacher",
            "train__batch_size": 1,
            **TEXT_ENCODER,
        },
        PASS,
    ),
    ("sd3", {"output__formats": ["diffusers"], **TEXT_ENCODER, **PRIOR_IMAGES, **ALL}, GRAPH),
    (
        "sdxl",
        {"memory__stream_base": True},
        GRAPHS_OFF + "memory.stream_base copies weights during the step. Training is correct, only slower.",
    ),
]
# A case with this option skips the self-check, because its file differs from another case's in nothing it examines.
UNCHECKED = {"adapter__dropout"}
# While a text encoder computes, the UNet is not on the card, and the other way round. Trained text encoders stay on the
# card in training, but T5 leaves it; class pictures and the self-check need no text encoder while the UNet computes.
ON_CARD: dict[tuple[str, bool], set[tuple[str, ...]]] = {
    ("sd1", False): {("unet",), ("text_encoder",)},
    ("sd3", True): {("text_encoder", "text_encoder_2", "unet"), ("unet",)},
}


@dataclass(frozen=True)
class Watched:
    """What a run did on the card.

    Attributes:
        modules: names of the modules on the card, before each forward pass of a watched module.
        batch_sizes: pictures that were encoded together.
    """

    modules: set[tuple[str, ...]]
    batch_sizes: list[int]


def watch(monkeypatch: pytest.MonkeyPatch, *parts: str) -> Watched:
    """Record the modules on the card before each forward pass of `parts`, and the sizes of encoded batches."""
    watched = Watched(set(), [])
    load, encode = families.load, loading.encode_image

    def look(family):
        watched.modules.add(tuple(sorted(name for name, module in family.modules().items() if where(module) == "cuda")))

    def loaded(*args):
        family = load(*args)
        for part in parts:
            family.modules()[part].register_forward_pre_hook(lambda *_: look(family))
        return family

    def encoded(vae, pixels):
        watched.batch_sizes.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(families, "load", loaded)
    monkeypatch.setattr(loading, "encode_image", encoded)
    return watched


def where(module: Any) -> str:
    return next(module.parameters()).device.type


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "changes", "issued"), CASES)
def test_a_run_on_a_card_equals_its_reference(bases, photos, tmp_path, monkeypatch, family, changes, issued):
    """A run with class pictures is also watched: small pictures are encoded together, and `ON_CARD`."""
    if UNCHECKED & changes.keys():
        short_run.unchecked(monkeypatch)
    trained = (family, "adapter__train_text_encoder" in changes)
    with monkeypatch.context() as patch:
        if "train__class_images" in changes:
            watched = watch(patch, "unet", *(() if trained[1] else ("text_encoder",)))
        there = train.train(run_config(bases[family], photos, tmp_path / "card", **EXACT, **changes))
    if "train__class_images" in changes:
        assert watched.modules == ON_CARD[trained]
        assert watched.batch_sizes == [5, 3]
    changes = {name: value for name, value in changes.items() if name != "memory__stream_base"} | NO_SAMPLES
    short_run.unchecked(monkeypatch)
    reference: dict[str, object] = {"device": "cpu"} if card is not None else {"memory__cuda_graphs": False, **EXACT}
    here = train.train(run_config(bases[family], photos, tmp_path / "reference", **reference, **changes))
    one, two = load_file(there.adapter), load_file(here.adapter)
    assert one.keys() == two.keys()
    for name, right in two.items():
        assert (one[name] - right).norm() <= CLOSE * right.norm(), name
    assert issued in log_values(there.folder)
    assert not any(text in line for line in log_values(there.folder) for text in FAILED)
    assert log_values(there.folder, "warning") == log_values(here.folder, "warning")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "skipped"), [("bf16", 0), ("fp16", 1)])
def test_graphs_in_half_precision_pass_their_verification(bases, photos, tmp_path, monkeypatch, precision, skipped):
    """In fp16 the first steps overflow and are skipped."""
    monkeypatch.setattr(loading, "FP16_GRADIENT_SCALE", 2.0**28)
    monkeypatch.setattr("lorakit.training.loop.READ_EVERY", 1)
    short_run.unchecked(monkeypatch)
    result = train.train(
        run_config(
            bases["sd1"],
            photos,
            tmp_path / "run",
            **NO_SAMPLES,
            memory__mixed_precision=precision,
            train__steps=10 if skipped else STEPS,
        )
    )
    assert GRAPH in log_values(result.folder)
    assert not any(text in line for line in log_values(result.folder) for text in FAILED)
    assert min(1, sum("overflow" in line for line in log_values(result.folder, "warning"))) == skipped
    assert len(log_values(result.folder, "step", "loss")) > 0


@counted
@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory__gradient_checkpointing": True, "memory__mixed_precision": "bf16"},
        {"adapter__train_text_encoder": True, "train__prior": "teacher"},
    ],
)
def test_a_step_does_not_wait_for_the_card(bases, photos, tmp_path, monkeypatch, changes):
    """Photos are not copied in a step either: the host's copies for a step are smaller than one latent."""
    syncs: list[tuple[int, int]] = []
    step = OptimizerStep.__call__

    def counted(self, number):
        before = card.waited(), card.copied()
        result = step(self, number)
        syncs.append((card.waited() - before[0], card.copied() - before[1]))
        return result

    monkeypatch.setattr(OptimizerStep, "__call__", counted)
    monkeypatch.setattr(loop, "READ_EVERY", STEPS)
    short_run.unchecked(monkeypatch)
    changes = NO_PICTURES | changes
    train.train(run_config(bases["sd1"], photos, tmp_path / "run", train__batch_size=5, **changes))
    # The first two steps compare graphs with eager execution: one of the pass, and one of the optimizer step.
    assert [waits for waits, _ in syncs[2:]] == [0] * (STEPS - 2)
    assert max(copied for _, copied in syncs[2:]) < 4 * 8 * 8 * 4


@counted
@pytest.mark.gpu
def test_a_full_card_is_reported_with_remedies(bases, photos, tmp_path):
    settings = run_config(bases["sd1"], photos, tmp_path / "run", sample__at_start=True)
    card.set_room(card.live() + families.describe(settings.model).bytes["unet"] + 2**18)
    with pytest.raises(LorakitError, match=r"^step 1: not enough memory on the device; cheapest first, set memory\."):
        train.train(settings)
    assert log_values(tmp_path / "run", "warning")[-1] == (
        "step 0: not enough memory to draw samples; training goes on without them"
    )


@pytest.mark.gpu
def test_a_resumed_run_has_the_same_bits(bases, photos, tmp_path, monkeypatch):
    short_run.unchecked(monkeypatch)
    straight = train.train(run_config(bases["sd1"], photos, tmp_path / "straight", **EXACT))
    step = OptimizerStep.__call__

    def stopping(self, number):
        if number == 1:
            (tmp_path / "cut" / "stop").write_text("")
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerStep, "__call__", stopping)
        with pytest.raises(train.Stopped):
            train.train(run_config(bases["sd1"], photos, tmp_path / "cut", **EXACT))
    resumed = train.resume(tmp_path / "cut")
    one, two = load_file(straight.adapter), load_file(resumed.adapter)
    assert all(torch.equal(one[name], two[name]) for name in one)
