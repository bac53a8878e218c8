"""Tests of several training processes: they end with the same weights and a lower loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.pocket import workers

EVERY = (1, 8)  # average gradients in every step, or weights every eighth step


def _descend(worker: workers.Worker, folder: Path) -> None:
    for every in EVERY:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        file = folder / f"rank-{worker.rank}-{every}.state"
        run = workers.Run(worker, {"model": model}, file, 1024, 8, 0.05, seed=worker.rank, every=every)
        losses = []
        while not run.is_finished:
            inputs = torch.randn(8, 4, generator=run.generator)
            loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
            run.step(loss)
            losses.append(float(loss.detach()))
        result = {"weights": model.weight.detach(), "first": losses[0], "last": losses[-1]}
        torch.save(result, folder / f"{every}-{worker.rank}.pt")


@pytest.mark.slow
def test_two_workers_end_with_the_same_weights_and_a_lower_loss(tmp_path: Path) -> None:
    workers.launch(_descend, 2, tmp_path)
    for every in EVERY:
        a, b = (torch.load(tmp_path / f"{every}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert torch.equal(a["weights"], b["weights"]), every
        assert a["last"] < 0.1 * a["first"], every
    assert (tmp_path / "rank-0-8.state").exists() and not (tmp_path / "rank-1-8.state").exists()


def test_randomness_is_a_function_of_seed_position_and_worker(tmp_path: Path) -> None:
    def draw(seed: int, position: int, rank: int) -> float:
        run = workers.Run(workers.Worker(rank, 2), {"m": torch.nn.Linear(1, 1)}, tmp_path / "x.state", 9, 1, 0.1, seed)
        run.position = position
        return float(torch.randn((), generator=run.generator))

    draws = [draw(seed, pictures, rank) for seed in (0, 1) for pictures in (0, 64) for rank in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert draw(1, 64, 1) == draws[-1]
