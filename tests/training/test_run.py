"""Tests of complete runs on a tiny model: training, resume, stop and failure."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from PIL import Image
from power import Cut, interrupted_after
from safetensors.torch import load_file
from short_run import unchecked

from lorakit import config, families
from lorakit.core import registry
from lorakit.core.errors import LorakitError
from lorakit.data import latents
from lorakit.inference import sampling
from lorakit.training import checkpoint, checkpoint_export, run as train
from lorakit.training.loss_step import LossStep

pytestmark = pytest.mark.usefixtures("short_validation", "copied_modules")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three shapes, two of them with captions. They are shared: only read them."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate([(64, 64), (80, 64), (64, 96), (64, 64), (70, 70)]):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a photo of a sks toy on a beach", encoding="utf-8")
    (folder / "1.txt").write_text("a sks toy in the snow", encoding="utf-8")
    return folder


def options(base: Path, photos: Path, folder: Path, **changes: object) -> dict[str, object]:
    """Return options of a short run without validation and samples; double underscores stand for dots."""
    short = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "adapter.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 4,
        "train.batch_size": 2,
        "train.prior": "none",
        "train.save_every": 2,
        "train.validate_every": 4,
        "train.validate_at_end": False,
        "sample.every": 4,
        "sample.at_start": False,
        "sample.at_end": False,
        "sample.steps": 2,
        "sample.prompts": ("a photo of sks toy",),
        "memory.device": "cpu",
        "output.folder": str(folder),
        "output.dtype": "fp32",
    }
    return short | {name.replace("__", "."): value for name, value in changes.items()}


def run(base: Path, photos: Path, folder: Path, **changes: object) -> train.Result:
    """Train with `options` and the given changes."""
    return train.train(config.load(None, options(base, photos, folder, **changes)))


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    """Return the events of one kind from a run's log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def plain(tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    """A run with `options` in every format and with TensorBoard. It is shared: only read its folder."""
    before = hashes(photos)
    everything = {"output__formats": ("kohya", "diffusers", "peft"), "output__trackers": ["tensorboard"]}
    everything |= {"sample__at_start": True, "sample__at_end": True, "train__validate_at_end": True}
    result = run(tiny_sd1, photos, tmp_path_factory.mktemp("plain") / "run", **everything)
    assert hashes(photos) == before
    return result


def same_adapter(result: train.Result, other: train.Result) -> bool:
    """Return whether the files of two runs are equal bit by bit."""
    one, two = load_file(result.adapter), load_file(other.adapter)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_run_gives_a_checked_adapter_and_keeps_the_photos_unchanged(plain):
    result = plain
    assert set(result.exports) == {"kohya", "diffusers", "peft"}
    assert result.steps == 4 and len(events(result.folder, "step")) == 4
    assert all(finding.passed for finding in result.findings)
    assert {"kohya unet", "diffusers unet", "peft unet"} <= {finding.name for finding in result.findings}
    tensors = load_file(result.adapter)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    ups = [name for name in tensors if name.endswith("lora_up.weight")]
    assert ups and all(tensors[name].abs().sum() > 0 for name in ups)
    state = json.loads((result.folder / "state.json").read_text(encoding="utf-8"))
    assert state["state"] == "done" and state["step"] == 4
    for name in ("config.toml", "plan.json", "report.html", "report.json", "curves.svg"):
        assert (result.folder / name).stat().st_size > 0, name
    assert [event["step"] for event in events(result.folder, "sample")] == [0, 4]
    with Image.open(result.exports["kohya"].with_suffix(".png")) as preview:
        with Image.open(result.folder / "samples" / "step-000004" / "01.png") as last:
            assert preview.tobytes() == last.tobytes() and "parameters" in last.info
        assert preview.info == {"Software": "lorakit"}, "the prompt is nobody's business"


