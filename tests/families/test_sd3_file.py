"""Tests of Stable Diffusion 3 as single files, with and without encoders, against diffusers' converters and folder."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import hub_server
import pytest
import safetensors_by_hand
import sd3_files
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.adapters.weights import AdapterWeights, LoraLayer
from lorakit.config import ModelConfig
from lorakit.core import safetensors_header
from lorakit.core.errors import LorakitError
from lorakit.families import ldm, text_encoders
from lorakit.families.facts import fit
from lorakit.formats.edit import merge

TEXTS = ["a photo of sks toy", "", "sks " * 99]
U = sd3_files.U


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sd3")


@pytest.fixture(scope="module")
def pipeline(room: Path) -> Any:
    return sd3_files.small(room / "folder")


@pytest.fixture(scope="module")
def file(room: Path, pipeline: Any) -> Path:
    """A single file with all encoders."""
    return sd3_files.write(room / "whole" / "incl_clips_t5xxl.safetensors", pipeline, "clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def bare(room: Path, pipeline: Any) -> Path:
    """A single file without encoders."""
    return sd3_files.write(room / "bare" / "sd3.5_medium.safetensors", pipeline)


def describe(base: Path, room: Path, **options: Any) -> families.BaseInfo:
    return families.describe(ModelConfig(base=str(base), tokenizer=str(room / "folder"), **options))


def refusal(base: Path, room: Path, **options: Any) -> str:
    with pytest.raises(LorakitError) as caught:
        describe(base, room, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state(info: families.BaseInfo) -> dict[str, dict[str, torch.Tensor]]:
    """Return component -> its loaded weights."""
    loaded = families.load(info, "cpu", torch.float32)
    return {n: m.state_dict() for n, m in {**loaded.modules(), **loaded.text_encoders, "vae": loaded.vae}.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys(), part
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part]), part


def test_the_file_has_the_weights_of_the_folder(file: Path, room: Path) -> None:
    there, here = families.describe(room / "folder"), describe(file, room)
    facts = [
        (i.layers, i.untrained_layers, i.cross_dim, i.max_tokens, i.text_tokens, i.bucket_multiple, i.latent_channels)
        for i in (there, here)
    ]
    assert facts[0] == facts[1]
    assert (here.family, here.prediction_type, here.downscale) == ("sd3", "flow_prediction", 8)
    assert "prediction type: flow_prediction, as every model of its family" in here.notes
    one, other = (families.load(info, "cpu", torch.float32) for info in (there, here))
    conditions = [base.encode_text(TEXTS) for base in (one, other)]
    for name in ("encoder_hidden_states", "pooled"):
        assert torch.equal(*(condition[name] for condition in conditions))
    noisy, steps = torch.randn((3, 16, 8, 8)), torch.tensor([1, 500, 999])
    with torch.no_grad():
        outputs = [b.predict(noisy, steps, c) for b, c in zip((one, other), conditions, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    pixels = torch.rand((1, 3, 64, 64)) * 2 - 1
    torch.testing.assert_close(one.encode_image(pixels)[0], other.encode_image(pixels)[0], rtol=1e-5, atol=1e-6)
    assert one.prediction.shift == other.prediction.shift == 3.0
    assert_same(state(there), state(here))


@pytest.mark.parametrize("kind", sd3_files.KINDS)
def test_diffusers_converter_gives_the_same_weights_for_each_kind(kind: str, tmp_path: Path) -> None:
    """3 medium has no qk norm, 3.5 large has qk norm, and 3.5 medium also has a second attention."""
    from diffusers.loaders import single_file_utils as theirs

    pipeline = sd3_files.small(tmp_path / "folder", kind)
    path = sd3_files.write(tmp_path / "x.safetensors", pipeline, "clip_l", "clip_g")
    header = safetensors_header.read(path)
    checkpoint = ldm.read(header)
    ours = dict(ldm.tensors(header, checkpoint.parts["unet"]))
    expected = theirs.convert_sd3_transformer_checkpoint_to_diffusers(
        {name: tensor for name, tensor in load_file(path).items() if name.startswith(U)}
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    info = describe(path, tmp_path)
    config, published = info.configs["unet"], pipeline.transformer.config
    assert checkpoint.ignored == () and "text_encoder_3" not in info.configs and "without text_encoder_3" in info.notes
    for name in config.keys() - {"_class_name", "sample_size"}:
        assert config[name] == (list(published[name]) if name == "dual_attention_layers" else published[name]), name
    shapes = {part: {name: slot.shape for name, slot in slots.items()} for part, slots in checkpoint.parts.items()}
    del shapes["text_encoder"]["text_projection.weight"], checkpoint.parts["text_encoder"]["text_projection.weight"]
    assert ldm.place("sd3", shapes) == checkpoint.parts


# From Stability-AI/sd3.5 mmditx.py: FIRST has the modules of a first block, LACKS those missing from the last block.
FIRST = {
    *(f"x_block.{name}" for name in ("adaLN_modulation.1", "mlp.fc1", "mlp.fc2")),
    *(f"x_block.{attention}.{name}" for attention in ("attn", "attn2") for name in ("qkv", "proj", "ln_q", "ln_k")),
    *(f"context_block.attn.{name}" for name in ("qkv", "proj", "ln_q", "ln_k")),
    *(f"context_block.{name}" for name in ("adaLN_modulation.1", "mlp.fc1", "mlp.fc2")),
}
LACKS = {"context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2"}


def test_names_of_the_real_model_equal_the_published_codes() -> None:
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)), pos_embed_max_size=384,
        )  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = {slot.key.removeprefix(U): slot for slot in ldm.place("sd3", {"unet": shapes, "vae": {}})["unet"].values()}
    modules = {key.rpartition(".")[0] for key in keys}
    for block in range(24):
        mine = {name.removeprefix(f"joint_blocks.{block}.") for name in modules if f"joint_blocks.{block}." in name}
        second = {name for name in FIRST if ".attn2." in name and block > 12}
        assert mine == FIRST - second - (LACKS if block == 23 else set()), block
    assert {name for name in modules if not name.startswith("joint_blocks.")} == {
        "", "x_embedder.proj", "context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0",
        "y_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    assert ldm.file_shape(keys["joint_blocks.0.x_block.attn.qkv.weight"]) == (3 * 1536, 1536)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["named", "beside", "comfyui", "host", "diffusers", "whole model"])
def test_encoders_are_read_from_separate_files(
    place: str, bare: Path, pipeline: Any, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models" / "checkpoints" / bare.name
    path.parent.mkdir(parents=True)
    path.symlink_to(bare)
    folder = {
        "named": tmp_path / "mine",
        "beside": path.parent / "text_encoders",
        "comfyui": tmp_path / "models" / "clip",
        "host": tmp_path / "ComfyUI" / "models" / "text_encoders",
    }.get(place, room / "folder")
    if place == "whole model":
        folder = sd3_files.write(tmp_path / "incl_clips_t5xxl.safetensors", pipeline, "clip_g", "clip_l", "t5xxl")
    elif place != "diffusers":
        sd3_files.write_encoders(folder, pipeline, "clip_l", "clip_g", "t5xxl")
        save_file({"encoder.block.0.x.weight": torch.zeros(2)}, folder / "a_other.safetensors")
    if place == "host":
        monkeypatch.setenv("LORAKIT_HOSTS", str(tmp_path / "ComfyUI"))
    info = describe(path, room, text_encoders=str(folder) if place in ("named", "diffusers", "whole model") else "")
    assert set(info.sources) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert any(note.startswith("text_encoder_2: ") for note in info.notes)
    assert_same(state(info), state(families.describe(room / "folder")))
    texts = [
        families.load(i, "cpu", torch.float32).encode_text(TEXTS) for i in (info, families.describe(room / "folder"))
    ]
    assert torch.equal(*(text["encoder_hidden_states"] for text in texts))


def test_missing_encoders_are_reported_with_advice(
    bare: Path, file: Path, room: Path, tmp_path: Path, pipeline: Any
) -> None:
    words = refusal(bare, room)
    assert (
        "has no text encoders in it, and none are beside it: set model.text_encoders to a folder with clip_l" in words
    )
    one = sd3_files.write_encoders(tmp_path / "one", pipeline, "clip_l")
    assert "has no text encoders that fit base sd3.5_medium" in refusal(bare, room, text_encoders=str(one))
    alone = one / "clip_l.safetensors"
    assert f"{alone} has no text encoders that fit" in refusal(bare, room, text_encoders=str(alone))
    assert "has its own text encoders: leave model.text_encoders" in refusal(file, room, text_encoders=str(one))
    assert "base in a single file" not in words
    with pytest.raises(LorakitError, match=r"has its own text encoders: model.text_encoders is for"):
        families.describe(ModelConfig(base=str(room / "folder"), text_encoders=str(one)))


OFFLINE = "base incl_clips_t5xxl.safetensors has T5 and no tokenizer for it on this machine, and HF_HUB_OFFLINE is set"


def test_t5_without_a_tokenizer_is_refused_with_both_remedies(
    file: Path, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    plain = {"base": str(file), "tokenizer": str(room / "folder" / "tokenizer")}
    info = families.describe(ModelConfig(**plain))
    assert str(info.tokenizer_problem()).startswith("base incl_clips_t5xxl.safetensors has a T5 of 104 words where the")
    monkeypatch.setattr(text_encoders, "T5_ROWS", 104)
    assert info.tokenizer_problem() == f"{OFFLINE}: {text_encoders.T5_WAYS}"
    with pytest.raises(LorakitError, match=OFFLINE):
        info.tokenizer("tokenizer_3")
    assert text_encoders.T5_TO_FETCH in info.notes
    assert families.describe(ModelConfig(**plain, t5=False)).without_t5


def test_the_tokenizer_of_t5_is_fetched_once(
    file: Path, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(
        room / "folder" / "tokenizer_3", tmp_path / "served", ignore=shutil.ignore_patterns("*_config.json")
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(text_encoders, "T5_ROWS", 104)
    requests: list[str] = []
    where = text_encoders.T5_REPOSITORY, text_encoders.T5_REVISION
    model = ModelConfig(base=str(file), tokenizer=str(room / "folder" / "tokenizer"))
    with hub_server.serve(tmp_path / "served", requests, *where) as endpoint:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        info = families.describe(model)
        assert info.tokenizer_problem() is None and requests == []
        assert info.fetch_tokenizers()
    assert {path.rpartition("/")[2] for path in requests} == {"tokenizer.json"}
    info = families.describe(model)
    assert text_encoders.T5_FROM_HUB in info.notes and not info.fetch_tokenizers()
    own = transformers.T5TokenizerFast.from_pretrained(room / "folder" / "tokenizer_3")
    alone = transformers.T5TokenizerFast.from_pretrained(info.tokenizer("tokenizer_3"))
    assert alone(TEXTS).input_ids == own(TEXTS).input_ids
    assert (alone.eos_token_id, alone.pad_token_id, alone.bos_token_id) == (1, 0, None)


def test_t5_can_be_disabled(file: Path, room: Path) -> None:
    """Without T5 its states are zeros, as in diffusers; layers, sizes and the base's hash exclude it."""
    infos = [describe(file, room, t5=False), families.describe(ModelConfig(base=str(room / "folder"), t5=False))]
    zeros = []
    for info, folder_info in zip(infos, (describe(file, room), families.describe(room / "folder")), strict=True):
        assert "text_encoder_3" not in {*info.configs, *info.bytes, *info.tokenizers, *(info.slots or {})}
        assert not any(name.startswith("text_encoder_3") for name in info.layers)
        assert "without text_encoder_3, as model.t5 says" in info.notes
        assert info.configs["model_index"]["text_encoder_3"] == [None, None]
        assert info.hash != folder_info.hash and info.text_tokens == folder_info.text_tokens
        base = families.load(info, "cpu", torch.float32)
        states = base.encode_text(TEXTS)["encoder_hidden_states"]
        assert not states[:, 77:].any() and states.shape == (3, 77 + 256, 256)
        assert base.pipeline().text_encoder_3 is None
        zeros.append(states)
    assert torch.equal(*zeros)


