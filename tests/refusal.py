"""Why a base is refused."""

from pathlib import Path
from typing import Any

import pytest

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError


def refusal(base: str | Path, **options: Any) -> str:
    """The one line that `families.describe` refuses a base with; `options` are those of the section `model`."""
    with pytest.raises(LorakitError) as caught:
        families.describe(ModelConfig(base=str(base), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)
