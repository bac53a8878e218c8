"""Tests of validation: figures follow the formulas, repeats give equal bits, and training state does not change."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorakit import adapters, config, families
from lorakit.core import rng
from lorakit.families.conditioning import Conditioning
from lorakit.families.prediction import Epsilon
from lorakit.inference.mode import inference
from lorakit.training import validation as evaluate

pytestmark = pytest.mark.usefixtures("copied_modules")
CHANNELS, SIDE = 4, 8


class Family:
    """A family that predicts `factor * noisy + text value + adapter's shift` for every pixel; epsilon prediction."""

    device = torch.device("cpu")

    def __init__(self, factor: float = 0.5):
        self.prediction = Epsilon(torch.linspace(0.999, 0.001, 1000))
        self.factor, self.shift, self.calls = factor, 0.0, 0
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())

    def modules(self):
        return {"unet": self.net}

    def predict(self, noisy, timesteps, condition):
        assert not torch.is_grad_enabled() and not self.net[1].training
        self.calls += 1
        return self.factor * noisy + condition["values"][:, None, None, None] + self.shift


class Adapter:
    """Shifts the family's predictions."""

    def __init__(self, family: Family, shift: float):
        self.family, self.shift = family, shift
        family.shift = shift

    def disabled(self):
        import contextlib

        @contextlib.contextmanager
        def off():
            self.family.shift = 0.0
            yield
            self.family.shift = self.shift

        return off()


def dataset(count: int = 3, variants: int = 1, seed: int = 0):
    """Photos of normal noise, each with a text and `variants` rows, of which the last is the plain photo."""
    rows = count * variants
    bucket = SimpleNamespace(
        mean=torch.randn(rows, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)),
        std=torch.full((rows, CHANNELS, SIDE, SIDE), 100.0),
        sizes={},
        photo=torch.arange(rows) // variants,
        variant=variants - 1 - torch.arange(rows) % variants,
        text=torch.arange(rows) // variants,
    )
    return SimpleNamespace(buckets=[bucket])


def conditions(count: int = 3) -> Conditioning:
    return Conditioning(values=torch.arange(count) * 0.01)


CLASS = Conditioning(values=torch.tensor([0.2]))


def by_hand(family: Family, validation: evaluate.Validation, data) -> dict[str, np.ndarray]:
    """Return predictions and targets of each band in float64, computed from the documented procedure alone."""
    predictions, targets, steps = [[] for _ in range(4)], [[] for _ in range(4)], []
    number = 0
    for _ in range(math.ceil(8 / 3)):
        for photo in range(3):
            draw = rng.generator(validation.seed, number, "validation")
            noise = torch.randn(4, CHANNELS, SIDE, SIDE, generator=draw).double()
            places = (number + torch.rand(4, generator=draw, dtype=torch.float64)) / 9
            for band in range(4):
                t = 250 * band + int(places[band] * 250)
                steps.append(t)
                a = family.prediction.alphas_cumprod[t].double()
                noisy = a.sqrt() * data.buckets[0].mean[photo].double() + (1 - a).sqrt() * noise[band]
                predictions[band].append((0.5 * noisy + 0.01 * photo + family.shift).numpy())
                targets[band].append(noise[band].numpy())
            number += 1
    assert all(sum(250 * band <= t < 250 * band + 250 for t in steps) == 9 for band in range(4))
    return {"prediction": np.array(predictions), "target": np.array(targets)}


