"""Parse sd-scripts' own text formats and tables: values of blocks, arguments of networks, data sets."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lorakit.core.messages import Message

# Number of values in sd-scripts for all blocks, for down or up blocks, and for the middle: for SDXL and for others.
SDXL_BLOCKS, BLOCKS = (23, 9, 3), (25, 12, 1)
LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
Row = dict[str, Any]
# Its named shapes of weights over `count` blocks.
_SHAPES: dict[str, Callable[[int, int], float]] = {
    "sine": lambda at, count: math.sin(math.pi / 2 * at / (count - 1)),
    "cosine": lambda at, count: math.sin(math.pi / 2 * (count - 1 - at) / (count - 1)),
    "linear": lambda at, count: at / (count - 1),
    "reverse_linear": lambda at, count: (count - 1 - at) / (count - 1),
    "zeros": lambda at, count: 0.0,
}
# Keys that only apply to their own data set.
_OF_SUBSET = ("image_dir", "resolution", "num_repeats", "class_tokens", "is_reg", "batch_size", "subsets")


def arguments(items: object) -> dict[str, str]:
    """The arguments "key=value" of a list, or of one text."""
    texts = items.split() if isinstance(items, str) else items if isinstance(items, list) else []
    pairs = (str(item).partition("=") for item in texts)
    return {key.strip(): text.strip() for key, _, text in pairs}


def optimizer_arguments(items: object) -> dict[str, object]:
    """As `arguments`, with values parsed as Python literals."""
    return {key: ast.literal_eval(f"[{text}]" if "," in text else text) for key, text in arguments(items).items()}


def block_patterns(text: object) -> dict[str, float]:
    """Convert the values of 25 blocks (Stable Diffusion 1 and 2) or 23 blocks (SDXL) to patterns of layers.

    Raises:
        ValueError: the number of values is different.
    """
    numbers = [float(item) for item in (text if isinstance(text, list) else str(text).split(","))]
    if len(numbers) not in (SDXL_BLOCKS[0], BLOCKS[0]):
        raise ValueError
    is_sdxl, patterns = len(numbers) == SDXL_BLOCKS[0], dict[str, float]()
    last, offset, attentions = (
        (2, 2, {"down": (1, 2), "up": (0, 1)}) if is_sdxl else (3, 1, {"down": (0, 1, 2), "up": (1, 2, 3)})
    )
    for side, first, count in (("down", offset, 2), ("up", 13, 3)):
        for block in range(last + 1):
            kinds = ["resnets"] + ["attentions"] * (block in attentions[side])
            places = {f"{kind}.{place}": place for kind in kinds for place in range(count)}
            places |= {f"{side}samplers.0": 2} if block < last else {}
            for layer, place in places.items():
                patterns[f"unet.{side}_blocks.{block}.{layer}.*"] = numbers[first + 3 * block + place]
    middle = {"resnets.0.*": 10, "attentions.0.*": 11, "resnets.1.*": 12} if is_sdxl else {"*": 12}
    return patterns | {f"unet.mid_block.{name}": numbers[place] for name, place in middle.items()}


def block_rates(values: Mapping[str, object]) -> dict[str, float]:
    """Convert the learning-rate factors in `LR_WEIGHTS` to patterns of layers; 0 means a block without an adapter.

    Raises:
        ValueError: the values do not show whether they are for SDXL.
    """
    weights = [values.get(name) for name in LR_WEIGHTS]
    parts = [str(weight).split(",") if weight not in (None, "") else [] for weight in weights]
    named = [part for part in parts if part and not _is_shape(part)]
    counts = [len(part) for part in (parts[0], parts[2]) if part in named]
    if BLOCKS[1] in counts:
        total, side, middle = BLOCKS
    elif SDXL_BLOCKS[1] in counts or len(parts[1]) == SDXL_BLOCKS[2]:
        total, side, middle = SDXL_BLOCKS
    elif parts[1] in named and not counts:
        total, side, middle = BLOCKS
    else:
        raise ValueError
    threshold = float(str(values.get("block_lr_zero_threshold") or 0))
    numbers = [number for part, count in zip(parts, (side, middle, side), strict=True) for number in _fill(part, count)]
    edge = [1.0] * ((total - len(numbers)) // 2)  # SDXL's time embeddings and output layer
    return block_patterns([number if number > threshold else 0.0 for number in (*edge, *numbers, *edge)])


def _is_shape(part: list[str]) -> bool:
    return part[0].partition("+")[0].strip() in _SHAPES


def _fill(part: list[str], count: int) -> list[float]:
    """`count` numbers; missing ones are 1."""
    if part and _is_shape(part):
        name, _, base = part[0].partition("+")
        return [_SHAPES[name.strip()](at, count) + float(base or 0) for at in range(count)]
    numbers = [float(text) if text.strip() else 0.0 for text in part]
    if len(numbers) > count:
        raise ValueError
    return numbers + [1.0] * (count - len(numbers))


def data_sets(tables: Row) -> tuple[Row, list[str], list[str]]:
    """Join the data sets of a config into one: its keys, the keys left out, and notes."""
    rows = list(_rows(tables)) or [{}]
    photos = [row for row in rows if not row.get("is_reg")] or rows
    shared, rest, notes = Row(), list[str](), list[str]()
    keys = dict.fromkeys(key for row in photos for key in row)
    for key in [key for key in keys if key not in _OF_SUBSET]:
        own = [row.get(key) for row in photos]
        if all(value == own[0] for value in own):
            shared[key] = own[0]
        else:
            rest.append(Message("{key} = {own} (another one in each data set)", key, own))
    if sizes := sorted({row["batch_size"] for row in photos if "batch_size" in row}):
        shared["batch_size"] = sizes[0]
        notes += (
            [Message("batch_size = {sizes}: the smallest of {value}", sizes[0], ", ".join(map(str, sizes)))]
            if sizes[1:]
            else []
        )
    places = list(dict.fromkeys(str(row["image_dir"]) for row in rows if row.get("is_reg") and row.get("image_dir")))
    if places and len(photos) < len(rows):
        shared["reg_data_dir"] = places[0]
        rest += [
            Message('image_dir = "{place}" (class images: put them into {places})', place, places[0])
            for place in places[1:]
        ]
    by_folder: dict[str, list[Row]] = {}
    for row in photos:
        by_folder.setdefault(str(row.get("image_dir", "")), []).append(row)
    return shared | _folders(by_folder, rest, notes), rest, notes


def _rows(tables: Row) -> Iterable[Row]:
    for data_set in tables["datasets"]:
        if isinstance(data_set, Mapping):
            own = {**tables.get("general", {}), **data_set}
            yield from ({**own, **subset} for subset in own.get("subsets") or [{}] if isinstance(subset, Mapping))


def _folders(by_folder: dict[str, list[Row]], rest: list[str], notes: list[str]) -> Row:
    """The keys for the photos, their resolutions and their names."""
    result: Row = {}
    paths = {name: (PureWindowsPath if "\\" in name else PurePosixPath)(name) for name in by_folder if name}
    parents = {str(path.parent) for path in paths.values()}
    names = {row.get("class_tokens", "") for rows in by_folder.values() for row in rows} - {""}
    if len(paths) == 1:
        result["train_data_dir"] = next(iter(by_folder))
    elif len(parents) == 1:
        result |= {"train_data_dir": parents.pop(), "data.concepts": "folders" if len(names) > 1 else "one"}
        notes.append(Message("{folder}: photos in all of its folders are trained", result["train_data_dir"]))
    elif paths:
        rest.append(Message("image_dir = {paths} (one folder with these in it is trained)", list(paths)))
    if len(names) == 1:
        result["class_tokens"] = names.pop()
    for folder, rows in by_folder.items():
        repeats = re.match(r"(\d+)_", paths[folder].name) if folder in paths and len(paths) > 1 else None
        for row in rows[:1]:
            count, name = row.get("num_repeats", 1), row.get("class_tokens", "")
            inside = re.sub(r"^\d+_", "", paths[folder].name) if folder in paths else ""
            if int(repeats[1] if repeats else 1) != count:
                rest.append(
                    Message(
                        "num_repeats = {count} (name the folder {count}_{name} inside of data.folder)",
                        count,
                        name or inside,
                    )
                )
            if len(names) > 1 and name and name != inside:
                rest.append(Message('class_tokens = "{name}" (name its folder so: {count}_{name})', name, count))
    sides = {folder: _distinct(row.get("resolution") for row in rows) for folder, rows in by_folder.items()}
    if all(own == next(iter(sides.values())) for own in sides.values()):
        own = next(iter(sides.values()))
        result |= {"resolution": tuple(own) if len(own) > 1 else own[0]} if own else {}
    elif "train_data_dir" in result and all(len(own) == 1 for own in sides.values()):
        result["resolution"] = max((own[0] for own in sides.values()), key=_area)
        result["folder_resolutions"] = {paths[folder].name: own[0] for folder, own in sides.items()}
    else:
        rest.append(Message("resolution = {sides} (another one in each data set)", list(sides.values())))
    return result


def _distinct(values: Iterable[object]) -> list[object]:
    result: list[object] = []
    for value in values:
        if value is not None and value not in result:
            result.append(value)
    return result


def _area(value: object) -> float:
    return square_side(value) ** 2


def square_side(value: object) -> int:
    """The side of a square with the area of "768,512", "768x512", 512 or [512, 512]; a multiple of 8."""
    parts = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    return round(math.sqrt(int(parts[0]) * int(parts[-1])) / 8) * 8
