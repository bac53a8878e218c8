"""Quantities as text."""

from __future__ import annotations

from lorakit.core.messages import Message


def duration(seconds: float) -> str:
    """Seconds as text: `45 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return Message("{seconds} s", max(1, round(seconds)))
    minutes = round(seconds / 60)
    if minutes < 90:
        return Message("{minutes} min", minutes)
    hours, minutes = divmod(minutes, 60)
    hours_and_minutes = Message("{hours} h {minutes} min", hours, minutes)
    return hours_and_minutes if hours < 24 else Message("{days:.1f} days", hours / 24)


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`, `3 batches`."""
    nouns = noun if number == 1 else f"{noun}{'es' if noun.endswith('tch') else 's'}"
    return Message(f"{{count}} {nouns}", number)


def millions(count: int) -> str:
    """`1,234`, `0.12 M`."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def gibibytes(size: float) -> str:
    """Bytes as `0.5 GiB`, `12 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.0f} MiB"