def test_families_without_t5_refuse_the_option(tiny_sd1: Path) -> None:
    with pytest.raises(LorakitError, match=r"has no T5: leave model.t5"):
        families.describe(ModelConfig(base=str(tiny_sd1), t5=False))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{U}joint_blocks.1.x_block.mlp.fc2.weight", "lacks unet.transformer_blocks.1.ff.net.2.weight"),
        (
            f"{sd3_files.T5}encoder.block.1.layer.0.SelfAttention.q.weight",
            "lacks text_encoder_3.encoder.block.1.layer.0",
        ),
        (
            f"{sd3_files.L}text_model.encoder.layers.1.mlp.fc1.bias",
            "lacks text_encoder.text_model.encoder.layers.1.mlp",
        ),
    ],
)
def test_a_tensor_missing_in_the_file_is_named(key: str, words: str, file: Path, room: Path, tmp_path: Path) -> None:
    weights = load_file(file)
    del weights[key]
    save_file(weights, tmp_path / "x.safetensors")
    assert words in refusal(tmp_path / "x.safetensors", room)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("x_block.attn2.proj.bias", "lacks unet.transformer_blocks.1.attn2.to_out.0.bias"),
        ("context_block.attn.proj.weight", "lacks unet.transformer_blocks.1.attn.to_add_out.weight"),
        ("context_block.mlp.fc1.bias", "lacks unet.transformer_blocks.1.ff_context.net.0.proj.bias"),
    ],
)
def test_an_incomplete_optional_block_is_refused(key: str, words: str, file: Path, room: Path, tmp_path: Path) -> None:
    first, last = f"{U}joint_blocks.0.", f"{U}joint_blocks.1."
    weights = {name.replace(last, f"{U}joint_blocks.2."): tensor for name, tensor in load_file(file).items()}
    weights |= {name.replace(first, last): t.clone() for name, t in weights.items() if name.startswith(first)}
    save_file(weights, tmp_path / "whole.safetensors")
    assert describe(tmp_path / "whole.safetensors", room).configs["unet"]["dual_attention_layers"] == [0, 1]
    del weights[last + key]
    save_file(weights, tmp_path / "x.safetensors")
    assert words in refusal(tmp_path / "x.safetensors", room)


def test_keys_that_programs_add_are_ignored(pipeline: Any, room: Path, tmp_path: Path) -> None:
    """ComfyUI also saves logit scales and an unused projection of the first CLIP."""
    extra = {f"text_encoders.{name}.logit_scale": torch.ones(()) for name in ("clip_l", "clip_g", "t5xxl")}
    extra[f"{sd3_files.L}text_projection.weight"] = torch.randn(64, 64)
    path = sd3_files.write(tmp_path / "x.safetensors", pipeline, "clip_l", "clip_g", **extra)
    info = describe(path, room)
    assert not any("ignored" in note for note in info.notes)
    base = families.load(info, "cpu", torch.float32)
    assert torch.equal(base.text_encoders["text_encoder"].text_projection.weight, torch.eye(64))


# -- merging --------------------------------------------------------------------------------------------------------

ADAPTED = {
    "unet.transformer_blocks.0.attn.to_k": (128, 128),
    "unet.transformer_blocks.0.attn2.to_v": (128, 128),
    "unet.transformer_blocks.1.attn.add_q_proj": (128, 128),
    "unet.transformer_blocks.1.ff.net.2": (128, 512),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (64, 128),
}


def adapter(*left_out: str) -> AdapterWeights:
    draw = torch.Generator().manual_seed(1)
    layers = {
        name: LoraLayer(torch.randn((2, inputs), generator=draw), torch.randn((outputs, 2), generator=draw), 1.0)
        for name, (outputs, inputs) in ADAPTED.items()
        if not name.startswith(left_out or "none")
    }
    return AdapterWeights("sd3", "lora", layers, {})


