"""Facts from an adapter file's values and metadata: damage, training history, trigger words and hashes."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from lorakit.core import foreign_json, safetensors_header
from lorakit.core.messages import Message

WORDS = 8  # maximum number of reported trigger words


# safetensors' dtype -> numpy dtype of its bits, and the mask of the exponent, which is all ones for NaN and infinity.
_EXPONENTS = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
_EXPONENTS |= {"F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F)}  # the latter has one NaN and no infinity


def damage(heads: Iterable[safetensors_header.Header]) -> str:
    """A message about the first tensor with NaN or infinity, or ""."""
    for head in heads:
        with head.path.open("rb") as file:
            for name, info in sorted(head.tensors.items(), key=lambda item: item[1].start):
                if info.dtype in _EXPONENTS:
                    kind, mask = _EXPONENTS[info.dtype]
                    file.seek(info.start)
                    bits = np.frombuffer(file.read(info.end - info.start), np.dtype(kind))
                    if bool(((bits & bits.dtype.type(mask)) == mask).any()):
                        return Message("{name} holds NaN or infinity", name)
    return ""


def numbers(head: safetensors_header.Header, name: str) -> np.ndarray:
    """One tensor in float32 or wider; zeros of its shape if numpy has no such dtype."""
    info = head.tensors[name]
    with head.path.open("rb") as file:
        file.seek(info.start)
        raw = file.read(info.end - info.start)
    wide = {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }
    if info.dtype in wide:
        array = np.frombuffer(raw, wide[info.dtype])
    elif info.dtype == "BF16":  # the upper half of a float32
        array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif info.dtype == "F8_E5M2":  # the upper half of a float16
        array = (np.frombuffer(raw, "u1").astype(np.uint16) << 8).view(np.float16)
    elif info.dtype == "F8_E4M3":
        array = np.array([safetensors_header.fp8_e4m3(byte) for byte in range(256)])[np.frombuffer(raw, "u1")]
    else:
        array = np.zeros(info.shape)
    return array.reshape(info.shape).astype(np.result_type(array.dtype, np.float32), copy=False)


def hashes(head: safetensors_header.Header) -> dict[str, str]:
    """The hashes that A1111 and Civitai use for lookup: AutoV2 of the complete file, AutoV3 of its tensors."""
    content, tensors = hashlib.sha256(), hashlib.sha256()
    with head.path.open("rb") as file:
        content.update(file.read(head.data_start))
        while block := file.read(1 << 20):
            content.update(block)
            tensors.update(block)
    return {"AutoV2": content.hexdigest()[:10], "AutoV3": tensors.hexdigest()[:12]}


def history(metadata: Mapping[str, str]) -> str:
    """The training history in the metadata of sd-scripts and ModelSpec, as text."""
    steps, side = (
        metadata.get("ss_steps", ""),
        metadata.get("ss_resolution") or metadata.get("modelspec.resolution", ""),
    )
    sides = re.findall(r"\d+", side)
    facts = {
        "on {}": metadata.get("ss_sd_model_name", ""),
        "{} images": metadata.get("ss_num_train_images", ""),
        "{} epochs": metadata.get("ss_num_epochs", ""),
        "{} steps": steps or metadata.get("ss_max_train_steps", ""),
        "at {}": "x".join(sides[:2] if len(sides) > 1 else sides * 2),
        "learning rate {}": metadata.get("ss_learning_rate", ""),
        "clip skip {}": metadata.get("ss_clip_skip", ""),
    }
    return ", ".join(text.format(value) for text, value in facts.items() if value not in ("", "None"))


def trigger_and_class(phrase: str, metadata: Mapping[str, str]) -> tuple[str, str]:
    """The trigger and the class in a trigger phrase of lorakit: "sks", "toy" of "sks toy".

    A style has no class. Other programs' phrases are not split: ("long hair, ada", "").
    """
    try:
        is_style = foreign_json.loads_table(metadata["lorakit.config"])["data"]["kind"] == "style"
        names = list(foreign_json.loads_table(metadata["ss_tag_frequency"])["photos"])
    except (KeyError, TypeError, ValueError):
        return phrase, ""
    if ", ".join(names) != phrase:
        return phrase, ""
    words, rests = zip(*(name.partition(" ")[::2] for name in names), strict=True)
    return ", ".join(words), "" if is_style else ", ".join(filter(None, rests))


def contradictions(metadata: Mapping[str, str], ranks: Iterable[int], scales: Iterable[float]) -> list[str]:
    """A message if rank and alpha in the metadata differ from those of the tensors, which every program uses."""
    try:
        rank, alpha = (float(metadata[f"ss_network_{name}"]) for name in ("dim", "alpha"))
        wrong = rank not in set(ranks) or not any(math.isclose(alpha / rank, scale, rel_tol=1e-2) for scale in scales)
    except (KeyError, ValueError, ZeroDivisionError):
        return []
    words = Message(
        "its metadata says rank {rank:g} and alpha {alpha:g}, which is wrong: programs use the tensors", rank, alpha
    )
    return [words] if wrong else []


def words(metadata: Mapping[str, str]) -> list[str]:
    """The most frequent tags of `ss_tag_frequency`, sd-scripts' tag counts per folder.

    Tags that name a folder, as in `10_sks dog`, come first: they are the trained concept.
    """
    counts: Counter[str] = Counter()
    names: set[str] = set()
    try:
        for folder, tags in foreign_json.loads(metadata.get("ss_tag_frequency", "{}")).items():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
            names |= {name := re.sub(r"^\d+_", "", folder).lower(), name.partition(" ")[0]}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    tags = [tag for tag, _ in counts.most_common() if tag]
    return sorted(tags, key=lambda tag: tag.lower() not in names)[:WORDS]
