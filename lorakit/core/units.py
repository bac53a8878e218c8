"""Quantities as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours / 24:.1f} days"


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`, `3 batches`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('tch') else 's'}"


def millions(count: int) -> str:
    """`1,234`, `0.12 M`."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def gibibytes(size: float) -> str:
    """Bytes as `0.5 GiB`, `12 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.0f} MiB"
