"""Tests of what each program reads: all programs read a complete file, and each change is reported.

The counts were measured by running each program's own loader.
"""

import pytest
import random_adapters

from lorakit.core.errors import LorakitError
from lorakit.formats import compatibility
from lorakit.formats.compatibility import read_report

KOHYA_READERS = ["a1111", "forge", "comfyui", "invokeai", "sd-scripts", "sd.cpp", "diffusers"]
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TE_OLD = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
TE_Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def renamed(shapes, old, new, count=None):
    result = {}
    for name, shape in shapes.items():
        hit = old in name and (count is None or count > 0)
        count = count - 1 if hit and count is not None else count
        result[name.replace(old, new) if hit else name] = shape
    return result


def without(shapes, *parts):
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


def complete(report):
    return {key for key, reading in report.items() if reading.complete}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("conv", [False, True])
def test_every_program_reads_a_complete_kohya_file(family, conv):
    shapes = random_adapters.kohya_shapes(family, conv=conv)
    report = read_report(shapes, family, alphas={name: 4.0 for name in shapes if name.endswith("alpha")})
    assert complete(report) == set(KOHYA_READERS)
    total = len(shapes) // 3
    for key in KOHYA_READERS:
        assert sum(read for read, _ in report[key].counts.values()) == total
    assert sum(read for read, _ in report["peft"].counts.values()) == 0
    if (family, conv) == ("sd1", False):
        assert report["a1111"].line() == "unet 192/192, text_encoder 72/72"


def test_sdxl_with_diffusers_block_names_is_read_by_all_but_a1111():
    """All programs read it, but A1111 loses the first upsampler."""
    assert complete(read_report(random_adapters.kohya_shapes("sdxl", conv=False, sgm=False), "sdxl")) == set(
        KOHYA_READERS
    )
    report = read_report(random_adapters.kohya_shapes("sdxl", sgm=False), "sdxl")
    assert complete(report) == set(KOHYA_READERS) - {"a1111"}
    assert report["a1111"].unmatched == ("lora_unet_up_blocks_0_upsamplers_0_conv",)


def test_sd_scripts_and_diffusers_do_not_read_sgm_names_of_sd1():
    report = read_report(random_adapters.kohya_shapes("sd1", sgm=True), "sd1")
    assert complete(report) == {"a1111", "forge", "comfyui", "sd.cpp"}
    assert report["sd-scripts"].counts == {"unet": (0, 278), "text_encoder": (72, 72)}
    assert "no rule for" in report["diffusers"].refused


@pytest.mark.parametrize(
    ("family", "lost"), [("sd1", {"invokeai", "sd-scripts"}), ("sd2", {"a1111", "invokeai", "sd-scripts"})]
)
def test_a_wrong_text_encoder_prefix_is_reported(family, lost):
    shapes = renamed(random_adapters.kohya_shapes(family), "lora_te_", "lora_te1_")
    report = read_report(shapes, family)
    assert complete(report) == set(KOHYA_READERS) - lost
    for key in lost:
        assert report[key].counts["text_encoder"][0] == 0 and "lora_te1_" in report[key].line()


@pytest.mark.parametrize(("family", "prefix"), [("sd1", "lora_te_"), ("sdxl", "lora_te1_")])
def test_no_program_reads_names_without_text_model(family, prefix):
    shapes = renamed(random_adapters.kohya_shapes(family), f"{prefix}text_model_", prefix)
    report = read_report(shapes, family)
    assert complete(report) == set()
    assert "rule for" in report["a1111"].line() and prefix + "encoder_layers" in report["a1111"].line()
    assert report["forge"].refused and report["diffusers"].refused


def test_one_dropped_text_model_names_the_key():
    shapes = renamed(random_adapters.kohya_shapes("sd1"), "te_text_model_", "te_", count=3)
    report = read_report(shapes, "sd1")
    assert complete(report) == set()
    assert report["comfyui"].unmatched == ("lora_te_encoder_layers_0_self_attn_k_proj",)
    assert report["comfyui"].counts["text_encoder"] == (71, 72)
    assert not report["forge"].refused  # Forge only drops up to 12 unknown tensors


def test_one_renamed_key_is_reported():
    shapes = renamed(random_adapters.kohya_shapes("sd1"), f"{TO_K}.lora_down", f"{TO_K}.lora_dwn")
    report = read_report(shapes, "sd1")
    assert complete(report) == set()
    assert report["forge"].wrong == {TO_K: "its down factor is missing"}


def test_one_missing_alpha_is_reported():
    shapes = random_adapters.kohya_shapes("sd1")
    del shapes[f"{TO_K}.alpha"]
    # in files of other programs a missing alpha means alpha = rank
    assert "a1111" in complete(read_report(shapes, "sd1"))
    report = read_report(shapes, "sd1", metadata={"lorakit.version": "0.1"})
    assert complete(report) == set()
    assert report["a1111"].wrong == {TO_K: "its alpha is missing, so it is applied with alpha = rank"}


def test_no_alpha_at_all_is_read_by_all_as_rank():
    shapes = without(random_adapters.kohya_shapes("sd1"), ".alpha")
    assert complete(read_report(shapes, "sd1")) == set(KOHYA_READERS)


@pytest.mark.parametrize("part", ["lora_down", "lora_up"])
def test_one_transposed_tensor_is_reported(part):
    shapes = random_adapters.kohya_shapes("sd1")
    shapes[f"{TO_K}.{part}.weight"] = shapes[f"{TO_K}.{part}.weight"][::-1]
    report = read_report(shapes, "sd1")
    assert complete(report) == set()
    assert "do not fit together" in report["comfyui"].wrong[TO_K]


def test_an_alpha_without_factors_is_reported():
    shapes = without(random_adapters.kohya_shapes("sd1"), f"{TO_K}.lora_")
    report = read_report(shapes, "sd1")
    assert complete(report) == set()
    refusing = {key for key in KOHYA_READERS if report[key].refused}
    assert refusing == {"a1111", "invokeai", "diffusers"}


def test_mixed_alphas_are_misread_by_diffusers_alone():
    shapes = random_adapters.kohya_shapes("sd1", conv=False)
    alphas = {name: 1.0 if "attn2_to_k" in name else 4.0 for name in shapes if name.endswith(".alpha")}
    report = read_report(shapes, "sd1", alphas=alphas)
    assert complete(report) == set(KOHYA_READERS) - {"diffusers"}
    assert len(report["diffusers"].wrong) == 16
    assert set(report["diffusers"].wrong.values()) == {"applies alpha 4 instead of 1"}
    # Text encoder and UNet may have different alphas, and so may layers that diffusers does not rename.
    alphas = {name: 1.0 if "lora_te_" in name or "_ff_" in name else 4.0 for name in alphas}
    assert complete(read_report(shapes, "sd1", alphas=alphas)) == set(KOHYA_READERS)


def test_rank_one_is_misread_by_sd_cpp_alone():
    report = read_report(random_adapters.kohya_shapes("sd1", rank=1), "sd1")
    assert complete(report) == set(KOHYA_READERS) - {"sd.cpp"}
    assert len(report["sd.cpp"].wrong) == 350


def dora(shapes, rows=False):
    result = dict(shapes)
    for name, shape in shapes.items():
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            out = shapes[f"{stem}.lora_up.weight"][0]
            result[f"{stem}.dora_scale"] = (out, 1) if rows else (1, shape[1], *(1 for _ in shape[2:]))
    return result


def test_dora_is_applied_by_the_web_uis_only():
    shapes = dora(random_adapters.kohya_shapes("sd1"))
    report = read_report(shapes, "sd1")
    assert complete(report) == {"a1111", "forge", "comfyui", "invokeai"}
    assert set(report["sd-scripts"].wrong.values()) == {"ignores dora_scale and applies it as plain LoRA"}
    assert complete(read_report(dora(random_adapters.kohya_shapes("sd1"), rows=True), "sd1")) == set()


@pytest.mark.parametrize(
    ("family", "lost"),
    [("sd1", {"diffusers"}), ("sd2", {"diffusers", "a1111"}), ("sdxl", {"diffusers", "a1111", "sd.cpp"})],
)
def test_a_text_encoder_with_only_q_and_v_is_reported(family, lost):
    every_shape = random_adapters.kohya_shapes(family)
    shapes = {n: s for n, s in every_shape.items() if n.startswith("lora_unet") or "_q_proj" in n or "_v_proj" in n}
    report = read_report(shapes, family)
    assert complete(report) == set(KOHYA_READERS) - lost
    if family == "sdxl":
        assert report["a1111"].counts == {"unet": (788, 788), "text_encoder": (24, 24), "text_encoder_2": (0, 64)}
        assert report["sd.cpp"].counts["text_encoder_2"] == (32, 64)


def test_comfyui_reads_old_diffusers_names_of_the_unet_only():
    shapes = {}
    for stem in ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora", TE_OLD):
        shapes[f"{stem}.down.weight"], shapes[f"{stem}.up.weight"] = (4, 8), (8, 4)
    report = read_report(shapes, "sd1")
    assert report["comfyui"].counts == {"unet": (1, 1), "text_encoder": (0, 1)}
    assert report["diffusers"].complete


def test_bundled_embeddings_and_peft_metadata_are_refused_by_diffusers():
    shapes = random_adapters.kohya_shapes("sd1") | {"bundle_emb.sks.string_to_param.*": (2, 768)}
    assert complete(read_report(shapes, "sd1")) == set(KOHYA_READERS) - {"diffusers"}
    report = read_report(random_adapters.kohya_shapes("sd1"), "sd1", metadata={"lora_adapter_metadata": "{}"})
    assert complete(report) == set(KOHYA_READERS) - {"diffusers"}


def test_pointwise_convolutions_as_matrices_fail_in_two_programs():
    shapes = random_adapters.kohya_shapes("sd1")
    flat = {name: shape[:2] if "proj_in" in name else shape for name, shape in shapes.items()}
    report = read_report(flat, "sd1")
    assert complete(report) == set(KOHYA_READERS) - {"diffusers", "sd-scripts"}
    assert "stored as matrices" in report["sd-scripts"].line()


def test_peft_names_in_a_file_are_for_diffusers():
    shapes = {}
    for name, *_, group, shape in random_adapters.frozen("sd1"):
        if group == "attn" or name.startswith("text_encoder"):
            shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (4, shape[1]), (shape[0], 4)
    report = read_report(shapes, "sd1")
    assert complete(report) == {"diffusers", "peft"}
    read = {key: sum(good for good, _ in reading.counts.values()) for key, reading in report.items()}
    assert read["comfyui"] == 136 and read["a1111"] == 0 and read["sd-scripts"] == 0 and read["sd.cpp"] == 192
    assert report["forge"].refused and report["invokeai"].refused
    assert complete(read_report(shapes, "sd1", folder=True)) == {"peft"}


