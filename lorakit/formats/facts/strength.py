"""The size of each module's change in an adapter, from its tensors only. No torch.

The size is the Frobenius norm of delta W. Changes that depend on a base (OFT, (IA)^3, GLoRA) have none.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorakit.core import image_grid, registry
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join
from lorakit.families.weight_files import of_last
from lorakit.formats.facts.health import numbers

if TYPE_CHECKING:
    from lorakit.core.safetensors_header import Header
    from lorakit.formats.identify import Module

# Tensor name -> its header, and its name there.
Places = Mapping[str, tuple["Header", str]]
OUTLIER = 10.0  # factor above the median of the module's kind
_KIND_SIZE = 4  # the fewest modules for a useful median
# Sizes in the picture, in pixels; and colours.
WIDTH, ROW, TOP, LEFT, BAR, CUT = 960, 64, 40, 130, (70, 110, 180), (200, 60, 50)


@dataclass(frozen=True)
class Strength:
    """The sizes of an adapter's changes.

    Attributes:
        modules: module name -> size, in the order of the network.
        blocks: block -> the sizes of its modules.
        dead: names of modules that change nothing.
        outliers: module name -> ratio of its size to the median of its kind.
    """

    modules: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, list[float]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    outliers: dict[str, float] = field(default_factory=dict)

    def health(self) -> str:
        """A message about unusual sizes, or ""."""
        lines: list[str] = []
        if self.modules and not any(self.modules.values()):
            return "every module is zero: it changes nothing"
        if self.dead:
            lines.append(
                Message(
                    "modules of zeros: {count} of {all}, such as {dead}",
                    len(self.dead),
                    len(self.modules),
                    self.dead[0],
                )
            )
        if self.outliers:
            stem, times = max(self.outliers.items(), key=lambda item: item[1])
            lines.append(
                Message(
                    "modules that stand out: {count} of {all}; {stem} by {times:.0f} times",
                    len(self.outliers),
                    len(self.modules),
                    stem,
                    times,
                )
            )
        return join("; ", lines)

    def lines(self) -> list[str]:
        """One line with a bar for each block."""
        totals = {name: math.hypot(*sizes) for name, sizes in self.blocks.items()}
        highest = max(totals.values(), default=0.0) or 1.0
        return [f"  {name:<15} {size:<9.3g} {'#' * round(30 * size / highest)}" for name, size in totals.items()]


def measure(modules: Mapping[str, Module], places: Places, scales: Mapping[str, float]) -> Strength:
    """Measure all modules. `scales`: module name -> alpha / rank, if not 1."""
    names = {stem: module.canonical or stem for stem, module in modules.items()}
    sizes: dict[str, float] = {}
    blocks: dict[str, list[float]] = {}
    kinds: dict[str, list[float]] = {}
    for stem in sorted(modules, key=lambda stem: _position(names[stem])):
        size = _size({part: numbers(*places[name]) for part, name in modules[stem].parts.items() if name in places})
        if size is not None:
            sizes[stem] = size * scales.get(stem, 1.0) * _scalar(modules[stem], places)
            blocks.setdefault(block(names[stem]), []).append(sizes[stem])
            kinds.setdefault(_kind(names[stem]), []).append(sizes[stem])
    medians = {kind: statistics.median(values) for kind, values in kinds.items() if len(values) >= _KIND_SIZE}
    times = {stem: size / median for stem, size in sizes.items() if (median := medians.get(_kind(names[stem]), 0.0))}
    zeros = {names[stem] for stem, size in sizes.items() if size == 0}
    unreached = _unreached({names[stem] for stem in sizes}, zeros)
    dead = [stem for stem in sizes if names[stem] in zeros - unreached and not _may_be_zero(stem)]
    return Strength(sizes, blocks, dead, {stem: ratio for stem, ratio in times.items() if ratio > OUTLIER})


def _scalar(module: Module, places: Places) -> float:
    """The factor of LyCORIS' `use_scalar`."""
    name = module.parts.get("scalar", "")
    values = numbers(*places[name]).ravel() if name in places else np.ones(1)
    return abs(float(values[0])) if len(values) == 1 else 1.0


def _may_be_zero(stem: str) -> bool:
    """Whether exporters write zeros for it on purpose: projections of a text encoder that are not adapted."""
    return bool(re.search(r"self_attn[._](?:[qkv]|out)_proj$", stem))


def _unreached(names: Collection[str], zeros: Collection[str]) -> set[str]:
    """Layers that are zero because they get no gradient: dead ends of the last block, and the last layers of a text
    encoder that is read before them."""
    ends = tuple(end for spec in registry.FAMILIES.values() for end in spec.dead_end_layers)
    result = {name for name in of_last(names, r"unet\.transformer_blocks") if name.endswith(ends)}
    for part in ("text_encoder", "text_encoder_2"):
        stack, count = rf"{part}\.text_model\.encoder\.layers", 1
        encoder = set(of_last(names, stack, len(names)))
        while (last := set(of_last(names, stack, count))) < encoder and last <= set(zeros):
            result |= last
            count += 1
    return result


