"""Fixtures of the data tests: an empty folder for photos, and a base that has only a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class BareBase:
    """The facts of a base that `check` reads: a latent covers four pixels, and sides are multiples of 16."""

    path: Path
    downscale: int = 4
    max_tokens: int = 77
    bucket_multiple: int = 16
    chunked_texts: bool = True

    @property
    def tokenizers(self) -> dict[str, Path]:
        return {"tokenizer": self.path / "tokenizer"}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BareBase:
    """A base with a CLIP tokenizer, in which photo, of, sks and toy are single tokens."""
    import tiny

    folder = tmp_path_factory.mktemp("bare")
    tiny.save_tokenizer(folder / "tokenizer")
    return BareBase(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An empty folder for photos, without files beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder
