"""The report of a run: curves, a contact sheet, and one self-contained HTML file.

The report shows only measured values. The page (report.html.jinja) contains its pictures and its style, makes no
network requests, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lorakit import __version__
from lorakit.config import Config, without_paths
from lorakit.core import atomic, foreign_json, image_grid
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message
from lorakit.data import augment, buckets, decode
from lorakit.runs import charts
from lorakit.runs.lessons import sentences, too_short
from lorakit.runs.run_folder import RunFolder

if TYPE_CHECKING:
    import jinja2

    from lorakit.data.checks import Item, Report
    from lorakit.runs.plan import Plan
    from lorakit.training.selfcheck import Finding

# Photos shown in the report, and the longest side of photos and samples in it, in pixels.
PHOTOS, PHOTO_SIDE, SAMPLE_SIDE = 60, 160, 320
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


def write(
    folder: RunFolder,
    config: Config,
    plan: Plan,
    photos: Report,
    history: Sequence[dict[str, Any]],
    findings: Iterable[Finding],
    lessons: Sequence[str] = (),
) -> Path:
    """Write curves.svg, contact-sheet.png, report.json and report.html of a run; the page's path.

    Args:
        history: the validations, one dict for each.
        findings: of the self-check.
        lessons: of `lesson_lines`.
    """
    findings = list(findings)
    folder.write_report(map(vars, findings), lessons)
    atomic.write(folder.curves_file, charts.sheet(_charts(folder)))
    sheet = contact_sheet(folder)
    if sheet is not None:
        image_grid.save(sheet, folder.contact_sheet_file)
    atomic.write(folder.html_file, html(folder, config, plan, photos, history, findings, lessons))
    return folder.html_file


def contact_sheet(folder: RunFolder) -> Image.Image | None:
    """Every sample of the run: a row for each step, a column for each prompt. None where nothing was drawn."""
    steps = [step for step in folder.sample_grids() if folder.sample_pictures(step)]
    rows = {step: [image_grid.read(file) for file in folder.sample_pictures(step)] for step in steps}
    if not rows:
        return None
    columns = max(map(len, rows.values()))
    prompts = next(([_prompt(image) for image in row] for row in rows.values() if len(row) == columns), [])
    cells = [row[n] if n < len(row) else None for row in rows.values() for n in range(columns)]
    return image_grid.grid(cells, [f"step {step}" for step in rows], prompts, largest=256)


def html(
    folder: RunFolder,
    config: Config,
    plan: Plan,
    photos: Report,
    history: Sequence[dict[str, Any]],
    findings: Iterable[Finding],
    lessons: Sequence[str] = (),
) -> str:
    """The page: verdict, samples, curves, photos as they were trained, plan, environment, options."""
    findings = list(findings)
    rows = _samples(folder)
    photo_rows, left_out = _photos(config, photos, history[-1] if history else {})
    return _template().render(
        title=config.data.name or folder.path.name,
        method=config.adapter.method,
        plan=plan,
        photo_count=len(photos.photos),
        run=folder.path.name,
        findings=findings,
        lessons=lessons,
        failed=sum(not finding.passed for finding in findings),
        samples=rows,
        prompts=[sample["prompt"] for sample in max((row["samples"] for row in rows), key=len, default=[])],
        small_samples=max((sample["side"] for row in rows for sample in row["samples"]), default=0) <= 128,
        charts=_charts(folder),
        charts_style=charts.PALETTE + charts.STYLE,
        lowest=min(history, key=lambda entry: entry["mse"], default=None),
        history=history,
        photos=photo_rows,
        photos_left_out=left_out,
        warnings=photos.warnings,
        environment=environment(folder),
        options=_options(config),
    )


@functools.cache
def _template() -> jinja2.Template:
    import jinja2  # torch brings it; nothing before the end of a run needs it

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return pages.get_template("report.html.jinja")


@functools.cache
def _versions() -> dict[str, str]:
    """Of lorakit, of what it computes with, and the system."""
    versions = {
        "lorakit": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def environment(folder: RunFolder) -> dict[str, str]:
    """Versions, system and device, without names of the machine or its user."""
    versions = _versions()
    device = next((e["message"] for e in folder.events("message") if e["message"].startswith("device: ")), "")
    return {"device": device.removeprefix("device: "), **versions} if device else dict(versions)


def _samples(folder: RunFolder) -> list[dict[str, Any]]:
    rows = []
    for step in folder.sample_grids():
        images = [image_grid.read(file) for file in folder.sample_pictures(step)]
        samples = [
            {"source": _source(image, SAMPLE_SIDE), "prompt": _prompt(image), "side": max(image.size)}
            for image in images
        ]
        rows.append({"step": step, "samples": samples})
    return rows


def _charts(folder: RunFolder) -> list[str]:
    return charts.run_charts(folder.events("step", "validation"))


def lesson_lines(folder: RunFolder, config: Config, photos: Report, history: Sequence[dict[str, Any]]) -> list[Message]:
    """A sentence for each fault in what the run has learned."""
    last = max(folder.sample_grids(), default=None)
    pictures = [] if last is None else [image_grid.read(file) for file in folder.sample_pictures(last)]
    samples = {_prompt(picture): picture for picture in pictures}
    crops = {item.relative: image for item, image in _crops(config, photos)} if samples else {}
    measured = history[-1] if history else {}
    return [*sentences(samples, crops, measured), *too_short(history, config.optimizer)]


def _crops(config: Config, report: Report) -> Iterator[tuple[Item, Image.Image]]:
    """The first photos, each cut and scaled as it was trained."""
    for item in [item for item in report.items if item.readable][:PHOTOS]:
        try:
            decoded = decode.decode(item.photo.path, item.relative, edit=item.photo.edit)
        except LorakitError:
            continue  # gone or changed since it was trained on; the report is not the place to fail for it
        crop = buckets.placements(decoded.size, config.data, report.multiple, item.relative)[0]
        yield item, Image.fromarray(augment.render(decoded.pixels, augment.Variant(crop.bucket, crop.box)))


def _photos(config: Config, report: Report, measured: Mapping[str, Any]) -> tuple[list[dict[str, str]], int]:
    """Each photo as it was trained, with its text and what it taught; and how many are not shown."""
    rows, gains = [], measured.get("gains", {}) | measured.get("holdout_gains", {})
    for item, image in _crops(config, report):
        size = f"{image.width}x{image.height}" + (f", {item.cropped:.0%} cropped" if item.cropped >= 0.005 else "")
        if item.relative in gains:
            gain, place = gains[item.relative], "held out; " * (item.relative in measured.get("holdout_gains", {}))
            size += f"; {place}error {abs(gain):.1%} {'below' if gain >= 0 else 'above'} the base's"
        rows.append({"source": _source(image, PHOTO_SIDE), "text": item.text, "size": size})
    return rows, max(0, sum(item.readable for item in report.items) - PHOTOS)


def _options(config: Config) -> str:
    return "\n".join(
        f"{section}.{name} = {json.dumps(value, ensure_ascii=False)}"
        for section, table in without_paths(config).items()
        for name, value in table.items()
    )


def _source(image: Image.Image, side: int) -> str:
    """The address of a picture that the page carries: PNG where that is small, else JPEG."""
    small, buffer = image_grid.thumbnail(image, side), io.BytesIO()
    kind = "png" if max(small.size) <= 128 else "jpeg"
    small.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _prompt(image: Image.Image) -> str:
    return str(foreign_json.loads(image.info.get("lorakit", "{}")).get("prompt", ""))
