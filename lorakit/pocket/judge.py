"""The judge: a small classifier trained on renders only: what a picture shows, how near it is to a subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import dataset, path
from .recipe import Recipe
from .spec import FIELDS
from .workers import Run, Worker


class Net(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to 128 features, and from these to the classes of every label."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in channels:
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.neck = nn.Linear(before * 16, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, count) for name, count in dataset.CLASSES.items()})

    def features(self, pictures: Tensor) -> Tensor:
        return self.neck(F.relu(self.trunk(pictures)).flatten(1))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.features(pictures))
        return {name: head(features) for name, head in self.heads.items()}


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
    from .autoencoder import to_tensor

    torch.manual_seed(recipe.seed)
    model = Net(recipe.judge_channels).to(worker.device)
    run = Run(
        worker,
        {"judge": model},
        work / "judge.state",
        recipe.judge_pictures,
        recipe.judge_batch,
        recipe.judge_rate,
        recipe.seed,
        decay=0.99,
        save_seconds=recipe.save_seconds,
    )
    pictures, labels = dataset.load(work / "renders", "pictures"), dataset.load(work / "renders", "labels")
    while not run.done:
        rng = np.random.default_rng((recipe.seed, run.seen, worker.rank, 1))
        chosen = rng.integers(0, len(pictures), run.batch)
        real = soften(to_tensor(pictures[chosen]).to(worker.device), rng)
        if rng.random() < 0.5:
            real = real.flip(3)
        truth = torch.from_numpy(labels[chosen].astype(np.int64)).to(worker.device)
        with worker.autocast(recipe.bf16):
            answers = model(real)
        loss = torch.zeros((), device=worker.device)
        for i, name in enumerate(dataset.LABELS):
            if (truth[:, i] >= 0).any():
                loss = loss + F.cross_entropy(answers[name].float(), truth[:, i], ignore_index=-1, label_smoothing=0.02)
        run.step(loss)
        right = {name: float((answers[name].argmax(1) == truth[:, i]).float().mean()) for i, name in enumerate(FIELDS)}
        run.note(loss=float(loss.detach()), **right)
    if worker.first:
        run.use_average()
        _settle(model, pictures)
        write(model, work / "judge.safetensors", recipe)


@torch.no_grad()
def _settle(model: Net, pictures: np.ndarray) -> None:
    """Measure the batch norms' statistics anew for the averaged weights."""
    from .autoencoder import to_tensor

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean
    model.train()
    rng = np.random.default_rng(0)
    for _ in range(20):
        model(soften(to_tensor(pictures[rng.integers(0, len(pictures), 64)]).to(model.neck.weight.device), rng))


def write(model: Net, file: Path, recipe: Recipe) -> None:
    from safetensors.torch import save_file

    tensors = {
        name: value.half().cpu().contiguous() for name, value in model.state_dict().items() if "num_batches" not in name
    }
    save_file(tensors, file, metadata={"channels": ",".join(map(str, recipe.judge_channels)), "licence": "Apache-2.0"})


class Judge:
    """Says what pictures show. Load it once: `Judge.load()`."""

    def __init__(self, model: Net) -> None:
        self.model = model.eval()
        self._centroids: dict[str, np.ndarray] | None = None

    @classmethod
    def load(cls, file: Path | None = None) -> Judge:
        """The bundled judge, or the one in `file`."""
        from safetensors import safe_open

        file = path() / "judge.safetensors" if file is None else file
        with safe_open(file, framework="pt") as tensors:
            model = Net([int(c) for c in tensors.metadata()["channels"].split(",")])
            weights = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
            model.load_state_dict(weights, strict=False)
        return cls(model)

    @staticmethod
    def _batch(images: Sequence[Image.Image]) -> Tensor:
        small = [
            np.asarray(
                image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
                if image.size != (64, 64)
                else image.convert("RGB")
            )
            for image in images
        ]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(N, 128) float32, each of length 1."""
        return np.concatenate(
            [
                F.normalize(self.model.features(self._batch(images[i : i + 64]))).numpy()
                for i in range(0, len(images), 64)
            ]
        )

    @torch.no_grad()
    def labels(self, images: Sequence[Image.Image]) -> dict[str, list[str]]:
        """The likeliest kind, colour, pattern, scene and manner of every picture."""
        found: dict[str, list[str]] = {field: [] for field in FIELDS}
        for start in range(0, len(images), 64):
            answers = self.model(self._batch(images[start : start + 64]))
            for field, options in FIELDS.items():
                found[field] += [options[i] for i in answers[field].argmax(1).tolist()]
        return found

    def scores(self, images: Sequence[Image.Image], asked: Sequence[dict[str, str]]) -> dict[str, float]:
        """Share of pictures that show what was asked, by field; a field that nothing was asked of is left out."""
        if len(images) != len(asked):
            raise ValueError(f"{len(images)} pictures but {len(asked)} requests")
        found = self.labels(images)
        shares = {}
        for field in FIELDS:
            hits = [found[field][i] == words[field] for i, words in enumerate(asked) if field in words]
            if hits:
                shares[field] = sum(hits) / len(hits)
        return shares

    def centroids(self) -> dict[str, np.ndarray]:
        """Mean features (128,) of real renders of every kind, subject and style."""
        if self._centroids is None:
            from . import subjects

            self._centroids = {
                name: self.features(images).mean(axis=0) for name, images in subjects.references().items()
            }
        return self._centroids

    def nearest(self, images: Sequence[Image.Image]) -> list[str]:
        """The kind, subject or style whose real renders each picture is nearest to.

        By cosine around the middle of all of them: what every picture has in common says nothing.
        """
        names, centroids = list(self.centroids()), np.stack(list(self.centroids().values()))
        middle = centroids.mean(axis=0)
        away = centroids - middle
        nearness = (self.features(images) - middle) @ (away / np.linalg.norm(away, axis=1, keepdims=True)).T
        return [names[i] for i in nearness.argmax(axis=1)]

    def subject_score(self, images: Sequence[Image.Image], name: str) -> float:
        """Share of pictures that are nearer to the real renders of this subject (or style) than to any other's."""
        if name not in self.centroids():
            raise ValueError(f"{name!r} is no subject; there are {', '.join(self.centroids())}")
        nearest = self.nearest(images)
        return sum(found == name for found in nearest) / len(nearest)