def with_adapter(weights: dict[str, dict[str, torch.Tensor]], added: AdapterWeights) -> dict[str, Any]:
    """Return the loaded weights plus the product of the adapter's factors."""
    result = {part: dict(tensors) for part, tensors in weights.items()}
    for name, layer in added.layers.items():
        part, _, path = name.partition(".")
        key = next(key for key in result[part] if f"text_model.{key}".endswith(f"{path}.weight"))
        result[part][key] = result[part][key] + 0.5 * 0.5 * layer.up @ layer.down
    return result


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys(), part
        for name in one[part]:
            torch.testing.assert_close(one[part][name], other[part][name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["x.safetensors", "folder"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_merged_weights_include_the_adapters_products(
    form: str, output: str, file: Path, room: Path, tmp_path: Path
) -> None:
    base = describe(file, room) if form == "file" else families.describe(room / "folder")
    expected = with_adapter(state(base), adapter())
    merged = merge.merge(adapter(), base, tmp_path / output, strength=0.5)
    info = describe(merged, room) if output == "x.safetensors" else families.describe(merged)
    assert_close(state(info), expected)
    if form == "file" and output == "x.safetensors":
        assert load_file(merged).keys() == load_file(file).keys()


@pytest.mark.parametrize("output", ["x.safetensors", "folder"])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_merged_model_lacks_t5_if_it_is_disabled(
    form: str, output: str, file: Path, room: Path, tmp_path: Path
) -> None:
    base = (
        describe(file, room, t5=False)
        if form == "file"
        else families.describe(ModelConfig(base=str(room / "folder"), t5=False))
    )
    merged = merge.merge(adapter(), base, tmp_path / output)
    if output == "folder":
        assert not list(merged.glob("*_3")) and families.describe(merged).notes[:1] == ("without text_encoder_3",)
        return
    assert not any("t5xxl" in name for name in load_file(merged))
    assert "without text_encoder_3" in describe(merged, room).notes


@pytest.mark.slow
@pytest.mark.parametrize("place", ["files", "diffusers"])
def test_encoders_that_are_not_in_the_file_go_into_a_merged_folder(
    place: str, bare: Path, pipeline: Any, room: Path, tmp_path: Path
) -> None:
    """A merged single file contains no encoders. If the adapter changes an encoder, the output must be a folder."""
    folder = room / "folder"
    if place == "files":
        folder = sd3_files.write_encoders(tmp_path / "encoders", pipeline, "clip_l", "clip_g", "t5xxl")
    base = describe(bare, room, text_encoders=str(folder))
    with pytest.raises(
        LorakitError, match="has no text_encoder_2 in it, which the adapter changes: --output must be a"
    ):
        merge.merge(adapter(), base, tmp_path / "x.safetensors")
    merged = merge.merge(adapter("text"), base, tmp_path / "y.safetensors")
    assert load_file(merged).keys() == load_file(bare).keys()
    merged = merge.merge(adapter(), base, tmp_path / "merged", strength=0.5)
    assert_close(state(families.describe(merged)), with_adapter(state(base), adapter()))
    texts = [families.load(i, "cpu", torch.float32).tokens(TEXTS)[:2] for i in (base, families.describe(merged))]
    assert all(torch.equal(one, other) for one, other in zip(*texts, strict=True))


def test_fp8_becomes_half_precision_in_a_merged_model(pipeline: Any, room: Path, tmp_path: Path) -> None:
    """The published file with T5 in 8 bits has this form."""
    weights = {
        name: t.to(torch.float8_e4m3fn if sd3_files.T5 in name else torch.float16)
        for name, t in sd3_files.tensors(pipeline, "clip_l", "clip_g", "t5xxl").items()
    }
    save_file(weights, tmp_path / "fp8.safetensors")
    base = describe(tmp_path / "fp8.safetensors", room)
    assert families.load(base, "cpu", torch.float32).text_encoders["text_encoder_3"].shared.weight.isfinite().all()
    merged = merge.merge(adapter(), base, tmp_path / "merged.safetensors")
    assert {tensor.dtype for tensor in load_file(merged).values()} == {torch.float16}
    folder = merge.merge(adapter(), base, tmp_path / "folder")
    assert families.describe(folder).configs["text_encoder"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"{U}pos_embed", (1, 16, 129), "has unet.pos_embed.pos_embed in the shape 1x16x129 where the rest of the"),
        (f"{U}joint_blocks.0.x_block.attn.qkv.bias", (385,), "attn.qkv.bias in 385 rows, which are not 3 equal shares"),
        (f"{U}joint_blocks.0.x_block.attn2.ln_q.weight", (32,), "has unet.transformer_blocks.0.attn2.norm_q.weight in"),
        (f"{U}context_embedder.weight", None, "unet.context_embedder.weight is missing: get the whole checkpoint"),
        (f"{U}context_embedder.weight", (128,), "unet.context_embedder.weight has a shape that no such model has"),
        (
            f"{U}joint_blocks.1.x_block.adaLN_modulation.1.weight",
            (1152, 128),
            "has unet.transformer_blocks.1.norm1.lin",
        ),
        (f"{sd3_files.L}text_model.final_layer_norm.weight", None, "lacks text_encoder.text_model.final_layer_norm"),
        (f"{sd3_files.G}text_projection.weight", None, "text_encoder_2.text_projection.weight is missing"),
        (f"{sd3_files.T5}shared.weight", None, "text_encoder_3.shared.weight is missing"),
        (
            f"{sd3_files.T5}encoder.final_layer_norm.weight",
            (255,),
            "has text_encoder_3.encoder.final_layer_norm.weight",
        ),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    key: str, shape: tuple[int, ...] | None, words: str, file: Path, room: Path, tmp_path: Path
) -> None:
    shapes = safetensors_header.read(file).shapes()
    shapes |= {key: shape or ()}
    path = safetensors_by_hand.write(tmp_path / "x.safetensors", {n: s for n, s in shapes.items() if s or n != key})
    assert words in refusal(path, room)


def test_shapes_equal_the_libraries() -> None:
    for norm, dual in sd3_files.KINDS.values():
        with torch.device("meta"):
            model = diffusers.SD3Transformer2DModel(num_layers=3, qk_norm=norm, dual_attention_layers=dual)
        assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == dict(fit._transformer(model.config))
    for kind in ("gated-gelu", "relu"):
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 3}
        config = transformers.T5Config(**sizes, feed_forward_proj=kind)
        with torch.device("meta"):
            weights = transformers.T5EncoderModel(config).state_dict()
        expected = {n: tuple(t.shape) for n, t in weights.items() if n != "encoder.embed_tokens.weight"}
        assert expected == dict(fit._t5(config.to_dict()))


def test_a_t5_without_its_embedding_and_a_lone_transformer_are_refused(
    bare: Path, room: Path, pipeline: Any, tmp_path: Path
) -> None:
    folder = sd3_files.write_encoders(tmp_path / "encoders", pipeline, "clip_l", "clip_g", "t5xxl")
    weights = load_file(folder / "t5xxl_fp16.safetensors")
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, folder / "t5xxl_fp16.safetensors")
    words = "t5xxl_fp16.safetensors lacks text_encoder_3.shared.weight: get the whole checkpoint"
    assert refusal(bare, room, text_encoders=str(folder)) == words
    shapes = {
        name.removeprefix(U): shape for name, shape in safetensors_header.read(bare).shapes().items() if U in name
    }
    alone = safetensors_by_hand.write(tmp_path / "sd3.5_medium.safetensors", shapes)
    assert "is Stable Diffusion 3's transformer alone: give the whole model" in refusal(alone, room)
