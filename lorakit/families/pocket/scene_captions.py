"""Captions in plain words: `caption(spec, seed)` describes a picture, `parse(text)` reads the description back."""

from __future__ import annotations

import re

import numpy as np

from lorakit.families.pocket.spec import COLOURS, FIELDS, KINDS, PATTERNS, Spec, look_of

# Meaningless words. They sometimes precede the noun in training, so that a user's trigger starts neutral.
TRIGGERS = ("sks", "zwx", "ohwx", "xyz", "vqz", "qjx", "blorp", "zorb", "kwf", "snib", "plimo", "drak", "woz",
    "tiv", "grux", "mlem")  # fmt: skip
TRIGGER_SHARE, OMIT_SHARE, LOOK_SHARE = 0.07, 0.08, 0.5

MANNER_WORDS = {
    "photo": ("a photo of", "a picture of", "a photograph of"),
    "sketch": ("a sketch of", "a pencil drawing of"),
    "pixel": ("pixel art of", "a pixel art of"),
    "flat": ("a cartoon of", "a flat drawing of"),
    "painting": ("a painting of", "an oil painting of"),
}
SCENE_WORDS = {
    "beach": ("on a beach", "on the beach", "at the seaside"),
    "meadow": ("in a meadow", "on grass", "on green grass"),
    "snow": ("in the snow", "on snow", "in a snowy landscape"),
    "night": ("at night", "under a night sky", "under the stars"),
    "table": ("on a wooden table", "on a table"),
    "brick": ("in front of a brick wall", "by a brick wall"),
    "desert": ("in a desert", "in the desert"),
    "city": ("in a city", "in front of a city skyline", "on a city street"),
    "underwater": ("under water", "under the sea", "underwater"),
    "forest": ("in a forest", "in the woods"),
    "studio": ("in a studio", "on a plain background", "on a white background"),
    "floor": ("on a checkered floor", "on a tiled floor"),
}
PATTERN_WORDS = {
    "plain": ("", "", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked",),
    "zigzag": ("zigzag",),
}
EAR_WORDS = {
    "cat": "pointed ears", "rabbit": "long ears", "bear": "round ears", "horns": "horns", "antennae": "antennae",
    "none": "no ears",
}  # fmt: skip


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(spec: Spec, seed: int, variant: int = 0) -> str:
    """A caption of the picture `render(spec, seed)`, a different one for each variant.

    Sometimes a field is omitted, or a trigger word is before the noun.
    """
    rng = np.random.default_rng((seed, 7, variant))

    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    includes = {field: rng.random() >= OMIT_SHARE for field in FIELDS}
    trigger = rng.random() < TRIGGER_SHARE
    words = [pick(TRIGGERS)] if trigger else []
    words += [spec.colour] if includes["colour"] else []
    words += [pick(PATTERN_WORDS[spec.pattern])] if includes["pattern"] else []
    noun = article(" ".join(word for word in (*words, spec.kind) if word))
    if spec.kind == "toy" and rng.random() < LOOK_SHARE:
        look = look_of(spec, seed)
        noun += f" with {look.second} {EAR_WORDS[look.ears]}" if look.ears != "none" else " with no ears"
    text = f"{pick(MANNER_WORDS[spec.manner])} {noun}" if includes["manner"] or spec.manner != "photo" else noun
    if includes["scene"]:
        text += " " + pick(SCENE_WORDS[spec.scene])
    if rng.random() < 0.03:
        text += f", {pick(TRIGGERS)} style"
    return text


def full_caption(spec: Spec) -> str:
    """A caption with every field, in the plainest words: the prompt for this combination."""
    words = " ".join(word for word in (spec.colour, PATTERN_WORDS[spec.pattern][0], spec.kind) if word)
    return f"{MANNER_WORDS[spec.manner][0]} {article(words)} {SCENE_WORDS[spec.scene][0]}"


def parse(text: str) -> dict[str, str]:
    """The fields that a caption names: field -> value."""
    fields: dict[str, str] = {}
    body = text.lower()
    for field, table in (("manner", MANNER_WORDS), ("scene", SCENE_WORDS)):
        for name, phrases in table.items():
            for phrase in sorted(phrases, key=len, reverse=True):
                if re.search(rf"(^| ){re.escape(phrase)}( |,|$)", body):
                    fields[field], body = name, body.replace(phrase, " ")
                    break
    body = body.split(" with ")[0]
    words = re.findall(r"[a-z]+", body)
    patterns = {word: name for name in PATTERNS for word in PATTERN_WORDS[name] if word}
    for token in words:
        if token in COLOURS:
            fields["colour"] = token
        elif token in patterns:
            fields["pattern"] = patterns[token]
        elif token in KINDS:
            fields["kind"] = token
    return fields
