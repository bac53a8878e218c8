"""Run a complete training at the size of Stable Diffusion 1.5 on a CPU, and compare the files of three formats.

    python benchmarks/full_size.py PHOTOS [--folder DIR] [--steps 3] [--resolution 512] [--json FILE]

The base has the true architecture and random weights: one .safetensors file in LDM layout, which this script writes.
`lorakit train` in bf16 is stopped after one step, and `lorakit resume` ends the run. The script then reads the adapter
in each of three formats and compares the delta W. It takes 2.2 GB of disk and 5.5 GiB of memory. On two busy cores it
takes 35 minutes: less than a minute for a step, and 25 for the validation at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import small_models  # noqa: E402  the tests' own writer of such files

from lorakit import formats  # noqa: E402
from lorakit.adapters.weights import AdapterWeights  # noqa: E402

FORMATS = ("kohya", "diffusers", "peft")
GIB = 2**30


def main() -> None:
    """Write the base, train, stop, resume and compare; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="folder of photos")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=3, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--resolution", type=int, default=512, help="training resolution in pixels (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        room = args.folder or Path(temporary)
        room.mkdir(parents=True, exist_ok=True)
        figures = measure(room, args.photos, args.steps, args.resolution)
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(room: Path, photos: Path, steps: int, resolution: int) -> dict[str, Any]:
    """Return seconds, peak resident memory in MiB and the largest difference between the formats."""
    base = small_models.of_true_size(room, "sd1")
    run = room / "run"
    settings = {
        "train.steps": steps,
        "train.save_every": 1,
        "train.validate_every": steps,
        "data.resolution": resolution,
        # At an ordinary learning rate, bf16's rounding errors would be larger than the effect of three steps.
        "optimizer.learning_rate": 0.01,
        "memory.device": "cpu",
        "memory.mixed_precision": "bf16",
        "adapter.train_text_encoder": True,
        "sample.steps": 1,
        "sample.prompts": "a photo of a sks dog",
        "sample.every": steps,
        "output.formats": ",".join(FORMATS),
        "output.dtype": "fp32",
    }
    options = [
        f"--set={key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()
    ]
    subject = ["--subject", "sks dog", "--preset", "subject-sd15", "--base", str(base), "--output", str(run)]
    first = watch(["train", str(photos), *subject, *options], stop_at=run / "checkpoints" / "step-000001" / "complete")
    second = watch(["resume", str(run)])
    assert (first["exit"], second["exit"]) == (130, 0), (first, second)
    exports = {
        "kohya": run / "sks-dog.safetensors",
        "diffusers": run / "sks-dog-diffusers.safetensors",
        "peft": run / "sks-dog-peft",
    }
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "base": {"bytes": base.stat().st_size, "threads": torch.get_num_threads()},
        "train until stopped": first,
        "resume to the end": second,
        "losses": [event["loss"] for event in log if event["event"] == "step"],
        "formats": compare({name: formats.read(path) for name, path in exports.items()}),
        "self-check": json.loads((run / "report.json").read_text(encoding="utf-8")),
    }


def watch(arguments: list[str], stop_at: Path | None = None) -> dict[str, Any]:
    """Run lorakit in its own process; interrupt it as soon as the file `stop_at` exists."""
    start = time.monotonic()
    process = psutil.Popen([sys.executable, "-m", "lorakit", *arguments], cwd=ROOT, env=os.environ)
    peak = {"rss": 0, "own": 0}
    finish = threading.Event()

    def look() -> None:
        while not finish.wait(0.05):
            try:
                memory = process.memory_info()
            except psutil.Error:
                return
            peak["rss"] = max(peak["rss"], memory.rss)
            peak["own"] = max(peak["own"], memory.rss - memory.shared)

    watcher = threading.Thread(target=look)
    watcher.start()
    while process.poll() is None:
        if stop_at is not None and stop_at.is_file():
            process.send_signal(signal.SIGINT)
            stop_at = None
        try:
            process.wait(0.5)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            continue
    finish.set()
    watcher.join()
    peaks = {f"peak {name} MiB": round(size / 2**20) for name, size in peak.items()}
    return {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1), **peaks}


def compare(read: dict[str, AdapterWeights]) -> dict[str, Any]:
    """Return each format's number of layers, and its largest relative difference of delta W to the first format."""
    first = read[FORMATS[0]]
    values = {}
    for name, weights in read.items():
        assert weights.layers.keys() == first.layers.keys(), name
        worst = max(
            float((layer.delta() - first.layers[key].delta()).abs().max() / first.layers[key].delta().abs().max())
            for key, layer in weights.layers.items()
        )
        values[name] = {"layers": len(weights.layers), "largest difference": worst}
    return values


if __name__ == "__main__":
    main()
