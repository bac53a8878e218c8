"""Get the error of a base that lorakit refuses."""

from pathlib import Path
from typing import Any

import pytest

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError


def refusal(base: str | Path, **options: Any) -> str:
    """Return the one-line error of `families.describe` for a base. `options` are options of the section `model`."""
    with pytest.raises(LorakitError) as caught:
        families.describe(ModelConfig(base=str(base), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)
