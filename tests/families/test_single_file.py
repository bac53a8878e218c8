"""Tests of single-file bases: every tensor's place, and family and prediction type from keys, shapes and metadata."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors_by_hand
import small_models
import tiny
import torch
from refusal import refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.config import ModelConfig
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families import ldm, single_file

FAMILIES = ("sd1", "sd2", "sdxl")
U = "model.diffusion_model."


@pytest.fixture(scope="module")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Path]]:
    """Family -> pipeline, its folder in diffusers layout, its single file."""
    room = tmp_path_factory.mktemp("whole")
    bases = {}
    for family in FAMILIES:
        pipeline = small_models.small(family, room / family)
        bases[family] = (
            pipeline,
            room / family,
            small_models.write(room / f"{family}.safetensors", family, pipeline),
        )
    return bases


def describe(file: Path, folder: Path | None = None, **options: Any) -> families.BaseInfo:
    return families.describe(ModelConfig(base=str(file), tokenizer=str(folder or ""), **options))


# -- the writer, the reader, and diffusers' own converters ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_has_the_weights_of_the_folder_it_was_written_from(family: str, base_files: Any) -> None:
    _, folder, file = base_files[family]
    there, here = families.describe(folder), describe(file, folder)
    assert (here.layers, here.untrained_layers, here.cross_dim) == (
        there.layers,
        there.untrained_layers,
        there.cross_dim,
    )
    assert (here.downscale, here.max_tokens, here.latent_channels) == (8, 77, 4)
    assert (here.family, here.loader) == (family, "sdxl" if family == "sdxl" else "sd")
    one, other = (families.load(info, "cpu", torch.float32) for info in (there, here))
    parts = [(one.vae, other.vae), *zip(one.modules().values(), other.modules().values(), strict=True)]
    for left, right in parts:
        expected, actual = left.state_dict(), right.state_dict()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    texts = ["a photo of sks toy", "", "sks " * 99]
    conditions = [loaded.encode_text(texts) for loaded in (one, other)]
    assert torch.equal(*(condition["encoder_hidden_states"] for condition in conditions))
    noisy, steps = torch.randn((3, 4, 8, 8)), torch.tensor([1, 500, 999])
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 3)
    if family == "sdxl":
        assert torch.equal(*(condition["pooled"] for condition in conditions))
        conditions = [condition.with_rows(time_ids=ids) for condition in conditions]
    with torch.no_grad():
        predictions = [f.predict(noisy, steps, c) for f, c in zip((one, other), conditions, strict=True)]
    # Bits may differ, because kernels round by the alignment of the weights in memory.
    torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-5)
    pixels = torch.rand((1, 3, 64, 64)) * 2 - 1
    torch.testing.assert_close(one.encode_image(pixels)[0], other.encode_image(pixels)[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(one.prediction.alphas_cumprod, other.prediction.alphas_cumprod)
    assert type(one.pipeline()) is type(other.pipeline())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converters_give_the_same_weights(family: str, base_files: Any) -> None:
    """The tests' writer and the loader's table both agree with diffusers' converters."""
    from diffusers.loaders import single_file_utils as theirs

    pipeline, _, file = base_files[family]
    tensors = load_file(file)
    header = safetensors_header.read(file)
    ours = {part: dict(ldm.tensors(header, slots)) for part, slots in ldm.read(header).parts.items()}
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(pipeline.unet.config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config)),
    }
    if family == "sd1":
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    elif family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            pipeline.text_encoder_2, dict(tensors), prefix
        )
    for part, expected in converted.items():
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith("position_ids")}
        assert expected.keys() == ours[part].keys()
        assert all(torch.equal(expected[name], ours[part][name]) for name in expected), part


@pytest.mark.parametrize("family", FAMILIES)
def test_placing_a_folder_is_the_inverse_of_reading_a_file(family: str, base_files: Any) -> None:
    read = ldm.read(safetensors_header.read(base_files[family][2])).parts
    shapes = {part: {name: slot.shape for name, slot in slots.items()} for part, slots in read.items()}
    assert ldm.place(family, shapes) == read


