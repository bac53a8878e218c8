"""Check a folder of photos, photo by photo, before any model is loaded. Imports no torch.

Errors stop a run. Warnings name probable problems. Notes say what the check decided for the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lorakit.config import DataConfig
from lorakit.config.option import suggest
from lorakit.core.messages import Message, some
from lorakit.core.names import printable
from lorakit.core.protocols import Base
from lorakit.core.units import count
from lorakit.data import captions, concepts, decode, duplicates, photo_folder, time_limit
from lorakit.data.checks.measure import Measurement, MeasurementCache, measure
from lorakit.data.checks.report import Item, Report, names
from lorakit.data.checks.texts import check_texts
from lorakit.data.photo_folder import Photo

__all__ = ["NOT_COUNTED", "Item", "MeasurementCache", "Progress", "Report", "check"]

# Called with the number of measured photos and of all photos.
Progress = Callable[[int, int], object]
# A larger crop gets a warning: it may cut off a head.
MAX_CROP = 0.10
# Sharpness is the variance of the Laplacian divided by that of the picture, at the trained size. At 512 pixels, 46
# sharp photos had 0.04 to 2.5. After a Gaussian blur of 2.6 pixels, 18 of them had 0.002 or less.
MIN_SHARPNESS = 0.004
# With fewer photos, the check adds a warning.
MIN_PHOTOS = 4
# The advised numbers of photos, least and most. README, docs, presets and the front end name the same: a test compares.
ADVISED_PHOTOS = {"subject": (5, 20), "style": (15, 40)}
MORE_PHOTOS = "only {photos}: {low} to {high} from different sides and places teach more"
MORE_PICTURES = "only {photos}: {low} to {high} of different things teach more"
NOT_COUNTED = "tokens of the texts are not counted: the base's tokenizer is not on this machine yet"


def check(
    config: DataConfig, base: Base, *, cache: MeasurementCache | None = None, progress: Progress | None = None
) -> Report:
    """Check the photos of `config.folder`. Problems of single photos go into the report and do not raise.

    Args:
        cache: measurements of earlier checks; an unchanged photo is not decoded again.
        progress: called with the number of measured photos and of all photos.

    Raises:
        LorakitError: the folder does not exist, or has no pictures.
    """
    files = photo_folder.of_config(config)
    items = [Item(photo) for photo in files.photos]
    multiple = base.bucket_multiple
    report = Report(files.path, multiple, base.downscale, items, [], files.warnings, files.notes, files.class_photos)
    late = Message("takes longer than {seconds:.0f} s to read; save it again", time_limit.SECONDS)
    pairs = time_limit.for_each(
        items,
        lambda item: measure(replace(item, findings=[]), config, multiple, cache),  # a copy
        lambda item: (item, Measurement(late)),
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
    check_texts(report, config, counter)
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
    report.notes += [Message("{names}: {cause}", names(group), note) for note, group in by_note.items()]
    return report


def _class_problem(photo: Photo) -> str:
    try:
        decode.decode(photo.path, photo.relative)
    except decode.Unreadable as error:
        return str(error)
    return ""


def _check_readable(report: Report, measurements: Sequence[Measurement]) -> None:
    """Add one error for each cause, with the names of its files: thirty HEIC photos are one error."""
    causes: dict[str, list[Item]] = {}
    for item, measurement in zip(report.items, measurements, strict=True):
        if measurement.problem:
            item.findings.append(measurement.problem)
            causes.setdefault(measurement.problem, []).append(item)
    report.errors += [Message("{names}: {cause}", names(items), cause) for cause, items in causes.items()]


def _check_duplicates(report: Report, pairs: Sequence[tuple[Item, Measurement]]) -> None:
    by_digest: dict[str, list[Item]] = {}
    for item, _ in pairs:
        by_digest.setdefault(item.digest, []).append(item)
    copies = [items for items in by_digest.values() if len(items) > 1]
    report.warnings += duplicates.some_lines(
        [Message("{names}: the same file, counted {count} times", names(items), len(items)) for items in copies]
    )
    for items in copies:
        for item in items[1:]:
            item.findings.append(Message("same as {photo}", items[0].relative))
    distinct = [(item, measurement) for item, measurement in pairs if by_digest[item.digest][0] is item]
    matches = duplicates.first_matches(
        np.array([measurement.hash for _, measurement in distinct]),
        np.array([measurement.colours for _, measurement in distinct]),
    )
    groups: dict[int, list[Item]] = {}
    roots: dict[int, int] = {}  # a copy of a copy belongs to the group of the first
    for at, original in matches.items():
        root = roots[at] = roots.get(original, original)
        distinct[at][0].findings.append(Message("almost the same as {photo}", distinct[original][0].relative))
        groups.setdefault(root, [distinct[root][0]]).append(distinct[at][0])
    report.warnings += duplicates.some_lines(
        [Message("{names}: look almost the same", names(items)) for items in groups.values()]
    )


def _check_twins(report: Report, pairs: Sequence[tuple[Item, Measurement]]) -> None:
    """Warn of a grey picture with the size of a colour photo and a name that contains the photo's: it may be a mask."""
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
            Message(
                "{names}: grey, with the name and size of a photo in colour; name.mask.png is read as a mask, "
                "this is trained as a photo",
                names(twins),
            )
        )


