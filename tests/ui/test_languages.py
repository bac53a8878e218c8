"""The language files in ui/texts/: each has the lines of English with the same values, and the page uses one."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.core.errors import LorakitError
from lorakit.ui import form, texts

OTHERS = [name for name in texts.LANGUAGES if name != "en"]
PARTS = {"about", "texts", "sections", "options", "choices", "joints", "sentences"}
# Number of missing or unused lines that a machine-made language may have. The limit may only be lowered.
LACKING = 0


def lines(language: str) -> Iterator[tuple[str, str, str]]:
    """Yield part, key and text of each line of a language."""
    for part in PARTS - {"about"}:
        for key, text in vars(texts.source(language))[part].items():
            yield from ((part, key, one) for one in (text if part == "options" else [text]))


def values(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_a_file_has_each_key_once_and_no_other_parts(language: str):
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        assert [key for key, count in Counter(key for key, _ in pairs).items() if count > 1] == []
        return dict(pairs)

    content = json.loads((texts.FOLDER / f"{language}.json").read_text(encoding="utf-8"), object_pairs_hook=once)
    assert set(content) == PARTS
    about = content["about"]
    assert set(about) == {"name", "locale", "serves", "by_machine", "note"}
    assert texts.language_of(about["locale"]) == language
    assert bool(about["note"]) == about["by_machine"], "who reads it is told"


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("ja; q=0.5, en;q=0.1", "ja"),
        ("en ;q=0.2 , ja-JP ; Q=0.9", "ja"),
        ("ja;q=0, zh-TW;q=0.1", "zh-Hant"),
        ("ja;q=0", "en"),
        ("ja;q=nan, jam, x;q=much", "en"),
    ],
)
def test_accept_language_may_have_spaces_and_exclusions(header: str, language: str):
    assert texts.language_of(header) == language


def test_no_two_languages_have_the_same_name_or_serve_the_same_browsers():
    for part in ("name", "locale"):
        assert len({vars(texts.source(name).about)[part] for name in texts.LANGUAGES}) == len(texts.LANGUAGES)
    codes = [code for name in texts.LANGUAGES for code in texts.source(name).about.serves]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_has_the_lines_and_values_of_english(language: str):
    content, english = (vars(texts.source(name)) for name in (language, "en"))
    keys = {part: set(english[part]) for part in ("texts", "sections", "choices")}
    keys |= {"options": set(form.fields())} | {
        part: set(vars(texts.source("zh-Hant"))[part]) for part in ("joints", "sentences")
    }
    lacking = [(part, key) for part, names in keys.items() for key in sorted(names - set(content[part]))]
    left_over = [(part, key) for part, names in keys.items() for key in content[part] if key not in names]
    allowed = LACKING if content["about"].by_machine else 0
    assert len(lacking + left_over) <= allowed, (lacking, left_over)
    for part, key, text in lines(language):
        assert text.strip() or key in ("", " "), (part, key)
        if part == "texts" and key in english["texts"]:
            assert values(text) == values(english["texts"][key]), key
        elif part == "sentences" and "{" in key.replace("{{", ""):
            # A translation may omit one value.
            assert values(text) <= values(key) and len(values(key) - values(text)) <= 1, key
    assert all(len(pair) == 2 for pair in content["options"].values())
    # The page removes a pair of asterisks and emphasizes the text between them.
    table = texts.table(language)
    assert [key for key, text in table.items() if key.startswith("help.") and text.count("*") > 1] == []


def test_missing_lines_of_a_language_are_in_english(monkeypatch: pytest.MonkeyPatch):
    about = texts.About("x", "xx", ["xx"], True, "(made)")
    some = {"about": about, "texts": {"tab.train": "X"}, "options": {"model.vae": ["Y"]}}
    content = texts.Source(**{part: {} for part in PARTS} | some)
    original = texts.source
    monkeypatch.setattr(texts, "source", lambda name: content if name == "xx" else original(name))
    table, english = texts.table.__wrapped__("xx"), texts.table("en")
    changed = {key for key, text in table.items() if text != english[key]}
    assert changed == {"tab.train", "option.model.vae", "app.tagline"} and set(table) == set(english)
    assert table["app.tagline"] == f"{english['app.tagline']} (made)" and table["option.model.vae"] == "Y"


GOOD = {"about": {"name": "X", "locale": "xx", "serves": ["xx"], "by_machine": False, "note": ""}}


def folder_with(place: Path, content: bytes) -> Path:
    """Write a folder with the English file and a file of another language."""
    (place / "en.json").write_bytes((texts.FOLDER / "en.json").read_bytes())
    (place / "xx.json").write_bytes(content)
    return place


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"about": ', r"no JSON in UTF-8 \(Expecting value"),
        (b'{"about": "\xff"}', r"no JSON in UTF-8 \('utf-8' codec"),
        (b"[" * 100_000, r"no JSON in UTF-8 \("),
        (b"[]", "its parts are not those that docs/adding.md names"),
        (b"{}", "its parts are not those that docs/adding.md names"),
        (json.dumps(GOOD | {"text": {}}).encode(), "its parts are not those that docs/adding.md names"),
        (json.dumps({"about": GOOD["about"] | {"serves": "xx"}}).encode(), "serves is of the wrong kind"),
        (json.dumps({"about": GOOD["about"] | {"by_machine": "no"}}).encode(), "by_machine is of the wrong kind"),
        (json.dumps({"about": GOOD["about"] | {"locale": 3}}).encode(), "locale is of the wrong kind"),
        (json.dumps(GOOD | {"texts": {"tab.train": None}}).encode(), "texts is of the wrong kind"),
        (json.dumps(GOOD | {"sections": []}).encode(), "sections is of the wrong kind"),
        (json.dumps(GOOD | {"options": {"model.vae": "VAE"}}).encode(), "options is of the wrong kind"),
        (json.dumps(GOOD | {"options": {"model.vae": ["1", "2", "3"]}}).encode(), "options is of the wrong kind"),
    ],
)
def test_a_file_that_is_no_language_is_named_and_left_out(tmp_path: Path, content: bytes, reason: str):
    languages, problems = texts.read_all(folder_with(tmp_path, content))
    assert list(languages) == ["en"]
    (line,) = problems
    assert re.fullmatch(rf".*xx\.json: {reason}.*; the page leaves this language out", line)


def test_a_text_with_other_values_is_shown_in_english(tmp_path: Path):
    own = {"tab.train": "X", "photos.count": "{cuont}", "photos.page": "{first", "unit.gib": "{value} G"}
    languages, problems = texts.read_all(folder_with(tmp_path, json.dumps(GOOD | {"texts": own}).encode()))
    assert languages["xx"].texts == {"tab.train": "X", "unit.gib": "{value} G"} and languages["xx"].sentences == {}
    assert problems == [
        f"{tmp_path / 'xx.json'}: the names in braces of photos.count, photos.page are not those of English; "
        "these texts are in English"
    ]


def test_without_english_there_is_no_page(tmp_path: Path):
    (folder_with(tmp_path, b"") / "en.json").write_text("{", encoding="utf-8")
    with pytest.raises(LorakitError, match=r"en\.json: no JSON in UTF-8"):
        texts.read_all(tmp_path)
    (tmp_path / "en.json").unlink()
    with pytest.raises(LorakitError, match=r"en\.json: cannot be read \(No such file"):
        texts.read_all(tmp_path)


def test_the_command_says_which_file_is_broken_and_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    app = pytest.importorskip("lorakit.ui.app", reason="the front end needs gradio: pip install 'lorakit[ui]'")
    served: list[object] = []
    monkeypatch.setattr(app, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(texts, "PROBLEMS", texts.read_all(folder_with(tmp_path, b"{"))[1])
    assert app.main(["--runs", str(tmp_path / "runs"), "--root", str(tmp_path)]) == 0 and len(served) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"lorakit: {tmp_path / 'xx.json'}: no JSON in UTF-8")


@pytest.mark.parametrize("language", OTHERS)
def test_commands_are_not_translated(language: str):
    command = re.compile(r"(?<![\w-])--[a-z][a-z-]*|lorakit [a-z]+\b")
    for part, key, text in lines(language):
        english = texts.source("en").texts.get(key, text) if part == "texts" else key
        if part in ("texts", "sentences"):
            assert set(command.findall(text)) <= set(command.findall(english)), key
