"""Tests of Stable Diffusion 3, a family without a UNet, against diffusers: from the formula to a checked adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sd3
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from power import Cut, interrupted_after
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import lorakit
from lorakit import config, families, formats
from lorakit.adapters import targets
from lorakit.core.errors import LorakitError
from lorakit.data import checks
from lorakit.families.prediction import Flow
from lorakit.formats import inspect, keys
from lorakit.formats.edit import extract, merge_folder
from lorakit.inference import sampling
from lorakit.runs import plan
from lorakit.training import run as train

TEXTS = ["a photo of sks toy", "", "a very long text " * 30]
# The published configuration of 3.5 medium (stabilityai/stable-diffusion-3.5-medium, transformer/config.json).
MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.save_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="module")
def sd3(folder: Path) -> Any:
    return families.load(families.describe(folder), "cpu", torch.float32)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    loaded = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(draw.integers(0, 255, (72, 90, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return place


def options(base: Path, photos: Path, folder: Path, **changes: object) -> dict[str, object]:
    table: dict[str, object] = {
        "model.base": str(base),
        "data.folder": str(photos),
        "data.name": "sks toy",
        "data.resolution": 64,
        "output.folder": str(folder),
        "output.formats": ("diffusers", "peft", "kohya"),
        "train.steps": 4,
        "train.save_every": 2,
        "train.validate_every": 4,
        "sample.every": 4,
        "train.prior": "teacher",
        "adapter.target_modules": "linear",
        "adapter.train_text_encoder": True,
        "optimizer.learning_rate": 1e-3,
        "sample.steps": 2,
        "sample.at_start": False,
        "sample.at_end": False,
        "train.validate_at_end": False,
    }
    return table | {key.replace("__", "."): value for key, value in changes.items()}


@pytest.fixture(scope="module")
def result(folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> train.Result:
    return train.train(config.load(None, options(folder, photos, tmp_path_factory.mktemp("runs") / "run")))


def test_the_folder_is_described(folder: Path) -> None:
    info = families.describe(folder)
    assert (info.family, info.loader, info.prediction_type) == ("sd3", "sd3", "flow_prediction")
    assert (info.latent_channels, info.downscale, info.max_tokens, info.cross_dim) == (16, 8, 77, 80)
    assert info.text_tokens == 77 + 256
    assert set(info.bytes) == {"unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    # A patch has two latents per side, and a latent eight pixels.
    assert info.bucket_multiple == 16
    assert info.untrained_layers == {f"unet.transformer_blocks.{tiny_sd3.BLOCKS - 1}.attn.add_q_proj"}


def test_sd3_texts_are_encoded_as_by_the_pipeline(sd3: Any, pipeline: Any) -> None:
    expected, _, pooled, _ = pipeline.encode_prompt(TEXTS, None, None, "cpu", do_classifier_free_guidance=False)
    condition = sd3.encode_text(TEXTS)
    torch.testing.assert_close(condition["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(condition["pooled"], pooled, rtol=1e-4, atol=1e-4)
    assert expected.shape == (3, 77 + 256, 80)


def test_without_t5_its_states_are_zeros_as_in_the_pipeline(tmp_path: Path) -> None:
    base = tiny_sd3.save_sd3(tmp_path / "base", t5=False)
    info = families.describe(base)
    assert info.notes == ("without text_encoder_3",)
    condition = families.load(info, "cpu", torch.float32).encode_text(TEXTS)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    loaded = StableDiffusion3Pipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True, **absent)
    expected = loaded.encode_prompt(TEXTS, None, None, "cpu", do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(condition["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-4)
    assert torch.count_nonzero(expected[:, 77:]) == 0


def test_prediction_is_the_transformers_output_on_the_flow(sd3: Any) -> None:
    """The expected input is z = (1 - s) x + s n at time 1000 s, computed without alpha_bar."""
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((2, 16, 8, 8), generator=draw) for _ in range(2))
    timesteps = torch.tensor([100.0, 900.0])
    sigma = timesteps / 1000
    straight = (1 - sigma).reshape(-1, 1, 1, 1) * latents + sigma.reshape(-1, 1, 1, 1) * noise
    condition = sd3.encode_text(["a photo", "sks"])
    with torch.no_grad():
        expected = sd3.denoiser(straight, condition["encoder_hidden_states"], condition["pooled"], 1000 * sigma).sample
        noisy = sd3.prediction.add_noise(latents, noise, timesteps)
        actual = sd3.predict(noisy, timesteps, condition)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    target = sd3.prediction.target(latents, noise, timesteps)
    assert torch.equal(target, noise - latents)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_follow_the_distribution_of_diffusers_script(shift: float) -> None:
    """Compare with diffusers' training script: logit-normal positions in the scheduler's shifted table."""
    table = tiny_sd3.FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    places = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    nearest = table[(places * 1000).long()].sort().values
    shares = torch.arange(1000, dtype=torch.float64) / 1000
    ours = Flow(shift).timesteps_at(shares) / 1000
    assert (ours.diff() > 0).all() and ours.dtype is torch.float32
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(ours[int(1000 * quantile)] - nearest[int(len(nearest) * quantile)]) < 0.01


def test_samples_equal_diffusers(sd3: Any, pipeline: Any) -> None:
    settings = config.load(None, {"train.steps": 1, "sample.steps": 3, "sample.guidance": 4.0, "sample.seed": 7}).sample
    (ours,) = sampling.draw(sd3, ["a photo of sks toy"], settings, 64)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(7))
    theirs = pipeline(
        "a photo of sks toy", width=64, height=64, num_inference_steps=3, guidance_scale=4.0, latents=noise
    ).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert "Sampler: Euler," in ours.info["parameters"]


@pytest.mark.slow
def test_a_run_ends_with_a_checked_adapter(result: train.Result, folder: Path) -> None:
    assert all(finding.passed for finding in result.findings)
    names = {finding.name for finding in result.findings}
    assert {"diffusers in diffusers", "diffusers unet", "diffusers text encoder", "peft unet"} <= names
    # Every linear layer of attention and feed-forward in the blocks, under diffusers' names.
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    expected = {
        f"transformer.{path}"
        for path, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith("transformer_blocks.") and "norm" not in path
    }
    stems = {name.partition(".lora_")[0] for name in load_file(result.adapter)}
    assert {stem for stem in stems if stem.startswith("transformer.")} == expected
    assert sum(stem.startswith("text_encoder.") for stem in stems) == 18
    assert sum(stem.startswith("text_encoder_2.") for stem in stems) == 18
    assert {path.name for path in result.exports["peft"].iterdir()} == {"transformer", "text_encoder", "text_encoder_2"}


def test_diffusers_predicts_the_same_with_the_file(result: train.Result, folder: Path) -> None:
    """A new diffusers pipeline with the file predicts what the run's base with the adapter predicts."""
    prompt = "a photo of a sks toy"
    loaded = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    loaded.load_lora_weights(str(result.adapter.parent), weight_name=result.adapter.name)
    family = families.load(families.describe(folder), "cpu", torch.float32)
    lorakit.adapters.apply(family, formats.read(result.adapter))
    states, _, pooled, _ = loaded.encode_prompt(prompt, None, None, "cpu", do_classifier_free_guidance=False)
    noisy, timesteps = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    condition = family.encode_text([prompt])
    torch.testing.assert_close(condition["encoder_hidden_states"], states, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        theirs = loaded.transformer(noisy, states, pooled, timesteps).sample
        ours = family.predict(noisy, timesteps, condition)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_a_resumed_run_gives_the_same_bits(
    result: train.Result, folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(Cut):
            train.train(config.load(None, options(folder, photos, tmp_path / "cut")))
    resumed = train.resume(tmp_path / "cut")
    one, two = load_file(result.adapter), load_file(resumed.adapter)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_inspect_reports_which_programs_read_it(result: train.Result) -> None:
    for path in (result.adapter, result.exports["peft"]):
        report = inspect.inspect(path)
        assert report.family == "sd3" and set(report.components) == {"unet", "text_encoder", "text_encoder_2"}
    readers = inspect.inspect(result.adapter).readers
    assert [name for name, reading in readers.items() if reading.complete] == ["comfyui", "diffusers", "peft"]
    # A1111 reads only the picture's attention (query, key, value, output) of three blocks.
    assert readers["a1111"].line().startswith("unet 12/37, text_encoder 0/18, text_encoder_2 0/18; no rule for ")


def test_an_adapter_for_another_kind_of_model_is_named(tmp_path: Path) -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{stem}.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}, tmp_path / "flux.safetensors")
    report = inspect.inspect(tmp_path / "flux.safetensors")
    assert (report.model, report.family, report.readers) == ("FLUX.1", None, {})


