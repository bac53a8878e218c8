"""Tests of which program reads which foreign file. diffusers loads each kind of file into a small model, and its result
must agree with `inspect`. Each rule of another program comes from its loader's source and has a file here.
"""

import copy
import json

import pytest
import random_adapters
import torch
from safetensors.torch import save_file

from lorakit.core.errors import LorakitError
from lorakit.formats import diffusers, kohya, peft, read, save
from lorakit.formats.compatibility import read_report
from lorakit.formats.edit.merge_folder import Merger
from lorakit.formats.inspect import inspect

DOTTED = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FEED = DOTTED.replace("attn1.to_q", "ff.net.2")
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = QUERY.replace("attn1_to_q", "attn2_to_k")
CONV = "lora_unet_mid_block_resnets_0_conv1"
OLD = DOTTED.replace("to_q", "processor.to_q_lora")
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn."
AB = ("lora_A.weight", "lora_B.weight")


def numbers(*shape):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def pair(stem, outputs=64, inputs=64, rank=4, names=AB, alpha=None):
    there = {f"{stem}.{names[0]}": numbers(rank, inputs), f"{stem}.{names[1]}": numbers(outputs, rank)}
    return there | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(float(alpha))})


def lora(stem, outputs=64, inputs=64, rank=4, alpha=2.0):
    return pair(stem, outputs, inputs, rank, ("lora_down.weight", "lora_up.weight"), alpha)


def text(names):
    return {k: v for part in ("q", "k", "v", "out") for k, v in pair(f"{TEXT}{part}_proj", 32, 32, names=names).items()}


def config(**options):
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in options.items()})}


MAGNITUDE = {f"{DOTTED}.lora_magnitude_vector.weight": 1 + numbers(64).abs()}
TRAINING = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
LIVE = {
    "kohya": (lora(QUERY) | lora(KEY, inputs=32), {}),
    "DoRA per column": (lora(QUERY) | {f"{QUERY}.dora_scale": 1 + numbers(1, 64).abs()}, {}),
    "DoRA per row": (lora(QUERY) | {f"{QUERY}.dora_scale": 1 + numbers(64, 1).abs()}, {}),
    "bias": (lora(QUERY) | {f"{QUERY}.diff_b": numbers(64)}, {}),
    "scale": (lora(QUERY, alpha=None) | {f"{QUERY}.scale": torch.tensor(0.5)}, {}),
    "strange part": (lora(QUERY) | {f"{QUERY}.foo": numbers(4)}, {}),
    "PEFT's factors, kohya's modules": (pair(QUERY), {}),
    "rank 0": (lora(QUERY) | lora(KEY, inputs=32, rank=0), {}),
    "alpha 0": (lora(QUERY, alpha=0), {}),
    "one alpha missing": (lora(QUERY) | lora(KEY, inputs=32, alpha=None), {}),
    "several alphas": (lora(QUERY, alpha=1) | lora(KEY, inputs=32) | lora(KEY.replace("_k", "_v"), inputs=32), {}),
    "full difference": ({f"{QUERY}.diff": numbers(64, 64)}, {}),
    "PEFT": (pair(DOTTED) | pair(FEED, inputs=256) | text(AB), {}),
    "PEFT's DoRA": (pair(DOTTED) | MAGNITUDE, {}),
    "PEFT's DoRA in part": (pair(DOTTED) | MAGNITUDE | pair(FEED, inputs=256), {}),
    "name of an adapter": (pair(DOTTED, names=("lora_A.toy.weight", "lora_B.toy.weight")), {}),
    "alpha in the header": (pair(DOTTED), config(r=4, lora_alpha=8, target_modules=["attn1.to_q"])),
    "stabilised": (pair(DOTTED), config(r=4, lora_alpha=8, use_rslora=True, target_modules=["attn1.to_q"])),
    "training scripts": (pair(DOTTED, names=("lora.down.weight", "lora.up.weight")) | text(TRAINING), {}),
    "old": ({f"{OLD}.down.weight": numbers(4, 64), f"{OLD}.up.weight": numbers(64, 4)}, {}),
    "ComfyUI's nodes": (lora("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"), {}),
    "SimpleTuner": (lora(QUERY.replace("lora_unet", "lycoris")), {}),
}


@pytest.fixture(scope="module")
def pipeline(tiny_sd1):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)