def test_figures_follow_the_formulas():
    family, data = Family(), dataset()
    validation = evaluate.Validation(family, data, conditions(), CLASS, 5, from_holdout=True)
    actual = validation.run(Adapter(family, 0.1))
    expected = by_hand(family, validation, data)
    groups = [(actual, expected["prediction"].ravel(), expected["target"].ravel())]
    groups += [
        (actual["bands"][band], expected["prediction"][band].ravel(), expected["target"][band].ravel())
        for band in range(4)
    ]
    for figures, prediction, target in groups:
        error = prediction - target
        assert figures["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
        assert figures["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
        assert figures["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        r2 = 1 - (error**2).sum() / ((target - target.mean()) ** 2).sum()
        assert figures["r2"] == pytest.approx(r2, abs=1e-5)
    assert [band["timesteps"] for band in actual["bands"]] == [[0, 249], [250, 499], [500, 749], [750, 999]]
    assert (actual["photos"], actual["source"]) == (3, "held-out photos")


def test_drift_is_the_relative_change_on_the_class_prompt():
    family, data = Family(factor=0.0), dataset()
    validation = evaluate.Validation(family, data, conditions(), CLASS, 0)
    # Every value is 0.2 without the adapter and 0.3 with it: (0.1 / 0.2)^2.
    assert validation.run(Adapter(family, 0.1))["prior_drift"] == pytest.approx(0.25, rel=1e-5)
    assert validation.run(Adapter(family, 0.0))["prior_drift"] == 0.0
    # A trained text encoder changes the class prompt; the base's prediction still uses the base's own.
    shifted = validation.run(Adapter(family, 0.0), class_condition=Conditioning(values=torch.tensor([0.4])))
    assert shifted["prior_drift"] == pytest.approx(1.0, rel=1e-5)
    assert validation.source == "training photos"


@pytest.mark.slow
def test_the_bases_trajectory_equals_ddims(tiny_sd1, tiny_sd1_v):
    """Drift is measured at points of the base's trajectory, which must equal diffusers' DDIM at the same timesteps."""
    from diffusers import DDIMScheduler

    for base in (tiny_sd1, tiny_sd1_v):
        family = families.load(families.describe(str(base)), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            prompt = family.encode_text(["a photo of a toy"])
            points = evaluate.Validation(family, dataset(), prompt, prompt, 3)._follow_the_base()
            scheduler = DDIMScheduler.from_config(family.pipeline().scheduler.config, clip_sample=False)
            scheduler.num_inference_steps = 8
            latents = torch.randn((4, 4, 8, 8), generator=rng.generator(3, 0, "prior drift"))
            for place, time in enumerate([999, 874, 749, 624, 499, 374, 249, 124]):
                predicted = family.predict(latents, torch.full((4,), time), prompt.expand(4))
                if place % 2:
                    noisy, timesteps, reference = points[place // 2]
                    assert timesteps.tolist() == [time] * 4
                    assert torch.allclose(noisy, latents, atol=1e-4) and torch.allclose(reference, predicted, atol=1e-4)
                latents = scheduler.step(predicted, time, latents).prev_sample
        assert len(points) == 8


def test_the_bases_trajectory_is_computed_once():
    family, data = Family(), dataset()
    validation = evaluate.Validation(family, data, conditions(), CLASS, 0)
    adapter = Adapter(family, 0.1)
    first, calls = validation.run(adapter), family.calls
    assert validation.run(adapter) == first
    # An evaluation has 9 photos and 8 class points. The base's trajectory takes two batches of 8 steps, once.
    assert calls == 9 + 2 * 8 + 8 and family.calls - calls == 9 + 8


@pytest.mark.parametrize("count, photos, points", [(1, 1, 8), (3, 3, 9), (8, 8, 8), (16, 16, 16), (40, 16, 16)])
def test_few_photos_are_repeated_and_many_are_sampled(count, photos, points):
    validation = evaluate.Validation(Family(), dataset(count), conditions(count), CLASS, 0)
    assert (validation.photo_count, len(validation.places)) == (photos, points)
    assert len({place[1] for place in validation.places}) == photos


def test_variants_are_not_validated():
    validation = evaluate.Validation(Family(), dataset(3, variants=2), conditions(), CLASS, 0)
    assert sorted({place[1] for place in validation.places}) == [1, 3, 5]


def test_train_flags_and_random_state_are_restored():
    family = Family()
    family.net.train()
    family.net[0].eval()
    before = torch.random.get_rng_state()
    evaluate.Validation(family, dataset(), conditions(), CLASS, 0).run(Adapter(family, 0.1))
    assert [part.training for part in family.net.modules()] == [True, False, True]
    assert torch.equal(torch.random.get_rng_state(), before) and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), inference([family.net]):
        raise ZeroDivisionError
    assert [part.training for part in family.net.modules()] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd1_v", "tiny_sdxl"])
def test_validation_of_a_real_family_is_repeatable_bit_by_bit(base, request):
    info = families.describe(str(request.getfixturevalue(base)))
    family = families.load(info, torch.device("cpu"), torch.float32)
    adapter = adapters.attach(family, config.LoraConfig(rank=2), seed=0)
    data = dataset()
    sizes = family.size_conditions((64, 64), (0, 0), (64, 64))
    data.buckets[0].sizes = {name: torch.tensor([row] * 3) for name, row in sizes.items()}
    with torch.no_grad():
        texts = family.encode_text(["one", "two", "three"])
        prompt = family.encode_text(["a photo of a toy"])
    validation = evaluate.Validation(family, data, texts, prompt, 0)
    untouched = validation.run(adapter)
    assert untouched["prior_drift"] == 0.0 and 0.1 < untouched["mse"] < 10
    with torch.no_grad():
        for _, group in adapter.groups():
            for parameter in group:
                parameter.add_(0.05)
    first, second = validation.run(adapter), validation.run(adapter)
    assert first == second
    assert first["prior_drift"] > 1e-6 and first["mse"] != untouched["mse"]
    repeat = evaluate.Validation(family, data, texts, prompt, 0).run(adapter)
    assert repeat == first


def test_gains_are_relative_reductions_of_the_bases_error():
    """The trained text value stays right for one photo and becomes wrong for the other."""
    data, family = dataset(2), Family(factor=0.0)
    data.names = lambda bucket: ["good.png", "bad.png"]
    validation = evaluate.Validation(family, data, conditions(2), CLASS, seed=0)
    adapter = Adapter(family, 0.0)
    after = Conditioning(values=torch.tensor([0.0, 2.0]))
    gains = validation.gains(adapter, after)
    expected = {}
    for photo, name in enumerate(("good.png", "bad.png")):
        errors = [0.0, 0.0]
        for number in (n for n, place in enumerate(validation.places) if place[1] == photo):
            _, _, target, _, _ = validation._point(number)
            for side, value in enumerate((photo * 0.01, after["values"][photo])):
                errors[side] += float((value - target).square().mean())
        expected[name] = 1 - errors[1] / errors[0]
    assert gains == pytest.approx(expected, rel=1e-5)
    assert gains["good.png"] == 0 and gains["bad.png"] < -1
    assert validation.gains(adapter) == {"good.png": 0, "bad.png": 0}