def test_layer_names_identify_the_family(result: train.Result) -> None:
    from lorakit.formats import identify

    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(result.adapter).items()}
    assert identify.adapter_family(identify.modules(shapes), shapes, {}) == ("sd3", "names")


def test_merge_equals_base_and_adapter_and_extract_inverts_it(
    result: train.Result, folder: Path, tmp_path: Path
) -> None:
    weights = formats.read(result.adapter)
    merged = merge_folder.merge_folder(weights, folder, tmp_path / "merged")
    family = families.load(families.describe(folder), "cpu", torch.float32)
    lorakit.adapters.apply(family, weights)
    merged_base = families.load(families.describe(merged), "cpu", torch.float32)
    noisy, timesteps = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    with torch.no_grad():
        outputs = [part.predict(noisy, timesteps, part.encode_text(["sks toy"])) for part in (family, merged_base)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    back = extract.extract(folder, merged, "sd3", rank=16)
    name = "unet.transformer_blocks.0.attn.to_q"
    torch.testing.assert_close(back.layers[name].delta(), weights.layers[name].delta(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"output__formats": ("kohya",), "adapter__method": "lokr"},
            "the kohya format cannot carry this adapter: it has q, k and v",
        ),
        ({"train__timestep_shift": 3.0}, "train.timestep_shift = 3.0 is not defined for base sd3"),
        ({"train__min_snr_gamma": 5.0}, "train.min_snr_gamma is not defined for base sd3, which predicts the flow"),
        ({"adapter__new_tokens": 2}, "reads texts by T5 too, which learns no words; use an adapter"),
        ({"model__prediction_type": "epsilon"}, "predicts the flow: leave model.prediction_type"),
        ({"adapter__method": "dora"}, "the diffusers format cannot carry this DoRA"),
    ],
)
def test_unsupported_options_are_refused_before_writing(
    folder: Path, photos: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(LorakitError, match=words.replace("(", r"\(")):
        train.train(config.load(None, options(folder, photos, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_a_timestep_shift_is_allowed_with_uniform_sampling(folder: Path) -> None:
    info = families.describe(folder)
    shifted = config.load(None, {"train.steps": 1, "train.timestep_sampling": "uniform", "train.timestep_shift": 3.0})
    assert families.unsuited(info, shifted) == []


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for part in ("transformer", "tokenizer_3"):
        shutil.rmtree(copy / part)
    with pytest.raises(LorakitError, match="lacks transformer/, tokenizer_3/"):
        families.describe(copy)


def test_a_pipeline_of_diffusers_can_be_adapted(pipeline: Any) -> None:
    adapter = lorakit.attach(pipeline, config.load(None, {"train.steps": 1}).adapter)
    try:
        assert adapter.describe().keys() == {"unet"}
        assert adapter.weights().family == "sd3"
    finally:
        adapter.detach()


@pytest.mark.slow
def test_operations_at_true_size_equal_torchs_count() -> None:
    with torch.device("meta"):
        model = SD3Transformer2DModel(**MEDIUM)
        inputs = torch.empty(1, 16, 128, 128), torch.empty(1, 77 + 256, 4096), torch.empty(1, 2048)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs, torch.empty(1))
    shapes = {
        f"unet.{name.removesuffix('.weight')}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight") and tensor.ndim in (2, 4)
    }
    assert plan.forward_flop("sd3", shapes, 128, 128, 77 + 256) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    selected = targets.select("sd3", shapes, "linear", False)
    # 24 blocks have 8 projections each, the last one 7; 13 blocks have 4 more. Each has 4 other layers, the last 2.
    assert len(selected) == 24 * 8 - 1 + 13 * 4 + 24 * 4 - 2
    assert all(keys.is_read_everywhere(name) for name in selected)


def test_a_plan_needs_no_loaded_base(folder: Path, photos: Path, tmp_path: Path) -> None:
    settings = config.load(None, options(folder, photos, tmp_path / "run"))
    info = families.describe(settings.model)
    the_plan = plan.make(settings, info, checks.check(settings.data, info))
    assert the_plan.modules["unet"][0] == len(targets.select("sd3", info.layers, "linear", False))
    assert the_plan.modules.keys() == {"unet", "text_encoder", "text_encoder_2"}
    assert the_plan.memory["activations"] > 0