def block(name: str) -> str:
    """The block of a canonical name, for messages."""
    part, _, path = name.partition(".")
    if match := re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.", path):
        return f"{match[1]} {match[2]}" if match[1] else "mid"
    if match := re.match(r"transformer_blocks\.(\d+)\.", path):
        return f"block {match[1]}"
    return part.replace("_", " ") if part.startswith("text") else "top"


def _kind(name: str) -> str:
    return re.sub(r"\d+", "", name.partition(".")[0] + "." + ".".join(name.split(".")[-3:]))


def _position(name: str) -> tuple[int, list[int]]:
    sides = ("text_encoder.", "text_encoder_2.", "unet.down", "unet.mid", "unet.up", "unet.transformer")
    side = next((number for number, start in enumerate(sides) if name.startswith(start)), len(sides))
    return side, [int(digits) for digits in re.findall(r"\d+", name)]


def _size(parts: Mapping[str, np.ndarray]) -> float | None:
    """The norm of delta W without its scale; None if the change depends on the base."""
    try:
        if "mid" in parts:
            delta = np.einsum("mnhw,im,nj->ijhw", parts["mid"], _flat(parts["up"]), _flat(parts["down"]))
            return float(np.linalg.norm(delta))
        if "down" in parts:
            down, up = _flat(parts["down"]), _flat(parts["up"])
            return math.sqrt(max(0.0, float(((down @ down.T) * (up.T @ up)).sum())))
        if "hada_w1_a" in parts:
            return float(np.linalg.norm(_hada(parts, "1") * _hada(parts, "2")))
        if {"lokr_w1", "lokr_w1_a"} & parts.keys():
            return float(np.linalg.norm(_kron(parts, "1")) * np.linalg.norm(_kron(parts, "2")))
    except (KeyError, ValueError):
        return None  # `compatibility` reports missing or mismatched parts
    delta = parts.get("diff", parts.get("w_norm", parts.get("diff_b")))
    return None if delta is None else float(np.linalg.norm(delta))


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _hada(parts: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    return _product(parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"], parts.get(f"hada_t{side}"))


def _kron(parts: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    if f"lokr_w{side}" in parts:
        return parts[f"lokr_w{side}"]
    return _product(parts[f"lokr_w{side}_a"], parts[f"lokr_w{side}_b"], parts.get(f"lokr_t{side}"))


def _product(a: np.ndarray, b: np.ndarray, kernel: np.ndarray | None) -> np.ndarray:
    """The product of two factors, with Tucker's small kernel between them if there is one."""
    delta: np.ndarray = _flat(a) @ _flat(b) if kernel is None else np.einsum("ijkl,ip,jr->prkl", kernel, a, b)
    return delta


def plot(strength: Strength, path: Path, title: str) -> None:
    """Draw a bar for each module, block by block.

    Raises:
        LorakitError: no module has a size, or the file exists, is not named .png or cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    if path.exists() or path.suffix.lower() != ".png":
        raise LorakitError("{path}: name a new file that ends in .png", path)
    if not strength.modules:
        raise LorakitError("{title}: its changes have no size without a base, so there is nothing to draw", title)
    # Outliers are cut off, so that they do not flatten all other bars.
    usual = [size for stem, size in strength.modules.items() if stem not in strength.outliers]
    highest, font = max(usual, default=0.0) or 1.0, ImageFont.load_default(image_grid.FONT_SIZE)
    picture = Image.new("RGB", (WIDTH, TOP + ROW * len(strength.blocks)), image_grid.PAPER)
    draw = ImageDraw.Draw(picture)
    text = f"{title}: size of the change (norm of delta W) of each module; the highest is {highest:.3g}"
    cut = max(strength.outliers, key=strength.outliers.__getitem__, default="")
    text += f", outliers in red go up to {strength.modules[cut]:.3g}" if cut else ""
    draw.text((8, 10), text, image_grid.INK, font)
    bar_width = (WIDTH - LEFT - 8) / max(map(len, strength.blocks.values()))
    for number, (name, sizes) in enumerate(strength.blocks.items()):
        foot = TOP + ROW * (number + 1) - 8
        draw.text((8, foot - image_grid.FONT_SIZE), name, image_grid.INK, font)
        for at, size in enumerate(sizes):
            x = LEFT + at * bar_width
            top = foot - (ROW - 16) * min(1.0, size / highest)
            draw.rectangle((x, top, x + max(1, bar_width - 2), foot), CUT if size > highest else BAR)
    try:
        image_grid.save(picture, path)
    except OSError as error:
        raise LorakitError("{path}: cannot be written: {reason}", path, error.strerror or error) from None