def test_names_of_the_real_models_equal_published_lists() -> None:
    """With sgm block names, kohya's names equal LDM's with dots replaced by underscores. Frozen lists at true
    dimensions have every layer."""
    lists = Path(__file__).parents[1] / "formats" / "keys"
    for name, family in {"sd15": "sd1", "sd2": "sd2", "sdxl": "sdxl"}.items():
        with torch.device("meta"):
            model = small_models.unet(family)
        table = ldm.place(family, {"unet": {k: tuple(v.shape) for k, v in model.state_dict().items()}, **_REST[family]})
        key_names = {
            f"unet.{ours.removesuffix('.weight')}": slot.key.removeprefix(U).removesuffix(".weight").replace(".", "_")
            for ours, slot in table["unet"].items()
            if ours.endswith(".weight")
        }
        text = gzip.decompress((lists / f"{name}.tsv.gz").read_bytes()).decode()
        rows = [line.split("\t") for line in text.splitlines()]
        expected = {row[0]: row[1:3] for row in rows if row[0].startswith("unet.")}
        for ours, spellings in expected.items():
            assert f"lora_unet_{key_names[ours]}" in spellings, ours


PUBLISHED: dict[str, dict[str, Any]] = {
    "sd1": {"words": (49408, 768, 12), "heads": 12, "side": 64, "text_encoder": {"hidden_act": "quick_gelu"}},
    "sd2": {"words": (49408, 1024, 23), "heads": 16, "side": 64, "text_encoder": {"hidden_act": "gelu"}},
    "sdxl": {
        "words": (49408, 768, 12),
        "heads": 12,
        "side": 128,
        "text_encoder_2": {"hidden_act": "gelu", "hidden_size": 1280, "projection_dim": 1280, "pad_token_id": 0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_of_the_real_models_equal_the_published_ones(family: str) -> None:
    """Configurations that follow from shapes alone equal the published ones, and models built from them have the same
    tensors."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    published = PUBLISHED[family]
    words, width, depth = published["words"]
    with torch.device("meta"):
        parts: dict[str, Any] = {"unet": small_models.unet(family), "vae": small_models.vae(family)}
        parts["text_encoder"] = small_models.text(
            small_models.CLIPTextModel, words, width, depth, openclip=family == "sd2"
        )
        if family == "sdxl":
            parts["text_encoder_2"] = small_models.text(
                small_models.CLIPTextModelWithProjection, words, 1280, 32, openclip=True
            )
    slots = {
        part: {
            name if part in ("unet", "vae") or name.startswith("text_") else f"text_model.{name}": ldm.Slot(
                "", tuple(t.shape)
            )
            for name, t in model.state_dict().items()
        }
        for part, model in parts.items()
    }
    prediction = ldm.Prediction("epsilon", False, "", certain=True)
    configs = single_file.configs(ldm.Checkpoint(family, slots, prediction))
    unet, expected = configs["unet"], small_models.UNETS[family]
    assert unet["sample_size"] == published["side"] and (unet["in_channels"], unet["layers_per_block"]) == (4, 2)
    for name, value in expected.items():
        settings = unet[name]
        assert (tuple(settings) if isinstance(settings, list) else settings) == value, name
    assert configs["vae"]["block_out_channels"] == [128, 256, 512, 512]
    assert configs["vae"]["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)
    first = configs["text_encoder"]
    assert (first["vocab_size"], first["hidden_size"], first["num_hidden_layers"]) == (words, width, depth)
    assert (first["num_attention_heads"], first["intermediate_size"]) == (published["heads"], 4 * width)
    for part in parts:
        assert configs[part].items() >= published.get(part, {}).items()
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel.from_config(unet), "vae": AutoencoderKL.from_config(configs["vae"])}
    for part, model in models.items():
        shapes = {name: t.shape for name, t in model.state_dict().items()}
        assert shapes == {name: t.shape for name, t in parts[part].state_dict().items()}


_REST: dict[str, dict[str, Any]] = {
    family: {part: {} for part in ldm.layout_of(family).parts if part != "unet"} for family in FAMILIES
}


# -- family and prediction type -------------------------------------------------------------------------------------


def with_extra(base_files: Any, family: str, path: Path, extra: dict[str, Any], **metadata: str) -> Path:
    return small_models.write(path / "x.safetensors", family, base_files[family][0], extra=extra, metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "extra", "metadata", "expected", "words"),
    [
        ("sd1", [], {}, ("epsilon", False), "as nothing in the file says otherwise; if that is wrong, set model.pred"),
        ("sdxl", ["v_pred"], {}, ("v_prediction", False), "as its key v_pred says"),
        ("sdxl", ["v_pred", "ztsnr"], {}, ("v_prediction", True), "with zero terminal SNR, as its key v_pred says"),
        ("sd2", [], {"modelspec.prediction_type": "v"}, ("v_prediction", False), "as its metadata says (v)"),
        ("sd2", [], {"modelspec.prediction_type": "epsilon"}, ("epsilon", False), "as its metadata says (epsilon)"),
        (
            "sd2",
            [],
            {"modelspec.architecture": "stable-diffusion-v2-768-v"},
            ("v_prediction", False),
            "as its metadata says (768-v)",
        ),
        (
            "sd2",
            [],
            {},
            ("epsilon", False),
            "spreads by 0.000, not above 0.09; if that is wrong, set model.p",
        ),
    ],
)
def test_the_prediction_type_is_read_and_reported(
    family: str, extra: list[str], metadata: dict[str, str], expected: Any, words: str, base_files: Any, tmp_path: Path
) -> None:
    file = with_extra(base_files, family, tmp_path, {key: torch.zeros(0) for key in extra}, **metadata)
    info = describe(file)
    assert (info.prediction_type, bool(info.configs["scheduler"].get("rescale_betas_zero_snr"))) == expected
    note, _ = info.notes
    assert note.startswith(f"prediction type: {expected[0]}") and words in note


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_prediction_type_of_sd2_follows_from_the_spread_of_a_bias(
    dtype: torch.dtype, base_files: Any, tmp_path: Path
) -> None:
    """A 512-base and a 768-v model have the same keys and shapes. lorakit decides by ComfyUI's rule."""
    pipeline = base_files["sd2"][0]
    bias = pipeline.unet.up_blocks[-1].attentions[-1].transformer_blocks[0].norm1.bias
    original = bias.detach().clone()
    try:
        for spread, kind in ((0.05, "epsilon"), (0.2, "v_prediction")):
            bias.data = spread * torch.tensor([1.0, -1.0] * (len(bias) // 2))
            file = small_models.write(tmp_path / "x.safetensors", "sd2", pipeline, dtype)
            info = describe(file)
            assert info.prediction_type == kind
            assert f"spreads by {spread:.3f}, {'not ' * (kind == 'epsilon')}above 0.09" in info.notes[0]
    finally:
        bias.data = original


def test_the_option_overrides_the_prediction_type(base_files: Any) -> None:
    _, folder, file = base_files["sdxl"]
    for base in (file, folder):
        plain = families.describe(base)
        info = families.describe(ModelConfig(base=str(base), prediction_type="v_prediction_zero_snr"))
        assert info.prediction_type == "v_prediction" and info.hash != plain.hash
        assert info.notes[-1] == (
            "prediction type: v_prediction_zero_snr, as model.prediction_type says; the base itself says epsilon"
        )
        assert not any("if that is wrong" in note for note in info.notes)
        same = families.describe(ModelConfig(base=str(base), prediction_type="epsilon"))
        assert (same.hash, same.prediction_type) == (plain.hash, "epsilon")
    info = describe(file, folder, prediction_type="v_prediction_zero_snr")
    assert families.load(info, "cpu", torch.float32).prediction.alphas_cumprod[-1] == 0


@pytest.mark.slow
def test_every_common_precision_is_read(base_files: Any, tmp_path: Path) -> None:
    pipeline, folder, _ = base_files["sd1"]
    weight = pipeline.unet.conv_in.weight.detach()
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        file = small_models.write(tmp_path / "x.safetensors", "sd1", pipeline, dtype)
        family = families.load(describe(file, folder), "cpu", torch.float32)
        assert torch.equal(family.denoiser.conv_in.weight, weight.to(dtype).float())


def test_a_file_may_be_overwritten_after_loading(base_files: Any, tmp_path: Path) -> None:
    """The file is not memory-mapped, so loaded weights stay unchanged."""
    pipeline, folder, _ = base_files["sd1"]
    file = small_models.write(tmp_path / "x.safetensors", "sd1", pipeline)
    family = families.load(describe(file, folder), "cpu", torch.float32)
    before = family.denoiser.conv_in.weight.clone()
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(family.denoiser.conv_in.weight, before)


def test_the_hash_covers_the_content_and_not_the_name(base_files: Any, tmp_path: Path) -> None:
    file = base_files["sd1"][2]
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(file.read_bytes())
    assert describe(copy).hash == describe(file).hash
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for name, tensor in tensors.items():
        if name.startswith(U) and tensor.is_floating_point():
            tensors[name] = tensor * 1.001
    save_file(tensors, copy, metadata=metadata)
    assert describe(copy).hash != describe(file).hash


def test_early_files_without_text_model_in_their_keys_are_read(base_files: Any, tmp_path: Path) -> None:
    _, folder, file = base_files["sd1"]
    tensors = {name.replace(".transformer.text_model.", ".transformer."): t for name, t in load_file(file).items()}
    save_file(tensors, tmp_path / "early.safetensors")
    actual, expected = describe(tmp_path / "early.safetensors", folder), describe(file, folder)
    assert actual.layers == expected.layers
    families.load(actual, "cpu", torch.float32)


def test_sd2_with_sgms_key_names_is_sd2(base_files: Any, tmp_path: Path) -> None:
    _, folder, file = base_files["sd2"]
    prefixes = "cond_stage_model.model.", "conditioner.embedders.0.model."
    tensors = {name.replace(*prefixes): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, tmp_path / "sgm.safetensors")
    assert describe(tmp_path / "sgm.safetensors", folder).layers == describe(file, folder).layers


def test_averages_and_buffers_of_training_are_ignored(base_files: Any, tmp_path: Path) -> None:
    extra = {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3), "betas": torch.zeros(1000)}
    file = with_extra(base_files, "sd1", tmp_path, extra)
    assert describe(file).layers == describe(base_files["sd1"][2]).layers


# -- the tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_comes_from_the_option_or_beside_the_file(base_files: Any, tmp_path: Path) -> None:
    _, folder, file = base_files["sd1"]
    assert (
        describe(file, folder).tokenizer() == describe(file, folder / "tokenizer").tokenizer() == folder / "tokenizer"
    )
    copy = tmp_path / "people.safetensors"
    copy.symlink_to(file)
    tiny.save_tokenizer(tmp_path / "tokenizer")
    assert describe(copy).tokenizer() == tmp_path / "tokenizer"


def test_an_unfit_tokenizer_is_refused_with_the_option(base_files: Any, tmp_path: Path) -> None:
    _, folder, file = base_files["sd1"]
    other = tmp_path / "other" / "tokenizer"
    tiny.save_tokenizer(other)
    words = json.loads((other / "vocab.json").read_text(encoding="utf-8"))
    (other / "vocab.json").write_text(json.dumps(words | {"one-more": len(words)}), encoding="utf-8")
    with pytest.raises(LorakitError, match=r"knows 524 words where its text encoder has 523: set model\.tokenizer"):
        describe(file, other)
    empty = tmp_path / "empty"
    empty.mkdir()
    words = refusal(file, tokenizer=str(empty))
    assert "vocab.json is missing in" in words and "model.tokenizer must name a folder with both" in words
    assert refusal(file, tokenizer=str(tmp_path / "no")) == f"model.tokenizer: {tmp_path / 'no'} does not exist"
    assert "has its own tokenizer" in refusal(folder, tokenizer=str(folder))


@pytest.mark.slow
def test_each_encoder_has_its_own_padding_token(base_files: Any) -> None:
    for family, expected in {"sd1": [tiny.SPECIAL[1]], "sd2": ["!"], "sdxl": [tiny.SPECIAL[1], "!"]}.items():
        _, folder, file = base_files[family]
        loaded = families.load(describe(file, folder / "tokenizer"), "cpu", torch.float32)
        tokenizers = loaded.tokenizers if family == "sdxl" else [loaded.tokenizer]
        assert [tokenizer.pad_token for tokenizer in tokenizers] == expected


# -- other models and damaged files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"{U}double_blocks.0.img_attn.qkv.weight"], "is a FLUX.1 model; lorakit trains"),
        ([f"{U}x.weight", "noise_augmentor.time_embed.0.weight"], "is an unCLIP model"),
        ([f"{U}x.weight", "edm_mean"], "is trained with EDM's noise"),
        ([f"{U}x.weight", "edm_vpred.sigma_max"], "is trained with EDM's noise"),
        (
            [f"{U}label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
            "is SDXL's refiner",
        ),
        ([f"{U}x.weight", "first_stage_model.quant_conv.weight"], "lacks its text encoder (cond_stage_model.*, cond"),
    ],
)
def test_other_models_in_one_file_are_named(names: list[str], words: str, tmp_path: Path) -> None:
    file = safetensors_by_hand.write(tmp_path / "file.safetensors", dict.fromkeys(names, (1, 1)))
    assert f"file.safetensors {words}" in refusal(file)


def test_a_missing_vae_and_an_unknown_tensor_are_named(base_files: Any, tmp_path: Path) -> None:
    tensors = load_file(base_files["sd1"][2])
    path = tmp_path / "x.safetensors"
    save_file({name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}, path)
    assert "x.safetensors lacks its vae (first_stage_model.*): get the whole checkpoint" in refusal(path)
    save_file(tensors | {f"{U}temporal.weight": torch.zeros(1)}, path)
    assert f"has a tensor {U}temporal.weight that Stable Diffusion does not have" in refusal(path)


def test_a_tensor_of_the_wrong_shape_is_found_before_it_is_loaded(base_files: Any, tmp_path: Path) -> None:
    _, folder, file = base_files["sd1"]
    tensors = load_file(file)
    save_file(tensors | {f"{U}out.2.weight": torch.zeros(4, 8, 3, 3)}, tmp_path / "x.safetensors")
    words = "has unet.conv_out.weight in the shape 4x8x3x3 where the rest of the file has 4x32x3x3: get the base again"
    assert words in refusal(tmp_path / "x.safetensors", tokenizer=str(folder))
    tensors.pop("cond_stage_model.transformer.text_model.final_layer_norm.weight")
    save_file(tensors, tmp_path / "x.safetensors")
    words = "base x lacks text_encoder.text_model.final_layer_norm.weight: get the base again"
    assert words in refusal(tmp_path / "x.safetensors", tokenizer=str(folder))


def test_an_incomplete_download_is_reported_with_its_size(base_files: Any, tmp_path: Path) -> None:
    content = base_files["sd1"][2].read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    assert "(50 %): download it again" in refusal(tmp_path / "half.safetensors")


def test_describing_a_file_needs_no_torch(base_files: Any) -> None:
    import subprocess
    import sys

    program = (
        f"import sys; from lorakit import families; info = families.describe({str(base_files['sd2'][2])!r}); "
        "print(info.family, [m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("sd2 []\n", "")