def _check_sizes(report: Report) -> None:
    """Add a warning for small photos, for large crops and for blurred photos."""
    readable = [item for item in report.items if item.readable]
    kinds: tuple[tuple[Callable[[Item], bool], Callable[[Item], str], str], ...] = (
        (
            lambda item: item.scale > 1,
            lambda item: Message("scaled up {times:.3g}x", item.scale),
            "smaller than the size they are trained at",
        ),
        (
            lambda item: item.cropped > MAX_CROP,
            lambda item: Message("{share:.0%} cropped away", item.cropped),
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
            report.warnings.append(Message("{names}: {cause}", names(items, detail), meaning))


def _check_folder(report: Report, config: DataConfig) -> None:
    readable = [item for item in report.items if item.readable]
    # If some cannot be read, the errors say that; without them, the number of photos is not known yet.
    if 0 < len(readable) == len(report.items) < MIN_PHOTOS:
        template = MORE_PICTURES if config.kind == "style" else MORE_PHOTOS
        report.warnings.append(Message(template, count(len(report.items), "photo"), *ADVISED_PHOTOS[config.kind]))
    folders = {item.relative.partition("/")[0] for item in report.items if "/" in item.relative}
    report.errors += [
        Message(
            "data.folder_resolutions: no photo is in a folder {name}/{hint}", printable(name), suggest(name, folders)
        )
        for name in config.folder_resolutions
        if name not in folders
    ]
    counts = [f"{bucket} ({count})" for bucket, count in report.buckets.items()]
    sizes = some(counts, 8)
    if config.lower_resolutions:
        sides = ", ".join(map(str, config.resolutions))
        report.notes.append(
            Message("each photo is trained at {sides}: as {sizes}; a batch holds one size", sides, sizes)
        )
    elif len(report.buckets) > 1:
        what = "mixed sizes" if config.folder_resolutions else "mixed aspect ratios"
        report.notes.append(Message("{what}: trained at {sizes}; a batch holds one size", what, sizes))
    rotated = [item for item in readable if item.orientation]
    if rotated:
        report.notes.append(Message("rotated by their EXIF tag: {names}", names(rotated)))
    transparent = [item for item in readable if item.transparent]
    if transparent:
        report.notes.append(Message("transparent parts are shown on white: {names}", names(transparent)))
    masks = sum(item.photo.has_mask for item in report.items)
    if masks:
        report.notes.append(
            Message(
                "photos with a mask: {some} of {count}; train.masked_loss = true uses the masks",
                masks,
                len(report.items),
            )
        )
    if config.flip and config.kind == "subject":
        report.notes.append("data.flip: the subject is learned mirrored too; leave it off where its sides differ")
