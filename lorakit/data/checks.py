"""Check a folder of photos, photo by photo, before any model is loaded. Imports no torch.

Errors stop a run. Warnings name probable problems. Notes say what the check decided for the user.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorakit.config import DataConfig
from lorakit.core import prompt_syntax
from lorakit.core.names import printable, shorten
from lorakit.core.protocols import Base
from lorakit.data import buckets, captions, concepts, decode, duplicates, photo_folder, time_limit
from lorakit.data.buckets import Bucket
from lorakit.data.photo_folder import Photo

# A larger crop gets a warning: it may cut off a head.
MAX_CROP = 0.10
# Sharpness is the variance of the Laplacian over that of the picture, at the trained size. At 512 pixels, 46 sharp
# photos had 0.04 to 2.5. After a Gaussian blur of 2.6 pixels, 18 of them had 0.002 or less.
MIN_SHARPNESS = 0.004
# With fewer photos, the check warns.
MIN_PHOTOS = 4
NOT_COUNTED = "tokens of the texts are not counted: the base's tokenizer is not on this machine yet"
# Fields of a photo in `--json`, besides its file, bucket, mask and caption source.
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
        black_mask: whether its mask, or where it has none its alpha channel, is 0 all over.
        bucket: the size it is trained at; None if the photo cannot be read.
        lower_buckets: the sizes at `data.lower_resolutions`.
        cropped: share of its area that the crop removes, the largest of all sizes.
        scale: bucket pixels for one of its pixels; above 1 it is scaled up.
        text: the final text it is trained with.
        tokens: number of tokens of the text, without start and end.
        cut: the part of the text beyond the token limit.
        sharpness: see `MIN_SHARPNESS`.
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
        downscale: pixels for one latent, on a side.
        class_photos: the user's own class images, for prior preservation.
        chunks: chunks of the text encoder that the longest text takes.
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

    @property
    def photos(self) -> list[Photo]:
        """The photos that can be read."""
        return [item.photo for item in self.items if item.readable]

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Number of photos of each size, the most frequent size first."""
        return dict(Counter(size for item in self.items for size in item.buckets).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`; keys are only ever added."""
        rows = []
        for item in self.items:
            row = {"file": item.relative} | {name: _round(getattr(item, name)) for name in ITEM_JSON}
            row |= {"caption_source": item.photo.caption_source, "mask": item.photo.mask is not None}
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


def check(
    config: DataConfig, base: Base, *, cache: MeasurementCache | None = None, progress: Progress | None = None
) -> Report:
    """Check the photos of `config.folder`. Problems of single photos are in the report and raise nothing.

    Args:
        cache: measurements of earlier checks; a photo that did not change is not decoded again.
        progress: called with the number of photos that were measured and of all.

    Raises:
        LorakitError: there is no folder, or no picture in it.
    """
    files = photo_folder.scan(photo_folder.require(config.folder), config.class_folder)
    items = [Item(photo) for photo in files.photos]
    multiple = base.bucket_multiple
    report = Report(files.path, multiple, base.downscale, items, [], files.warnings, files.notes, files.class_photos)
    late = f"takes longer than {time_limit.SECONDS:.0f} s to read; save it again"
    pairs = time_limit.for_each(
        items,
        lambda item: _measure_cached(replace(item, findings=[]), config, multiple, cache),  # a copy
        lambda item: (item, _Measurement(late)),
        progress=progress or (lambda count, total: None),
    )
    report.items, measurements = [item for item, _ in pairs], [measurement for _, measurement in pairs]
    class_problems = time_limit.for_each(files.class_photos, _class_problem, lambda photo: f"{photo.relative}: {late}")
    report.errors += [problem for problem in class_problems if problem]
    if problem := concepts.problem(files.photos, config):
        report.errors.append(problem)
    tokenizer = base.tokenizers.get("tokenizer")
    chunks = captions.max_chunks(config, base.chunked_texts)
    counter = captions.TokenCounter(tokenizer, base.max_tokens, chunks) if tokenizer else None
    if counter is None:
        report.notes.append(NOT_COUNTED)
    _check_texts(report, config, counter)
    _check_readable(report, measurements)
    photos = [pair for pair in zip(report.items, measurements, strict=True) if pair[0].readable]
    _check_duplicates(report, photos)
    _check_twins(report, photos)
    _check_sizes(report)
    _check_folder(report, config)
    by_note: dict[str, list[Item]] = {}
    for item, measurement in zip(report.items, measurements, strict=True):
        for note in measurement.notes:
            by_note.setdefault(note, []).append(item)
    report.notes += [f"{_names(group)}: {note}" for note, group in by_note.items()]
    return report


@dataclass(frozen=True)
class _Measurement:
    """The result of decoding a photo: its problem and notes, and the values to compare it with other photos."""

    problem: str = ""
    notes: tuple[str, ...] = ()
    hash: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, np.bool_))
    colours: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, np.float32))
    grey: bool = False


# (files of the photo with time and size, resolutions, aspect, multiple) -> (its `Item` without texts, its measurement).
Progress = Callable[[int, int], object]
MeasurementCache = dict[tuple[Any, ...], tuple[Item, _Measurement]]


def _measure_cached(
    item: Item, config: DataConfig, multiple: int, cache: MeasurementCache | None
) -> tuple[Item, _Measurement]:
    """As `_measure`, from the cache if the photo and its mask did not change."""
    if cache is None:
        return item, _measure(item, config, multiple)
    try:
        files = [(path, path.stat()) for path in (item.photo.path, item.photo.mask) if path is not None]
    except OSError:
        return item, _measure(item, config, multiple)
    stamps = [(path, status.st_mtime_ns, status.st_size) for path, status in files]
    key = (item.relative, *stamps, config.resolutions, config.max_aspect, multiple)
    if key not in cache:
        measurement = _measure(item, config, multiple)
        cache[key] = replace(item), measurement
        return item, measurement
    measured, measurement = cache[key]
    return replace(measured, photo=item.photo, findings=[]), measurement


def _measure(item: Item, config: DataConfig, multiple: int) -> _Measurement:
    """Decode one photo and fill the fields of its `Item`."""
    photo = item.photo
    try:
        raw = decode.read(photo.path, photo.relative)
        size = decode.measure(raw, photo.relative)
        with decode.one_at_a_time(size):
            return _measure_picture(item, raw, size, buckets.placements(size, config, multiple))
    except decode.Unreadable as error:
        return _Measurement(problem=error.reason if str(error).startswith(photo.relative) else str(error))


def _measure_picture(
    item: Item, raw: bytes, size: tuple[int, int], placements: Sequence[buckets.Placement]
) -> _Measurement:
    placement, *lower = placements
    # Twice the trained size is enough to see whether a photo is sharp there.
    picture = decode.decode(raw, item.relative, at_least=2 * max(placement.bucket))
    mask = picture.alpha if item.photo.mask is None else decode.decode_mask(item.photo.mask, size)
    item.black_mask = mask is not None and not mask.any()
    item.digest = hashlib.sha256(raw).hexdigest()
    item.width, item.height = size
    item.orientation, item.transparent = picture.orientation, picture.alpha is not None
    item.bucket, item.scale = placement.bucket, placement.scale
    item.lower_buckets = tuple(each.bucket for each in lower)
    item.cropped = max(each.cropped for each in placements)
    item.sharpness = buckets.sharpness(picture.image, placement)
    hash_bits, colours = duplicates.fingerprint(picture.image)
    sample = np.asarray(picture.image.resize((64, 64), Image.Resampling.NEAREST))
    has_no_colour = bool((sample.max(axis=2) - sample.min(axis=2) <= 8).all())
    return _Measurement("", picture.notes, hash_bits, colours, has_no_colour)


def _class_problem(photo: Photo) -> str:
    try:
        decode.decode(photo.path, photo.relative)
    except decode.Unreadable as error:
        return str(error)
    return ""


def _check_texts(report: Report, config: DataConfig, counter: captions.TokenCounter | None) -> None:
    cuts, syntax = [], []
    for item in report.items:
        texts = captions.all_texts(item.photo, concepts.of_photo(item.photo, config))
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            texts = [printable(text) for text in texts]
            report.errors.append(f"{item.relative}: its text has what is no character: {shorten(texts[0], 60)}")
        item.text = texts[0]
        if counter is not None:
            item.tokens, item.cut = max((counter.count(text) for text in texts), key=lambda count: count[0])
        if counter is not None and item.cut:
            fit = f"its text has {item.tokens} tokens, {counter.limit} fit"
            cuts.append(f'{item.relative}: {fit}; cut off: "{shorten(item.cut, 60)}"')
        if match := next(filter(None, map(prompt_syntax.syntax, texts)), ""):
            syntax.append((item, match))
            item.findings.append(f"{match} is trained as letters")
        if config.flip and any(map(captions.mentions_sides, texts)):
            item.findings.append("left or right in its text")
            report.errors.append(
                f"{item.relative}: its text says left or right, which data.flip makes untrue; "
                "set data.flip = false or change the text"
            )
    long = [item for item in report.items if counter is not None and item.tokens > counter.room]
    if counter is not None and long:
        report.chunks = -(-min(counter.limit, max(item.tokens for item in long)) // counter.room)
    if counter is not None and report.chunks > 1:
        report.notes.append(
            f"{len(long)} of {len(report.items)} texts have more than {counter.room} tokens: they are read in up to "
            f"{report.chunks} chunks of {counter.room}, as web UIs read them"
        )
    if syntax:
        report.warnings.append(
            f"{len(syntax)} of {len(report.items)} texts have what web UIs read as weights or commands and training "
            f"reads as letters, such as {syntax[0][1]}: {_names(item for item, _ in syntax)}"
        )
    report.warnings += cuts if len(cuts) < 7 else [*cuts[:5], f"{len(cuts) - 5} more texts are too long and cut off"]
    for own in concepts.of_photos([item.photo for item in report.items], config):
        items = [item for item in report.items if concepts.of_photo(item.photo, config) == own]
        _check_captions(report, items, own)


def _check_captions(report: Report, items: list[Item], config: DataConfig) -> None:
    """Add what is wrong with the captions of the photos of one concept."""
    no_caption = [item for item in items if not captions.captions_of(item.photo, config)]
    prompt = captions.instance_prompt(config)
    every = "every photo" if len(items) == len(report.items) else f"{_names(items)}: each"
    if no_caption and len(no_caption) == len(items):
        report.notes.append(f'no captions: {every} is trained as "{prompt}"')
    elif no_caption:
        for item in no_caption:
            item.findings.append("no caption")
        count = f"{len(no_caption)} of {len(items)} photos have no caption"
        report.warnings.append(f'{count} and are trained as "{prompt}": {_names(no_caption)}')
    caption_count = len(items) - len(no_caption)
    no_trigger = [
        item
        for item in items
        if not all(captions.has_trigger(caption, config) for caption in captions.captions_of(item.photo, config))
    ]
    for item in no_trigger:
        item.findings.append("caption without the trigger")
    if no_trigger:
        count = f"{len(no_trigger)} of {caption_count} captions are without the trigger {config.trigger}"
        report.warnings.append(f'{count}; "{config.name}, " is put in front: {_names(no_trigger)}')
    several = [len(item.photo.caption_lines) for item in items if len(item.photo.caption_lines) > 1]
    if several:
        effect = (
            f"{sum(several)} captions, of which one is drawn each time" if config.caption_lines else "one text each"
        )
        option = "" if config.caption_lines else "; with data.caption_lines = true each line is a caption"
        report.notes.append(f"{len(several)} of {caption_count} caption files have several lines: {effect}{option}")
    if config.name and not config.noun and not config.class_prompt and config.kind == "subject":
        report.warnings.append(
            f'data.name = "{config.name}" is one word: give a rare word and what it is, such as "sks dog"'
        )


def _check_readable(report: Report, measurements: Sequence[_Measurement]) -> None:
    """Add one error for each cause, with the names of its files: thirty HEIC photos are one error."""
    causes: dict[str, list[Item]] = {}
    for item, measurement in zip(report.items, measurements, strict=True):
        if measurement.problem:
            item.findings.append(measurement.problem)
            causes.setdefault(measurement.problem, []).append(item)
    report.errors += [f"{_names(items)}: {cause}" for cause, items in causes.items()]


def _check_duplicates(report: Report, pairs: Sequence[tuple[Item, _Measurement]]) -> None:
    by_digest: dict[str, list[Item]] = {}
    for item, _ in pairs:
        by_digest.setdefault(item.digest, []).append(item)
    copies = [items for items in by_digest.values() if len(items) > 1]
    report.warnings += duplicates.some_lines(
        [f"{_names(items)}: the same file, counted {len(items)} times" for items in copies]
    )
    for items in copies:
        for item in items[1:]:
            item.findings.append(f"same as {items[0].relative}")
    distinct = [(item, measurement) for item, measurement in pairs if by_digest[item.digest][0] is item]
    matches = duplicates.first_matches(
        np.array([measurement.hash for _, measurement in distinct]),
        np.array([measurement.colours for _, measurement in distinct]),
    )
    groups: dict[int, list[Item]] = {}
    roots: dict[int, int] = {}  # a copy of a copy belongs to the group of the first
    for at, original in matches.items():
        root = roots[at] = roots.get(original, original)
        distinct[at][0].findings.append(f"almost the same as {distinct[original][0].relative}")
        groups.setdefault(root, [distinct[root][0]]).append(distinct[at][0])
    report.warnings += duplicates.some_lines([f"{_names(items)}: look almost the same" for items in groups.values()])


def _check_twins(report: Report, pairs: Sequence[tuple[Item, _Measurement]]) -> None:
    """Warn of a grey picture with the size and the name of a photo in colour and something more: it may be a mask."""
    colour = {
        (Path(item.relative).stem, item.width, item.height) for item, measurement in pairs if not measurement.grey
    }
    twins = []
    for item, measurement in pairs:
        stem, size = Path(item.relative).stem, (item.width, item.height)
        parts = {*(stem[:at] for at in range(3, len(stem) + 1)), *(stem[at:] for at in range(len(stem) - 2))}
        parts |= {*re.split(r"[\W_]+", stem)}  # shorter names too: "1" of "1_matte"
        if measurement.grey and item.photo.mask is None and any((part, *size) in colour for part in parts | {stem}):
            twins.append(item)
            item.findings.append("grey, beside a photo in colour")
    if twins:
        report.warnings.append(
            f"{_names(twins)}: grey, with the name and size of a photo in colour; name.mask.png is read as a mask, "
            "this is trained as a photo"
        )


def _check_sizes(report: Report) -> None:
    """Add a warning for small photos, for large crops and for blurred photos."""
    readable = [item for item in report.items if item.readable]
    kinds: tuple[tuple[Callable[[Item], bool], Callable[[Item], str], str], ...] = (
        (
            lambda item: item.scale > 1,
            lambda item: f"scaled up {item.scale:.3g}x",
            "smaller than the size they are trained at",
        ),
        (
            lambda item: item.cropped > MAX_CROP,
            lambda item: f"{item.cropped:.0%} cropped away",
            "lose much to the crop; crop them yourself to choose what stays",
        ),
        (
            lambda item: item.sharpness < MIN_SHARPNESS,
            lambda item: "blurred",
            "look blurred at the size they are trained at",
        ),
    )
    for condition, detail, meaning in kinds:
        items = [item for item in readable if condition(item)]
        for item in items:
            item.findings.append(detail(item))
        if items:
            report.warnings.append(f"{_names(items, detail)}: {meaning}")


def _check_folder(report: Report, config: DataConfig) -> None:
    readable = [item for item in report.items if item.readable]
    if 0 < len(report.items) < MIN_PHOTOS:
        photos = "1 photo" if len(report.items) == 1 else f"{len(report.items)} photos"
        report.warnings.append(f"only {photos}: 5 to 20 from different sides and places teach more")
    counts = [f"{bucket} ({count})" for bucket, count in report.buckets.items()]
    sizes = ", ".join(counts[:8]) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")
    if config.lower_resolutions:
        sides = ", ".join(map(str, config.resolutions))
        report.notes.append(f"each photo is trained at {sides}: as {sizes}; a batch holds one size")
    elif len(report.buckets) > 1:
        report.notes.append(f"mixed aspect ratios: trained at {sizes}; a batch holds one size")
    rotated = [item for item in readable if item.orientation]
    if rotated:
        report.notes.append(f"set upright by their EXIF tag: {_names(rotated)}")
    transparent = [item for item in readable if item.transparent]
    if transparent:
        report.notes.append(f"transparent parts are shown on white: {_names(transparent)}")
    masks = sum(item.photo.mask is not None for item in report.items)
    if masks:
        report.notes.append(f"{masks} of {len(report.items)} photos have a mask; train.masked_loss = true uses it")
    if config.flip and config.kind == "subject":
        report.notes.append("data.flip: the subject is learned mirrored too; leave it off where its sides differ")


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _names(items: Iterable[Item], detail: Callable[[Item], str] | None = None, limit: int = 5) -> str:
    labels = [item.relative if detail is None else f"{item.relative} ({detail(item)})" for item in items]
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return ", ".join(labels[:limit]) + more


def _table(report: Report) -> list[str]:
    """One row for each photo. A text that all photos share is in the title instead."""
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
    widths = [max(len(row[at]) for row in [columns, *rows]) for at in range(len(columns))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, *rows]
    ]
    return [title, "", *lines]
