import re
from pathlib import Path

import pytest

from lorakit import config
from lorakit.runs import quickstart
from lorakit.ui import commands, form, texts
from lorakit.ui.access import Roots

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("preset", config.preset_names())
def test_a_form_returns_the_config_that_it_shows(preset: str, tmp_path: Path):
    settings = config.load(preset)
    read, problems = form.read(form.values(settings), Roots([tmp_path]))
    assert problems == {}
    assert read == settings


def test_every_option_has_a_field_and_every_kind_occurs():
    fields = form.fields()
    assert {k.key for method in config.ADAPTER_SECTIONS for k in config.options(method) if not k.local_only} == set(
        fields
    )
    assert {field.kind for field in fields.values()} == {
        "text", "lines", "table", "number", "whole", "switch", "choice", "choices",
    }  # fmt: skip


def filled(**answers: object) -> dict[str, object]:
    values = form.values(config.load("subject-pocket"))
    return values | {key.replace("__", "."): value for key, value in answers.items()}


@pytest.mark.parametrize(
    ("answers", "key", "message"),
    [
        ({"adapter__rank": 0.0}, "adapter.rank", "adapter.rank = 0: must be between 1 and 1024"),
        ({"adapter__rank": 8.5}, "adapter.rank", "adapter.rank = 8.5: must be a whole number"),
        ({"adapter__rank": None}, "adapter.rank", "adapter.rank = None: must be a whole number"),
        ({"adapter__alpha": "many"}, "adapter.alpha", "adapter.alpha = 'many': must be a number"),
        ({"train__steps": "10"}, "train.steps", "set exactly one of"),
        ({"data__variants": 3.0}, "data.variants", "data.variants > 1 needs data.flip"),
        ({"data__folder": "../elsewhere"}, "data.folder", "is outside of"),
        ({"data__more_folders": "{'zib cat' = '/etc'}", "data__concepts": "one"}, "data.more_folders", "is outside of"),
        ({"data__more_folders": "{'zib cat' = 3}", "data__concepts": "one"}, "data.more_folders", "must be text"),
        ({"data__edits": "{'a.jpg' = 'turn 3'}"}, "data.edits", "write turn 90, 180 or 270"),
        ({"data__edits": "{'a.jpg' = "}, "data.edits", "must be a table, such as {'a.jpg' = 'turn 90'}"),
    ],
)
def test_a_problem_is_shown_at_its_field(answers: dict[str, object], key: str, message: str, tmp_path: Path):
    read, problems = form.read(filled(**answers), Roots([tmp_path]))
    assert read is None
    assert list(problems) == [key]
    assert message in problems[key][0]


def test_all_problems_are_shown_at_once(tmp_path: Path):
    _, problems = form.read(filled(adapter__rank=0.0, train__batch_size=0.0, model__base="/etc"), Roots([tmp_path]))
    assert set(problems) == {"adapter.rank", "train.batch_size", "model.base"}


def test_values_are_read_from_widgets():
    fields = form.fields()
    assert fields["adapter.alpha"].read("") is None
    assert fields["adapter.alpha"].read("1e-1") == 0.1
    assert fields["train.steps"].read("200") == 200
    assert isinstance(fields["train.steps"].read("200"), int)
    assert fields["sample.prompts"].read(" a dog \n\n a cat\n") == ("a dog", "a cat")
    assert fields["output.formats"].read(["kohya", "peft"]) == ("kohya", "peft")


def test_an_empty_prompt_stays_in_a_list():
    prompts = form.fields()["train.prior_prompts"]
    assert prompts.to_widget(("a mug", "", "a fish")) == 'a mug\n""\na fish'
    assert prompts.read(' a mug\n\n "" \na fish\n') == ("a mug", "", "a fish")


def test_changed_options_are_those_that_differ_from_the_preset():
    preset = form.values(config.load("subject-pocket"))
    assert form.changed(preset, preset) == {}
    assert form.changed(preset | {"adapter.rank": 9.0}, preset) == {"adapter.rank": (preset["adapter.rank"], 9.0)}


def test_quality_is_a_factor_on_the_presets_length():
    lengths = {}
    for quality in quickstart.LENGTH_FACTORS:
        suggested = quickstart.config_for_answers({}, quality)
        (lengths[quality],) = [
            v for key in quickstart.LENGTH_KEYS if (v := getattr(suggested.train, key.split(".")[1]))
        ]
    assert lengths["best"] == 2 * lengths["balanced"]
    assert lengths["quick"] == pytest.approx(lengths["balanced"] / 2, abs=1)


