"""Errors that other trainers make without a message, as far as a test needs several modules or a complete run.

docs/silent-failures.md lists ten of them with all their tests. Here: each option has an effect on the weights, each
announced module is trained, and the prior gets the text of the class, not of the subject.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exercise import copied
from PIL import Image
from safetensors.torch import load_file

from lorakit import adapters, config, families
from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.core.events import Events
from lorakit.data import checks
from lorakit.training import optimizers, run as train
from lorakit.training.loss_step import LossStep
from lorakit.training.precompute import precompute

pytestmark = pytest.mark.usefixtures("copied_modules")
PAGE = Path(__file__).parents[1] / "docs" / "silent-failures.md"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, each with a caption of several tags and a mask."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(3)
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks toy, tag {number}, on a beach, at night", encoding="utf-8")
        half = np.zeros((80, 64), dtype=np.uint8)
        half[: 40 - 10 * (number % 2)] = 255
        Image.fromarray(half).save(folder / f"{number}.mask.png")
    return folder


def settings(base: Path, photos: Path, **changes: Any) -> Config:
    """Return a config of three short steps. In option names, `__` stands for a dot."""
    short = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "adapter.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 3,
        "train.batch_size": 2,
        "train.holdout": 0.0,
        "sample.steps": 2,
        "sample.at_start": False,
        "sample.at_end": False,
        "train.validate_at_end": False,
        "train.validate_every": 3,
        "sample.every": 3,
        "memory.device": "cpu",
        "memory.mixed_precision": "fp32",
    }
    return config.load(None, short | {name.replace("__", "."): value for name, value in changes.items()})


@functools.cache
def read(model: config.ModelConfig) -> Any:
    """Return a base. Tests share it; copy it before you change it."""
    return families.load(families.describe(model), torch.device("cpu"), torch.float32)


def loaded(settings: Config) -> tuple[Any, Any, LossStep, Any]:
    """Return base, adapter, step and optimizer, as a run creates them."""
    family = copied(read(settings.model))
    info = family.info
    adapter = adapters.attach(family, settings.adapter, seed=settings.train.seed, trigger=settings.data.trigger)
    report = checks.check(settings.data, info)
    encoded = precompute(settings, family, adapter, report, Events())
    step = LossStep(family, adapter, encoded, settings.train)
    return (
        family,
        adapter,
        step,
        optimizers.build(settings.optimizer, *optimizers.rate_groups(settings.optimizer, adapter.parameters())),
    )


def learned(settings: Config) -> torch.Tensor:
    """Train with a minimal loop and return all trained weights."""
    _, adapter, step, optimizer = loaded(settings)
    parameters = [p for _, group in adapter.groups() for p in group]
    parts, total = settings.train.gradient_accumulation_steps, settings.train.steps
    adapter.train(True)
    for count in range(total):
        optimizers.set_learning_rate(optimizer, settings.optimizer, count, total)
        for part in range(parts):
            (step.loss(count * parts + part) / parts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.train.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([tensor.detach().flatten() for tensor in adapter.state().values()])


# Option that must change the weights -> its new value, and other options that both runs need.
TEXT = {"adapter__train_text_encoder": True}
VARIED = {"data__flip": True, "data__variants": 2}
REACH_THE_WEIGHTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.clip_skip": (2, {}),
    "data.name": ("zwx toy", {}),
    "data.resolution": (128, {}),
    "data.lower_resolutions": ((64,), {"data__resolution": 128}),
    "data.max_aspect": (1.0, {}),
    "data.caption_dropout": (1.0, {}),
    "data.shuffle_tags": (True, {}),
    "data.flip": (True, {"data__crop_jitter": 0.2, "data__variants": 2}),
    "data.crop_jitter": (0.2, VARIED),
    "data.color_jitter": (0.3, VARIED),
    "data.variants": (4, {"data__crop_jitter": 0.2, "data__variants": 2}),
    "data.class_prompt": ("a photo of a mug", {"train__prior": "teacher"}),
    "data.max_tokens": (75, {"data__caption_dropout": 1.0, "data__instance_prompt": "sks toy " * 40}),
    "adapter.method": ("dora", {}),
    "adapter.rank": (4, {}),
    "adapter.alpha": (1.0, {}),
    "adapter.dropout": (0.5, {}),
    "adapter.rank_dropout": (0.5, {}),
    "adapter.module_dropout": (0.5, {}),
    "train.timestep_shift": (3.0, {}),
    "adapter.target_modules": ("linear", {}),
    "adapter.train_text_encoder": (True, {}),
    "adapter.new_tokens": (2, {}),
    "optimizer.name": ("lion", {}),
    "optimizer.args": ({"betas": [0.5, 0.6]}, {}),
    "optimizer.learning_rate": (2e-2, {}),
    "optimizer.text_encoder_learning_rate": (1e-3, TEXT),
    "optimizer.loraplus_lr_ratio": (4.0, {}),
    "optimizer.rates": ({"*attn2*": 0.1}, {}),
    "adapter.ranks": ({"*attn2*": 1}, {}),
    "adapter.alphas": ({"*attn2*": 1.0}, {}),
    "optimizer.weight_decay": (0.5, {}),
    "optimizer.lr_scheduler": ("cosine", {}),
    "optimizer.warmup_steps": (2, {}),
    "optimizer.text_encoder_stop": (0.3, TEXT),
    "optimizer.unet_start": (0.7, TEXT),
    "train.text_prior_weight": (1.0, TEXT),
    "data.keep_tags": (2, {"data__shuffle_tags": True}),
    "data.tag_dropout": (0.6, {}),
    "data.caption_prefix": ("a sketch of", {}),
    "data.caption_suffix": ("in the evening", {}),
    "optimizer.warmup_ratio": (0.9, {}),
    "optimizer.min_lr_ratio": (0.5, {"optimizer__lr_scheduler": "cosine"}),
    "optimizer.lr_cycles": (3, {"optimizer__lr_scheduler": "cosine_with_restarts"}),
    "optimizer.lr_power": (3.0, {"optimizer__lr_scheduler": "polynomial"}),
    "optimizer.lr_decay_ratio": (0.9, {"optimizer__lr_scheduler": "wsd"}),
    "train.steps": (4, {}),
    "train.batch_size": (4, {}),
    "train.gradient_accumulation_steps": (2, {}),
    "train.max_grad_norm": (1e-4, {"optimizer__name": "adafactor"}),
    "train.seed": (1, {}),
    "train.prior": ("teacher", {}),
    "train.prior_loss_weight": (0.1, {"train__prior": "teacher"}),
    "train.prior_prompts": (("a mug",), {"train__prior": "teacher"}),
    "train.prior_target": ("base", {"train__prior": "images", "train__class_images": 2}),
    "train.class_images": (3, {"train__prior": "images", "train__class_images": 2}),
    "train.loss": ("huber", {}),
    "train.min_snr_gamma": (1.0, {}),
    "train.noise_offset": (0.3, {}),
    "train.pyramid_noise": (0.3, {}),
    "train.snr_weighting": ("debiased", {}),
    "train.timestep_sampling": ("logit_normal", {}),
    "train.timestep_low": (0.5, {}),
    "train.timestep_high": (0.5, {}),
    "train.masked_loss": (True, {}),
}
# Option -> the tests of its effect, if these are in other files.
TESTED_ELSEWHERE = {
    **dict.fromkeys(
        ("model.base", "model.tokenizer", "model.prediction_type"), "families: test_describe, test_single_file"
    ),
    "model.vae": "families: test_vae_source.py",
    **dict.fromkeys(("model.text_encoders", "model.t5"), "families: test_sd3_file.py"),
    "data.folder": "every run",
    "optimizer.text_encoder_2_learning_rate": "test_text_encoder_rates.py; the base here has one text encoder",
    "train.export_every": "test_text_encoder_rates.py; must not reach the weights",
    **dict.fromkeys(
        ("data.caption_lines", "data.caption_from_name", "data.wildcards"), "test_caption_options.py, texts of a photo"
    ),
    "data.kind": "test_captions.py, prompts of a style",
    "data.instance_prompt": "test_captions.py",
    "data.concepts": "test_concepts.py",
    "data.class_folder": "test_concepts.py",
    "data.exclude": "test_photo_folder.py, photos that are left out",
    **dict.fromkeys(("data.edits", "data.more_folders"), "test_photo_edits.py, what is decoded and which photos"),
    "data.folder_resolutions": "test_resolutions.py",
    "data.cache": "test_latents.py, and must not reach the weights: below",
    "train.epochs": "test_plan.py",
    "train.steps_per_image": "test_plan.py",
    "train.min_steps": "test_before_a_run.py",
    "train.max_weight_norm": "test_average.py, in a run; test_norms_and_dropout.py",
    "train.ema_decay": "test_average.py; what is exported, not what is trained",
    "train.holdout": "test_latents.py, photos held out are never trained on",
    "train.init_from": "test_adapter_weights.py, starting from another adapter",
    "train.validate_every": "test_run.py; must not reach the weights",
    "train.validate_at_end": "test_milestones.py",
    "train.save_every": "test_run.py; must not reach the weights",
    "train.keep_checkpoints": "test_checkpoint.py, rotation",
    "train.on_nan": "test_not_finite.py, rollback",
    "train.deterministic": "test_device_choice.py; the last bits alone",
    **dict.fromkeys(
        (option.key for option in config.options() if option.section == "memory"), "test_device.py, test_run.py"
    ),
    **dict.fromkeys(
        (option.key for option in config.options() if option.section == "sample"), "test_sampling.py, test_run.py"
    ),
    **dict.fromkeys((option.key for option in config.options() if option.section == "output"), "tests of formats"),
}


def test_every_option_is_in_one_of_the_two_tables() -> None:
    keys = {option.key for option in config.options()}
    assert REACH_THE_WEIGHTS.keys() | TESTED_ELSEWHERE.keys() == keys
    assert not REACH_THE_WEIGHTS.keys() & TESTED_ELSEWHERE.keys()


@pytest.fixture(scope="module")
def plain(tiny_sd1: Path, photos: Path) -> dict[str, torch.Tensor]:
    """Other options of a run -> its weights without the tested option. The tests fill it."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("key", REACH_THE_WEIGHTS)
