"""The loss term that keeps the text encoders' output for texts without the trigger."""

from pathlib import Path

import pytest
import short_run
import torch
from test_prior import step_of

from lorakit import config
from lorakit.adapters.adapter import Adapter
from lorakit.training import prior
from lorakit.training.loss_step import LossStep

OPTIONS: dict[str, object] = {"train__prior": "none", "adapter__train_text_encoder": True}


def with_term(base: Path, folder: Path, weight: float = 10.0) -> tuple[LossStep, Adapter]:
    short_run.noise(folder, 2)
    return step_of(base, folder, train__text_prior_weight=weight, **OPTIONS)


def change(adapter: Adapter, encoders_only: bool = False) -> None:
    """Move every trained weight."""
    with torch.no_grad():
        for name, parameters in adapter.groups():
            for parameter in parameters if name != "unet" or not encoders_only else []:
                parameter += 0.05


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sdxl"])
def test_the_term_is_the_relative_distance_from_the_base(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    step, adapter = with_term(request.getfixturevalue(base), tmp_path)
    batch = step.seed(0)
    assert prior.text_distance(step, len(batch.entries)) == 0
    change(adapter)
    step.seed(0)
    rows = torch.randint(
        1,
        len(step.encoded.reference_texts.conditions),
        (2 * len(batch.entries),),
        generator=step.generators["text order"],
    ).tolist()
    tokens = [table[[0, *rows]] for table in step.encoded.reference_texts.tokens]
    now = step.family.encode_tokens(tokens)
    with adapter.disabled():
        before = step.family.encode_tokens(tokens)
    means = []
    for name in ("encoder_hidden_states", "pooled"):
        if before.get(name) is not None:
            gap = (now[name] - before[name]).double().norm(dim=-1) / before[name].double().norm(dim=-1)
            means.append(gap.square().mean().item())
    assert len(means) == (2 if base == "tiny_sdxl" else 1)
    expected = sum(means) / len(means)
    total = step.loss(0).item()
    step.train = config.load(None, {"train.steps": 1, "train.seed": step.train.seed}).train
    assert expected > 1e-4
    assert total - step.loss(0).item() == pytest.approx(10 * expected, rel=1e-3)


def test_the_term_teaches_the_text_encoder_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    step, adapter = with_term(tiny_sd1, tmp_path)
    change(adapter, encoders_only=True)
    step.seed(0)
    prior.text_distance(step, 2).backward()
    for name, parameters in adapter.groups():
        assert all((parameter.grad is not None) == (name == "text_encoder") for parameter in parameters)


def test_its_texts_are_random_and_have_no_trigger(tiny_sd1: Path, tmp_path: Path) -> None:
    step, _ = with_term(tiny_sd1, tmp_path)
    family, texts = step.family, step.encoded.class_texts
    (table,) = step.encoded.reference_texts.tokens
    exact = torch.cat(family.tokens(["", *texts]))
    assert torch.equal(table[: len(exact)], exact)
    copies = table[len(exact) :]
    special, trigger = exact[0].unique(), family.tokens(["sks"])[0].unique()
    trigger = trigger[~torch.isin(trigger, special)]
    assert len(trigger) and not torch.isin(copies, trigger).any()
    originals = exact[1:]
    shares = [min(float((copy != original).float().mean()) for original in originals) for copy in copies]
    words = float((~torch.isin(originals[0], special)).float().mean())
    assert len(copies) == prior.RANDOM_TEXTS
    assert min(shares) < 0.2 * words and max(shares) > 0.8 * words  # from nearly equal to nearly all random
    assert len(copies.unique()) > 3 * len(originals.unique())  # words that the run's texts do not have
    encoded = step.encoded
    second = prior.random_texts(family, encoded.class_tokens, encoded.tokens, ["sks"], step.train.seed)
    assert torch.equal(second[0], table)


def test_the_term_needs_a_trained_text_encoder() -> None:
    with pytest.raises(config.ConfigError, match=r"train.text_prior_weight needs adapter.train_text_encoder = true"):
        config.load(None, {"train.steps": 1, "train.text_prior_weight": 1.0, "adapter.new_tokens": 2})


@pytest.mark.parametrize(
    "replaced", [{"adapter.train_text_encoder": False}, {"adapter.method": "full"}, {"adapter.method": "embedding"}]
)
def test_what_trains_no_text_encoder_drops_the_presets_options(replaced: dict[str, object]) -> None:
    text = "[adapter]\ntrain_text_encoder = true\n[train]\nsteps = 2\ntext_prior_weight = 1.0\n"
    loaded = config.from_tables(
        config.loading.tomllib.loads(text + "[optimizer]\nunet_start = 0.4\n"), {"data.name": "sks toy"} | replaced
    )
    assert loaded.train.text_prior_weight == 0 and loaded.optimizer.unet_start == 0
