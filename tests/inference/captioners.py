"""Tiny captioners of the true classes with a fixed text: each token predicts one next token."""

import itertools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "red", "cat", "on", "the", "mat", "<image>"]
WORDS += ["user", "assistant", "describe", ":", "."]
TEXT = "a red cat on the mat"
SIDE = {"height": 8, "width": 8}
TEMPLATE = (
    "{% for message in messages %}{{message.role}} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{part.text}} {% endif %}{% endfor %}{% endfor %}assistant :"
)
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
VISION = TINY | {"projection_dim": 16, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
TOKENS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)


@torch.no_grad()
def _rig(model: Any, embedding: Any, head: Any, first: str) -> None:
    """Zero all weights except embedding, norms and head, so that the words of TEXT and the end follow `first`."""
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    embedding.weight.copy_(torch.eye(*embedding.weight.shape))
    chain = [WORDS.index(word) for word in [first, *TEXT.split(), "[EOS]"]]
    for token, following in itertools.pairwise(chain):
        head.weight[following, token] = 1.0


def save_blip(folder: Path) -> None:
    text = TINY | TOKENS | {"encoder_hidden_size": 16, "projection_dim": 16, "num_hidden_layers": 1}
    text |= {"max_position_embeddings": 32, "sep_token_id": 2, "tie_word_embeddings": False}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False))
    decoder = model.text_decoder
    _rig(model, decoder.bert.embeddings.word_embeddings, decoder.cls.predictions.decoder, "[BOS]")
    with torch.no_grad():
        decoder.cls.predictions.transform.dense.weight.copy_(torch.eye(16))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size=SIDE), _tokenizer()).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    text = LlamaConfig(**TINY, **TOKENS, num_hidden_layers=1, num_key_value_heads=2)
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_index=10)
    model = LlavaForConditionalGeneration(config)
    _rig(model, model.get_input_embeddings(), model.lm_head, ":")
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    LlavaProcessor(
        pictures,
        _tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def save_tagger(folder: Path, side: int = 8, rows: str = "") -> None:
    """Save a network whose tags are the picture's mean blue, green and red, and two tags that are always likely."""
    from onnx import TensorProto, checker, helper, save

    floats = TensorProto.FLOAT
    picture = helper.make_tensor_value_info("input", floats, [None, side, side, 3])
    output = helper.make_tensor_value_info("output", floats, [None, 5])
    constants = [
        helper.make_tensor("scale", floats, [1], [255.0]),
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("always", floats, [1, 2], [0.9, 0.8]),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "scale"], ["share"]),
        helper.make_node("Concat", ["share", "always"], ["output"], axis=1),
    ]
    graph = helper.make_graph(nodes, "tagger", [picture], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    save(model, str(folder / "model.onnx"))
    rows = rows or "1,mostly_blue,0,9\n2,>_<,0,9\n3,bright_red,0,9\n4,zib_(toy),4,9\n5,general,9,9\n"
    (folder / "selected_tags.csv").write_text(f"tag_id,name,category,count\n{rows}", encoding="utf-8")
