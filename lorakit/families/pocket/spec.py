"""The content of a picture in words of a caption: the vocabulary of pocket's world and random draws from it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]

KINDS = (
    "ball", "star", "heart", "mug", "fish", "house", "tree", "car", "mushroom", "boat",
    "flower", "bottle", "robot", "cat", "umbrella", "rocket", "butterfly", "hat", "crown", "toy",
)  # fmt: skip
COLOURS: dict[str, RGB] = {
    "red": (212, 36, 40),
    "orange": (245, 132, 26),
    "yellow": (248, 216, 48),
    "green": (44, 158, 66),
    "blue": (38, 88, 214),
    "purple": (126, 52, 176),
    "pink": (248, 142, 194),
    "brown": (120, 72, 38),
    "white": (244, 244, 242),
    "black": (36, 36, 42),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag")
SCENES = (
    "beach", "meadow", "snow", "night", "table", "brick",
    "desert", "city", "underwater", "forest", "studio", "floor",
)  # fmt: skip
MANNERS = ("photo", "sketch", "pixel", "flat", "painting")

# The parts of a toy (the class of the subjects) in training. Subjects use parts that are not in these lists, so no
# training picture shows one.
BODIES = ("round", "egg", "box", "pear")
EARS = ("cat", "rabbit", "bear", "horns", "antennae", "none")
TOY_DETAILS = ("plain", "belly", "half")

FIELDS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "scene": SCENES,
    "manner": MANNERS,
}


@dataclass(frozen=True)
class Look:
    """The parts of one toy. `second` colours its ears, feet and (for `belly`, `half`) a part of its body."""

    body: str
    ears: str
    second: str
    detail: str
    eyes: int
    tail: bool
    extra: str = "none"  # only subjects have one


@dataclass(frozen=True)
class Spec:
    """One picture in words. A toy without a `look` gets a random one from the picture's seed."""

    kind: str
    colour: str
    pattern: str
    scene: str
    manner: str
    look: Look | None = None

    def __post_init__(self) -> None:
        for field, values in FIELDS.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {', '.join(values)}, not {getattr(self, field)!r}")

    @property
    def words(self) -> dict[str, str]:
        """The five caption fields."""
        return {field: getattr(self, field) for field in FIELDS}


def is_holdout(spec: Spec) -> bool:
    """Whether this combination is held out of training: a sixteenth of all, by a hash without a seed."""
    return zlib.crc32("/".join(spec.words.values()).encode()) % 16 == 0


def random_look(seed: int) -> Look:
    """The toy that a picture with this seed shows."""
    rng = np.random.default_rng((seed, 11))

    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    return Look(
        pick(BODIES),
        pick(EARS),
        pick(tuple(COLOURS)),
        pick(TOY_DETAILS),
        int(rng.choice(3, p=[0.15, 0.7, 0.15])) + 1,
        bool(rng.random() < 0.4),
    )


def look_of(spec: Spec, seed: int) -> Look:
    """The toy of this picture: that of the spec (for subjects), else that of the seed."""
    return spec.look if spec.look is not None else random_look(seed)


def random_spec(seed: int, unseen: bool = False) -> Spec:
    """A combination of the training set, or with `unseen` a held-out one, with all fields drawn evenly."""
    rng = np.random.default_rng((seed, 3))
    while True:
        kinds = np.full(len(KINDS), 1.0)
        patterns, manner_weights = np.ones(len(PATTERNS)), np.ones(len(MANNERS))
        if not unseen:  # toys are what users teach, plain photos what they ask for: both come more often
            kinds[KINDS.index("toy")] = 4.0
            patterns[0], manner_weights[0] = 2.5, 4.0
        draw = (
            KINDS[rng.choice(len(KINDS), p=kinds / kinds.sum())],
            tuple(COLOURS)[int(rng.integers(len(COLOURS)))],
            PATTERNS[rng.choice(len(PATTERNS), p=patterns / patterns.sum())],
            SCENES[int(rng.integers(len(SCENES)))],
            MANNERS[rng.choice(len(MANNERS), p=manner_weights / manner_weights.sum())],
        )
        spec = Spec(*draw)
        if is_holdout(spec) == unseen:
            return spec


CLASSES = {**{field: len(values) for field, values in FIELDS.items()},
           "body": len(BODIES), "ears": len(EARS), "second": len(COLOURS), "detail": len(TOY_DETAILS)}  # fmt: skip
