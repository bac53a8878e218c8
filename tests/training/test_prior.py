"""Tests of the prior: targets, prompts and class images; an unchanged model has zero loss against the base."""

from pathlib import Path

import pytest
import short_run
import torch

from lorakit import adapters, config, families
from lorakit.adapters.adapter import Adapter
from lorakit.core.events import Events
from lorakit.data import checks
from lorakit.runs import preflight
from lorakit.training import objective
from lorakit.training.loss_step import LossStep
from lorakit.training.precompute import precompute


def step_of(base: Path, folder: Path, **changes: object) -> tuple[LossStep, Adapter]:
    settings = short_run.run_config(base, folder, folder / "run", 2, **{"train__prior": "images"} | changes)
    family = families.load(families.describe(base), torch.device("cpu"), torch.float32)
    adapter = adapters.attach(family, settings.adapter, trigger=settings.data.trigger)
    encoded = precompute(settings, family, adapter, checks.check(settings.data, family.info), Events())
    return LossStep(family, adapter, encoded, settings.train), adapter


@pytest.mark.parametrize("text", [False, True])
def test_an_unchanged_model_has_zero_loss_against_the_base(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bool
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    short_run.noise(tmp_path, 2)
    common = {"train__class_images": 2, "adapter__train_text_encoder": text}
    step, adapter = step_of(tiny_sd1, tmp_path, train__prior_target="base", **common)
    terms = step._terms(step.seed(0))
    instance, _ = step._predict(terms)
    assert terms[1].target is None and terms[0].target is not None
    photos_alone = objective.loss(instance, terms[0].target)
    assert torch.allclose(step.loss(0), photos_alone, rtol=1e-5)
    with torch.no_grad(), adapter.disabled():
        without = step.family.predict(terms[1].noisy, terms[1].timesteps, terms[1].teacher)
        for parameter in (parameter for _, group in adapter.groups() for parameter in group):
            parameter += 0.05
    changed = step._predict(step._terms(step.seed(0)))
    away = objective.loss(changed[0], terms[0].target) + objective.loss(changed[1], without)
    assert torch.allclose(step.loss(0), away, rtol=1e-5) and away > photos_alone


def test_prior_prompts_are_added_to_the_class_prompt(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    short_run.noise(tmp_path, 2)
    others = {"train__prior_prompts": ("a mug", "", "a fish")}
    step, _ = step_of(tiny_sd1, tmp_path, train__class_images=8, **others)
    encoded = step.encoded
    assert encoded.class_texts == ["a photo of a toy", "a mug", "", "a fish"]
    assert sorted(encoded.class_latents.text_rows.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    step, _ = step_of(tiny_sd1, tmp_path, train__prior="teacher", **others)
    places = step.family.encode_text(step.encoded.class_texts)["encoder_hidden_states"]
    counts = [0] * 4
    for index in range(40):
        instance, prior = step._terms(step.seed(index))
        assert torch.equal(instance.noisy, prior.noisy)
        for row, teacher in zip(
            *(part["encoder_hidden_states"] for part in (prior.condition, prior.teacher)), strict=True
        ):
            assert torch.equal(row, teacher)
            counts[next(place for place, states in enumerate(places) if torch.allclose(row, states, atol=1e-5))] += 1
    assert counts[0] > sum(counts) / 3 and min(counts[1:]) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train.prior": "teacher", "train.prior_prompts": ("a sks mug",)},
            "train.prior_prompts: 'a sks mug' has the trigger sks, which is to be learned",
        ),
        ({"train.prior_prompts": ("a mug",)}, "train.prior_prompts has no effect with train.prior = 'none'"),
        (
            {"train.prior_target": "base", "train.prior": "teacher"},
            "train.prior_target has no effect with train.prior = 'teacher': choose 'images'",
        ),
    ],
)
def test_unfit_prior_options_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.load(None, {"train.steps": 1, "data.name": "sks toy"} | settings)
    assert any(line.startswith(message) for line in caught.value.problems)


def test_without_the_text_encoder_the_presets_rate_is_removed() -> None:
    assert config.load("subject-pocket").optimizer.text_encoder_learning_rate
    without = config.load("subject-pocket", {"adapter.train_text_encoder": False})
    assert without.optimizer.text_encoder_learning_rate is None


def test_a_words_rate_stays_without_a_trained_text_encoder() -> None:
    tables = {"data": {"name": "sks toy"}, "train": {"steps": 1}}
    tables |= {"adapter": {"new_tokens": 2}, "optimizer": {"text_encoder_learning_rate": 2e-2}}
    loaded = config.from_tables(tables, {"adapter.train_text_encoder": False})
    assert loaded.optimizer.text_encoder_learning_rate == 2e-2


def test_own_class_images_exclude_prior_prompts(tiny_sd1: Path, tmp_path: Path) -> None:
    short_run.noise(tmp_path, 2)
    (tmp_path / "reg").mkdir()
    short_run.noise(tmp_path / "reg", 1)
    others = {"train__prior": "images", "train__prior_prompts": ("a mug",)}
    findings = preflight.preflight(short_run.run_config(tiny_sd1, tmp_path, tmp_path / "run", 2, **others)).warnings
    assert any("nothing is drawn for train.prior_prompts" in line for line in findings)
