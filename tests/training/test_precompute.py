"""Tests of the encoding before the first step: which components are on the device meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit import config, families
from lorakit.core import events
from lorakit.core.events import Event, Events
from lorakit.data import checks
from lorakit.families import loading
from lorakit.training.precompute import TEXTS, embed, precompute


class Watched:
    """A family that records which of its components were on the device at each use.

    On a CPU nothing moves, so this class tracks the components by the rules of `families.Family`.
    """

    def __init__(self, family: Any):
        self.family, self.there = family, set[str]()
        self.on_device: dict[str, set[frozenset[str]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def release(self, *names: str) -> None:
        adapted = any(weight.requires_grad for weight in self.family.denoiser.parameters())
        self.there -= set(names) - ({"unet"} if adapted else set())

    def acquire(self, *names: str) -> None:
        self.there |= set(names)

    def _use(self, part: str, doing: str) -> None:
        self.acquire(part)
        self.on_device.setdefault(doing, set()).add(frozenset(self.there))

    def encode_image(self, pixels: torch.Tensor) -> Any:
        self._use("vae", "encode_image")
        return self.family.encode_image(pixels)

    def encode_text(self, texts: list[str]) -> Any:
        self._use("text_encoders", "encode_text")
        return self.family.encode_text(texts)

    def encode_prompt(self, prompt: str) -> Any:
        self._use("text_encoders", "encode_prompt")
        return self.family.encode_prompt(prompt)

    def encode_tokens(self, tokens: list[torch.Tensor], *, grad: bool = False) -> Any:
        self._use("text_encoders", "encode_tokens")
        return self.family.encode_tokens(tokens, grad=grad)

    def pipeline(self) -> Any:
        self.on_device.setdefault("pipeline", set()).add(frozenset(self.there))
        return self.family.pipeline()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._use("vae", "decode")
        return self.family.decode(latents)


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    yield folder


@pytest.mark.parametrize("prior", ["none", "images"])
def test_each_component_has_the_device_alone(
    tiny_sd1: Path, photos: Path, prior: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    settings = {
        "model.base": str(tiny_sd1),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "train.steps": 1,
        "train.prior": prior,
        "sample.steps": 1,
    } | ({"train.class_images": 2} if prior == "images" else {})
    run_config = config.load(None, settings)
    info = families.describe(tiny_sd1)
    family = Watched(families.load(info, "cpu", torch.float32))
    monkeypatch.setattr(events, "WORK_SECONDS", 0.0)
    work: dict[str, tuple[int, int]] = {}

    def count(event: Event) -> None:
        if event.kind == "work":
            work[event.facts["doing"]] = (event.facts["position"], event.facts["total"])

    encoded = precompute(run_config, family, None, checks.check(run_config.data, info), Events(count))
    images = {"drawing the class images": (2, 2), "encoding the class images": (2, 2)} if prior == "images" else {}
    assert work == {"encoding the photos": (3, 3)} | images
    for doing in ("encode_text", "encode_tokens", "encode_prompt"):
        assert family.on_device[doing] == {frozenset({"text_encoders"})}
    assert not any({"unet", "text_encoders"} <= there for there in family.on_device.get("pipeline", set()))
    drawing = {frozenset({"unet", "vae"})} if prior == "images" else set()
    assert family.on_device.get("decode", set()) == drawing
    assert family.on_device["encode_image"] == {frozenset({"vae"})} | drawing
    assert "vae" not in family.there and "text_encoders" not in family.there
    assert (encoded.class_latents is None) == (prior == "none")
    if prior == "images":  # the second time all images are in the cache
        work.clear()
        second = Watched(families.load(info, "cpu", torch.float32))
        precompute(run_config, second, None, checks.check(run_config.data, info), Events(count))
        assert "drawing the class images" not in work and work["reading the class images"] == (2, 2)


def test_a_unet_with_an_adapter_is_not_moved(tiny_sd1: Path, photos: Path) -> None:
    from lorakit import adapters

    settings = {"data.folder": str(photos), "data.name": "sks toy", "data.resolution": 64, "train.steps": 1}
    run_config = config.load(None, settings)
    info = families.describe(tiny_sd1)
    family = Watched(families.load(info, "cpu", torch.float32))
    family.acquire("unet")
    adapter = adapters.attach(family.family, run_config.adapter)
    precompute(run_config, family, adapter, checks.check(run_config.data, info), Events())
    assert family.on_device["encode_image"] == {frozenset({"unet", "vae"})}


def test_many_texts_do_not_need_more_memory_than_a_few(tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = families.load(families.describe(tiny_sdxl), "cpu", torch.float32)
    texts = [f"a photo of a toy {number}" for number in range(2 * TEXTS + 3)]
    batch_sizes: list[int] = []
    encode_tokens = family.encode_tokens
    monkeypatch.setattr(
        family, "encode_tokens", lambda rows: (batch_sizes.append(len(rows[0])), encode_tokens(rows))[1]
    )
    embeddings = embed(family, family.tokens(texts))
    assert batch_sizes == [TEXTS, TEXTS, 3] and len(embeddings) == len(texts)
    monkeypatch.undo()
    for place, text in enumerate(texts):
        alone, row = family.encode_text([text]), embeddings.index(torch.tensor([place]))
        torch.testing.assert_close(row["encoder_hidden_states"], alone["encoder_hidden_states"])
        torch.testing.assert_close(row["pooled"], alone["pooled"])


class Somewhere:
    """A replacement for a module in `components.move`: it knows its device and counts its moves."""

    def __init__(self, device: str, trained: bool = False):
        self.device, self.trained, self.moves = torch.device(device), trained, 0

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(device=self.device, requires_grad=self.trained)

    def to(self, device: torch.device) -> None:
        self.device, self.moves = device, self.moves + 1


def test_trained_modules_are_not_moved_off_the_device() -> None:
    module = Somewhere("cuda:0", trained=True)
    loading.move({"unet": [module]}, ("unet",), torch.device("cpu"))
    assert module.moves == 0
    loading.move({"unet": [other := Somewhere("cpu", trained=True)]}, ("unet",), torch.device("cuda"))
    assert other.moves == 1


def test_modules_beside_trained_ones_are_not_moved() -> None:
    """A CUDA graph of both modules would otherwise read the old address."""
    frozen, trained = Somewhere("cuda:0"), Somewhere("cuda:0", trained=True)
    loading.move({"text_encoders": [frozen, trained]}, ("text_encoders",), torch.device("cpu"))
    assert (frozen.moves, trained.moves) == (0, 0)


def test_modules_already_on_the_device_are_not_moved() -> None:
    vae, first, second = Somewhere("cpu"), Somewhere("cpu"), Somewhere("cuda:0")
    parts = {"vae": [vae], "text_encoders": [first, second]}
    for _ in range(2):
        loading.move(parts, ("text_encoders",), torch.device("cuda"))
    assert (vae.moves, first.moves, second.moves) == (0, 1, 0)
    assert (vae.device.type, first.device.type) == ("cpu", "cuda")


def test_own_class_images_are_used_and_none_are_drawn(tiny_sd1: Path, photos: Path) -> None:
    for name, color in (("reg/red.png", (255, 0, 0)), ("reg/1_mug/blue.png", (0, 0, 255))):
        (photos / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), color).save(photos / name)
    settings = {"data.folder": str(photos), "data.name": "sks toy", "data.resolution": 64, "train.steps": 1}
    run_config = config.load(None, settings | {"train.prior": "images", "sample.steps": 1})
    info = families.describe(tiny_sd1)
    family = Watched(families.load(info, "cpu", torch.float32))
    encoded = precompute(run_config, family, None, checks.check(run_config.data, info), Events())
    assert "decode" not in family.on_device
    assert len(encoded.dataset.photos) == 3
    assert encoded.class_latents is not None
    texts = [encoded.class_texts[place] for place in encoded.class_latents.text_rows.tolist()]
    assert texts == ["a photo of a toy", "a photo of a mug"]
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(encoded.class_latents.mean[:1], family.family.encode_image(red)[0], rtol=0, atol=1e-3)
