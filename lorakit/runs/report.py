"""What a run did, for a person: curves, a contact sheet, and one HTML file that needs nothing else.

Only what was measured is drawn or said. The page carries its pictures and its style, calls nobody, and follows the
reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lorakit import __version__
from lorakit.config import Config, with_paths_removed
from lorakit.core import atomic, image_grid
from lorakit.core.errors import LorakitError
from lorakit.data import augment, buckets, decode
from lorakit.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Photos shown in the report, and the longest side of photos and samples in it, in pixels.
PHOTOS, PHOTO_SIDE, SAMPLE_SIDE = 60, 160, 320
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")

# Ink, faint ink, accent, and the timestep bands from little noise to much, for light and dark paper.
LIGHT = ("#22221f", "#8a8984", "#2a6fb8", ("#9cc4ea", "#5f9fdb", "#2a6fb8", "#123e6d"))
DARK = ("#e8e7e2", "#96958f", "#6fb0ee", ("#2f5f91", "#4a8bcb", "#7cb8f0", "#c4e0fa"))


def write(
    folder: RunFolder,
    config: Config,
    plan: Any,
    photos: Any,
    history: Sequence[dict[str, Any]],
    findings: Iterable[Any],
) -> Path:
    """Write curves.png, contact-sheet.png and report.html of a run; the page's path.

    Args:
        plan: `plan.Plan`.
        photos: `data.check.Report`.
        history: the validations, as `evaluate.choose_best` takes them.
        findings: of the self-check, each with name, passed and detail.
    """
    events = list(folder.events("step", "validation"))
    best = best_step(folder)
    atomic.write(folder.curves_file, curves(events, best=best))
    sheet = contact_sheet(folder)
    if sheet is not None:
        image_grid.save(sheet, folder.contact_sheet_file)
    page = html(folder, config, plan, photos, history, findings)
    atomic.write(folder.html_file, page)
    return folder.html_file


def best_step(folder: RunFolder) -> int | None:
    """The step that validation prefers, as state.json says."""
    found = _state(folder).get("best")
    return found["step"] if found else None


def contact_sheet(folder: RunFolder) -> Image.Image | None:
    """Every sample of the run: a row for each step, a column for each prompt. None where nothing was drawn."""
    steps = [step for step in folder.sample_grids() if folder.sample_pictures(step)]
    rows = {step: [_read(file) for file in folder.sample_pictures(step)] for step in steps}
    if not rows:
        return None
    columns = max(map(len, rows.values()))
    prompts = next(([_prompt(image) for image in row] for row in rows.values() if len(row) == columns), [])
    cells = [row[n] if n < len(row) else None for row in rows.values() for n in range(columns)]
    return image_grid.grid(cells, [f"step {step}" for step in rows], prompts, largest=256)


def curves(events: Iterable[dict[str, Any]], *, best: int | None = None, dark: bool = False) -> bytes:
    """A PNG of loss, learning rate, validation error by timestep band and prior drift, over optimizer steps.

    What the log has no events of gets no panel. A step that was done twice (a resume goes back to its checkpoint)
    counts as it was done last.

    Args:
        events: of the log, kinds "step" and "validation".
        best: step to mark.
        dark: ink for dark paper; the paper itself is transparent.
    """
    from matplotlib.figure import Figure  # a quarter of a second that a run's first step need not wait for

    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = {"step": steps, "validation": validations}.get(event["event"])
        if kind is not None:
            kind[event["step"]] = event
    trained = [steps[step] for step in sorted(steps)]
    validated = [validations[step] for step in sorted(validations)]
    ink, faint, accent, bands = DARK if dark else LIGHT
    panels = []
    if trained:
        panels += [lambda axes: _loss(axes, trained, faint, accent), lambda axes: _rate(axes, trained, accent)]
    if validated:
        panels += [
            lambda axes: _validation(axes, validated, ink, bands),
            lambda axes: _drift(axes, validated, accent),
        ]
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(10, 3.1 * rows), dpi=110, layout="constrained")
    if not dark:
        figure.patch.set_facecolor("white")
    else:
        figure.patch.set_alpha(0)
    for number, draw in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        draw(axes)
        _style(axes, ink, faint)
        # The best is chosen by validation, so it is marked there.
        if best is not None and number >= 2:
            axes.axvline(best, color=ink, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                "best",
                (best, 1),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=ink,
                fontsize=8,
                va="top",
            )
    buffer = io.BytesIO()
    # `Figure` alone, without pyplot, draws with Agg and keeps no state that another thread could meet.
    figure.savefig(buffer, format="png", metadata={"Software": f"lorakit {__version__}"})
    return buffer.getvalue()


def _loss(axes: Axes, events: list[dict[str, Any]], faint: str, accent: str) -> None:
    at, loss = [event["step"] for event in events], [event["loss"] for event in events]
    axes.plot(at, loss, color=faint, linewidth=0.6, alpha=0.55)
    axes.plot(at, [event["smoothed_loss"] for event in events], color=accent, linewidth=1.8)
    axes.set_title("training loss (raw and smoothed)")
    axes.set_ylim(bottom=0, top=max(sorted(loss)[int(0.99 * (len(loss) - 1))] * 1.15, 1e-12))


def _rate(axes: Axes, events: list[dict[str, Any]], accent: str) -> None:
    axes.plot([e["step"] for e in events], [e["learning_rate"] for e in events], color=accent, linewidth=1.8)
    axes.set_title("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _validation(axes: Axes, events: list[dict[str, Any]], ink: str, colours: Sequence[str]) -> None:
    at = [event["step"] for event in events]
    for number, colour in enumerate(colours):
        values = [event["bands"][number]["mse"] for event in events]
        first, last = events[-1]["bands"][number]["timesteps"]
        axes.plot(at, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=f"t {first}-{last}")
    axes.plot(at, [e["mse"] for e in events], color=ink, linewidth=2, marker="o", markersize=3.5, label="all")
    axes.set_title(f"validation error (MSE) on {events[-1]['photos']} {events[-1]['source']}")
    axes.set_ylim(bottom=0)
    axes.legend(
        fontsize=8,
        frameon=False,
        labelcolor=ink,
        ncols=5,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        handlelength=1.2,
        columnspacing=1.2,
    )


def _drift(axes: Axes, events: list[dict[str, Any]], accent: str) -> None:
    at, drift = [e["step"] for e in events], [100 * e["prior_drift"] for e in events]
    axes.plot(at, drift, color=accent, linewidth=1.8, marker="o", markersize=3.5)
    axes.set_title("prior drift: change on the class prompt, %")
    axes.set_ylim(bottom=0)


def _style(axes: Axes, ink: str, faint: str) -> None:
    axes.set_facecolor("none")
    axes.title.set_fontsize(10)
    axes.title.set_color(ink)
    axes.tick_params(colors=ink, labelsize=8, length=0)
    axes.yaxis.get_offset_text().set(color=ink, fontsize=8)
    axes.grid(axis="y", color=faint, alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(faint)
    axes.set_xlim(left=0)
    axes.set_xlabel("step", color=ink, fontsize=8, loc="right", labelpad=0)


# -- the page -----------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #22221f; --soft: #66655f; --line: #e3e1db;
  --good: #1d7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171715; --card: #20201d; --ink: #e8e7e2; --soft: #a3a29b;
  --line: #36352f; --good: #6fcf93; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .verdict { font-weight: 600; }
section { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } tr + tr td { border-top: 1px solid var(--line); }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: .8rem; }
figure { margin: 0; } figcaption { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
img { max-width: 100%; display: block; border-radius: 4px; } .curves { width: 100%; }
.photos img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--card); }
.samples td { padding: .25rem; border: 0; } .samples img { width: 176px; max-width: none; }
.samples th { padding: .25rem .6rem .25rem 0; font-weight: 400; color: var(--soft); max-width: 176px;
  font-size: .85rem; }
.small img { image-rendering: pixelated; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .82rem; white-space: pre-wrap; } summary { cursor: pointer; color: var(--soft); }
"""


