import json
import math
from pathlib import Path

import pytest
import torch

from lorakit import config, formats
from lorakit.cli import main as cli
from lorakit.core.errors import LorakitError
from lorakit.runs.run_folder import RunFolder
from lorakit.training import checkpoint, checkpoint_export

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def checkpoint_folder(tmp_path: Path, tiny_sd1: Path) -> Path:
    """A checkpoint of one layer in a run folder, written without training."""
    options = {
        "model.base": str(tiny_sd1),
        "data.name": "sks toy",
        "adapter.method": "rslora",
        "adapter.rank": 4,
        "output.folder": str(tmp_path / "run"),
    }
    settings = config.load("subject-sd15", options)
    run = RunFolder.create(settings)
    run.write_plan({"photos": 5, "batches": 5})
    draw = torch.Generator().manual_seed(0)
    state = {f"{LAYER}.down": torch.randn(4, 32, generator=draw), f"{LAYER}.up": torch.randn(32, 4, generator=draw)}
    return checkpoint.save(run.checkpoints, 20, state, {"state": {}, "param_groups": []}, {}, config=settings)


def test_a_checkpoint_can_be_read_as_an_adapter(checkpoint_folder: Path):
    assert checkpoint_export.is_checkpoint(checkpoint_folder) and not checkpoint_export.is_checkpoint(
        checkpoint_folder.parent
    )
    weights = checkpoint_export.read(checkpoint_folder)
    layer = weights.layers[LAYER]
    assert (weights.family, weights.method, list(weights.layers)) == ("sd1", "rslora", [LAYER])
    assert layer.scale == pytest.approx(4 / math.sqrt(4)), "alpha / sqrt(rank), alpha unset being the rank"
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(layer.down, torch.randn(4, 32, generator=draw))
    assert json.loads(weights.metadata["lorakit.config"])["adapter"]["rank"] == 4


def test_a_checkpoint_is_exported_like_an_adapter(checkpoint_folder: Path, tmp_path: Path):
    assert (
        cli.main(
            ["export", str(checkpoint_folder), "--to", "kohya", "--dtype", "fp32", "--output", str(tmp_path / "out")]
        )
        == 0
    )
    (file,) = (tmp_path / "out").glob("*.safetensors")
    read, expected = formats.read(file).layers[LAYER], checkpoint_export.read(checkpoint_folder).layers[LAYER]
    assert torch.allclose(read.delta(), expected.delta(), rtol=1e-6)


def test_a_missing_plan_is_reported(checkpoint_folder: Path):
    (checkpoint_folder.parent.parent / "plan.json").write_text("{")
    with pytest.raises(LorakitError, match=r"plan\.json is not there or damaged"):
        checkpoint_export.read(checkpoint_folder)


def test_inspect_describes_a_checkpoint(checkpoint_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(checkpoint_folder)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{checkpoint_folder.name}: a checkpoint of a run, as it would be exported")
    assert any("Stable Diffusion 1" in line for line in lines) and any("rslora" in line for line in lines)
    size = float(torch.linalg.vector_norm(checkpoint_export.read(checkpoint_folder).layers[LAYER].delta()))
    assert any(line.split()[:3] == ["down", "0", f"{size:.3g}"] for line in lines)
    (checkpoint_folder / checkpoint.MARKER).unlink()
    assert cli.main(["inspect", str(checkpoint_folder)]) == 1
    assert "not a checkpoint inside a run folder" in capsys.readouterr().err
