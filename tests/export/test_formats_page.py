"""The table in docs/formats.md is what `read_report` says of whole files at true dimensions.

`python tests/export/test_formats_page.py` prints it anew.
"""

from pathlib import Path

import random_adapters

from lorakit.export.consumers import CONSUMERS, read_report

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
LABELS = {"sd1": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL"}


def kohya(family: str, method: str, conv: bool) -> dict[str, tuple]:
    """Names and shapes of a whole kohya file, with `dora_scale` per input column for DoRA."""
    shapes = random_adapters.kohya_shapes(family, conv=conv)
    scales = {}
    for name, shape in shapes.items() if method == "dora" else ():
        if name.endswith(".lora_down.weight"):
            scales[name.replace("lora_down.weight", "dora_scale")] = (1, shape[1], *(1 for _ in shape[2:]))
    return shapes | scales


def dotted(family: str, conv: bool) -> dict[str, tuple]:
    """Names and shapes of a whole diffusers file."""
    shapes = {}
    for name, _, _, group, (out, into, *kernel) in random_adapters.frozen(family):
        if not group.startswith("top") and "text_projection" not in group and (conv or not group.startswith("conv")):
            shapes[f"{name}.lora_A.weight"] = (4, into, *kernel)
            shapes[f"{name}.lora_B.weight"] = (out, 4, *(1 for _ in kernel))
    return shapes


def cell(reading) -> str:
    """How many modules are read rightly, or what happens to the file instead."""
    read, total = (sum(count[i] for count in reading.counts.values()) for i in (0, 1))
    if reading.refused:
        return "refused"
    if not read:
        return "misread" if reading.wrong else "none"
    return "all" if read == total else f"{read} of {total}"


def table() -> str:
    """Family x layers x method x format down, programs across."""
    titles = [consumer.title for consumer in CONSUMERS.values()]
    lines = ["| For | Layers | Method | Format | " + " | ".join(titles) + " |", "| --- " * (4 + len(titles)) + "|"]
    for family, label in LABELS.items():
        for conv, layers in ((False, "attention, text"), (True, "+ conv")):
            kinds = [
                ("LoRA, rsLoRA", "kohya", kohya(family, "lora", conv)),
                ("DoRA", "kohya", kohya(family, "dora", conv)),
            ]
            kinds += [("LoRA, rsLoRA", fmt, dotted(family, conv)) for fmt in ("diffusers", "peft")]
            for method, fmt, shapes in kinds:
                report = read_report(shapes, family, folder=fmt == "peft")
                cells = [cell(report[key]) for key in CONSUMERS]
                lines.append(f"| {label} | {layers} | {method} | {fmt} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_page_has_the_table_of_today():
    assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
