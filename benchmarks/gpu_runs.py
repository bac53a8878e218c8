"""Two parts of gpu.py: complete runs of presets with random weights of the true size."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_parts as parts

# Name -> (base, preset, changes to the preset).
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd15": ("sd1", "subject-sd15", {}),
    "sd15, text encoder": ("sd1", "subject-sd15", {"adapter.train_text_encoder": True, "train.batch_size": 2}),
    "sdxl": ("sdxl", "subject-sdxl", {}),
    "sdxl, little memory": ("sdxl", "subject-sdxl-lowmem", {}),
    "sdxl within 8 GiB": ("sdxl", "subject-sdxl", {"memory.limit_gib": 8}),
    "sdxl streamed": ("sdxl", "subject-sdxl-lowmem", {"memory.base_storage": "full", "memory.stream_base": True}),
}


def runs(machine: parts.Machine, kind: str) -> None:
    """Run the presets of a base, and print time, measured and predicted memory, and the self-check of each run."""
    import short_run
    import small_models

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photos = folder / "photos"
        photos.mkdir()
        short_run.noise(photos, 12)
        if machine.rehearse:
            base = folder / kind
            small_models.small(kind, base)
        else:
            with machine.device:
                base = small_models.of_true_size(folder, kind)
            parts.loops.clear(machine.device)
        cases = [(title, preset, changes) for title, (base_kind, preset, changes) in RUNS.items() if base_kind == kind]
        for number, (title, preset, changes) in enumerate(cases[: 1 if machine.rehearse else None]):
            with parts.attempt(title):
                _run(
                    machine,
                    title,
                    [str(photos), "--base", str(base), "--preset", preset],
                    changes,
                    folder / str(number),
                )


def _run(machine: parts.Machine, title: str, arguments: list[str], changes: dict[str, Any], folder: Path) -> None:
    """Run `lorakit train` for 40 steps and time the last 20."""
    steps = 4 if machine.rehearse else 40
    options = {
        # At an ordinary learning rate, bf16's rounding errors would be larger than the effect of a few steps.
        "optimizer.learning_rate": 3e-3,
        "train.steps": steps,
        "train.validate_every": steps,
        "train.save_every": steps,
        "sample.every": steps,
        "sample.steps": 4,
        "memory.device": machine.device.type,
        **({"data.resolution": 128} if machine.rehearse else {}),
        **changes,
    }
    settings = [f"--set={name}={json.dumps(value)}" for name, value in options.items()]
    command = [sys.executable, "-m", "lorakit", "train", *arguments, "--subject", "sks toy", "--output", str(folder)]
    start = time.perf_counter()
    result = subprocess.run([*command, *settings], cwd=parts.ROOT, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    print(result.stdout[-6000:], result.stderr[-3000:])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = {event["step"]: event["time"] for event in log if event["event"] == "step"}
    plan, state = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("plan.json", "state.json"))
    predicted = {name: round(size / 2**30, 2) for name, size in plan["peaks"].items()}
    warnings = [event["message"] for event in log if event["event"] == "warning"]
    graphs = [event.get("message", "") for event in log if "CUDA graph" in event.get("message", "")]
    took = 1e3 * (times.get(steps, 0.0) - times.get(steps // 2, 0.0)) / (steps / 2)
    memory = {"peak_gib": round((state["memory_mib"] or 0) / 2**10, 2), "predicted_gib": predicted}
    facts = {"exit": result.returncode, "seconds": seconds, "planned_s": plan["seconds"], **memory}
    parts.row(f"run {title}", took, unit="ms a step", **facts, warnings=warnings, graphs=graphs)
    for event in log:
        if event.get("message", "").startswith(("ok: ", "FAILED: ")):
            parts.row(f"run {title}", event["message"])