@pytest.mark.parametrize("prefix", ["unet.", "text_encoder."])
def test_lycoris_is_refused_by_diffusers(prefix):
    stem = TO_K if prefix == "unet." else TE_Q
    shapes = random_adapters.kohya_shapes("sd1")
    shapes = without(shapes, stem) | {f"{stem}.{part}": () if part == "alpha" else (4, 4) for part in HADA}
    report = read_report(shapes, "sd1")
    assert complete(report) == {"a1111", "forge", "comfyui", "invokeai", "sd.cpp"}
    assert f"{stem} is loha" in report["diffusers"].refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("hada_w2_b"), "its hada_w2_b factor is missing"),
        (lambda parts: [parts.pop("hada_w2_a"), parts.pop("hada_w2_b")], "its hada_w2 is missing"),
        (lambda parts: parts.update(hada_w1_b=(768, 4)), "do not fit together"),
        (lambda parts: parts.pop("alpha"), "its alpha is missing"),
    ],
)
def test_no_program_reads_a_broken_loha(change, words):
    parts = {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4), "hada_w2_b": (4, 768), "alpha": ()}
    shapes = without(random_adapters.kohya_shapes("sd1"), TO_K)
    assert "a1111" in complete(read_report(shapes | {f"{TO_K}.{part}": shape for part, shape in parts.items()}, "sd1"))
    change(parts)
    own = {"lorakit.version": "0.1"}
    report = read_report(shapes | {f"{TO_K}.{part}": shape for part, shape in parts.items()}, "sd1", metadata=own)
    assert complete(report) == set()
    assert words in report["a1111"].wrong[TO_K]


def test_tucker_factors_and_lokr_convolutions_are_misread_by_sd_cpp():
    shapes = without(random_adapters.kohya_shapes("sd1"), TO_K)
    linear = {"lokr_w1": (16, 16), "lokr_w2_a": (20, 4), "lokr_w2_b": (4, 48), "alpha": ()}
    report = read_report(shapes | {f"{TO_K}.{part}": shape for part, shape in linear.items()}, "sd1")
    assert report["sd.cpp"].complete and report["a1111"].complete and not report["sd-scripts"].complete
    tucker = {"lokr_w1": (16, 16), "lokr_w2_a": (4, 20), "lokr_w2_b": (4, 48), "lokr_t2": (4, 4, 3, 3), "alpha": ()}
    report = read_report(shapes | {f"{TO_K}.{part}": shape for part, shape in tucker.items()}, "sd1")
    assert report["sd.cpp"].wrong == {TO_K: "applies Tucker's form wrongly"} and report["comfyui"].complete
    conv = "lora_unet_down_blocks_0_attentions_0_proj_in"
    report = read_report(without(shapes, conv) | {f"{conv}.{part}": shape for part, shape in linear.items()}, "sd1")
    assert report["sd.cpp"].wrong == {conv: "applies it wrongly on convolutions"}
    assert compatibility.predict_compatibility("lokr", "kohya")["sd.cpp"] == "applies it wrongly on convolutions"


def test_unknown_targets_are_refused():
    assert compatibility.names(["A1111", " forge"]) == ["a1111", "forge"]
    assert compatibility.names(["all"]) == list(compatibility.CONSUMERS)
    with pytest.raises(LorakitError, match=r"unknown target 'automatic': choose from a1111, forge, .*, all"):
        compatibility.names(["automatic"])


def test_unread_methods_give_a_warning_before_training():
    assert set(compatibility.predict_compatibility("lora", "kohya").values()) == {"", "does not read the kohya format"}
    assert compatibility.warning("lora", "kohya") is None and compatibility.warning("rslora", "diffusers") is None
    assert compatibility.warning("dora", "kohya") == (
        "dora in the kohya format is honoured by AUTOMATIC1111, Forge, ComfyUI, InvokeAI; not by kohya sd-scripts, "
        "stable-diffusion.cpp, diffusers: ignores dora_scale and applies it as plain LoRA"
    )
    lines = compatibility.predict_compatibility("dora", "kohya")
    assert [key for key, problem in lines.items() if not problem] == ["a1111", "forge", "comfyui", "invokeai"]
    assert lines["diffusers"] == "ignores dora_scale and applies it as plain LoRA"
    assert [
        key for key, problem in compatibility.predict_compatibility("lora", "diffusers").items() if not problem
    ] == ["diffusers"]
    assert [key for key, problem in compatibility.predict_compatibility("rslora", "peft").items() if not problem] == [
        "peft"
    ]
