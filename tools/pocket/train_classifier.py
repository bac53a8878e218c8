"""Train the classifier of the bundled model on renders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.families.pocket import subjects
from lorakit.families.pocket.classifier import Classifier, Net
from lorakit.families.pocket.spec import FIELDS
from tools.pocket import dataset
from tools.pocket.recipe import Recipe
from tools.pocket.workers import Run, Worker


def soften(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise, brightness and shifts as a decoder makes them: the judge must not mind these."""
    if rng.random() < 0.5:
        kernel = torch.tensor([1.0, 2.0, 1.0], device=pictures.device) / 4
        kernel = (kernel[:, None] * kernel[None, :]).expand(3, 1, 3, 3)
        pictures = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    if rng.random() < 0.3:
        pictures = F.interpolate(
            F.interpolate(pictures, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear"
        )
    noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32)).to(pictures.device)
    pictures = pictures * rng.uniform(0.9, 1.1) + rng.normal(0, 0.04) + noise * rng.uniform(0, 0.08)
    return torch.roll(pictures, tuple(rng.integers(-2, 3, 2)), (2, 3))


def train(worker: Worker, recipe: Recipe, work: Path) -> None:
    """Learn all labels at once; those of a toy's parts only from toys."""
    from tools.pocket.autoencoder import to_tensor

    torch.manual_seed(recipe.seed)
    model = Net(recipe.judge_channels).to(worker.device)
    run = Run(
        worker,
        {"judge": model},
        work / "classifier.state",
        recipe.judge_pictures,
        recipe.judge_batch,
        recipe.judge_rate,
        recipe.seed,
        decay=0.99,
        save_seconds=recipe.save_seconds,
    )
    pictures, labels = dataset.load(work / "renders", "pictures"), dataset.load(work / "renders", "labels")
    while not run.is_finished:
        rng = np.random.default_rng((recipe.seed, run.position, worker.rank, 1))
        rows = rng.integers(0, len(pictures), run.batch)
        real = soften(to_tensor(pictures[rows]).to(worker.device), rng)
        if rng.random() < 0.5:
            real = real.flip(3)
        targets = torch.from_numpy(labels[rows].astype(np.int64)).to(worker.device)
        with worker.autocast(recipe.bf16):
            logits = model(real)
        loss = torch.zeros((), device=worker.device)
        for i, name in enumerate(dataset.LABELS):
            if (targets[:, i] >= 0).any():
                loss = loss + F.cross_entropy(
                    logits[name].float(), targets[:, i], ignore_index=-1, label_smoothing=0.02
                )
        run.step(loss)
        accuracies = {
            name: float((logits[name].argmax(1) == targets[:, i]).float().mean()) for i, name in enumerate(FIELDS)
        }
        run.note(loss=float(loss.detach()), **accuracies)
    if worker.first:
        run.use_average()
        _settle(model, pictures)
        write(model, work / "classifier.safetensors", recipe)


@torch.no_grad()
def _settle(model: Net, pictures: np.ndarray) -> None:
    """Measure the batch norms' statistics again for the averaged weights."""
    from tools.pocket.autoencoder import to_tensor

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean
    model.train()
    rng = np.random.default_rng(0)
    for _ in range(20):
        model(soften(to_tensor(pictures[rng.integers(0, len(pictures), 64)]).to(model.neck.weight.device), rng))


def write(model: Net, file: Path, recipe: Recipe) -> None:
    """The weights in float16, and in float32 the centroids that they give: drawing their pictures takes seconds."""
    from safetensors.torch import save_file

    tensors = {
        name: value.half().cpu().contiguous() for name, value in model.state_dict().items() if "num_batches" not in name
    }
    rounded = Net(recipe.judge_channels)
    rounded.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    centroids = Classifier(rounded).measure_centroids(subjects.references(recipe.judge_references))
    metadata = {
        "channels": ",".join(map(str, recipe.judge_channels)),
        "centroids": ",".join(centroids),
        "licence": "Apache-2.0",
    }
    rows = torch.from_numpy(np.stack(list(centroids.values())))
    save_file(tensors | {"centroids": rows}, file, metadata=metadata)
