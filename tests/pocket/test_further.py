"""Tests of further training of the shipped UNet: its renderings and the file that it writes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.families import pocket
from tools.pocket import further


@pytest.mark.slow
def test_the_written_file_fits_the_shipped_model(tmp_path: Path) -> None:
    further.render_chunks(tmp_path, 0, seconds=0.2, size=8)
    further.render_chunks(tmp_path, 1, seconds=60, size=8, unseen=True)
    model = further.Further(torch.device("cpu"), rate=1e-4)
    unseen = model.encode(next(tmp_path.glob("*.unseen")))
    before = model.unseen_loss(unseen)
    assert model.unseen_loss(unseen) == before
    further.train(model, tmp_path, batch=4, seconds=0.5)
    assert model.steps > 0 and model.unseen_loss(unseen) != before
    model.save(tmp_path / "unet.safetensors")

    shipped = load_file(pocket.path() / "unet" / "diffusion_pytorch_model.safetensors")
    result = load_file(tmp_path / "unet.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in result.items()} == {
        name: (v.shape, v.dtype) for name, v in shipped.items()
    }
    assert any(not torch.equal(result[name], shipped[name]) for name in shipped)
    with safe_open(tmp_path / "unet.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_renderers_use_seeds_of_their_own(tmp_path: Path) -> None:
    for number in range(2):
        further.render_chunks(tmp_path, number, seconds=0.001, size=1)
    seeds = sorted(int(file.stem) for file in tmp_path.glob("*.npz"))
    assert min(seeds) >= further.FIRST_SEED and len({seed // further.SEEDS_A_RENDERER for seed in seeds}) == 2
    assert max(seeds) < further.UNSEEN_SEED
