"""Read JSON from untrusted files."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str) -> Any:
    """As `json.loads`, with one exception type for all errors.

    Raises:
        json.JSONDecodeError: it does not parse, is nested too deep, or has a number with too many digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number of too many digits", text, 0) from None


def loads_table(text: str) -> dict[str, Any]:
    """As `loads`, for a JSON object.

    Raises:
        json.JSONDecodeError: as `loads`, or it is not an object.
    """
    table = loads(text)
    if not isinstance(table, dict):
        raise json.JSONDecodeError("no object", text, 0)
    return table
