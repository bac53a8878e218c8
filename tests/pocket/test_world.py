"""Tests of the renderer, its captions, and the combinations that are excluded from training."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lorakit.families.pocket import subjects, textures
from lorakit.families.pocket.scene_captions import TRIGGERS, caption, full_caption, parse
from lorakit.families.pocket.scenes import render
from lorakit.families.pocket.spec import (
    BODIES,
    COLOURS,
    EARS,
    FIELDS,
    KINDS,
    MANNERS,
    PATTERNS,
    SCENES,
    Spec,
    is_holdout,
    look_of,
    random_look,
    random_spec,
)
from tools.pocket import dataset

MUG = Spec("mug", "red", "plain", "beach", "photo")


def pixels(spec: Spec, seed: int = 5, size: int = 64) -> np.ndarray:
    return np.asarray(render(spec, seed, size), np.int16)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, lorakit.families.pocket; print(sorted({'torch', 'PIL', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("manner", MANNERS)
def test_same_seed_same_bytes_other_seed_other_picture(manner: str) -> None:
    spec = Spec("robot", "blue", "dotted", "city", manner)
    assert render(spec, 3).tobytes() == render(spec, 3).tobytes()
    assert difference(pixels(spec, 3), pixels(spec, 4)) > 2


def test_a_larger_picture_shows_the_same_thing() -> None:
    large = render(MUG, 8, 128)
    assert large.size == (128, 128) and large.mode == "RGB"
    # The size changes the backdrop's grain but not the drawing.
    assert difference(np.asarray(large.resize((64, 64), Image.Resampling.BOX), np.int16), pixels(MUG, 8)) < 12


@pytest.mark.parametrize("field", ["kind", "scene", "manner", "pattern", "colour"])
def test_every_word_changes_the_picture(field: str) -> None:
    pictures = {word: pixels(Spec(**{**MUG.words, field: word})) for word in FIELDS[field]}
    for (a, first), (b, second) in itertools.combinations(pictures.items(), 2):
        assert difference(first, second) > 1.0, (a, b)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_the_colour_of_its_caption(colour: str) -> None:
    picture = pixels(Spec("ball", colour, "plain", "studio", "flat"), 12)
    middle = np.median(picture[28:44, 26:38].reshape(-1, 3), axis=0)
    nearest = min(COLOURS, key=lambda name: float(np.square(middle - COLOURS[name]).sum()))
    assert nearest == colour


def test_unknown_words_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of ball.*'teapot'"):
        Spec("teapot", "red", "plain", "beach", "photo")
    with pytest.raises(ValueError, match="zib"):
        subjects.photos("nobody", 1)


def test_full_captions_parse_back_to_the_spec() -> None:
    for seed in range(500):
        spec = random_spec(seed, unseen=bool(seed % 2))
        assert {"pattern": "plain", **parse(full_caption(spec))} == spec.words


def test_training_captions_are_true_and_mostly_complete() -> None:
    counts = dict.fromkeys(FIELDS, 0)
    for seed in range(1000):
        spec = random_spec(seed)
        for field, word in parse(caption(spec, seed)).items():
            assert word == spec.words[field], caption(spec, seed)
            counts[field] += 1
    assert counts["kind"] == 1000
    assert all(counts[field] > 800 for field in ("colour", "scene", "manner"))


def test_a_toys_caption_names_its_own_ears() -> None:
    count = 0
    for seed in range(300):
        spec = Spec("toy", "red", "plain", "beach", "photo")
        text = caption(spec, seed)
        if " with " in text and "no ears" not in text:
            assert f" with {look_of(spec, seed).second} " in text
            count += 1
    assert count > 80


def test_triggers_come_before_the_noun_in_about_one_caption_in_fourteen() -> None:
    texts = [caption(random_spec(seed), seed) for seed in range(3000)]
    before = sum(any(f" {word} " in text.split(",")[0] for word in TRIGGERS) for text in texts)
    assert 0.05 < before / len(texts) < 0.09


def test_holdout_combinations_never_occur_in_training() -> None:
    assert not any(is_holdout(random_spec(seed)) for seed in range(2000))
    assert all(is_holdout(random_spec(seed, unseen=True)) for seed in range(500))
    share = np.mean(
        [is_holdout(Spec(*words)) for words in itertools.product(KINDS, COLOURS, PATTERNS[:2], SCENES[:3], MANNERS[:2])]
    )
    assert 0.04 < share < 0.09


def test_subjects_have_a_part_that_no_training_toy_can_have() -> None:
    looks = [random_look(seed) for seed in range(2000)]
    assert {look.body for look in looks} == set(BODIES) and {look.ears for look in looks} == set(EARS)
    assert all(look.extra == "none" for look in looks)
    assert len(subjects.SUBJECTS) >= 6 and len(subjects.STYLES) >= 3
    for spec in subjects.SUBJECTS.values():
        assert spec.look is not None and spec.look.extra != "none"


def test_subject_pictures_are_seeded_and_have_the_given_scenes() -> None:
    pictures = subjects.photos("zib", 6, seed=2, scenes=["snow", "city"])
    assert [scene for _, scene in pictures] == ["snow", "city"] * 3
    repeat = subjects.photos("zib", 6, seed=2, scenes=["snow", "city"])
    assert all(a.tobytes() == b.tobytes() for (a, _), (b, _) in zip(pictures, repeat, strict=True))
    assert pictures[0][0].tobytes() != subjects.photos("zib", 1, seed=3, scenes=["snow"])[0][0].tobytes()


@pytest.mark.parametrize("style", subjects.STYLES)
def test_styles_differ_from_every_manner(style: str) -> None:
    image, spec = subjects.pictures(style, 1, seed=4, size=128)[0]
    assert image.size == (128, 128)
    small = np.asarray(subjects.pictures(style, 1, seed=4)[0][0], np.int16)
    number = 1_000_000_000 + 40_000
    for manner in MANNERS:
        assert difference(small, pixels(Spec(**{**spec.words, "manner": manner}), number)) > 12, manner


def test_textures_are_seeded_and_full_of_detail() -> None:
    for seed in (0, 1, 2):
        picture = textures.texture(seed)
        assert picture.tobytes() == textures.texture(seed).tobytes()
        assert np.asarray(picture, np.float32).std() > 8
    assert textures.texture(1).tobytes() != textures.texture(2).tobytes()


def test_shards_contain_the_pictures_of_their_seeds(tmp_path) -> None:
    dataset.make(tmp_path, 20, 64, 1)
    pictures, labels, texts = (
        dataset.load(tmp_path, "pictures"),
        dataset.load(tmp_path, "labels"),
        dataset.captions(tmp_path),
    )
    assert pictures.shape == (20, 64, 64, 3) and labels.shape == (20, len(dataset.LABELS)) and len(texts) == 20
    spec = random_spec(7)
    assert pictures[7].tobytes() == render(spec, 7).tobytes()
    assert FIELDS["kind"][labels[7][0]] == spec.kind and texts[7][1] == caption(spec, 7, 1)
    before = (tmp_path / "pictures-0000.npy").stat().st_mtime_ns
    dataset.make(tmp_path, 20, 64, 1)
    assert (tmp_path / "pictures-0000.npy").stat().st_mtime_ns == before
