"""The report of a folder check, on each photo and on the folder, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core.messages import Message, some
from lorakit.core.names import columns as terminal_columns, pad, shorten
from lorakit.data.buckets import Bucket
from lorakit.data.photo_folder import Photo

# Fields of a photo in `--json`, in addition to file, bucket, mask and caption source.
ITEM_JSON = (
    "width", "height", "orientation", "transparent", "cropped", "scale", "text", "tokens", "cut", "sharpness",
    "findings",
)  # fmt: skip


@dataclass
class Item:
    """One photo of the report.

    Attributes:
        photo: the file, its caption and its mask.
        width, height: size in pixels after the EXIF rotation; 0 if the photo cannot be read.
        orientation: the rotation of its EXIF tag, or "".
        transparent: whether it has transparent parts (shown on white).
        black_mask: whether its mask (or else its alpha channel) is 0 everywhere.
        bucket: the size of the photo in training; None if the photo cannot be read.
        lower_buckets: the sizes at `data.lower_resolutions`.
        cropped: share of its area that the crop removes, the largest of all sizes.
        scale: bucket pixels for one of its pixels; above 1 it is scaled up.
        text: the final training text.
        tokens: number of tokens of the text, without start and end.
        cut: the part of the text beyond the token limit.
        sharpness: see `checks.MIN_SHARPNESS`.
        digest: SHA-256 of its file; "" if the photo cannot be read.
        findings: problems of this photo, a few words each.
    """

    photo: Photo
    width: int = 0
    height: int = 0
    orientation: str = ""
    transparent: bool = False
    black_mask: bool = False
    bucket: Bucket | None = None
    lower_buckets: tuple[Bucket, ...] = ()
    cropped: float = 0.0
    scale: float = 0.0
    text: str = ""
    tokens: int = 0
    cut: str = ""
    sharpness: float = 0.0
    digest: str = ""
    findings: list[str] = field(default_factory=list)

    @property
    def relative(self) -> str:
        """Path relative to the folder."""
        return self.photo.relative

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every size it is trained at."""
        return (self.bucket, *self.lower_buckets) if self.bucket else ()

    @property
    def readable(self) -> bool:
        """Whether the photo can be decoded."""
        return self.bucket is not None


@dataclass
class Report:
    """Result of `check`. The caller raises the errors before it loads a model.

    Attributes:
        folder: the folder of photos.
        multiple: every side of a bucket is a multiple of it, in pixels.
        downscale: pixels per latent, along one side.
        class_photos: the user's own class images, for prior preservation.
        chunks: number of chunks of the longest text.
        long_triggers: messages about triggers that are too long to learn vectors for.
        trigger_findings: messages about other meanings of a trigger, which do not matter if new tokens are learned.
    """

    folder: Path
    multiple: int
    downscale: int
    items: list[Item] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_photos: list[Photo] = field(default_factory=list)
    chunks: int = 1
    long_triggers: list[str] = field(default_factory=list)
    trigger_findings: list[str] = field(default_factory=list)

    @property
    def photos(self) -> list[Photo]:
        """The photos that can be read."""
        return [item.photo for item in self.items if item.readable]

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Number of photos of each size, the most frequent size first."""
        return dict(Counter(size for item in self.items for size in item.buckets).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`. New versions may add keys, but never remove any."""
        rows = []
        for item in self.items:
            row = {"file": item.relative} | {name: _round(getattr(item, name)) for name in ITEM_JSON}
            row |= {"caption_source": item.photo.caption_source, "mask": item.photo.has_mask}
            row["bucket"] = item.bucket and item.bucket._asdict()
            row["lower_buckets"] = [bucket._asdict() for bucket in item.lower_buckets]
            rows.append(row)
        return {
            "folder": str(self.folder),
            "photos": rows,
            "buckets": [bucket._asdict() | {"photos": count} for bucket, count in self.buckets.items()],
            "errors": self.errors,
            "warnings": self.warnings,
            "notes": self.notes,
        }

    def table(self) -> str:
        """A table with a row for each photo."""
        return "\n".join(_table(self))


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def names(items: Iterable[Item], detail: Callable[[Item], str] | None = None, limit: int = 5) -> str:
    """The first `limit` names, each with a detail, and the number of the remaining ones."""
    labels = (Message("{name} ({detail})", item.relative, detail(item)) if detail else item.relative for item in items)
    return some(labels, limit)


def _table(report: Report) -> list[str]:
    """One row for each photo. If all photos have the same text, it is in the title instead."""
    texts = {item.text for item in report.items}
    count = "1 photo" if len(report.items) == 1 else f"{len(report.items)} photos"
    title = f"{report.folder}: {count}"
    columns = ["photo", "size", "trained at", "cropped", "scaled", "tokens"]
    rows = [
        [
            shorten(item.relative, 40),
            f"{item.width}x{item.height}" if item.readable else "unreadable",
            ", ".join(map(str, item.buckets)) or "-",
            f"{item.cropped:.0%}" if item.cropped >= 0.005 else "-",
            f"{item.scale:.3g}x up" if item.scale > 1 else "-",
            str(item.tokens),
        ]
        for item in report.items
    ]
    if len(texts) == 1 and len(report.items) > 1:
        title += f', each "{report.items[0].text}"'
    else:
        columns.append("text")
        for row, item in zip(rows, report.items, strict=True):
            row.append(shorten(item.text, 60))
    widths = [max(terminal_columns(row[at]) for row in [columns, *rows]) for at in range(len(columns))]
    lines = [
        "  " + "  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *rows]
    ]
    return [title, "", *lines]
