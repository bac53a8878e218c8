"""What the tests of the data room share: a folder to fill, and a base that has a tokenizer and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class BareBase:
    """What `check` asks of a base: four pixels a latent, sides are multiples of 16."""

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
    """A base with CLIP's kind of tokenizer, in which photo, of, sks and toy are whole words."""
    import tiny

    folder = tmp_path_factory.mktemp("bare")
    tiny.save_tokenizer(folder / "tokenizer")
    return BareBase(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An empty folder to put photos in; nothing else lies beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder
