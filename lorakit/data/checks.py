"""What is in a folder of photos and what is wrong with it, image by image, before any model is loaded.

Errors stop a run; warnings name what will probably disappoint; notes say what was decided for the user. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lorakit.config import DataConfig
from lorakit.core.errors import LorakitError
from lorakit.data import buckets, captions, decode, folder
from lorakit.data.buckets import Bucket
from lorakit.data.folder import Photo

# A crop larger than this is worth a look: a head may be missing.
CROP = 0.10
# Variance of the Laplacian over that of the picture, at the trained size. At 512 pixels 46 sharp photos measured 0.04
# to 2.5, and 18 of them 0.002 or less under a Gaussian blur of 2.6 of those pixels.
BLUR = 0.004
# Bits of a 256-bit difference hash, and mean colour difference (of 255) of 16 x 16 thumbnails, within which two photos
# look the same: saved again at quality 50 or cropped by 1 % measured up to 23 bits and 3.5; four drawings of one figure
# in other poses on white 13 bits and 5 or more. The colours also keep flat pictures, whose hashes are all alike, apart.
HASH_BITS, HASH_COLOUR = 24, 4.0
FEW = 4
# What `--json` says of a photo, besides its file, bucket, mask and where its caption is from.
ITEM_JSON = (
    "width", "height", "orientation", "transparent", "cropped", "scale", "text", "tokens", "cut", "sharpness",
    "findings",
)  # fmt: skip


class Base(Protocol):
    """What the check asks of a base model; `families.describe` gives it."""

    def tokenizer(self) -> Path: ...
    @property
    def downscale(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def layers(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass
class Item:
    """One photo of the report.

    Attributes:
        photo: the file, its caption and its mask.
        width, height: size in pixels, upright; 0 where it cannot be read.
        orientation: what its EXIF tag asked for, "" if nothing.
        transparent: whether it has see-through parts (shown on white).
        bucket: the size it is trained at, None where it cannot be read.
        cropped: share of its area that is cut away.
        scale: bucket pixels for one of its pixels; above 1 it is scaled up.
        text: the final text it is trained with.
        tokens: how many tokens that is, without start and end.
        cut: the part of the text that does not fit.
        sharpness: see `BLUR`.
        digest: SHA-256 of its file, "" where it cannot be read.
        findings: what was found about this photo alone, in a few words each.
    """

    photo: Photo
    width: int = 0
    height: int = 0
    orientation: str = ""
    transparent: bool = False
    bucket: Bucket | None = None
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
        """Its name below the folder."""
        return self.photo.relative

    @property
    def readable(self) -> bool:
        """Whether it could be decoded."""
        return self.bucket is not None


@dataclass
class Report:
    """Everything `check` found. Errors are to be raised before a model is loaded.

    Attributes:
        folder: the folder of photos.
        step: what sides of buckets are multiples of, in pixels.
        downscale: pixels of one latent's side.
    """

    folder: Path
    step: int
    downscale: int
    items: list[Item] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def photos(self) -> list[Photo]:
        """The photos that can be read."""
        return [item.photo for item in self.items if item.readable]

    @property
    def buckets(self) -> dict[Bucket, int]:
        """How many photos are trained at each size, most first."""
        return dict(Counter(item.bucket for item in self.items if item.bucket).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`; keys are only ever added."""
        rows = []
        for item in self.items:
            row = {"file": item.relative} | {name: _rounded(getattr(item, name)) for name in ITEM_JSON}
            row |= {"caption_source": item.photo.caption_source, "mask": item.photo.mask is not None}
            row["bucket"] = item.bucket and item.bucket._asdict()
            rows.append(row)
        return {
            "folder": str(self.folder),
            "photos": rows,
            "buckets": [bucket._asdict() | {"photos": count} for bucket, count in self.buckets.items()],
            "errors": self.errors,
            "warnings": self.warnings,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """A table with a row for each photo, then errors, warnings and notes."""
        parts = ["\n".join(_table(self))] if self.items else []
        for title, lines in (("errors", self.errors), ("warnings", self.warnings), ("notes", self.notes)):
            if lines:
                parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
        return "\n\n".join(parts)


def step_of(base: Base) -> int:
    """What a bucket's sides must be multiples of: pixels of one latent, halved at each of the U-Net's downsamplers, or
    as many as a transformer takes for a patch."""
    if patches := base.layers.get("unet.pos_embed.proj"):
        return int(base.downscale * patches[-1])
    downsamplers = sum(name.startswith("unet.") and ".downsamplers." in name for name in base.layers)
    return int(base.downscale * 2**downsamplers)


def check(config: DataConfig, base: Base, *, memory: Memory | None = None) -> Report:
    """Look over the photos of `config.folder`. What is wrong with single photos is in the report, not raised.

    Args:
        memory: kept by the caller from check to check, so that a photo that has not changed is not decoded again.

    Raises:
        LorakitError: there is no folder, or no picture in it, or the base has no tokenizer.
    """
    if not config.folder:
        raise LorakitError("no folder of photos given (data.folder)")
    found = folder.scan(config.folder)
    items = [Item(photo) for photo in found.photos]
    step = step_of(base)
    report = Report(found.path, step, base.downscale, items, [], found.warnings, found.notes)
    workers = min(4, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock; a large photo is 150 MB
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(lambda item: _remembered(item, config.resolution, step, memory), report.items))
    _texts(report, config, captions.Tokens(base.tokenizer(), base.max_tokens))
    _unreadable(report, seen)
    _duplicates(report, [(item, look) for item, look in zip(report.items, seen, strict=True) if item.readable])
    _sizes(report)
    _aggregate(report, config)
    report.notes += [
        f"{item.relative}: {note}" for item, look in zip(report.items, seen, strict=True) for note in look.notes
    ]
    return report


@dataclass(frozen=True)
class _Look:
    """What is kept of a photo's pixels: enough to compare it with the others."""

    problem: str = ""
    notes: tuple[str, ...] = ()
    hash: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, np.bool_))
    colours: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, np.float32))


