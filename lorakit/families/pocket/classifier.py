"""A small classifier trained on renders only: labels of a picture, and its similarity to a subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lorakit.families.pocket import path
from lorakit.families.pocket.spec import CLASSES, FIELDS


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
        self.heads = nn.ModuleDict({name: nn.Linear(128, count) for name, count in CLASSES.items()})

    def features(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.neck(F.relu(self.trunk(pictures)).flatten(1))
        return features

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.features(pictures))
        return {name: head(features) for name, head in self.heads.items()}


class Classifier:
    """Labels pictures. Load it once: `Classifier.load()`."""

    def __init__(self, model: Net, centroids: dict[str, np.ndarray] | None = None) -> None:
        self.model = model.eval()
        self._centroids = centroids

    @classmethod
    def load(cls, file: Path | None = None) -> Classifier:
        """The bundled classifier, or the one in `file`."""
        from safetensors import safe_open

        file = path() / "classifier.safetensors" if file is None else file
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
            model = Net([int(c) for c in metadata["channels"].split(",")])
            weights = {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
        rows = weights.pop("centroids", None)
        model.load_state_dict(weights, strict=False)
        if rows is None:
            return cls(model)
        return cls(model, dict(zip(metadata["centroids"].split(","), rows.numpy(), strict=True)))

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
        """The most probable kind, colour, pattern, scene and manner of each picture."""
        result: dict[str, list[str]] = {field: [] for field in FIELDS}
        for start in range(0, len(images), 64):
            logits = self.model(self._batch(images[start : start + 64]))
            for field, options in FIELDS.items():
                result[field] += [options[i] for i in logits[field].argmax(1).tolist()]
        return result

    def scores(self, images: Sequence[Image.Image], requests: Sequence[dict[str, str]]) -> dict[str, float]:
        """Accuracy by field: share of pictures with the requested label. Fields without requests are absent."""
        if len(images) != len(requests):
            raise ValueError(f"{len(images)} pictures but {len(requests)} requests")
        predictions = self.labels(images)
        shares = {}
        for field in FIELDS:
            hits = [predictions[field][i] == words[field] for i, words in enumerate(requests) if field in words]
            if hits:
                shares[field] = sum(hits) / len(hits)
        return shares

    def centroids(self) -> dict[str, np.ndarray]:
        """Mean features (128,) of rendered pictures of every kind, subject and style, from the file if it has them."""
        if self._centroids is None:
            from lorakit.families.pocket import subjects

            self._centroids = self.measure_centroids(subjects.references())
        return self._centroids

    def measure_centroids(self, pictures: dict[str, list[Image.Image]]) -> dict[str, np.ndarray]:
        """Mean features (128,) of the pictures of each name."""
        return {name: self.features(images).mean(axis=0) for name, images in pictures.items()}

    def nearest(self, images: Sequence[Image.Image]) -> list[str]:
        """The kind, subject or style with the nearest centroid, for each picture."""
        names = list(self.centroids())
        return [names[i] for i in self._cosines(images).argmax(axis=1)]

    def nearness(self, images: Sequence[Image.Image], name: str) -> float:
        """Mean cosine of the pictures' features to the centroid of a kind, subject or style: -1 to 1.

        A share shows only which centroid is nearest. The cosine shows how near it is, and can still grow where shares
        are 1.
        """
        cosines = self._cosines(images)[:, self._index(name)]
        return float(cosines.mean())

    def subject_score(self, images: Sequence[Image.Image], name: str) -> float:
        """Share of pictures whose nearest centroid is that of this subject or style."""
        index = self._index(name)
        return float((self._cosines(images).argmax(axis=1) == index).mean())

    def _index(self, name: str) -> int:
        if name not in self.centroids():
            raise ValueError(f"{name!r} is no subject; there are {', '.join(self.centroids())}")
        return list(self.centroids()).index(name)

    def _cosines(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(pictures, centroids): the cosines after the mean of all centroids is subtracted."""
        centroids = np.stack(list(self.centroids().values()))
        middle = centroids.mean(axis=0)
        away = centroids - middle
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        features = self.features(images) - middle
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        cosines: np.ndarray = features @ away.T
        return cosines