def html(
    folder: RunFolder,
    config: Config,
    plan: Any,
    photos: Any,
    history: Sequence[dict[str, Any]],
    findings: Iterable[Any],
) -> str:
    """The page: verdict, samples, curves, photos as they were trained, plan, environment, options."""
    title = config.data.name or folder.path.name
    findings = list(findings)
    state = _state(folder)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(config.adapter.method)} on {escape(plan.base)}, {plan.steps} steps, '
        f"{len(photos.photos)} photos; run {escape(folder.path.name)}</p>",
        _verdict(findings),
        _section("SampleInputs", _samples(folder)),
        _section("Curves", _curves(folder, best_step(folder)) + _best(state, history)),
        _section("Photos as they were trained", _photos(config, photos)),
        _section("Plan", _list(plan.lines())),
        _section("Warnings", _list(photos.warnings)),
        _section("Environment", _table(environment(folder))),
        _section("Options", _options(config)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: lorakit report</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def environment(folder: RunFolder) -> dict[str, str]:
    """Versions, system and device; nothing that names the machine or its user."""
    found = {
        "lorakit": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device = next((e["message"] for e in folder.events("message") if e["message"].startswith("device: ")), "")
    return {"device": device.removeprefix("device: "), **found} if device else found


def _verdict(findings: list[Any]) -> str:
    failed = [finding for finding in findings if not finding.passed]
    if not findings:
        head = '<p class="verdict bad">Not checked: the exported file was not compared with the trained model.</p>'
    elif failed:
        head = f'<p class="verdict bad">The self-check failed: {len(failed)} of {len(findings)} checks.</p>'
    else:
        head = f'<p class="verdict good">Checked: all {len(findings)} checks of the exported file held.</p>'
    rows = "".join(
        f'<tr><td class="{"good" if f.passed else "bad"}">{"ok" if f.passed else "failed"}</td>'
        f"<td>{escape(f.name)}</td><td>{escape(f.detail)}</td></tr>"
        for f in findings
    )
    return f"{head}<section><table>{rows}</table></section>" if rows else head


def _samples(folder: RunFolder) -> str:
    rows: list[str] = []
    columns: list[str] = []
    side = 0
    for step in folder.sample_grids():
        images = [_read(file) for file in folder.sample_pictures(step)]
        columns = columns if len(columns) >= len(images) else [_prompt(image) for image in images]
        side = max([side, *(max(image.size) for image in images)])
        cells = "".join(f"<td>{_img(image, SAMPLE_SIDE, f'step {step}: {_prompt(image)}')}</td>" for image in images)
        rows.append(f"<tr><th>step {step}</th>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{escape(prompt)}</th>" for prompt in columns)
    return f'<table class="samples{" small" if side <= 128 else ""}"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _curves(folder: RunFolder, best: int | None) -> str:
    events = list(folder.events("step", "validation"))
    if not events:
        return ""
    light, dark = (_data(curves(events, best=best, dark=dark), "png") for dark in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img class="curves" src="{light}" '
        'alt="loss, learning rate, validation error and prior drift by step"></picture>'
    )


def _best(state: dict[str, Any], history: Sequence[dict[str, Any]]) -> str:
    if not history or not state.get("best"):
        return ""
    rows = "".join(
        f"<tr><td>{entry['step']}</td><td>{entry['mse']:.4f}</td><td>{entry['rmse']:.4f}</td><td>{entry['mae']:.4f}</td>"
        f"<td>{entry['r2']:.3f}</td><td>{entry['prior_drift']:.2%}</td></tr>"
        for entry in history
    )
    return (
        f"<p>Best checkpoint by validation: {escape(state['best']['reason'])}. "
        "This is a suggestion: look at the samples too.</p>"
        "<table><tr><th>step</th><th>MSE</th><th>RMSE</th><th>MAE</th><th>R2</th><th>prior drift</th></tr>"
        f"{rows}</table>"
    )


def _photos(config: Config, report: Any) -> str:
    """Each photo cut and scaled as it was trained, with its text."""
    figures = []
    items = [item for item in report.items if item.readable]
    for item in items[:PHOTOS]:
        try:
            decoded = decode.decode(item.photo.path, item.relative)
        except LorakitError:
            continue  # gone or changed since it was trained on; the report is not the place to fail for it
        placed = buckets.assign(decoded.size, config.data.resolution, report.step)
        shown = Image.fromarray(augment.render(decoded.pixels, augment.Variant(placed.bucket, placed.box)))
        size = f"{shown.width}x{shown.height}" + (f", {item.cropped:.0%} cropped" if item.cropped >= 0.005 else "")
        caption = f"<figcaption>{escape(item.text)}<br>{size}</figcaption>"
        figures.append(f"<figure>{_img(shown, PHOTO_SIDE, item.text)}{caption}</figure>")
    more = f'<p class="soft">{len(items) - PHOTOS} more are not shown.</p>' if len(items) > PHOTOS else ""
    return f'<div class="photos">{"".join(figures)}</div>{more}' if figures else ""


def _options(config: Config) -> str:
    text = "\n".join(
        f"{section}.{name} = {json.dumps(value, ensure_ascii=False)}"
        for section, table in with_paths_removed(config).items()
        for name, value in table.items()
    )
    return f"<details><summary>every option as it was resolved</summary><pre>{escape(text)}</pre></details>"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n<section>{body}</section>" if body else ""


def _list(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _table(rows: dict[str, str]) -> str:
    return (
        "<table>" + "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows.items()) + "</table>"
    )


def _img(image: Image.Image, side: int, text: str) -> str:
    """An <img> that carries its picture: PNG where that is small, else JPEG."""
    small, buffer = image_grid.thumbnail(image, side), io.BytesIO()
    kind = "png" if max(small.size) <= 128 else "jpeg"
    small.save(buffer, kind, quality=88)
    return f'<img src="{_data(buffer.getvalue(), kind)}" alt="{escape(text, quote=True)}" loading="lazy">'


def _data(raw: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _read(file: Path) -> Image.Image:
    """A sample with its recipe in `info`."""
    with Image.open(file) as image:
        image.load()
        return image


def _prompt(image: Image.Image) -> str:
    return str(json.loads(image.info.get("lorakit", "{}")).get("prompt", ""))


def _state(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.state_file.read_text(encoding="utf-8"))
    return found
