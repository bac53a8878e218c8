"""Tests that the tables in docs/formats.md are current: `read_report` of complete files at true dimensions, and
adapters of every method and format on small bases in every kind of storage.

`python tests/formats/test_formats_page.py` prints the tables.
"""

import contextlib
import dataclasses
import math
import sys
import tempfile
from pathlib import Path

import pytest
import random_adapters
import torch

sys.path.append(str(Path(__file__).parents[1]))
import small_models

from lorakit import adapters, families, formats
from lorakit.adapters.weights import AdapterWeights
from lorakit.config import ModelConfig
from lorakit.core.errors import LorakitError
from lorakit.formats.compatibility import CONSUMERS, read_report
from lorakit.formats.edit import merge

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
LABELS = {"sd1": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL"}


NAMES = {"lora": "LoRA, rsLoRA, PiSSA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
FORMATS = ("kohya", "diffusers", "peft")


def kohya(family: str, method: str, conv: bool) -> dict[str, tuple]:
    """Names and shapes of a complete kohya file of rank 4; `dora_scale` has one value per input column."""
    shapes = random_adapters.kohya_shapes(family, conv=conv)
    if method == "lora":
        return shapes
    result: dict[str, tuple] = {name: () for name in shapes if name.endswith(".alpha")}
    for name, shape in shapes.items() if method == "dora" else ():
        if name.endswith(".lora_down.weight"):
            result[name.replace("lora_down.weight", "dora_scale")] = (1, shape[1], *(1 for _ in shape[2:]))
    if method == "dora":
        return shapes | result
    for stem, (out, into, *kernel) in _weights(shapes).items():
        result |= {f"{stem}.{part}": shape for part, shape in lycoris(method, out, into, kernel).items()}
    return result


def _weights(shapes: dict[str, tuple]) -> dict[str, tuple[int, ...]]:
    """Return stem -> shape of the layer's weight."""
    stems = {name.partition(".")[0] for name in shapes}
    downs = {stem: shapes[f"{stem}.lora_down.weight"] for stem in sorted(stems)}
    return {stem: (shapes[f"{stem}.lora_up.weight"][0], *down[1:]) for stem, down in downs.items()}


def lycoris(method: str, out: int, into: int, kernel: list[int]) -> dict[str, tuple]:
    """Return the parts of one LoHa or LoKr layer of rank 4 with LyCORIS' shapes."""
    if method == "loha":
        columns = into * math.prod(kernel)
        return {f"hada_w{n}_{side}": (out, 4) if side == "a" else (4, columns) for n in (1, 2) for side in "ab"}
    (a, b), (c, d) = random_adapters.cut(out), random_adapters.cut(into)
    return {"lokr_w1": (a, c), "lokr_w2_a": (b, 4), "lokr_w2_b": (4, d * math.prod(kernel))}


def dotted(family: str, method: str, conv: bool) -> dict[str, tuple]:
    """Names and shapes of a complete diffusers file or PEFT folder."""
    shapes = {}
    for name, _, _, group, (out, into, *kernel) in random_adapters.frozen(family):
        if group.startswith("top") or "text_projection" in group or (group.startswith("conv") and not conv):
            continue
        if method == "lora":
            shapes[f"{name}.lora_A.weight"] = (4, into, *kernel)
            shapes[f"{name}.lora_B.weight"] = (out, 4, *(1 for _ in kernel))
        else:
            shapes |= {f"{name}.{part}": shape for part, shape in lycoris(method, out, into, kernel).items()}
    return shapes


def cell(reading) -> str:
    """Return how many modules are read correctly, or what happens to the file instead."""
    read, total = (sum(count[i] for count in reading.counts.values()) for i in (0, 1))
    if reading.refused:
        return "refused"
    if not read:
        return "misread" if reading.wrong else "none"
    return "all" if read == total else f"{read} of {total}"


def table() -> str:
    """Return a table with rows of family, layers, method and format, and a column for each program."""
    titles = [consumer.title for consumer in CONSUMERS.values()]
    lines = ["| For | Layers | Method | Format | " + " | ".join(titles) + " |", "| --- " * (4 + len(titles)) + "|"]
    for family, label in LABELS.items():
        for conv, layers in ((False, "attention, text"), (True, "+ conv")):
            kinds = [(NAMES[method], "kohya", kohya(family, method, conv)) for method in NAMES]
            kinds += [(NAMES["lora"], "diffusers", dotted(family, "lora", conv))]
            kinds += [(NAMES[method], "peft", dotted(family, method, conv)) for method in ("lora", "loha", "lokr")]
            for method, fmt, shapes in kinds:
                report = read_report(shapes, family, folder=fmt == "peft")
                cells = [cell(report[key]) for key in CONSUMERS]
                lines.append(f"| {label} | {layers} | {method} | {fmt} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def outputs(family) -> torch.Tensor:
    """Return a base's outputs for fixed inputs: text embeddings and prediction."""
    condition = family.encode_text(["a photo of sks toy"])
    condition = condition.with_sizes(family.size_conditions((64, 64), (0, 0), (64, 64)))
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prediction = family.predict(noisy, torch.tensor([500]), condition)
    return torch.cat([condition["encoder_hidden_states"].flatten(), prediction.flatten()])


def same(actual: torch.Tensor, base: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).norm() < 1e-3 * (expected - base).norm())


def effect(loaded, weights: AdapterWeights) -> torch.Tensor:
    """Return a base's outputs with an adapter."""
    applied = adapters.apply(loaded, weights)
    after = outputs(loaded)
    applied.detach()
    return after


def exported(weights: AdapterWeights, folder: Path) -> dict[str, AdapterWeights]:
    """Return each format that can hold an adapter -> the weights that its file contains."""
    exports = {}
    for fmt in FORMATS:
        with contextlib.suppress(LorakitError):  # the page states that this export is refused
            exports[fmt] = formats.read(formats.save(weights, folder, "a", [fmt], "fp32", {})[fmt])
    return exports


def equal(one: AdapterWeights, other: AdapterWeights) -> bool:
    """Whether two adapters have the same weights, so that their outputs are the same without a look at them."""

    def facts(layer) -> tuple:
        return type(layer), layer.alpha, {name: tensor.tolist() for name, tensor in layer.factors().items()}

    return one.layers.keys() == other.layers.keys() and all(
        facts(layer) == facts(other.layers[name]) for name, layer in one.layers.items()
    )


def storage_rows(family: str, room: Path) -> list[str]:
    """Return the rows of one family: each kind of storage, and the methods and formats that work there."""
    pipeline = small_models.small(family, room / family)
    file = small_models.write(room / f"{family}.safetensors", family, pipeline)

    def load(path: Path):
        section = ModelConfig(base=str(path), tokenizer=str(room / family) if path.is_file() else "")
        # The width of SD2's texts identifies it, and the small replica lacks that width, so the test sets the family.
        info = dataclasses.replace(families.describe(section), family=family)
        return info, families.load(info, "cpu", torch.float32)

    places = {"folder": room / family, "single file": file}
    cells: dict[str, list[str]] = {place: [] for place in (*places, "merged into a folder", "merged into a file")}
    bases = {place: load(path) for place, path in places.items()}
    layers = bases["folder"][0].layers
    shapes = random_adapters.one_of_each_kind({n: layers[n] for n in layers if export_can_hold(n)})
    outputs_before = {place: outputs(loaded) for place, (_, loaded) in bases.items()}
    for method in NAMES:
        weights = random_adapters.adapter(shapes, family, rank=2, alpha=1.0, method=method)
        exports = exported(weights, room / f"{family}-{method}")
        for place, (info, loaded) in bases.items():
            before = outputs_before[place]
            after = effect(loaded, weights)
            assert (after - before).norm() > 0
            good = [
                fmt
                for fmt, export in exports.items()
                if equal(export, weights) or same(effect(loaded, export), before, after)
            ]
            cells[place].append(", ".join(good))
            ending = ".safetensors" if place == "single file" else ""
            merged = merge.merge(weights, info, room / f"{family}-{method}-merged{ending}")
            kind = "merged into a file" if ending else "merged into a folder"
            cells[kind].append("yes" if same(outputs(load(merged)[1]), before, after) else "no")
    return [f"| {LABELS[family]} | {place} | " + " | ".join(row) + " |" for place, row in cells.items()]


def export_can_hold(name: str) -> bool:
    from lorakit.formats import keys

    return keys.is_read_everywhere(name)


STORAGE_HEAD = ["| For | Base | " + " | ".join(NAMES.values()) + " |", "| --- " * (2 + len(NAMES)) + "|"]


@pytest.mark.slow
def test_the_page_has_the_current_table_of_programs():
    assert table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", LABELS)
def test_the_page_has_the_current_table_of_storage(family, tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join(STORAGE_HEAD) in page
    assert "\n".join(storage_rows(family, tmp_path)) in page


if __name__ == "__main__":
    print(table())
    with tempfile.TemporaryDirectory() as room:
        print("\n".join([*STORAGE_HEAD, *(row for family in LABELS for row in storage_rows(family, Path(room)))]))
