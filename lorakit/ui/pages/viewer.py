"""The picture viewer: shows a picture in full size over the page, moves to others by arrow keys, and saves files."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from lorakit.core import foreign_json, image_grid
from lorakit.core.errors import LorakitError
from lorakit.ui.texts import Say
from lorakit.ui.widgets import say_for
from lorakit.ui.workspace import Workspace

# Opens the picture that a button names in `data-picture`. The buttons in one element with `data-pictures` form a table.
# `data-row` and `data-column` are a button's place in it, and the arrow keys move between places.
SCRIPT = """
const dialog = document.createElement('dialog');
dialog.className = 'lk-viewer';
dialog.innerHTML = '<header><span role=status></span><button type=button data-go="0,-1">←</button>' +
  '<button type=button data-go="0,1">→</button><button type=button data-go="-1,0">↑</button>' +
  '<button type=button data-go="1,0">↓</button><button type=button data-original>1:1</button>' +
  '<a download></a><button type=button data-close>✕</button></header><div tabindex=0><img alt=""></div>';
document.body.append(dialog);
const part = (name) => dialog.querySelector(name);
let shown = '';
const current = () => document.querySelector(`[data-picture="${CSS.escape(shown)}"]`);
const place = (button) => [Number(button.dataset.row), Number(button.dataset.column)];
const neighbour = (rows, columns) => {
  const from = current();
  if (!from) return null;
  const all = [...from.closest('[data-pictures]').querySelectorAll('[data-picture]')];
  const [row, column] = place(from), line = all.every((one) => place(one)[1] === column);
  const [down, right] = line ? [rows || columns, 0] : [rows, columns];
  const ahead = all.filter((one) => {
    const [y, x] = place(one);
    return down ? x === column && (y - row) * down > 0 : y === row && (x - column) * right > 0;
  });
  const distance = (one) => Math.abs(place(one)[0] - row) + Math.abs(place(one)[1] - column);
  return ahead.sort((a, b) => distance(a) - distance(b))[0] ?? null;
};
const show = async (button) => {
  shown = button.dataset.picture;
  part('[role=status]').textContent = '…';
  if (!dialog.open) dialog.showModal();
  const name = shown, picture = await server.picture(name);
  if (name !== shown) return;
  part('[role=status]').textContent = picture.text;
  Object.assign(part('img'), {src: picture.address, alt: picture.text, title: picture.recipe});
  Object.assign(part('a'), {href: picture.address, download: picture.name, textContent: picture.save});
  part('a').hidden = !picture.address;
  part('[data-original]').ariaLabel = part('[data-original]').title = picture.original;
  part('[data-close]').ariaLabel = picture.close;
};
const go = (rows, columns) => { const next = neighbour(rows, columns); if (next) show(next); };
const KEYS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
dialog.addEventListener('keydown', (event) => {
  if (!(event.key in KEYS) || dialog.classList.contains('lk-original')) return;
  event.preventDefault();
  go(...KEYS[event.key]);
});
dialog.addEventListener('click', ({target}) => {
  if (target.dataset.go) go(...target.dataset.go.split(',').map(Number));
  else if ('original' in target.dataset) dialog.classList.toggle('lk-original');
  else if ('close' in target.dataset || target === dialog) dialog.close();
});
dialog.addEventListener('close', () => { current()?.focus(); dialog.classList.remove('lk-original'); });
document.addEventListener('click', ({target}) => {
  const button = target.closest?.('button[data-picture]');
  if (button) show(button);
});
"""


def build(workspace: Workspace) -> gr.HTML:
    """Build the viewer. Call it once for a page, outside of the tabs."""

    def picture(name: object, request: gr.Request) -> dict[str, str]:
        return original(workspace, name, say_for(request))

    return gr.HTML("", elem_id="viewer", js_on_load=SCRIPT, server_functions=[picture], apply_default_css=False)


def original(workspace: Workspace, name: object, say: Say) -> dict[str, str]:
    """The original file of a picture and the viewer's texts.

    Args:
        name: path below the runs.

    Returns:
        `address` (a `data:` URL), `name` (for saving), `recipe`, `text` and the labels of the buttons. If the picture
        cannot be read, `address` is "" and `text` is the error message.
    """
    words = {key: say(f"viewer.{key}") for key in ("save", "original", "close")}
    try:
        path = workspace.roots.resolve(workspace.runs / str(name))
        if path.suffix != ".png" or not path.is_relative_to(workspace.runs) or not path.is_file():
            raise LorakitError("{name}: no such picture", name)
        content, info = path.read_bytes(), image_grid.read(path).info
    except (LorakitError, OSError, SyntaxError, ValueError) as problem:
        return words | {"address": "", "name": "", "recipe": "", "text": say.translate(str(problem))}
    parts = path.relative_to(workspace.runs).with_suffix("").parts
    return words | {
        "address": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
        "name": "-".join((parts[0], *parts[-2:])) + ".png",
        "text": " · ".join(part for part in (str(_recipe(info).get("prompt", "")), *parts[-2:]) if part),
        "recipe": str(info.get("parameters", "")),
    }


def heads(paths: Sequence[Path]) -> str:
    """HTML with the prompt of each picture as the head of its column in a table with row heads."""
    prompts = [recipe_of(path).get("prompt", "") for path in paths]
    cells = "".join(f"<th scope=col>{escape(str(prompt))}</th>" for prompt in prompts)
    return f"<thead><tr><td></td>{cells}</tr></thead>" if any(prompts) else ""


def recipe_of(path: Path) -> Mapping[str, object]:
    """The recipe in a picture's file. It is empty if the file has none."""
    try:
        return _recipe_of(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError):
        return {}


@functools.lru_cache(maxsize=512)
def _recipe_of(path: Path, changed: int) -> Mapping[str, object]:
    """As `recipe_of`. `changed` is the time of the last change, for the cache."""
    with Image.open(path, formats=["PNG"]) as image:  # reads no pixels
        return _recipe(image.info)


def _recipe(info: Mapping[str | tuple[int, int], object]) -> Mapping[str, object]:
    try:
        return foreign_json.loads_table(str(info.get("lorakit", "{}")))
    except ValueError:
        return {}


def button(workspace: Workspace, path: Path, title: str, row: int, column: int, *, side: int, wait: bool = True) -> str:
    """HTML of a button with a thumbnail that opens the viewer.

    Args:
        path: picture below the runs.
        row, column: place of the picture in its table, for the arrow keys.
        side: longer side of the thumbnail in pixels.
        wait: whether to wait for the thumbnail. If not, the button has a placeholder until the thumbnail is cached.
    """
    small = workspace.thumbnails.get(path, side) if wait else workspace.thumbnails.soon(path, side)
    name = path.relative_to(workspace.runs).as_posix()
    content = f'<span class=lk-pending role=img aria-label="{escape(title)}">…</span>'
    if small is not None:
        content = f'<img src="{small.address}" alt="{escape(title)}">'
    return (
        f'<button type=button class=lk-zoom data-picture="{escape(name)}" data-row="{row}" data-column="{column}">'
        f"{content}</button>"
    )