def test_a_users_preview_stays_and_a_runs_is_replaced(tmp_path):
    images = tmp_path / "01.png"
    Image.new("RGB", (8, 8), "red").save(images)
    messages: list[str] = []
    exports = {"kohya": tmp_path / "toy.safetensors", "diffusers": tmp_path / "toy-diffusers.safetensors"}
    for before in (b"mine", None):
        preview = tmp_path / "toy.png"
        preview.write_bytes(before) if before else preview.unlink()
        train.write_previews(images, exports, messages.append)
        assert (preview.read_bytes() == b"mine") is bool(before)
    Image.new("RGB", (8, 8), "blue").save(images)
    train.write_previews(images, exports, messages.append)
    with Image.open(tmp_path / "toy.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)
    assert messages == ["toy.png exists already and is not replaced"] and not (tmp_path / "toy-diffusers.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_resolved_config_repeats_the_run_bit_by_bit(plain, photos, tmp_path):
    places = {"data.folder": str(shutil.copytree(photos, tmp_path / "photos")), "output.folder": str(tmp_path / "two")}
    repeat = train.train(config.load(plain.folder / "config.toml", places))
    assert repeat.adapter.parent == tmp_path / "two" and same_adapter(plain, repeat)


@pytest.mark.slow
def test_an_effect_as_small_as_rounding_fails_the_check(tiny_sd1, photos, tmp_path):
    with pytest.raises(LorakitError, match=r"self-check failed.*no effect on its output: ") as caught:
        run(tiny_sd1, photos, tmp_path / "run", optimizer__learning_rate=1e-8, train__steps=1)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.adapter_methods())
def test_every_method_trains_and_passes_its_check_with_text_encoder_and_convolutions(
    tiny_sd1, photos, tmp_path, method
):
    result = run(
        tiny_sd1,
        photos,
        tmp_path / "run",
        adapter__method=method,
        adapter__alpha=1.0,
        adapter__target_modules="linear+conv",
        adapter__train_text_encoder=True,
        train__steps=2,
    )
    assert {"kohya unet", "kohya text encoder"} <= {f.name for f in result.findings}


@pytest.mark.slow
def test_a_word_is_learned_with_the_adapter_and_checked(photos, tmp_path):
    """Pivotal tuning on the bundled base writes files for A1111, ComfyUI and diffusers; the self-check opens them."""
    result = run(
        "pocket",
        photos,
        tmp_path / "run",
        adapter__new_tokens=2,
        train__steps=1,
        train__holdout=0.0,
        sample__prompts=("a photo of a sks toy",),
        output__formats=("kohya", "diffusers", "peft"),
    )
    assert {f"{fmt} {part}" for fmt in result.exports for part in ("file", "unet", "text encoder")} <= {
        finding.name for finding in result.findings
    }
    name = result.adapter.stem
    embedding = load_file(result.folder / f"{name}-embedding" / "sks.safetensors")
    bundle = load_file(result.folder / f"{name}-bundled.safetensors")
    rows = embedding["emb_params"]
    assert list(embedding) == ["emb_params"] and len(rows) == 2
    assert torch.equal(bundle["bundle_emb.sks.string_to_param.*"], rows)
    assert {key: t for key, t in bundle.items() if not key.startswith("bundle_emb.")}.keys() == load_file(
        result.adapter
    ).keys()
    base = families.load(families.describe("pocket"), "cpu", torch.float32)
    table = base.text_encoders["text_encoder"].get_input_embeddings().weight
    ids = base.tokenizer("sks", add_special_tokens=False).input_ids
    assert (rows != table[[ids[0], ids[1 % len(ids)]]]).any(1).all()

    (path,) = sampling.from_file(result.adapter, "pocket", ["a sks toy"], [1.0], config.SampleConfig(steps=1))[1:]
    assert path.is_file()
    last = checkpoint_export.read(checkpoint.latest(result.folder / "checkpoints"))
    assert torch.equal(last.embeddings["sks"]["text_encoder"], rows)
    (result.folder / f"{name}-embedding" / "sks.safetensors").unlink()
    with pytest.raises(LorakitError, match=r"its embedding .*sks\.safetensors is not beside it: put it back"):
        sampling.recorded(result.adapter, {})


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prior", ["images", "teacher"])
def test_both_kinds_of_prior_change_the_adapter(plain, tiny_sd1, photos, tmp_path, monkeypatch, prior):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    extra = {"train__class_images": 3} if prior == "images" else {}
    assert not same_adapter(plain, run(tiny_sd1, photos, tmp_path / prior, train__prior=prior, **extra))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_sdxl_trains_with_both_text_encoders(tiny_sdxl, photos, tmp_path):
    result = run(tiny_sdxl, photos, tmp_path / "run", adapter__train_text_encoder=True, train__steps=1)
    assert {name.split("_")[1] for name in load_file(result.adapter)} == {"unet", "te1", "te2"}


@pytest.mark.slow
def test_sdxl_learns_a_word_in_both_text_encoders(tiny_sdxl, photos, tmp_path, monkeypatch):
    folder, changes = tmp_path / "cut", {"adapter__new_tokens": 2, "train__steps": 2, "train__save_every": 1}
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        with pytest.raises(Cut):
            run(tiny_sdxl, photos, folder, **changes)
    result = train.resume(folder)
    assert all(finding.passed for finding in result.findings)
    unchecked(monkeypatch)
    straight = run(tiny_sdxl, photos, tmp_path / "straight", **changes)
    name = result.adapter.stem
    vectors = load_file(folder / f"{name}-embedding" / "sks.safetensors")
    other = load_file(straight.folder / f"{straight.adapter.stem}-embedding" / "sks.safetensors")
    assert vectors.keys() == other.keys() == {"clip_l", "clip_g"}
    assert all(torch.equal(vectors[key], other[key]) for key in vectors)
    base = families.load(families.describe(tiny_sdxl), "cpu", torch.float32)
    for encoder, key, tokenizer in zip(base.text_encoders.values(), ("clip_l", "clip_g"), base.tokenizers, strict=True):
        table = encoder.get_input_embeddings().weight
        ids = tokenizer("sks", add_special_tokens=False).input_ids
        assert len(vectors[key]) == 2 and (vectors[key] != table[[ids[0], ids[1 % len(ids)]]]).any(1).all()
    bundle = load_file(folder / f"{name}-bundled.safetensors")
    for key, rows in vectors.items():
        assert torch.equal(bundle[f"bundle_emb.sks.{key}"], rows)
    (path,) = sampling.from_file(result.adapter, str(tiny_sdxl), ["a sks toy"], [1.0], config.SampleConfig(steps=1))[1:]
    assert path.is_file()


@pytest.mark.slow
def test_tensorboard_has_the_figures_of_the_log(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(plain.folder / "tensorboard" / "sks-toy")).Reload()
    logged = {event["step"]: event["loss"] for event in events(plain.folder, "step")}
    scalars = {scalar.step: scalar.value for scalar in board.Scalars("step/loss")}
    assert scalars == pytest.approx(logged) and len(scalars) == 4
    assert [scalar.step for scalar in board.Scalars("validation/prior_drift")] == [4]


def test_missing_tensorboard_is_reported(tiny_sd1, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(LorakitError, match=r"-m pip install .?tensorboard\b"):
        run(tiny_sd1, photos, tmp_path / "run", output__trackers=["tensorboard"])
    assert not (tmp_path / "run").exists()


EVERYTHING_RANDOM = {
    "train__steps": 6,
    "train__save_every": 1,
    "train__validate_every": 3,
    "train__gradient_accumulation_steps": 2,
    "optimizer__lr_scheduler": "cosine",
    "optimizer__warmup_steps": 2,
    "adapter__dropout": 0.1,
    "adapter__train_text_encoder": True,
}


@pytest.fixture(scope="module")
def straight(tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    """An uninterrupted run with schedule, accumulation and dropout."""
    with pytest.MonkeyPatch.context() as patch:
        unchecked(patch)
        return run(tiny_sd1, photos, tmp_path_factory.mktemp("straight") / "run", **EVERYTHING_RANDOM)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cuts", [(5,), (2, 4)])
def test_resume_is_bit_equal_to_an_uninterrupted_run(straight, tiny_sd1, photos, tmp_path, monkeypatch, cuts):
    folder = tmp_path / "cut"
    for number, cut in enumerate(cuts):
        with monkeypatch.context() as patch:
            interrupted_after(cut, patch)
            with pytest.raises(Cut):
                train.resume(folder) if number else run(tiny_sd1, photos, folder, **EVERYTHING_RANDOM)
    resumed = train.resume(folder)

    assert same_adapter(straight, resumed)
    rates = [[(e["step"], e["learning_rate"]) for e in events(f, "step")] for f in (straight.folder, resumed.folder)]
    assert dict(rates[0]) == dict(rates[1]) and len(dict(rates[0])) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_resume_uses_the_runs_number_of_threads(tiny_sd1, photos, tmp_path, monkeypatch):
    now = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with monkeypatch.context() as patch:
            interrupted_after(1, patch)
            with pytest.raises(Cut):
                run(tiny_sd1, photos, tmp_path / "run", train__steps=2, train__save_every=1)
        torch.set_num_threads(1)
        with pytest.raises(train.Stopped):
            train.resume(tmp_path / "run", stop=lambda: True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(now)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_one_base_is_in_memory_at_a_time(tiny_sd1, photos, tmp_path, monkeypatch, checkpointing):
    load, bases, others = families.load, [], []

    def counted(*args):
        others.append(sum(part() is not None for part in bases))
        family = load(*args)
        bases.extend(weakref.ref(part) for part in family.denoiser.modules())
        return family

    monkeypatch.setattr(families, "load", counted)
    settings = {"output__formats": ("kohya", "diffusers", "peft"), "memory__gradient_checkpointing": checkpointing}
    gc.disable()  # so that no object is freed by chance
    try:
        run(tiny_sd1, photos, tmp_path / "run", train__steps=2, **settings)
    finally:
        gc.enable()
    assert others == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_sampling_and_validation_do_not_disturb_training(plain, tiny_sd1, photos, tmp_path):
    state = torch.get_rng_state()
    busy = run(tiny_sd1, photos, tmp_path / "busy", sample__every=1, train__validate_every=1, train__save_every=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_adapter(plain, busy)


def updates_in(precision: str, base: Path, photos: Path, folder: Path) -> torch.Tensor:
    """Return the up factors after four steps."""
    result = run(base, photos, folder, train__save_every=4, memory__mixed_precision=precision)
    tensors = load_file(result.adapter)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_up" in name])


@pytest.fixture(scope="module")
def in_full_precision(tiny_sd1: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        unchecked(patch)
        return updates_in("fp32", tiny_sd1, photos, tmp_path_factory.mktemp("fp32") / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_base_in_half_precision_trains_a_similar_adapter(in_full_precision, tiny_sd1, photos, tmp_path, precision):
    half = updates_in(precision, tiny_sd1, photos, tmp_path / "run")
    assert torch.cosine_similarity(in_full_precision, half, dim=0) > 0.98


def test_out_of_memory_in_a_step_gives_advice(tiny_sd1, photos, tmp_path, monkeypatch):
    def full(self, index):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LossStep, "loss", full)
    with pytest.raises(LorakitError) as caught:
        run(tiny_sd1, photos, tmp_path / "run")
    assert str(caught.value) == (
        "step 1: not enough memory on the device; cheapest first, set memory.gradient_checkpointing = true, "
        "memory.base_storage = 'nf4', train.batch_size = 1 with train.gradient_accumulation_steps = 2, "
        "or a lower data.resolution (now 64)"
    )


def test_a_run_that_cannot_begin_leaves_no_folder(tiny_sd1, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for base, folder in ((tmp_path / "none", photos), (tiny_sd1, empty)):
        settings = {"model.base": str(base), "data.folder": str(folder), "data.name": "sks toy", "train.steps": 1}
        with pytest.raises(LorakitError):
            train.train(config.load(None, settings))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_quantized_base_is_trained_reported_and_checked(plain, tiny_sd1, photos, tmp_path):
    small = run(tiny_sd1, photos, tmp_path / "small", memory__base_storage="nf4")
    messages = [event["message"] for event in events(tmp_path / "small", "message")]
    assert "device: cpu (1 thread), base in float32 (the UNet's weights kept in nf4), adapter in float32" in messages
    assert all(finding.passed for finding in small.findings)
    ups = [load_file(result.adapter) for result in (plain, small)]
    off = [torch.dist(ups[0][name], ups[1][name]) / ups[0][name].norm() for name in ups[0] if "lora_up" in name]
    assert 1e-4 < torch.stack(off).mean() < 1


def test_out_of_memory_before_the_first_step_gives_advice(tiny_sd1, photos, tmp_path, monkeypatch):
    def full(*args, **named):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(families, "load", full)
    with pytest.raises(LorakitError, match=r"^loading the base: not enough memory on the device; cheapest first, set "):
        run(tiny_sd1, photos, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))["state"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_swapping_two_captions_changes_the_adapter(plain, tiny_sd1, photos, tmp_path):
    swapped = shutil.copytree(photos, tmp_path / "photos")
    for here, there in (("0.txt", "1.txt"), ("1.txt", "0.txt")):
        shutil.copy(photos / here, swapped / there)
    assert not same_adapter(plain, run(tiny_sd1, swapped, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_each_epoch_has_every_photo_once_with_caption_and_trigger(tiny_sd1, photos, tmp_path, monkeypatch):
    names: list[str] = []
    texts: list[str] = []
    instance = LossStep._instance_term

    def spy(self, batch):
        names.extend(self.encoded.dataset.names(batch.bucket)[i] for i in batch.entries.tolist())
        texts.extend(self.encoded.dataset.texts[i] for i in batch.text_rows.tolist())
        return instance(self, batch)

    monkeypatch.setattr(LossStep, "_instance_term", spy)
    run(tiny_sd1, photos, tmp_path / "run", train__steps=None, train__epochs=2, train__validate_every=100)
    assert sorted(names) == sorted([f"{n}.png" for n in range(5)] * 2)
    assert all("sks" in text.split() for text in texts)
    by_name = dict(zip(names, texts, strict=True))
    assert by_name["0.png"] == "a photo of a sks toy on a beach" and by_name["1.png"] == "a sks toy in the snow"


def test_a_broken_photo_stops_the_run_before_the_base_is_loaded(tiny_sd1, photos, tmp_path, monkeypatch):
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "9.jpg").write_bytes(b"not a picture")
    monkeypatch.setattr(latents, "build", lambda *a, **k: pytest.fail("the photos were encoded"))
    with pytest.raises(LorakitError, match=r"9\.jpg"):
        run(tiny_sd1, photos, tmp_path / "run")


def test_resume_without_a_checkpoint_is_refused(tmp_path, tiny_sd1, photos):
    with pytest.raises(LorakitError, match="not a run folder"):
        train.resume(photos)


@pytest.mark.slow
def test_ctrl_c_saves_exports_and_exits_130(tiny_sd1, photos, tmp_path):
    folder = tmp_path / "run"
    never = {"train__steps": 5000, "train__save_every": 5000, "train__validate_every": 5000, "sample__every": 5000}
    settings = options(tiny_sd1, photos, folder, **never)
    texts_of_values = {key: json.dumps(value) for key, value in settings.items()}
    sets = [
        f"--set={key}={value}" for key, value in texts_of_values.items() if key not in ("data.folder", "output.folder")
    ]
    process = program.start(["train", str(photos), "--output", str(folder), *sets], tmp_path / "output")
    for _ in range(6000):
        if (folder / "log.jsonl").exists() and events(folder, "step"):
            break
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, output = process.wait(600), (tmp_path / "output").read_text()
    assert code == 130, output
    assert "Traceback" not in output
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None and int(newest.name.removeprefix("step-")) > 0
    exported = list(folder.glob("*.safetensors"))
    assert len(exported) == 1 and all(torch.isfinite(t).all() for t in load_file(exported[0]).values())
    assert json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"] == "stopped"
