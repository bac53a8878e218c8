"""Tests of samples: the recipe alone determines a picture, whatever else is drawn, and drawing changes no state."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit import __version__, adapters, config, families, formats
from lorakit.config import SampleConfig
from lorakit.core import image_grid, registry
from lorakit.core.errors import LorakitError
from lorakit.core.events import Events
from lorakit.inference import class_images, sampling

pytestmark = pytest.mark.usefixtures("copied_modules")
CPU, FLOAT = torch.device("cpu"), torch.float32
QUICK = SampleConfig(steps=3, guidance=3.0, seed=5)
PROMPTS = ["a photo of sks toy", "sks toy in the snow", "a toy"]


def family_of(base: Path, dtype: torch.dtype = FLOAT):
    return families.load(families.describe(str(base)), CPU, dtype)


@pytest.fixture(scope="module")
def family(tiny_sd1):
    """The tiny base; tests do not change it."""
    return family_of(tiny_sd1)


def noisy_adapter(family, strength: float = 0.2, seed: int = 0):
    """Return an adapter with a visible effect."""
    adapter = adapters.attach(family, config.LoraConfig(rank=2), seed=0)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, group in adapter.groups():
            for parameter in group:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * strength)
    return adapter


def arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_a_picture_does_not_depend_on_other_pictures_of_its_batch(family):
    in_one_call = sampling.draw(family, PROMPTS, QUICK, 64)
    assert arrays(in_one_call).shape == (3, 64, 64, 3) and arrays(in_one_call).std() > 1
    for number, prompt in enumerate(PROMPTS):
        alone = sampling.draw(family, [prompt], SampleConfig(steps=3, guidance=3.0, seed=5 + number), 64)
        assert np.array_equal(arrays(alone)[0], arrays(in_one_call)[number])
    assert not np.array_equal(arrays(in_one_call)[0], arrays(in_one_call)[1])


def test_width_and_height_are_in_this_order(family):
    (image,) = sampling.draw(family, ["x"], QUICK, (64, 128))
    assert image.size == (64, 128)


def test_drawing_changes_no_state(family):
    pipeline = family.pipeline()
    scheduler, unet = pipeline.scheduler, family.denoiser
    scheduler.set_timesteps(7)
    before = (torch.random.get_rng_state(), scheduler.timesteps.tolist(), dict(scheduler.config))
    unet.train()
    unet.mid_block.eval()
    flags = [part.training for part in unet.modules()]
    dtypes = {parameter.dtype for parameter in unet.parameters()}
    try:
        sampling.draw(family, ["x"], QUICK, 64)
        assert [part.training for part in unet.modules()] == flags
        assert (scheduler.timesteps.tolist(), dict(scheduler.config)) == before[1:]
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert {parameter.dtype for parameter in unet.parameters()} == dtypes
        assert torch.is_grad_enabled()
    finally:
        unet.eval()


def test_dropout_is_off_while_drawing(tiny_sd1):
    family = family_of(tiny_sd1)
    adapter = noisy_adapter(family)
    plain = arrays(sampling.draw(family, ["x"], QUICK, 64))
    for part in family.denoiser.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.9
    adapter.train(True)
    assert np.array_equal(arrays(sampling.draw(family, ["x"], QUICK, 64)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny_sd1_v", "tiny_sdxl"])
def test_samples_equal_diffusers_pictures(base, request):
    """diffusers draws the same pictures from the same noise, sampler and prompt with its own pipeline."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    folder = request.getfixturevalue(base)
    ours = sampling.draw(family_of(folder), ["sks toy"], QUICK, 64)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=FLOAT)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        "sks toy", negative_prompt="", latents=noise, num_inference_steps=3, guidance_scale=3.0, height=64, width=64
    ).images
    assert np.abs(arrays(ours) - arrays(theirs)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_similar_pictures(tiny_sd1, family, dtype):
    half = sampling.draw(family_of(tiny_sd1, dtype), ["x"], QUICK, 64)
    full = sampling.draw(family, ["x"], QUICK, 64)
    assert np.abs(arrays(half) - arrays(full)).mean() < 6


def test_a_zero_snr_base_is_sampled_from_its_last_timestep(tmp_path):
    import tiny

    family = family_of(tiny.save_sd1(tmp_path / "zero", "v_prediction", zero_snr=True))
    pipeline, name = sampling.sampling_pipeline(family)
    pipeline.scheduler.set_timesteps(3)
    assert name == "DDIM" and pipeline.scheduler.timesteps[0] == 999
    (image,) = sampling.draw(family, ["x"], QUICK, 64)
    assert "Sampler: DDIM" in image.info["parameters"]


def test_a_picture_files_metadata_has_the_recipe(family, tmp_path):
    settings = SampleConfig(steps=3, guidance=4.5, seed=5, negative_prompt="雨, blur")
    image = sampling.draw(family, PROMPTS[:2], settings, 64, adapter="sks-toy", strength=0.5)[1]
    image_grid.save(image, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as read:
        info = read.info
    title = family.info.title
    assert info["parameters"] == (
        "sks toy in the snow <lora:sks-toy:0.5>\nNegative prompt: 雨, blur\n"
        f"Steps: 3, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 4.5, Seed: 6, Size: 64x64, Model: {title}, "
        f"RNG: CPU, Version: lorakit {__version__}"
    )
    recipe = json.loads(info["lorakit"])
    expected = {"prompt": PROMPTS[1], "seed": 6, "steps": 3, "guidance": 4.5, "width": 64, "height": 64}
    expected |= {"adapter": "sks-toy", "strength": 0.5, "base": family.info.hash, "negative_prompt": "雨, blur"}
    assert {key: recipe[key] for key in expected} == expected


# -- from a file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_sd1, tmp_path_factory) -> dict[str, Path]:
    """An adapter in each format, with a config in its metadata."""
    family = family_of(tiny_sd1)
    weights = noisy_adapter(family).weights()
    settings = config.load(
        None, {"train.steps": 5, "data.name": "sks toy", "data.resolution": 64, "sample.steps": 3, "sample.seed": 5}
    )
    from lorakit.formats import metadata

    facts = metadata.build(settings, family.info, name="toy", images=4, steps=5, epochs=1, times=(0.0, 1.0))
    folder = tmp_path_factory.mktemp("exported")
    return formats.save(weights, folder, "toy", tuple(registry.FORMATS), "fp16", facts, say=lambda line, **_: None)


@pytest.mark.slow
def test_strengths_and_prompts_make_a_grid(exported, tiny_sd1, tmp_path):
    files = sampling.from_file(
        exported["kohya"], str(tiny_sd1), PROMPTS[:2], [0, 0.5, 1], QUICK, folder=tmp_path / "out", size=64
    )
    names = ["grid.png", *(f"{n:02d}-strength-{s}.png" for s in ("0", "0.5", "1") for n in (1, 2))]
    assert [file.name for file in files] == names and all(file.is_file() for file in files)
    base = sampling.draw(family_of(tiny_sd1), PROMPTS[:2], QUICK, 64)
    images = [Image.open(file) for file in files[1:]]
    assert np.array_equal(arrays(images[:2]), arrays(base))
    # Half the strength changes the picture less than full strength.
    differences = [np.abs(arrays(images[at : at + 2]) - arrays(base)).mean() for at in (2, 4)]
    assert 0 < differences[0] < differences[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", list(registry.FORMATS))
def test_every_format_draws_the_same(exported, tiny_sd1, form):
    rows = sampling.draw_weights(formats.read(exported[form]), str(tiny_sd1), ["x"], [1], QUICK, 64, name="toy")
    first = sampling.draw_weights(formats.read(exported["kohya"]), str(tiny_sd1), ["x"], [1], QUICK, 64, name="toy")
    assert np.abs(arrays(rows[0]) - arrays(first[0])).max() <= 2


def test_a_file_has_its_runs_sample_options(exported, tiny_sd1, tmp_path, monkeypatch):
    settings = sampling.recorded(exported["kohya"], {"sample.guidance": 2.0})
    assert (settings.sample.steps, settings.sample.seed, settings.sample.guidance) == (3, 5, 2.0)
    assert (settings.data.name, settings.data.resolution) == ("sks toy", 64)
    # Without prompt, size or folder, `from_file` uses the run's trigger and size and a new folder.
    monkeypatch.chdir(tmp_path)
    files = sampling.from_file(exported["kohya"], str(tiny_sd1), [], [1.0], settings.sample)
    assert files[0].parent.parent == Path("runs") and files[0].parent.name.endswith("-toy-samples")
    with Image.open(files[1]) as image:
        assert image.size == (64, 64) and "sks toy" in image.info["parameters"]


def test_a_file_of_another_program_is_drawn_with_defaults(exported, tiny_sd1, tmp_path):
    weights = replace(formats.read(exported["kohya"]), metadata={})
    formats.save(weights, tmp_path, "bare", ("kohya",), "fp16", {}, say=lambda line, **_: None)
    bare = tmp_path / "bare.safetensors"
    assert sampling.recorded(bare, {}).sample == SampleConfig()
    with pytest.raises(LorakitError, match=r"bare.safetensors does not say what its trigger is; give a --prompt"):
        sampling.from_file(bare, str(tiny_sd1), [], [1.0], QUICK)


def test_a_wrong_base_is_refused(exported, tiny_sdxl):
    with pytest.raises(LorakitError, match=r"was made for sd1 and .* is sdxl; give its --base"):
        sampling.from_file(exported["kohya"], str(tiny_sdxl), ["x"], [1.0], QUICK)


def test_existing_pictures_are_not_overwritten(exported, tiny_sd1, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(LorakitError, match="is not empty and nothing in it is overwritten; give another --output"):
        sampling.from_file(exported["kohya"], str(tiny_sd1), ["x"], [1.0], QUICK, folder=tmp_path)


# -- class images ---------------------------------------------------------------------------------------------------


def draw_class_images(family, count: int, folder: Path | None, messages: list[str] | None = None, **changes):
    arguments = {"prompt": "a photo of a toy", "sample": SampleConfig(steps=1, guidance=1.0), "side": 64, "seed": 0}
    arguments |= changes
    (text,) = sampling.embed(family, [arguments["prompt"]], arguments["sample"])
    events = Events(lambda event: messages is not None and messages.append(event.facts["message"]))
    with pytest.MonkeyPatch.context() as patch:
        if folder:
            patch.setenv("LORAKIT_CACHE", str(folder))
        group = class_images.find(family, text=text, count=count, **arguments)
        events.say(class_images.summary([group]))
        return class_images.draw(family, group, events=events)


def test_texts_are_embedded_without_the_unet_and_pictures_drawn_without_text_encoders(family, monkeypatch):
    moves: list[tuple[str, ...]] = []
    monkeypatch.setattr(family, "release", lambda *names: moves.append(("release", *names)))
    monkeypatch.setattr(family, "acquire", lambda *names: moves.append(("acquire", *names)))
    sampling.draw(family, ["a toy"], QUICK, 64)
    assert list(dict.fromkeys(moves))[:4] == [
        ("release", "unet", "vae"),
        ("acquire", "text_encoders"),
        ("release", "text_encoders"),
        ("acquire", "unet", "vae"),
    ]


def test_embedded_texts_are_not_embedded_again(family, monkeypatch):
    images = sampling.draw(family, ["a toy", "a dog"], QUICK, 64)
    texts = sampling.embed(family, ["a toy", "a dog"], QUICK)
    monkeypatch.setattr(sampling, "embed", None)
    repeat = sampling.draw(family, ["a toy", "a dog"], QUICK, 64, embeddings=texts)
    assert [image.tobytes() for image in repeat] == [image.tobytes() for image in images]


def image_numbers(monkeypatch) -> list[int]:
    """Return a list that collects the number of pictures of each pipeline call."""
    counts: list[int] = []
    original = sampling.draw_batch

    def counted(family, pipeline, text, seeds, *rest):
        counts.append(len(seeds))
        return original(family, pipeline, text, seeds, *rest)

    monkeypatch.setattr(sampling, "draw_batch", counted)
    return counts


def test_class_images_are_drawn_once_and_counted(family, tmp_path, monkeypatch):
    counts = image_numbers(monkeypatch)
    messages: list[str] = []
    first = draw_class_images(family, 7, tmp_path, messages)
    assert len(first) == sum(counts) == 7
    repeat = draw_class_images(family, 7, tmp_path, messages)
    assert np.array_equal(arrays(first), arrays(repeat)) and sum(counts) == 7
    assert "0 of 7 in the cache, 7 to draw" in messages[0] and "7 of 7 in the cache, 0 to draw" in messages[1]
    assert len({image.tobytes() for image in first}) == 7


def test_after_an_interruption_at_7_of_20_13_are_drawn(family, tmp_path, monkeypatch):
    uninterrupted = draw_class_images(family, 20, tmp_path / "whole")
    monkeypatch.setattr(class_images, "LARGEST_BATCH", 7)
    original, calls = sampling.draw_batch, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(sampling, "draw_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_class_images(family, 20, tmp_path / "cut")
    monkeypatch.setattr(sampling, "draw_batch", original)
    counts = image_numbers(monkeypatch)
    after = draw_class_images(family, 20, tmp_path / "cut")
    assert sum(counts) == 13 and len(after) == 20
    # The same pictures, although batches of another size round differently in the last bit.
    assert np.abs(arrays(after) - arrays(uninterrupted)).max() <= 1


def test_a_damaged_class_image_is_drawn_again(family, tmp_path, monkeypatch):
    first = draw_class_images(family, 3, tmp_path)
    (file,) = tmp_path.glob("class-images/*/00001.png")
    raw, pixels = file.read_bytes(), image_grid.read(file)
    counts, lines = image_numbers(monkeypatch), []
    for damage in ("cut", "one pixel"):
        file.write_bytes(raw[:100])
        if damage == "one pixel":  # a bit flipped on disk that PNG's own checksum does not detect
            changed = pixels.copy()
            changed.putpixel((0, 0), (pixels.getpixel((0, 0))[0] ^ 1, 0, 0))
            image_grid.save(changed, file)
        repeat = draw_class_images(family, 3, tmp_path, lines)
        assert np.abs(arrays(repeat) - arrays(first)).max() <= 1
        assert lines[-1].endswith("; 1 in the cache were damaged and are drawn again")
    assert counts == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a photo of a dog"},
        {"side": 128},
        {"seed": 1},
        {"sample": SampleConfig(steps=2, guidance=1.0)},
        {"sample": SampleConfig(steps=1, guidance=2.0)},
        {"sample": SampleConfig(steps=1, guidance=1.0, negative_prompt="x")},
    ],
)
def test_another_recipe_gives_another_set_of_class_images(family, tmp_path, monkeypatch, change):
    draw_class_images(family, 1, tmp_path)
    counts = image_numbers(monkeypatch)
    draw_class_images(family, 1, tmp_path, **change)
    assert counts == [1]
    assert len(list(tmp_path.glob("class-images/*"))) == 2


def test_sample_options_do_not_affect_class_images(family, tmp_path, monkeypatch):
    draw_class_images(family, 1, tmp_path)
    counts = image_numbers(monkeypatch)
    draw_class_images(family, 1, tmp_path, sample=SampleConfig(steps=1, guidance=1.0, seed=9, every=3, prompts=("y",)))
    assert counts == []


def test_the_variable_sets_the_cache_of_class_images(family, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "mine"))
    draw_class_images(family, 1, None)
    assert len(list((tmp_path / "mine" / "class-images").glob("*/00000.png"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(LorakitError, match=r"cannot keep class images in .*; set LORAKIT_CACHE"):
        draw_class_images(family, 1, None)


def test_pixels_have_the_encoders_range_and_batch_size():
    images = [Image.new("RGB", (8, 4), colour) for colour in ((0, 255, 51), (255, 0, 0), (0, 0, 0))]
    parts = list(class_images.as_pixels(images, 2))
    assert [part.shape for part in parts] == [(2, 3, 4, 8), (1, 3, 4, 8)]
    assert parts[0].dtype == torch.float32
    assert parts[0][0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, 51 / 127.5 - 1])
    assert math.isclose(parts[1].max().item(), -1.0)


@pytest.mark.slow
def test_a_runs_last_samples_equal_those_of_its_file(tiny_sd1, tmp_path):
    """The run's last sample grid and `from_file` with a newly loaded base give the same bytes, including the recipe."""
    from lorakit.training import run as train

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{number}.png")
    settings = config.load(
        None,
        {
            "model.base": str(tiny_sd1),
            "data.folder": str(photos),
            "data.name": "sks toy",
            "data.resolution": 64,
            "optimizer.learning_rate": 0.01,
            "train.steps": 2,
            "sample.steps": 3,
            "sample.seed": 4,
            "output.folder": str(tmp_path / "run"),
        },
    )
    result = train.train(settings)
    settings_of_file = sampling.recorded(result.adapter, {})
    files = sampling.from_file(
        result.adapter, str(tiny_sd1), [], [1.0], settings_of_file.sample, folder=tmp_path / "again"
    )
    last = sorted((result.folder / "samples" / "step-000002").glob("*.png"))
    assert len(last) == len(files) - 1 >= 2
    for one, two in zip(last, files[1:], strict=True):
        assert one.read_bytes() == two.read_bytes()
    first = sorted((result.folder / "samples" / "step-000000").glob("*.png"))
    assert first[0].read_bytes() != last[0].read_bytes()
