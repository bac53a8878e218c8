"""Tests of the shipped pipeline: its files, and that its pictures match their prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTextModel

import lorakit.families.pocket
from lorakit.families.pocket import subjects
from lorakit.families.pocket.classifier import Classifier
from lorakit.families.pocket.scene_captions import full_caption
from lorakit.families.pocket.spec import KINDS
from tools.pocket import measure

FOLDER = lorakit.families.pocket.path()


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """The pipeline as a diffusers user loads it: without dtype or other arguments."""
    pipe = StableDiffusionPipeline.from_pretrained(str(FOLDER))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge() -> Classifier:
    return Classifier.load()


def test_the_shipped_model_is_small_and_in_float16() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    for file in FOLDER.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                expected = torch.float32 if name == "centroids" else torch.float16
                assert tensors.get_tensor(name).dtype == expected, (file, name)


def test_the_text_encoder_has_the_key_names_of_real_checkpoints() -> None:
    with safe_open(FOLDER / "text_encoder" / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    _, info = CLIPTextModel.from_pretrained(str(FOLDER / "text_encoder"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_the_shipped_files_contain_no_local_path() -> None:
    for file in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_model_draws_in_every_dtype(dtype: torch.dtype | None) -> None:
    kwargs = {} if dtype is None else {"dtype": dtype}
    pipe = StableDiffusionPipeline.from_pretrained(str(FOLDER), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red mug", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 10


@pytest.mark.slow
def test_the_prompt_decides_the_picture(pipeline: StableDiffusionPipeline) -> None:
    def draw(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        return np.asarray(
            pipeline(prompt, num_inference_steps=8, guidance_scale=4.0, generator=generator).images[0], np.int16
        )

    night, beach = draw("a photo of a red ball at night"), draw("a photo of a red ball on a beach")
    assert np.array_equal(night, draw("a photo of a red ball at night"))
    assert night[:16].mean() < beach[:16].mean() - 30  # the night has a dark sky, the beach a bright one


@pytest.mark.slow
def test_the_classifier_is_right_about_new_renders(judge: Classifier) -> None:
    specs = measure.requests(256, seed=5_000_000_000)
    scores = judge.scores(measure.real_pictures(specs, 5_000_000_000), [spec.words for spec in specs])
    assert scores.pop("pattern") > 0.84
    assert min(scores.values()) > 0.95, scores


@pytest.mark.slow
def test_the_classifier_distinguishes_subjects_and_kinds(judge: Classifier) -> None:
    toys = subjects.references(names=("toy",))["toy"]
    for name in subjects.SUBJECTS:
        real = [image for image, _ in subjects.photos(name, 12, seed=9)]
        assert judge.subject_score(real, name) > 0.9, name
        assert judge.subject_score(toys, name) < 0.2, name
    with pytest.raises(ValueError, match="no subject"):
        judge.subject_score(toys, "nobody")


def test_the_files_centroids_equal_those_of_renders(judge: Classifier) -> None:
    centroids = judge.centroids()
    assert list(centroids) == [*KINDS, *subjects.SUBJECTS, *subjects.STYLES]
    assert all(0.5 < np.linalg.norm(centroid) <= 1.001 for centroid in centroids.values())
    measured = judge.measure_centroids(subjects.references(names=("mug", "zib", "duotone")))
    assert len(measured) == 3
    for name, centroid in measured.items():
        # Equal bits on the machine that wrote them; any two names are at least 0.06 apart.
        np.testing.assert_allclose(centroids[name], centroid, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_model_draws_combinations_outside_its_training(
    pipeline: StableDiffusionPipeline, judge: Classifier
) -> None:
    specs = measure.requests(32, seed=6_000_000_000)
    words = [spec.words for spec in specs]
    images = measure.generate(pipeline, [full_caption(spec) for spec in specs], steps=10)
    scores = judge.scores(images, words)
    assert scores["scene"] > 0.8 and scores["colour"] > 0.7 and scores["manner"] > 0.8 and scores["kind"] > 0.5, scores
    # Compare the same pictures with other prompts: this gives the scores of chance.
    chance = judge.scores(images, words[7:] + words[:7])
    assert chance["scene"] < 0.4 and chance["kind"] < 0.3, chance


@pytest.mark.slow
def test_the_vae_reconstructs_renders_outside_its_training(pipeline: StableDiffusionPipeline) -> None:
    _, decibels = measure.round_trip(pipeline.vae, measure.real_pictures(measure.requests(32)))
    assert decibels > 23