def test_every_used_text_exists_and_every_text_is_used():
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "lorakit/ui").rglob("*.py"))
    keys = set(re.findall(r"\b(?:say|t)\(\s*[\"']([\w.]+)[\"']", code)) | {*commands.CONVERSION}
    prefixed = (
        "state.",
        "choice.",
        "viewer.",
        "task.",
        "chart.",
        "captions.tool.",
        "edit.",
        "quality.",
        "section.",
        "option.",
        "help.",
        "photos.errors",
        "photos.warnings",
        "photos.notes",
    )
    assert keys <= set(texts.table("en"))
    unused = {key for key in texts.source("en").texts if key not in keys and not key.startswith(prefixed)}
    assert unused == set()


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-TW,zh;q=0.9,en;q=0.8", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"),
        ("en-GB,en;q=0.9,zh-TW;q=0.8", "en"),
        ("de-DE,de;q=0.9", "en"),
        ("de,zh;q=0.5,en;q=0.3", "zh-Hans"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-Hans"),
        ("zh-sg", "zh-Hans"),
        ("zh-HK,en;q=0.5", "zh-Hant"),
        ("eng,enm", "en"),
        ("en;q=x", "en"),
        ("", "en"),
    ],
)
def test_the_browser_chooses_the_language(header: str, language: str):
    assert texts.language_of(header) == language


def test_the_front_end_names_no_option_and_trains_nothing():
    keys = {k.key for method in config.ADAPTER_SECTIONS for k in config.options(method)}
    entry = (ROOT / "ui.py").read_text(encoding="utf-8")
    assert not [k for k in config.options() if re.search(rf"\b{k.name}\b", entry) and k.name not in ("name", "base")]
    for path in [ROOT / "ui.py", *(ROOT / "lorakit/ui").glob("*.py")]:
        code = path.read_text(encoding="utf-8")
        named = {key for key in keys if f'"{key}"' in code or f"'{key}'" in code}
        # The adapter's section is a tagged union. Its tag, the method, decides which options exist.
        assert named <= {"adapter.method"}, path.name
        assert not re.search(r"\btorch\b(?! never)|diffusers\.|backward\(|optimizer\.step", code), path.name


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("adapter.rank = 0: must be between 1 and 1024", "“Rank” = 0: must be between 1 and 1024"),
        ("set train.epochs, or data.folder.", "set “Epochs”, or “Photos”."),
        ("go on with --set train.steps=4", "go on with --set train.steps=4"),
        ("`train.steps` and a/train.steps and photo.txt", "`train.steps` and a/train.steps and photo.txt"),
        ("train.stepz is no option", "train.stepz is no option"),
        ("give it with --base", "give it with “Base model”"),
        ("give a VAE by model.vae (--vae)", "give a VAE by “VAE”"),
        ("(`lorakit caption` does that)", "(“Captions: write with a model, or edit all” does that)"),
        ("lorakit merge a --base BASE", "lorakit merge a --base BASE"),
        ("--base-model x: leave --no-base out", "--base-model x: leave --no-base out"),
    ],
)
def test_a_message_names_options_as_the_page_does(message: str, line: str):
    assert texts.sayer("en").explain(message) == line
    assert ("「" in texts.sayer("zh-Hant").explain(message)) == ("“" in line)


def test_a_line_of_the_plan_says_where_an_option_is() -> None:
    say = texts.sayer("en")
    line = say.explain("45 steps, raised to train.min_steps = 400; data.name, --base", places=True)
    assert line == ("45 steps, raised to “All options › Training › Min steps” = 400; “Trigger and name”, “Base model”")


@pytest.mark.parametrize("method", config.ADAPTER_SECTIONS)
def test_a_form_has_a_value_for_every_option_of_any_method(method: str) -> None:
    values = form.values(config.load(None, {"adapter.method": method, "train.steps": 1}))
    assert values.keys() == form.fields().keys()
    assert values["adapter.method"] == method and values["adapter.rank"] >= 1


def test_lines_of_a_widget_stay_the_same():
    field = next(field for field in form.fields().values() if field.kind == "lines")
    assert field.to_widget(field.to_widget(("a toy", "b"))) == "a toy\nb"
