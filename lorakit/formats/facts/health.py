"""What an adapter file's numbers and metadata say: whether they are whole, how strong it is, its words and hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from lorakit.core import foreign_json, safetensors_header

WORDS = 8  # as many trigger words as are reported


# safetensors' dtype -> numpy's of the bits, and the bits of the exponent, all of which are set in NaN and infinity.
_EXPONENTS = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
_EXPONENTS |= {"F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F)}  # the latter has one NaN and no infinity


def damage(heads: Iterable[safetensors_header.Header]) -> str:
    """The first tensor with a number that is NaN or infinite, or ""."""
    for head in heads:
        with head.path.open("rb") as file:
            for name, info in sorted(head.tensors.items(), key=lambda item: item[1].start):
                if info.dtype in _EXPONENTS:
                    kind, mask = _EXPONENTS[info.dtype]
                    file.seek(info.start)
                    bits = np.frombuffer(file.read(info.end - info.start), np.dtype(kind))
                    if bool(((bits & bits.dtype.type(mask)) == mask).any()):
                        return f"{name} holds NaN or infinity"
    return ""


def hashes(head: safetensors_header.Header) -> dict[str, str]:
    """The names by which A1111 and Civitai look a file up: AutoV2 of the whole file, AutoV3 of its tensors alone."""
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with head.path.open("rb") as file:
        whole.update(file.read(head.data_start))
        while block := file.read(1 << 20):
            whole.update(block)
            tensors.update(block)
    return {"AutoV2": whole.hexdigest()[:10], "AutoV3": tensors.hexdigest()[:12]}


def words(metadata: Mapping[str, str]) -> list[str]:
    """The most frequent tags of `ss_tag_frequency`, sd-scripts' count of captions' parts in each folder."""
    counts: Counter[str] = Counter()
    try:
        for folder in foreign_json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip(): int(count) for tag, count in folder.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(WORDS) if tag]