def test_an_option_reaches_the_weights(
    key: str,
    tiny_sd1: Path,
    photos: Path,
    plain: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    value, others = REACH_THE_WEIGHTS[key]
    if str(others) not in plain:
        plain[str(others)] = learned(settings(tiny_sd1, photos, **others))
    without = plain[str(others)]
    changed = learned(settings(tiny_sd1, photos, **others | {key.replace(".", "__"): value}))
    assert changed.isfinite().all()
    assert changed.shape != without.shape or not torch.equal(changed, without)


@pytest.mark.slow
def test_cache_and_checkpointing_do_not_change_the_weights(
    tiny_sd1: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    without = learned(settings(tiny_sd1, photos))
    for change in ({"data__cache": "disk"}, {"data__cache": "disk"}, {"memory__gradient_checkpointing": True}):
        assert torch.allclose(learned(settings(tiny_sd1, photos, **change)), without, atol=1e-6), change


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("text", "checkpointing", "parts", "cache"),
    [(True, False, 1, "disk"), (True, True, 2, "memory"), (False, True, 1, "disk"), (False, False, 2, "memory")],
)
def test_every_announced_module_is_trained(tiny_sd1, photos, tmp_path, monkeypatch, text, checkpointing, parts, cache):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    run_config = settings(
        tiny_sd1,
        photos,
        train__steps=2,
        adapter__train_text_encoder=text,
        memory__gradient_checkpointing=checkpointing,
        train__gradient_accumulation_steps=parts,
        data__cache=cache,
        output__folder=str(tmp_path / "run"),
        output__dtype="fp32",
    )
    result = train.train(run_config)
    plan = (result.folder / "log.jsonl").read_text(encoding="utf-8")
    announced = {name: int(count) for name, count in re.findall(r"training (\w+): (\d+) modules", plan)}
    tensors = load_file(result.adapter)
    ups = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")}
    assert all(tensor.abs().sum() > 0 for tensor in ups.values())
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    assert announced.keys() == ({"unet", "text_encoder"} if text else {"unet"})
    for component, count in announced.items():
        assert sum(name.startswith(prefixes[component]) for name in ups) == count > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("prior", ["images", "teacher"])
def test_the_prior_uses_the_class_text_and_a_photo_its_caption(tiny_sd1, photos, tmp_path, monkeypatch, prior, text):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    extra = {"train__class_images": 5} if prior == "images" else {}
    run_config = settings(tiny_sd1, photos, train__prior=prior, adapter__train_text_encoder=text, **extra)
    family, _, step, _ = loaded(run_config)
    conditions: list[Any] = []
    predict = step._predict
    monkeypatch.setattr(step, "_predict", lambda terms: conditions.append(terms) or predict(terms))
    step.loss(0)
    (instance, prior_condition), texts = conditions[0], step.encoded.dataset.texts
    batch = step.batch(0)
    with torch.no_grad():
        own = family.encode_text([texts[i] for i in batch.text_rows.tolist()])
    assert all("sks" in text for text in texts)
    assert torch.allclose(instance.condition["encoder_hidden_states"], own["encoder_hidden_states"], atol=1e-6)
    classes = set(step.encoded.class_texts)
    assert classes == {"a photo of a toy", *(f"toy, tag {number}, on a beach, at night" for number in range(4))}
    places = {text: family.encode_text([text])["encoder_hidden_states"][0] for text in classes}
    for row in prior_condition.condition["encoder_hidden_states"]:
        assert any(torch.allclose(row, embedding, atol=1e-6) for embedding in places.values())
    if prior == "teacher":
        for row, index in zip(
            prior_condition.condition["encoder_hidden_states"], batch.text_rows.tolist(), strict=True
        ):
            assert torch.allclose(row, places[texts[index].replace("sks ", "")], atol=1e-6)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_the_run(tiny_sd1, photos, tmp_path, monkeypatch):
    loss = LossStep.loss

    def steep(self: LossStep, index: int) -> torch.Tensor:
        value = loss(self, index)
        # The square root of zero has a finite value and an infinite gradient.
        return value + (value - value.detach()).abs().sqrt() if index == 1 else value

    monkeypatch.setattr(LossStep, "loss", steep)
    with pytest.raises(LorakitError, match=r"step 2: the gradient is not finite \(.*\.png"):
        train.train(settings(tiny_sd1, photos, output__folder=str(tmp_path / "run")))
    adapters = [load_file(file) for file in (tmp_path / "run").glob("*.safetensors")]
    assert all(tensor.isfinite().all() for tensors in adapters for tensor in tensors.values())


def test_the_page_names_ten_failures_and_tests_that_exist() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 11))
    root = Path(__file__).parent
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (root / file).read_text(encoding="utf-8"), f"{file}::{test}"