def save_tensors(folder, tensors, metadata=None):
    path = folder / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def loaded(pipeline, path):
    """Return the model with the file's adapter fused into its weights by diffusers."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    own = type(pipeline)(**{**pipeline.components, **parts})
    own.load_lora_weights(path.parent, weight_name=path.name)
    own.fuse_lora()
    own.unload_lora_weights()
    return own


def are_right(weights, before, after):
    """Return whether every weight equals the result of `lorakit merge`."""
    merger = Merger(weights, 1.0)
    for part, prefix in (("unet", ""), ("text_encoder", "text_model.")):
        there = getattr(after, part).state_dict()
        for name, weight in getattr(before, part).state_dict().items():
            if not torch.allclose(merger(part, prefix + name.removeprefix(prefix), weight), there[name], atol=2e-4):
                return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LIVE)
def test_diffusers_agrees_with_inspect(tmp_path, pipeline, kind):
    path = save_tensors(tmp_path, *LIVE[kind])
    reading = inspect(path).readers["diffusers"]
    try:
        own = loaded(pipeline, path)
    except (ValueError, RuntimeError):
        assert reading.refused, reading.line()
        return
    assert not reading.refused
    weights = read(path) if kind != "scale" else None
    assert reading.complete == are_right(weights, pipeline, own), reading.line()


def test_dora_per_row_is_exported_unchanged_to_diffusers_and_peft(tmp_path, pipeline):
    from peft import PeftModel

    stems = {QUERY: (64, 64), KEY: (64, 32), CONV: (64, 64, 3, 3)}
    stems |= {f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj": (32, 32) for part in ("q", "k", "v", "out")}
    tensors = {}
    for stem, (outputs, inputs, *kernel) in stems.items():
        ones = [1 for _ in kernel]
        tensors[f"{stem}.lora_down.weight"] = numbers(4, inputs, *kernel)
        tensors |= {f"{stem}.lora_up.weight": numbers(outputs, 4, *ones), f"{stem}.alpha": torch.tensor(2.0)}
        tensors[f"{stem}.dora_scale"] = 1 + numbers(outputs, 1, *ones).abs()
    weights = read(save_tensors(tmp_path, tensors))
    paths = save(weights, tmp_path, "rows", ["diffusers", "peft"], "fp32", {})
    assert are_right(weights, pipeline, loaded(pipeline, paths["diffusers"]))
    other = copy.copy(pipeline)
    for part in ("unet", "text_encoder"):
        model = PeftModel.from_pretrained(copy.deepcopy(getattr(pipeline, part)), paths["peft"] / part)
        setattr(other, part, model.merge_and_unload())
    assert are_right(weights, pipeline, other)
    for path in paths.values():
        copied = read(path).layers
        assert all(torch.equal(copied[n].magnitude.flatten(), x.magnitude.flatten()) for n, x in weights.layers.items())


def test_partial_dora_per_row_is_refused_and_kohyas_format_reported(tmp_path, capsys):
    from lorakit.cli import main as cli

    path = save_tensors(tmp_path, LIVE["DoRA per row"][0] | lora(KEY, inputs=32))
    for writer in diffusers, peft:
        with pytest.raises(LorakitError, match=r"DoRA in all layers of a part or in none|this adapter mixes several"):
            writer.tensors(read(path), "fp16")
    assert cli.main(["export", str(path), "--to", "kohya", "--output", str(tmp_path / "out")]) == 0
    warnings = capsys.readouterr().err
    assert "DoRA with a magnitude for each output row in the kohya format is honoured by no program; not by" in warnings
    assert "AUTOMATIC1111, Forge, ComfyUI, InvokeAI: its dora_scale is per output row, which it misreads" in warnings


def parts(stem=QUERY, **shapes):
    return {f"{stem}.{name.replace('__', '.')}": shape for name, shape in shapes.items()}


LORA = parts(lora_down__weight=(4, 64), lora_up__weight=(64, 4), alpha=())
HADA = parts(hada_w1_a=(64, 4), hada_w1_b=(4, 64), hada_w2_a=(64, 4), hada_w2_b=(4, 64), alpha=())
GLORA = parts(a1__weight=(64, 4), a2__weight=(4, 64), b1__weight=(64, 4), b2__weight=(4, 64), alpha=())
MANY_IA3 = {
    k: s
    for n in range(7)
    for k, s in parts(QUERY.replace("mid_block", f"up_blocks_{n}"), weight=(64, 1), on_input=()).items()
}
# Kind of file -> program -> a word of its expected report; other programs have no report.
RULES = {
    "bias beside": (
        LORA | parts(diff_b=(64,)),
        {
            "a1111": "ignores its change",
            "invokeai": "ignores its change",
            "sd-scripts": "ignores its change",
            "comfyui": "",
            "forge": "",
            "sd.cpp": "",
        },
    ),
    "bias alone": (
        LORA | parts(KEY, diff_b=(64,)),
        {"a1111": "refuses", "invokeai": "refuses", "comfyui": "", "sd.cpp": ""},
    ),
    "GLoRA": (
        GLORA,
        {"a1111": "older form", "invokeai": "refuses", "comfyui": "", "forge": "", "sd.cpp": "does not apply"},
    ),
    "older GLoRA": (
        parts(a1__weight=(4, 64), a2__weight=(64, 4), b1__weight=(4, 64), b2__weight=(64, 4), alpha=()),
        {"a1111": "", "comfyui": "", "forge": "", "invokeai": "refuses", "sd.cpp": "does not apply"},
    ),
    "GLoRA tucker": (GLORA | parts(bm__weight=(4, 4, 3, 3)), {"comfyui": "ignores its bm", "forge": "ignores its bm"}),
    "IA3": (
        parts(weight=(64, 1), on_input=()),
        {"a1111": "", "invokeai": "", "comfyui": "reads none", "forge": "reads none"},
    ),
    "IA3 on a convolution": (
        parts(CONV, weight=(64, 1), on_input=()),
        {"a1111": "applies it wrongly", "invokeai": "fails"},
    ),
    "much IA3": (MANY_IA3, {"forge": "refuses"}),
    "OFT": (
        parts(oft_blocks=(4, 16, 16), alpha=()),
        {"comfyui": "", "a1111": "", "forge": "reads none", "invokeai": "refuses"},
    ),
    "older OFT": (
        parts(oft_diag=(4, 16, 16)),
        {"a1111": "", "comfyui": "older form", "forge": "reads none", "invokeai": "refuses", "diffusers": "refuses"},
    ),
    "sd-scripts' OFT": (
        parts("oft_unet_middle_block_1_proj_in", oft_blocks=(4, 16, 16), alpha=()),
        {"a1111": "", "comfyui": "reads none", "forge": "reads none", "sd-scripts": "reads none"},
    ),
    "OneTrainer's OFT": (
        parts(oft_R__weight=(4, 120), alpha=()),
        {"a1111": "refuses", "comfyui": "reads none", "forge": "reads none", "diffusers": "refuses"},
    ),
    "OFT rescaled": (
        parts(oft_blocks=(4, 16, 16), alpha=(), rescale=(64, 1)),
        {"comfyui": "ignores its rescale", "a1111": ""},
    ),
    "BOFT rescaled": (parts(oft_blocks=(3, 4, 16, 16), alpha=(), rescale=(64, 1)), {"comfyui": "", "a1111": ""}),
    "LoHa with DoRA": (
        HADA | parts(dora_scale=(1, 64)),
        {"a1111": "", "comfyui": "", "invokeai": "refuses", "sd.cpp": "ignores dora"},
    ),
    "DoRA per row": (
        LORA | parts(dora_scale=(64, 1)),
        dict.fromkeys(("a1111", "forge", "comfyui", "invokeai"), "misreads"),
    ),
    "DoRA of one axis": (
        LORA | parts(dora_scale=(64,)),
        dict.fromkeys(("a1111", "forge", "comfyui", "invokeai"), "misreads"),
    ),
    "scale": (
        LORA | parts(scale=()),
        {"a1111": "", "sd.cpp": "", "comfyui": "no rule for", "sd-scripts": "no rule for"},
    ),
    "strange part": (LORA | parts(foo=(2,)), dict.fromkeys(("a1111", "forge", "comfyui", "sd.cpp"), "no rule for")),
    "PEFT's factors": (
        parts(lora_A__weight=(4, 64), lora_B__weight=(64, 4)),
        {"comfyui": "", "forge": "", "a1111": "", "invokeai": "refuses", "sd-scripts": "reads none"},
    ),
    "factors without weight": (parts(lora_A=(4, 64), lora_B=(64, 4)), {"comfyui": "", "forge": "reads none"}),
    "ComfyUI's nodes": (
        parts("diffusion_model.middle_block.1.proj_in", lora_down__weight=(4, 64), lora_up__weight=(64, 4)),
        {"comfyui": "", "forge": "", "sd.cpp": "", "a1111": "reads none", "invokeai": "refuses"},
    ),
    "its text encoder": (
        parts(
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            lora_A__weight=(4, 64),
            lora_B__weight=(64, 4),
        ),
        {"comfyui": "", "forge": "reads none"},
    ),
    "SimpleTuner": (
        parts(QUERY.replace("lora_unet", "lycoris"), lokr_w1=(8, 8), lokr_w2=(8, 8), alpha=()),
        {"comfyui": "", "forge": "", "a1111": "reads none"},
    ),
    "old without unet": (
        {f"{OLD[5:]}.down.weight": (4, 64), f"{OLD[5:]}.up.weight": (64, 4)},
        {"comfyui": "", "forge": ""},
    ),
    "PEFT's DoRA": (
        {f"{FEED}.lora_A.weight": (4, 64), f"{FEED}.lora_B.weight": (64, 4), f"{FEED}.lora_magnitude_vector": (64,)},
        {"comfyui": "ignores its magnitude", "peft": "", "diffusers": ""},
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_each_programs_rules_are_reported(kind):
    shapes, expected = RULES[kind]
    report = read_report(shapes, "sd1", alphas={name: 0.0 if "oft" in str(shapes) else 2.0 for name in shapes})
    for program, words in expected.items():
        assert words in report[program].line(), (program, report[program].line())
        assert report[program].complete is not bool(words), (program, report[program].line())


DIT = "transformer.transformer_blocks.0."
# The same for Stable Diffusion 3: A1111 maps diffusers' names of picture attention, Forge maps none of diffusers'.
SD3_RULES = {
    "picture's attention": (
        [f"{DIT}attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")],
        {"a1111": "", "comfyui": "", "diffusers": "", "forge": "none", "invokeai": "refuses", "sd-scripts": "none"},
    ),
    "text's attention": ([f"{DIT}attn.add_q_proj"], {"a1111": "reads none", "comfyui": "", "diffusers": ""}),
    "feed-forward": ([f"{DIT}attn.to_q", f"{DIT}ff.net.2"], {"a1111": "unet 1/2; no rule for", "comfyui": ""}),
    "kohya": (
        ["lora_unet_joint_blocks_0_context_block_attn_qkv"],
        {"forge": "", "comfyui": "", "sd-scripts": "", "a1111": "reads none", "diffusers": "refuses"},
    ),
    "ComfyUI": (["diffusion_model.joint_blocks.0.x_block.attn.qkv"], {"forge": "", "comfyui": "", "a1111": "none"}),
}


@pytest.mark.parametrize("kind", SD3_RULES)
def test_each_programs_rules_for_sd3_are_reported(kind):
    stems, expected = SD3_RULES[kind]
    pairs = [(stem, stems[0].startswith("lora_")) for stem in stems]
    shapes = {f"{stem}.{'lora_down' if kohya else 'lora_A'}.weight": (4, 64) for stem, kohya in pairs}
    shapes |= {f"{stem}.{'lora_up' if kohya else 'lora_B'}.weight": (64, 4) for stem, kohya in pairs}
    report = read_report(shapes, "sd3")
    for program, words in expected.items():
        assert words in report[program].line(), (program, report[program].line())
        assert report[program].complete is not bool(words), (program, report[program].line())


def test_each_programs_rules_of_alpha_are_reported():
    oft = parts(oft_blocks=(4, 16, 16), alpha=())
    report = read_report(oft, "sd1", alphas={f"{QUERY}.alpha": 0.5})
    assert "limits its rotation" in report["comfyui"].line() and report["a1111"].complete
    report = read_report(LORA, "sd1", alphas={f"{QUERY}.alpha": 0.0})
    assert "takes an alpha of 0 for the rank" in report["sd-scripts"].line() and report["comfyui"].complete
    shapes = {f"{FEED}.lora_A.weight": (4, 64), f"{FEED}.lora_B.weight": (64, 4)}
    for metadata, scale in ((config(r=4, lora_alpha=8), "2"), (config(r=4, lora_alpha=4, use_rslora=True), "2")):
        report = read_report(shapes, "sd1", metadata=metadata)
        assert f"ignores the alpha in its metadata, which is {scale} times the rank" in report["comfyui"].line()
        assert report["diffusers"].complete and not report["sd.cpp"].complete
    assert read_report(shapes, "sd1", metadata=config(r=0, lora_alpha="x"))["comfyui"].complete


def test_biases_of_peft_are_scaled_as_the_factors_are(tmp_path):
    bias = numbers(64)
    weights = read(save_tensors(tmp_path, pair(DOTTED) | {f"{DOTTED}.lora_B.bias": bias}, config(r=4, lora_alpha=8)))
    assert torch.allclose(weights.biases[DOTTED], 2 * bias)
    assert torch.allclose(kohya.tensors(weights, "fp32")[f"{QUERY}.diff_b"], 2 * bias)


REFUSED = {
    "tensors of no method that lorakit reads: 1, e.g. .*hra_u": parts(hra_u=(4, 120)),
    "tensors of no method that lorakit reads: 1, e.g. .*scale": LORA | parts(scale=()),
    "of no part that lorakit reads: [12], e.g. .*to_q.bias": {
        f"{DOTTED}.lora_A.weight": (4, 64),
        f"{DOTTED}.bias": (64,),
        f"{DOTTED}.lora_B.weight": (64, 4),
    },
    "of no part that lorakit reads: [12], e.g. .*lora_A.one": {
        f"{DOTTED}.lora_{s}.{n}.weight": (64, 64) for s in "AB" for n in ("one", "two")
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_unknown_parts_are_refused_by_name(tmp_path, words):
    path = save_tensors(tmp_path, {name: torch.zeros(shape) for name, shape in REFUSED[words].items()})
    with pytest.raises(LorakitError, match=words):
        read(path)
    assert not any(reading.complete for reading in inspect(path).readers.values() if reading.title == "diffusers")


def test_factors_with_other_names_give_the_same_adapter(tmp_path):
    down, up = numbers(4, 64), numbers(64, 4)
    for names in (AB, ("lora_A", "lora_B"), ("lora.down.weight", "lora.up.weight"), TRAINING):
        for stem in (QUERY, "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"):
            path = save_tensors(tmp_path, {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up})
            assert torch.allclose(read(path).layers[DOTTED].delta(), up @ down, atol=1e-6), (stem, names)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    """The header's length begins with the same two bytes as a pickle."""
    tensors = {f"{QUERY}.lora_down.weight": numbers(1, 2)}
    short = int.from_bytes(save_tensors(tmp_path, tensors, {"a": ""}).read_bytes()[:8], "little")
    path = save_tensors(tmp_path, tensors, {"a": "x" * (640 - short)})
    assert path.read_bytes()[:2] == b"\x80\x02" and inspect(path).kind == "adapter"


def test_methods_are_recognized_by_tensors_and_not_by_the_header(tmp_path):
    path = save_tensors(tmp_path, lora(QUERY) | {f"{QUERY}.dora_scale": numbers(1, 64)}, {"lorakit.method": "rslora"})
    assert inspect(path).method == "dora" and read(path).method == "dora"
    plain = random_adapters.adapter({DOTTED: (64, 64)}, "sd1", method="pissa")
    assert inspect(save(plain, tmp_path, "p", ["kohya"], "fp16", {})["kohya"]).method == "pissa"


PEFT = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["attn1.to_q", "conv1"]},
    "stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["attn1.to_q"]},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["attn1.to_q"], "alpha_pattern": {"mid_block.*to_q": 2}},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["attn1.to_q", "conv1"]},
    "biases": {"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": ["ff.net.2"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_written_by_peft_has_pefts_effect(tmp_path, pipeline, kind):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(pipeline.unet), LoraConfig(**PEFT[kind]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.add_(numbers(*parameter.shape))
    model.save_pretrained(tmp_path / "own")
    other = copy.copy(pipeline)
    other.unet = model.merge_and_unload()
    weights = read(tmp_path / "own")
    assert are_right(weights, pipeline, other)
    report = inspect(tmp_path / "own")
    assert report.readers["peft"].complete and set(report.components["unet"].alphas) <= {8.0, 2.0}
    assert (2.0 in report.components["unet"].alphas) is (kind == "patterns")
    sizes = sorted(float(torch.linalg.vector_norm(layer.delta())) for layer in weights.layers.values())
    assert sorted(report.strength.modules.values()) == pytest.approx(sizes, rel=1e-4)


NOTES = {
    "attn1 alone": ([QUERY], True),
    "with keys": ([QUERY, QUERY.replace("attn1_to_q", "attn2_to_k")], False),
    "deep": ([QUERY.replace("transformer_blocks_0", "transformer_blocks_4")], False),
    "text encoder": (["lora_te_text_model_encoder_layers_0_self_attn_q_proj"], False),
    "second text encoder": (["lora_te2_text_model_encoder_layers_0_self_attn_q_proj"], True),
    "both text encoders": ([f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj" for n in "12"], False),
}


@pytest.mark.parametrize("kind", NOTES)
def test_a_file_that_invokeai_cannot_identify_gets_a_note(tmp_path, kind):
    """InvokeAI's `lora_token_vector_length` identifies the model; InvokeAI refuses a file without such layers."""
    stems, expected = NOTES[kind]
    tensors = {f"{stem}.lora_down.weight": numbers(4, 64) for stem in stems}
    tensors |= {f"{stem}.lora_up.weight": numbers(64, 4) for stem in stems}
    notes = inspect(save_tensors(tmp_path, tensors)).notes
    assert any("InvokeAI may refuse to import it" in note for note in notes) is expected