# Photo as it was on disk, resolution and step -> what was measured of it, and its look.
Memory = dict[tuple[Any, ...], tuple[dict[str, Any], _Look]]
MEASURED = ("width", "height", "orientation", "transparent", "bucket", "cropped", "scale", "sharpness", "digest")


def _remembered(item: Item, resolution: int, step: int, memory: Memory | None) -> _Look:
    """As `_look`, from memory where the photo and its mask are the same files as before."""
    if memory is None:
        return _look(item, resolution, step)
    try:
        files = [(path, path.stat()) for path in (item.photo.path, item.photo.mask) if path is not None]
    except OSError:
        return _look(item, resolution, step)
    stamps = [(path, status.st_mtime_ns, status.st_size) for path, status in files]
    key = (item.relative, *stamps, resolution, step)
    if key not in memory:
        look = _look(item, resolution, step)
        memory[key] = {name: getattr(item, name) for name in MEASURED}, look
        return look
    measured, look = memory[key]
    for name, value in measured.items():
        setattr(item, name, value)
    return look


def _look(item: Item, resolution: int, step: int) -> _Look:
    """Decode one photo and fill in what its pixels say."""
    photo = item.photo
    try:
        raw = photo.path.read_bytes()
        decoded = decode.decode(raw, photo.relative)
        item.digest = hashlib.sha256(raw).hexdigest()
        if photo.mask is not None:
            decode.decode_mask(photo.mask, decoded.size)
    except decode.Unreadable as error:
        return _Look(problem=error.reason if str(error).startswith(photo.relative) else str(error))
    except OSError as error:
        return _Look(problem=f"cannot be read ({error.strerror or error})")
    item.width, item.height = decoded.size
    item.orientation, item.transparent = decoded.orientation, decoded.alpha is not None
    placement = buckets.assign(decoded.size, resolution, step)
    item.bucket, item.cropped, item.scale = placement.bucket, placement.cropped, placement.scale
    image = Image.fromarray(decoded.pixels)
    item.sharpness = _sharpness(image, placement)
    grey = np.asarray(image.resize((17, 16), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    colours = np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    return _Look("", decoded.notes, (grey[:, 1:] > grey[:, :-1]).ravel(), colours)


def _sharpness(image: Image.Image, placement: buckets.Placement) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) over the variance of the picture, at the trained size.

    A photo that is smaller than its bucket is measured as it is. A flat picture has no edges to judge: 1.
    """
    size = (placement.bucket.width, placement.bucket.height)
    if placement.enlarged:
        size = (max(3, round(size[0] / placement.scale)), max(3, round(size[1] / placement.scale)))
    grey = np.asarray(
        image.resize(size, Image.Resampling.BOX, box=placement.box, reducing_gap=2.0).convert("L"), dtype=np.float32
    )
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    spread = float(grey.var())
    # Rounding to 8 bits adds noise of variance 1/12 to each of the five places, of which the middle one counts 16-fold.
    return max(0.0, float(laplacian.var()) - 20 / 12) / spread if spread > 4 else 1.0


def _texts(report: Report, config: DataConfig, tokens: captions.Tokens) -> None:
    for item in report.items:
        item.text = captions.final_text(item.photo.caption, config)
        item.tokens, item.cut = tokens.count(item.text)
        if item.cut:
            fit = f"its text has {item.tokens} tokens, {tokens.limit} fit"
            report.warnings.append(f'{item.relative}: {fit}; cut off: "{_short(item.cut, 60)}"')
        if config.flip and captions.mentions_sides(item.text):
            item.findings.append("left or right in its text")
            report.errors.append(
                f"{item.relative}: its text says left or right, which data.flip makes untrue; "
                "set data.flip = false or change the text"
            )
    bare = [item for item in report.items if item.photo.caption is None]
    prompt = captions.instance_prompt(config)
    if bare and len(bare) == len(report.items):
        report.notes.append(f'no captions: every photo is trained as "{prompt}"')
    elif bare:
        for item in bare:
            item.findings.append("no caption")
        count = f"{len(bare)} of {len(report.items)} photos have no caption"
        report.warnings.append(f'{count} and are trained as "{prompt}": {_names(bare)}')
    without = [i for i in report.items if i.photo.caption and not captions.has_trigger(i.photo.caption, config)]
    for item in without:
        item.findings.append("caption without the trigger")
    if without:
        count = f"{len(without)} of {len(report.items) - len(bare)} captions are without the trigger {config.trigger}"
        report.warnings.append(f'{count}; "{config.name}, " is put in front: {_names(without)}')
    if not config.name:
        report.warnings.append('data.name is empty, so no word will call what is learned; give one, e.g. "sks dog"')
    elif not config.noun and not config.class_prompt and config.kind == "subject":
        report.warnings.append(f'data.name = "{config.name}" does not say what it is; "{config.trigger} dog" would')


def _unreadable(report: Report, seen: Sequence[_Look]) -> None:
    """One error for each cause, naming the files: thirty HEIC photos are one problem."""
    causes: dict[str, list[Item]] = {}
    for item, look in zip(report.items, seen, strict=True):
        if look.problem:
            item.findings.append(look.problem)
            causes.setdefault(look.problem, []).append(item)
    report.errors += [f"{_names(items)}: {cause}" for cause, items in causes.items()]


def _duplicates(report: Report, seen: Sequence[tuple[Item, _Look]]) -> None:
    same: dict[str, list[Item]] = {}
    for item, _ in seen:
        same.setdefault(item.digest, []).append(item)
    for items in same.values():
        if len(items) > 1:
            report.warnings.append(f"{_names(items)}: the same file, counted {len(items)} times")
            for item in items[1:]:
                item.findings.append(f"same as {items[0].relative}")
    first = [(item, look) for item, look in seen if same[item.digest][0] is item]
    hashes = np.array([look.hash for _, look in first])
    for at, (item, look) in enumerate(first):
        near = np.flatnonzero(np.count_nonzero(hashes[:at] != look.hash, axis=1) <= HASH_BITS)
        alike = [n for n in near.tolist() if np.abs(first[n][1].colours - look.colours).mean() <= HASH_COLOUR]
        if alike:
            other = first[alike[0]][0]
            report.warnings.append(f"{other.relative}, {item.relative}: look almost the same")
            item.findings.append(f"almost the same as {other.relative}")


def _sizes(report: Report) -> None:
    """Small, heavily cropped and blurred photos."""
    readable = [item for item in report.items if item.readable]
    kinds: tuple[tuple[Callable[[Item], bool], Callable[[Item], str], str], ...] = (
        (
            lambda item: item.scale > 1,
            lambda item: f"scaled up {item.scale:.3g}x",
            "smaller than the size they are trained at",
        ),
        (
            lambda item: item.cropped > CROP,
            lambda item: f"{item.cropped:.0%} cropped away",
            "lose much to the crop; crop them yourself to choose what stays",
        ),
        (lambda item: item.sharpness < BLUR, lambda item: "blurred", "look blurred at the size they are trained at"),
    )
    for applies, shown, meaning in kinds:
        items = [item for item in readable if applies(item)]
        for item in items:
            item.findings.append(shown(item))
        if items:
            report.warnings.append(f"{_names(items, shown)}: {meaning}")


def _aggregate(report: Report, config: DataConfig) -> None:
    readable = [item for item in report.items if item.readable]
    if 0 < len(report.items) < FEW:
        photos = "1 photo" if len(report.items) == 1 else f"{len(report.items)} photos"
        report.warnings.append(f"only {photos}: 5 to 20 from different sides and places teach more")
    if len(report.buckets) > 1:
        listed = ", ".join(f"{bucket} ({count})" for bucket, count in report.buckets.items())
        report.notes.append(f"mixed aspect ratios: trained at {listed}; a batch holds one size")
    turned = [item for item in readable if item.orientation]
    if turned:
        report.notes.append(f"set upright by their EXIF tag: {_names(turned)}")
    clear = [item for item in readable if item.transparent]
    if clear:
        report.notes.append(f"transparent parts are shown on white: {_names(clear)}")
    masks = sum(item.photo.mask is not None for item in report.items)
    if masks:
        report.notes.append(f"{masks} of {len(report.items)} photos have a mask; train.masked_loss = true uses it")
    if config.flip and config.kind == "subject":
        report.notes.append("data.flip: the subject is learned mirrored too; leave it off where its sides differ")


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _names(items: Iterable[Item], shown: Callable[[Item], str] | None = None, most: int = 5) -> str:
    listed = [item.relative if shown is None else f"{item.relative} ({shown(item)})" for item in items]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _table(report: Report) -> list[str]:
    """One row a photo. A text that all share stands above the table instead of in it."""
    shared = {item.text for item in report.items}
    count = "1 photo" if len(report.items) == 1 else f"{len(report.items)} photos"
    title = f"{report.folder}: {count}"
    columns = ["photo", "size", "trained at", "cropped", "scaled", "tokens"]
    rows = [
        [
            _short(item.relative, 40),
            f"{item.width}x{item.height}" if item.readable else "unreadable",
            str(item.bucket or "-"),
            f"{item.cropped:.0%}" if item.cropped >= 0.005 else "-",
            f"{item.scale:.3g}x up" if item.scale > 1 else "-",
            str(item.tokens),
        ]
        for item in report.items
    ]
    if len(shared) == 1 and len(report.items) > 1:
        title += f', each "{report.items[0].text}"'
    else:
        columns.append("text")
        for row, item in zip(rows, report.items, strict=True):
            row.append(_short(item.text, 60))
    widths = [max(len(row[at]) for row in [columns, *rows]) for at in range(len(columns))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *rows]
    ]
    return [title, "", *lines]
