"""The meaning of folder names: subjects and repeats as in "20_ohwx man/", class images as in "reg/", and runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.config import DataConfig
from lorakit.core.messages import Message

if TYPE_CHECKING:
    from lorakit.data.photo_folder import Photo

# "20_ohwx man": repeats and subject. A number of four digits is a year.
NUMBERED = re.compile(r"(\d{1,3})_(.+)")
# A folder name such as "sks dog" starts with a trigger from common guides, or with the run's own trigger.
TRIGGERS = {"sks", "ohwx", "zwx", "hta", "ukj", "olis"}
CLASS_IMAGES = re.compile(
    r"_?(\d+_)?(regs?|reg[_ -]\S.*|prior[_ -]?(images?|imgs?|pictures?|photos?)"
    r"|(class|classes|regulari[sz]ation)([_ -]?(images?|imgs?|pictures?|photos?|data|set))?)",
    re.IGNORECASE,
)


def split_name(name: str) -> tuple[int, str]:
    """Repeats and subject of a folder's name: "20_ohwx man" is (20, "ohwx man"); without a number, (1, its name)."""
    match = NUMBERED.fullmatch(name)
    return (int(match[1]), match[2].strip()) if match else (1, name)


def is_class_folder(folder: Path) -> bool:
    """Whether the name says that the folder has class images: reg/, class/, regularization_images/ and the like."""
    return CLASS_IMAGES.fullmatch(folder.name) is not None


def is_run(folder: Path) -> bool:
    """Whether the folder is a run, the samples of a run, or an output folder of `lorakit sample`."""
    places = (folder, folder.parent, folder.parent.parent)
    is_below = (True, folder.name == "samples", folder.parent.name == "samples")
    if any(
        (place / "config.toml").is_file() and (place / "state.json").is_file()
        for place, below in zip(places, is_below, strict=True)
        if below
    ):
        return True
    return (folder / "grid.png").is_file() and any(folder.glob("*-strength-*.png"))


def of_photo(photo: Photo, config: DataConfig) -> DataConfig:
    """The config for the photo's texts: with `data.concepts = "folders"`, its folder names the subject."""
    if config.concepts != "folders" or not photo.subject:
        return config
    return replace(config, name=photo.subject, instance_prompt="", class_prompt="")


def of_photos(photos: Sequence[Photo], config: DataConfig) -> list[DataConfig]:
    """The config of each concept, in the order of the photos."""
    return list(dict.fromkeys(of_photo(photo, config) for photo in photos)) or [config]


def counts(photos: Sequence[Photo], config: DataConfig) -> dict[str, int]:
    """The name of each concept ("sks dog") -> number of its photos, in the order of the photos."""
    return dict(Counter(of_photo(photo, config).name.strip() for photo in photos))


def with_name(config: DataConfig, photos: Sequence[Photo]) -> DataConfig:
    """The config with the first folder's subject as its name, if it has none and folders name the concepts."""
    subjects = [photo.subject for photo in photos if photo.subject]
    if config.name or config.concepts != "folders" or not subjects:
        return config
    return replace(config, name=subjects[0])


def problem(photos: Sequence[Photo], config: DataConfig) -> str | None:
    """The reason why folders contradict `data.name`, or None: photos in "20_ohwx man/" would be trained as "a sks dog".

    A folder without a number names a subject if another folder names `data.name`, or if its name is a trigger and a
    noun. A photo whose caption has the trigger contradicts nothing.
    """
    if config.concepts != "ask":
        return None
    has_own_folder = any(_words(config.name) == _words(photo.subject) for photo in photos if photo.subject)
    others = dict.fromkeys(
        photo.relative.partition("/")[0]
        for photo in photos
        if photo.subject
        and (has_own_folder or _is_subject(photo.relative.partition("/")[0], config))
        and not _names_subject(photo.subject, config)
        and config.trigger.casefold() not in _words(photo.caption or "")
    )
    if not others:
        return None
    names = ", ".join(f"{name}/" for name in others)
    name = f'"{config.name}"' if config.name else "any data.name (none is set)"
    return Message(
        "{folders}: the name of the folder is not {name}; data.concepts = 'folders' trains each folder under "
        "its own name, data.concepts = 'one' trains all photos under data.name",
        names,
        name,
    )


def _is_subject(name: str, config: DataConfig) -> bool:
    """Whether a folder name looks like a subject: "20_man", "ohwx man"."""
    first, *rest = re.split(r"[\s_-]+", name.casefold().strip(" _-"))
    return NUMBERED.fullmatch(name) is not None or (
        len(rest) == 1 and rest[0].isalpha() and first in TRIGGERS | {config.trigger.casefold()}
    )


def _names_subject(subject: str, config: DataConfig) -> bool:
    """Whether `subject` is another name for `data.name`: a subset of its words, or with its trigger and no other noun
    (unlike "sks ball" for "sks dog")."""
    words, own = _words(subject), _words(config.name)
    nouns = own - {config.trigger.casefold()}
    with_trigger = config.trigger.casefold() in words and (not nouns or len(words) != 2 or bool(nouns & words))
    return bool(config.name) and (words <= own or with_trigger)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))
