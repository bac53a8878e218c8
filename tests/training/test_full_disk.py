"""Tests of a full disk: a failed optional file is a warning, and a failed required file stops the run with advice."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import short_run
import torch

from lorakit import formats
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.core import atomic
from lorakit.core.errors import LorakitError
from lorakit.runs.run_folder import RunFolder, read
from lorakit.training import checkpoint, run as train

pytestmark = pytest.mark.usefixtures("unchecked")


def full(path: Path, content: str | bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_unwritable_adapter_file_is_a_warning_until_the_last(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    photos = short_run.noise(tmp_path / "photos", 2)
    config = short_run.run_config(tiny_sd1, photos, tmp_path / "run", 2, train__export_every=1)
    lines: list[str] = []
    with monkeypatch.context() as context:
        usage = shutil._ntuple_diskusage(10, 10, 1000)
        context.setattr("lorakit.formats.files.shutil.disk_usage", lambda path: usage)
        with pytest.raises(LorakitError) as error:
            train.train(config, listeners=[lambda event: lines.append(str(event.facts.get("message", "")))])
    assert [line for line in lines if line.startswith("step 1: the adapter cannot be written (")]
    assert str(error.value).endswith(
        f"the last step is saved; make room, then continue with: lorakit resume {tmp_path / 'run'}"
    )
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest is not None and checkpoint.step_of(latest) == 2
    assert read(tmp_path / "run").state == "failed"
    with monkeypatch.context() as context:
        context.setattr(atomic, "write", full)
        with pytest.raises(LorakitError, match=r"cannot be written \(No space left on device\); make room there, then"):
            train.resume(tmp_path / "run")
    assert train.resume(tmp_path / "run").adapter.is_file()


def test_an_unwritable_side_file_does_not_affect_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, lines = atomic.write, list[str]()

    def write_adapters(path: Path, content: str | bytes) -> None:
        (full if path.suffix == ".json" else write)(path, content)

    monkeypatch.setattr(atomic, "write", write_adapters)
    ones = torch.ones(2, 8)
    weights = AdapterWeights(
        "sd1", "lora", {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": LoraLayer(ones, ones.T, 2.0)}
    )
    paths = formats.save(weights, tmp_path, "a", ["kohya"], "fp32", {}, say=lines.append)
    assert paths["kohya"].is_file() and not (tmp_path / "a.json").exists()
    assert re.search(r"a\.json: cannot be written \(No space left on device\).*a\.safetensors itself", lines[-1])


def test_a_run_folder_on_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = atomic.write
    monkeypatch.setattr(
        atomic, "write", lambda path, content: (full if path.name == "state.json" else write)(path, content)
    )
    config = short_run.run_config(tmp_path, tmp_path, tmp_path / "run", 1)
    with pytest.raises(LorakitError, match=r"cannot write to .*run: No space left on device; give another --output"):
        RunFolder.create(config)
