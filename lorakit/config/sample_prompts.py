"""A sample prompt with its own settings, "a dog --w 768 --h 512 --d 7", as in kohya's files."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.config.option import label, suggest, to_text
from lorakit.config.schema import SampleConfig, options
from lorakit.core.errors import ConfigError, MissingFile
from lorakit.core.messages import Message
from lorakit.core.names import quote

# Letter in a prompt -> name of the option and of the TOML key, and type of the value.
SETTINGS = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", float),
    "n": ("negative_prompt", str),
}
# In pixels; the options `width` and `height` may also be 0, which means unset.
SMALLEST_SIDE = 64
_LIMITS = {
    opt.name: (opt.low, opt.high)
    for opt in options()
    if opt.section == "sample" and opt.low is not None and opt.high is not None
}
_LIMITS |= {name: (SMALLEST_SIDE, _LIMITS[name][1]) for name in ("width", "height")}
# sd-scripts has more letters that are not supported here: a sampler, a control image and the like.
_FLAG = re.compile(r"\s--([a-z]{1,2})(?=\s|$)")


@dataclass(frozen=True)
class SamplePrompt:
    """The settings of one picture.

    Attributes:
        text: the prompt without its settings.
        size: (width, height) in pixels.
        sample: the section `sample` of the config with the prompt's own settings.
    """

    text: str
    size: tuple[int, int]
    sample: SampleConfig


def parse(text: str, sample: SampleConfig, size: tuple[int, int], number: int = 0) -> SamplePrompt:
    """Parse the settings of a prompt, which override the config's. Without a seed in the prompt, its seed is the
    config's plus `number`.

    Raises:
        ConfigError: a setting is unknown, or its value is out of range.
    """
    prompt, *rest = _FLAG.split(f" {text}")
    values: dict[str, int | float | str] = {"seed": sample.seed + number}
    for letter, value in zip(rest[::2], rest[1::2], strict=True):
        if letter not in SETTINGS:
            raise ConfigError(
                "sample.prompts: {text}: --{letter} is none of --{settings}",
                to_text(text),
                letter,
                ", --".join(SETTINGS),
            )
        name, kind = SETTINGS[letter]
        low, high = _LIMITS.get(name, (0, 0))
        try:
            values[name] = kind(value.strip())
            wrong = kind is not str and not low <= float(value) <= high
        except ValueError:
            wrong = True
        if wrong or (name in ("width", "height") and int(value) % 8):
            of_eight = "a multiple of 8 " if name in ("width", "height") else ""
            raise ConfigError(
                "sample.prompts: {text}: --{letter} must be {of_eight}between {low} and {high}",
                to_text(text),
                letter,
                of_eight,
                low,
                high,
            )
    width, height = (int(values.pop(name, side)) for name, side in zip(("width", "height"), size, strict=True))
    return SamplePrompt(prompt.strip(), (width, height), replace(sample, **values))  # type: ignore[arg-type]


def parse_all(prompts: list[str], sample: SampleConfig, size: tuple[int, int]) -> list[SamplePrompt]:
    """`parse` each prompt; seeds count up."""
    return [parse(prompt, sample, size, number) for number, prompt in enumerate(prompts)]


def default_size(sample: SampleConfig, resolution: int) -> tuple[int, int]:
    """(width, height) of the samples: those of the config, else the training square."""
    return sample.width or resolution, sample.height or resolution


def problems(sample: SampleConfig) -> list[str]:
    """Problems of the sizes and prompts of a config, one message each."""
    problems = []
    if any(side % 8 or 0 < side < SMALLEST_SIDE for side in (sample.width, sample.height)):
        problems.append("sample.width and sample.height must be multiples of 8 and 64 or more, or 0")
    for prompt in sample.prompts:
        if re.fullmatch(r"\S+\.(?:txt|json|toml)", prompt.strip()):
            problems.append(
                Message(
                    "sample.prompts: {text} is a file: give it with --prompts {path}", to_text(prompt), quote(prompt)
                )
            )
        try:
            parse(prompt, sample, (0, 0))
        except ConfigError as error:
            problems += error.problems
    return problems


def read_file(path: str | Path) -> list[str]:
    """Read the prompts of a file in one of kohya's formats.

    A text file has one prompt per line; lines that start with # are comments. JSON has a list of texts or tables. TOML
    has `[prompt]` with `[[prompt.subset]]`.

    Raises:
        ConfigError: it cannot be read, or has no prompts.
    """
    file, rows = Path(path), list[object]()
    kind = file.suffix.lower()
    try:
        text = file.read_text(encoding="utf-8-sig")
        if kind in (".json", ".toml"):
            rows = _rows(json.loads(text) if kind == ".json" else tomllib.loads(text).get("prompt", []))
        else:
            rows = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    except FileNotFoundError:
        raise MissingFile("--prompts {path}: no such file", quote(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        reason = getattr(error, "strerror", None) or reason
        raise ConfigError("--prompts {path}: cannot be read: {reason}", quote(path), reason) from None
    try:
        prompts = [from_table(_with_own_names(row)) if isinstance(row, Mapping) else str(row).strip() for row in rows]
    except ConfigError as error:
        lines = [Message("--prompts {path}: {problem}", quote(path), problem) for problem in error.problems]
        raise ConfigError(lines) from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConfigError("--prompts {path}: has no prompt; write one a line", quote(path))
    return prompts


def _rows(content: object) -> list[object]:
    """The rows of kohya's JSON or TOML; the table of a TOML file has the values that its subsets share.

    Raises:
        ValueError: a row is neither a text nor a table.
    """
    if isinstance(content, Mapping):
        shared, subsets = dict(content), content.get("subset", [{}])
        shared.pop("subset", None)
        content = (
            [{**shared, **row} if isinstance(row, Mapping) else row for row in subsets]
            if isinstance(subsets, list)
            else []
        )
    rows: list[object] = content if isinstance(content, list) else [content]
    if wrong := [row for row in rows if not isinstance(row, (str, Mapping))]:
        raise ValueError(Message("{row} is no prompt", to_text(wrong[0])))
    return rows


def _with_own_names(row: Mapping[str, object]) -> dict[str, object]:
    """A row of sd-scripts with the options' names and without null values."""
    names = {"sample_steps": "steps", "scale": "guidance"}
    return {names.get(key, key): value for key, value in row.items() if value is not None}


def from_recipe(recipe: Mapping[str, object]) -> str:
    """The prompt and its settings from a picture's metadata, on one line."""
    table = {name: recipe[name] for name, _ in SETTINGS.values() if recipe.get(name) not in (None, "")}
    return " ".join(from_table({"prompt": str(recipe["prompt"]), **table}).split())


def from_table(table: Mapping[str, object]) -> str:
    """Convert a table such as {prompt = "a dog", width = 768} of `sample.prompts` to text.

    Raises:
        ConfigError: a key is unknown, or the prompt is missing.
    """
    letters = {name: letter for letter, (name, _) in SETTINGS.items()}
    problems = [
        Message("sample.prompts: unknown key {key}{hint}", label(str(key)), suggest(key, [*letters, "prompt"]))
        for key in table
        if key not in letters and key != "prompt"
    ]
    if not isinstance(table.get("prompt"), str):
        problems.append(Message("sample.prompts: {row}: a table needs a prompt", to_text(dict(table))))
    if problems:
        raise ConfigError(problems)
    return str(table["prompt"]) + "".join(f" --{letters[key]} {table[key]}" for key in table if key != "prompt")
