"""Tests of resume after the loss of state or of a checkpoint, and from another current folder."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from short_run import noise, run_config

from lorakit.core.errors import LorakitError
from lorakit.training import run as train

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.slow
def test_resume_goes_back_to_the_newest_complete_checkpoint(tiny_sd1, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    noise(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    once = {"train__save_every": 1, "train__prior": "none", "sample__prompts": ("sks toy",)}
    result = train.train(run_config(tiny_sd1, "photos", tmp_path / "run", 3, **once))
    monkeypatch.chdir("/")
    folder, before = result.folder, load_file(result.adapter)

    # If a resume fails before it starts, a finished run stays unchanged.
    state = (folder / "state.json").read_bytes()
    shutil.move(tmp_path / "photos", tmp_path / "away")
    with pytest.raises(LorakitError, match="photos"):
        train.resume(folder, overrides={"train.steps": 4})
    with pytest.raises(LorakitError):
        train.resume(folder, from_checkpoint="step-000009")
    assert (folder / "state.json").read_bytes() == state
    shutil.move(tmp_path / "away", tmp_path / "photos")

    file = folder / "checkpoints" / "step-000003" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / "state.json").unlink()
    lines: list[str] = []
    resumed = train.resume(folder, listeners=[lambda event: lines.append(event.facts.get("message", ""))])
    after = load_file(resumed.adapter)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("optimizer.safetensors has changed since it was saved" in line for line in lines)
    assert any("renamed and unused" in line and "unused-step-000003" in line for line in lines)
    assert "continuing from step-000002" in lines
    # A resume without changes writes nothing; a change of output formats writes the files again.
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(LorakitError, match=r"is finished at step 3 .* lorakit resume .* --steps 4"):
        train.resume(folder)
    assert content == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines.clear()
    print_message = lambda event: lines.append(event.facts.get("message", ""))  # noqa: E731
    train.resume(folder, overrides={"output.formats": ("peft",)}, listeners=[print_message])
    assert "at step 3, the last one, the files are written again; --steps trains longer" in lines
