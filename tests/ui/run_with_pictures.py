"""A run that has ended, with pictures, a checkpoint and an empty adapter file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorakit.runs import quickstart
from lorakit.runs.run_folder import RunFolder
from lorakit.ui.workspace import Workspace


def run_with_pictures(
    workspace: Workspace, photos: Path, samples: Mapping[int, Sequence[Image.Image]], prompts: Sequence[str]
) -> RunFolder:
    """Create the run "one". `samples` maps a step to a picture for each prompt."""
    config = quickstart.config_for_answers({quickstart.PHOTOS: str(photos), quickstart.NAME: "sks toy"}, "quick")
    run = RunFolder.create(replace(config, output=replace(config.output, folder=str(workspace.runs / "one"))))
    for step, pictures in samples.items():
        run.save_samples(step, list(pictures), list(prompts))
    (run.checkpoints / "step-000004").mkdir()
    (run.checkpoints / "step-000004" / "complete").touch()
    (run.path / "sks-toy.safetensors").write_bytes(b"")
    run.update(state="done", step=6, steps=6, adapter="sks-toy.safetensors")
    run.unlock()
    return run
