"""Tests of captions with several lines: the check reads every text that is trained and reports how it reads lines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit.config import DataConfig
from lorakit.data import captions, checks
from lorakit.data.latents import _TextTable

LONG = "sks toy " + "photo " * 300


def check(photos: Path, base: Any, **options: Any) -> checks.Report:
    return checks.check(DataConfig(folder=str(photos), name="sks toy", resolution=64, **options), base)


def fill(photos: Path, *texts: str) -> None:
    for number, text in enumerate(texts):
        colours = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(colours).save(photos / f"{number}.png")
        if text:
            (photos / f"{number}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "options", "tokens"),
    [
        ("sks toy\nsks toy photo of photo", {"caption_lines": True}, 5),
        ("sks toy photo\n\n\nsks toy\r\n", {"caption_lines": True}, 3),
        ("sks toy\nphoto of", {}, 4),
        ("sks toy {photo|photo of photo of|of}", {"wildcards": True}, 6),
        ("photo\nsks toy {of|photo photo photo}", {"caption_lines": True, "wildcards": True}, 5),
    ],
)
def test_tokens_are_counted_for_the_longest_possible_text(
    photos: Path, base: Any, text: str, options: dict[str, Any], tokens: int
) -> None:
    fill(photos, text)
    report = check(photos, base, **options)
    assert report.items[0].tokens == tokens
    table = _TextTable(DataConfig(name="sks toy", **options), 0)
    counter = captions.TokenCounter(base.tokenizers["tokenizer"], base.max_tokens)
    counts = [counter.count(table.texts[at])[0] for at in table.choices(report.photos[0])]
    assert max(counts) == tokens


def test_faults_in_a_later_line_are_found(photos: Path, base: Any) -> None:
    fill(photos, f"sks toy\n{LONG}", "sks toy\nphoto (of:1.3)", "sks toy\nsks toy on the left")
    report = check(photos, base, caption_lines=True, flip=True, variants=2)
    long, weighted, left = report.items
    assert long.tokens > 225 and long.cut and report.chunks == 3
    assert "(of:1.3) is trained as letters" in weighted.findings and "caption without the trigger" in weighted.findings
    assert "left or right in its text" in left.findings and len(report.errors) == 1
    assert "caption files with several lines: 3 of 3; 6 captions, of which one is drawn each time" in report.notes


def test_several_lines_read_as_one_text_get_a_note(photos: Path, base: Any) -> None:
    fill(photos, "a sks toy\non a beach", "sks toy")
    report = check(photos, base)
    assert report.items[0].text == "a sks toy on a beach"
    assert (
        "caption files with several lines: 1 of 2; one text each; with data.caption_lines = true each line is a caption"
        in report.notes
    )


def test_a_caption_from_a_file_name_is_not_missing(photos: Path, base: Any) -> None:
    fill(photos, "sks toy", "")
    (photos / "1.png").rename(photos / "red_sks toy.png")
    assert not [line for line in check(photos, base, caption_from_name=True).warnings if "no caption" in line]
    assert [line for line in check(photos, base).warnings if "photos without a caption: 1 of 2" in line]


def test_an_unclosed_wildcard_is_scanned_in_linear_time() -> None:
    # a pattern that tries each bar as the first would take minutes
    assert captions.WILDCARD.search("{" + "|" * 500_000) is None
    assert [match[1] for match in captions.WILDCARD.finditer("a {red|blue} {dog|} {cat} {{x|y}}")] == [
        "red|blue",
        "dog|",
        "x|y",
    ]
