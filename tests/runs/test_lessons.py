"""Tests of sentences about what a run learned: copies of photos are found, other pictures of the subject are not."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from lorakit.config import OptimizerConfig
from lorakit.families.pocket import subjects
from lorakit.runs import lessons
from lorakit.ui import texts


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    return {
        f"{number}.png": image
        for number, (image, _) in enumerate(subjects.pictures("oz", 6, seed=0, scenes=["table", "beach"]))
    }


def worse(image: Image.Image) -> Image.Image:
    """Return a photo as a model draws it from memory: blurred, shifted by a pixel, recoloured and noisy."""
    small = image.resize((40, 40), Image.Resampling.LANCZOS).resize(image.size, Image.Resampling.BICUBIC)
    shift = np.roll(np.asarray(ImageEnhance.Color(small).enhance(0.7), np.float32), 1, 0)
    noise = np.random.default_rng(0).normal(0, 6, shift.shape)
    return Image.fromarray(np.clip(shift + noise + 12, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "change", [lambda image: image, worse, ImageOps.mirror, lambda image: worse(image.resize((96, 96)))]
)
def test_a_copy_is_found_with_its_photo(photos, change):
    result = list(lessons.copies({"a": change(photos["3.png"])}, photos))
    assert [(prompt, name) for prompt, name, _ in result] == [("a", "3.png")]


def test_other_pictures_of_the_subject_are_not_copies(photos):
    new = {
        str(n): image
        for n, (image, _) in enumerate(subjects.pictures("oz", 12, seed=7, scenes=["snow", "city", "floor"]))
    }
    other = {"other": subjects.pictures("zib", 1, seed=3)[0][0], "grey": Image.new("RGB", (64, 64), (90, 90, 90))}
    assert list(lessons.copies(new | other, photos)) == []
    assert list(lessons.copies(new, {})) == []


def test_photos_that_resemble_one_another_raise_the_limit(photos):
    """Two frames of a film differ less than a copy does, so a third frame is not a copy."""
    frames = {"first": photos["0.png"], "second": worse(photos["0.png"])}
    third = worse(worse(photos["0.png"]))
    assert list(lessons.copies({"third": third}, frames)) == []
    assert [name for _, name, _ in lessons.copies({"third": frames["first"]}, frames)] == ["first"]


# Gains of two real runs on the 14 photos of the bundled toy.
OF_400_STEPS = (0.200, 0.289, 0.340, 0.361, 0.385, 0.395, 0.404, 0.405, 0.412, 0.426, 0.430, 0.441, 0.482, 0.513)
OF_40_STEPS = (0.082, 0.108, 0.136, 0.147, 0.175, 0.176, 0.181, 0.187, 0.187, 0.193, 0.195, 0.241, 0.285, 0.286)


def numbered(gains: tuple[float, ...]) -> dict[str, float]:
    return {f"{number:02}.png": gain for number, gain in enumerate(gains, 1)}


@pytest.mark.parametrize(
    ("gains", "name"),
    [
        (numbered(OF_400_STEPS), None),
        (numbered(OF_40_STEPS), None),
        (numbered(OF_400_STEPS) | {"01.png": 0.05}, "01.png"),
        ({"a": 0.10, "b": 0.09, "c": 0.11, "d": 0.02}, "d"),
        ({"a": 0.10, "b": 0.09, "c": 0.11, "d": -0.05}, "d"),
        ({"a": 0.10, "b": 0.09, "c": 0.11, "d": 0.07}, None),
        ({"a": 0.10, "b": 0.09, "d": 0.0}, None),
        ({}, None),
    ],
)
def test_a_photo_far_below_the_others_is_named(gains, name):
    assert lessons.least(gains) == name


def test_sentences_give_advice_and_are_translated(photos):
    gains = {"a": 0.1, "b": 0.1, "c": 0.1, "d.png": 0.01}
    sentences = lessons.sentences({"a 'b'": photos["1.png"]}, photos, {"gains": gains})
    assert len(sentences) == 2
    assert "1.png" in sentences[0] and "fewer steps" in sentences[0] and "100%" in sentences[0]
    assert sentences[1].startswith("d.png taught least") and "1.0%" in sentences[1] and "10.0%" in sentences[1]
    assert all(texts.sayer("zh-Hant").translate(line) != line for line in sentences)


@pytest.mark.parametrize(
    ("holdout", "parts"),
    [
        ({"x.png": 0.12, "y.png": -0.15}, [("y.png, which was held out", "15.0% above", "something else")]),
        ({"x.png": -0.1, "y.png": -0.2}, [("the held-out photos", "15.0% above", "10.0% below", "fewer steps")]),
        ({"x.png": 0.12, "y.png": 0.01}, []),
        ({}, []),
    ],
)
def test_holdout_photos_show_how_well_a_run_generalizes(holdout, parts):
    gains = {"a": 0.1, "b": 0.1, "c": 0.1}
    sentences = lessons.sentences({}, {}, {"gains": gains, "holdout_gains": holdout})
    assert len(sentences) == len(parts)
    for sentence, words in zip(sentences, parts, strict=True):
        assert all(word in sentence for word in words)
        assert texts.sayer("zh-Hant").translate(sentence) != sentence
    # If nothing was learned, held-out photos that did not change give no sentence.
    assert lessons.sentences({}, {}, {"gains": dict.fromkeys("abc", -0.01), "holdout_gains": holdout}) == []


# Validations of real runs on the bundled base and of some invented runs: interval, errors, and "too short" or not.
RUNS = {
    "30 steps": (6, (0.3609, 0.3539, 0.3505, 0.3475, 0.3466), True),
    "60 steps of five photos": (12, (0.4647, 0.4387, 0.4259, 0.4216, 0.4209), True),
    "60 steps": (12, (0.3553, 0.3429, 0.3383, 0.3391, 0.3388), False),
    "210 steps": (42, (0.2650, 0.2546, 0.2530, 0.2520, 0.2506), False),
    "210 steps, a tenth of drift": (42, (0.2771, 0.2554, 0.2522, 0.2516, 0.2500), False),
    "210 steps whose held-out photos get worse": (42, (0.3459, 0.3625, 0.3604, 0.3676, 0.3695), False),
    "400 steps whose error rises at the end": (80, (0.2406, 0.2393, 0.2337, 0.2338, 0.2345), False),
    "400 steps whose last fall is smaller than a rise": (80, (0.2406, 0.2393, 0.2337, 0.2342, 0.2336), False),
    "400 steps whose last fall is smaller than the noise": (80, (0.2406, 0.2393, 0.2337, 0.2337, 0.2336), False),
    "60 steps of 14 photos": (12, (0.2814, 0.2682, 0.2602, 0.2547, 0.2536), True),
    "four validations": (15, (0.2814, 0.2682, 0.2602, 0.2547), True),
    "as good as nothing": (42, (0.3, 0.3, 0.3, 0.3, 0.3), False),
    "three validations": (10, (0.4, 0.3, 0.2), False),
}


@pytest.mark.parametrize(("every", "errors", "is_short"), RUNS.values(), ids=RUNS)
def test_a_run_whose_error_still_falls_was_too_short(every, errors, is_short):
    history = [{"step": every * number, "mse": error} for number, error in enumerate(errors, 1)]
    lines = lessons.too_short(history, OptimizerConfig(lr_scheduler="cosine"))
    assert bool(lines) == is_short
    if lines:
        assert (
            f"at the end of the {every * len(errors)} steps" in lines[0] and "train at least twice as long" in lines[0]
        )
        assert "太短" in texts.sayer("zh-Hant").translate(lines[0])


def test_validations_before_the_unet_starts_do_not_count():
    errors = (0.4594, 0.4494, 0.3365, 0.3114, 0.3105)  # it starts at step 160 of 400
    history = [{"step": 80 * number, "mse": error} for number, error in enumerate(errors, 1)]
    assert lessons.too_short(history, OptimizerConfig(lr_scheduler="cosine"))
    assert not lessons.too_short(history, OptimizerConfig(lr_scheduler="cosine", unet_start=0.4))
