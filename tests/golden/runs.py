"""Short training runs with recorded results: 20 losses and the adapter, for each family and method.

`python tests/golden/record.py` records them again, and `python tests/golden/record.py --check` compares every bit.
Both need the machine that recorded the results, because other processors round differently; the tests allow for
that.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
STEPS = 20
FAMILIES = ("sd1", "sdxl", "sd3")
# Each method also uses another part of the loss.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.train_text_encoder": True, "train.noise_offset": 0.1},
    "dora": {"train.prior": "teacher", "adapter.target_modules": "linear"},
    "lokr": {"train.loss": "huber", "optimizer.lr_scheduler": "cosine", "optimizer.warmup_steps": 3},
}
# No format carries DoRA of Stable Diffusion 3, so rank-stabilised LoRA replaces it.
INSTEAD = {("sd3", "dora"): "rslora"}
NAMES = [f"{f}-{INSTEAD.get((f, method), method)}" for f in FAMILIES for method in METHODS] + ["pocket"]


@dataclass(frozen=True)
class Golden:
    """The results of a run.

    Attributes:
        losses: the loss of each step.
        gradient_norms: the norm of each step's gradient before clipping.
        adapter: name of a trained weight -> float32 tensor from the last checkpoint.
    """

    losses: list[float]
    gradient_norms: list[float]
    adapter: dict[str, np.ndarray]


def run(name: str, folder: Path, base: str = "") -> Golden:
    """Train the run `name` in the empty folder `folder`, on one thread; `base` is the result of `save_base`."""
    import torch

    from lorakit import config
    from lorakit.training.run import train

    torch.set_num_threads(1)
    base, photos = base or save_base(name, folder / "base"), _photos(folder / "photos")
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(config.load(*_settings(name, base, photos, folder / "run")))
    steps = [json.loads(line) for line in (result.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in steps if event["event"] == "step"]
    return Golden(
        [event["loss"] for event in steps],
        [event["gradient_norm"] for event in steps],
        load_file(result.folder / "checkpoints" / f"step-{STEPS:06d}" / "adapter.safetensors"),
    )


def read(name: str) -> Golden:
    """Return the recorded results."""
    figures = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Golden(figures["losses"], figures["gradient_norms"], load_file(FOLDER / f"{name}.safetensors"))


def _settings(name: str, base: str, photos: Path, output: Path) -> tuple[str | None, dict[str, Any]]:
    shared = {
        "model.base": base,
        "data.folder": str(photos),
        "data.name": "sks toy",
        "train.steps": STEPS,
        "train.validate_every": STEPS,
        "train.validate_at_end": False,
        "train.save_every": STEPS,
        "sample.every": STEPS,
        "sample.at_start": False,
        "sample.at_end": False,
        "sample.prompts": ("a photo of a sks toy",),
        "sample.steps": 1,  # also for class images
        "memory.device": "cpu",
        "output.folder": str(output),
        "output.dtype": "fp32",
    }
    if name == "pocket":
        warmup = {"optimizer.warmup_steps": 10, "optimizer.warmup_ratio": 0.0}
        # The preset's values when the results were recorded.
        prior = {"train.prior_target": "image", "train.prior_prompts": (), "train.prior_loss_weight": 1.0}
        own = {"train.class_images": 8, "train.batch_size": 4, "optimizer.text_encoder_learning_rate": None}
        return "subject-pocket", shared | warmup | prior | own
    family, method = name.split("-")
    own = METHODS["dora" if method == "rslora" else method]
    if family == "sd3":
        own = own | {"output.formats": ("peft",)}
    return None, shared | own | {
        "adapter.method": method,
        "adapter.rank": 2,
        "data.resolution": 64,
        "optimizer.learning_rate": 3e-3,
        "train.batch_size": 2,
        "train.min_snr_gamma": 5.0 if family != "sd3" and method == "lokr" else None,
    }


def save_base(name: str, folder: Path) -> str:
    """Write the run's base to `folder` and return its path; for the bundled base return its name."""
    if name == "pocket":
        return "pocket"
    import tiny
    import tiny_sd3

    save = {"sd1": tiny.save_sd1, "sdxl": tiny.save_sdxl, "sd3": tiny_sd3.save_sd3}[name.split("-")[0]]
    return str(save(folder))


def _photos(folder: Path) -> Path:
    """Write five photos of noise, 64 pixels a side, each with a caption."""
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of sks toy, number {number}\n", encoding="utf-8")
    return folder
