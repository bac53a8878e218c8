"""Messages of the other packages are translated: plans, findings about photos, problems of a config."""

import dataclasses
import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lorakit import config, families
from lorakit.config import ConfigError, DataConfig
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Joined, Message, from_json, join
from lorakit.data import checks, photo_folder
from lorakit.families import clip_tokenizer, text_encoders
from lorakit.families.describe import INPAINTING
from lorakit.families.facts import noise_schedule, other_models
from lorakit.families.ldm import NOTHING_SAYS
from lorakit.runs import plan, quickstart
from lorakit.runs.preflight import preflight
from lorakit.ui import texts
from lorakit.ui.texts.sentences import Sentences

CHINESE = re.compile(r"[\u4e00-\u9fff]")
# The tables of languages that people translate. test_languages.py checks those that a machine makes.
TABLES = {
    name: texts.sentences(name) for name in texts.LANGUAGES if name != "en" and not texts.source(name).about.by_machine
}


def lacking(lines: list[str]) -> list[str]:
    """Return the lines, and parts of lines, for which a language has no translation."""
    every = [part for line in dict.fromkeys(lines) for part in parts(line)]
    return [part for part in every if any(table.translated(part) is None for table in TABLES.values())]


def parts(text: str) -> Iterator[str]:
    """Yield a message and the messages in its values."""
    if not isinstance(text, Joined):
        yield text
    inside = text.parts if isinstance(text, Joined) else text.values.values() if isinstance(text, Message) else ()
    yield from (part for value in inside if isinstance(value, Message) for part in parts(value))


# -- translation of one message -------------------------------------------------------------------------------------


def test_no_space_stands_between_two_words_of_a_script_without_spaces():
    table = Sentences({"{one} and {other}": "{one} 與 {other}", "toy": "玩具", "the word {word}": "「{word}」"}, {})
    quoted = Message("the word {word}", "a b")
    assert table.translated(Message("{one} and {other}", "toy", "toy")) == "玩具與玩具"
    assert table.translated(Message("{one} and {other}", quoted, "a toy")) == "「a b」與 a toy"
    assert table.translated(Message("{one} and {other}", "a", "b")) == "a 與 b"


@pytest.mark.parametrize("name", sorted({*texts.LANGUAGES} - {"en"}))
def test_the_plan_has_no_space_between_two_words_of_a_script_without_spaces(name: str, tmp_path: Path):
    wide = "[\u3000-\u30ff\u4e00-\u9fff\uff00-\uff60]"
    stray = re.compile(f"{wide} [“”]|[“”] {wide}|{wide} {wide}")
    for number in range(4):
        Image.effect_noise((96, 96), 50 + 20 * number).convert("RGB").save(tmp_path / f"{number}.png")
    answers = {quickstart.PHOTOS: str(tmp_path), quickstart.NAME: "sks toy"}
    ready = preflight(quickstart.config_for_answers(answers, "quick", changed={"train.prior": "images"}))
    lines = [texts.sayer(name).explain(line) for line in [*ready.plan.lines(), *ready.warnings]]
    assert any("sks toy" in line for line in lines) and len(lines) > 8
    assert [line for line in lines if stray.search(line)] == []


def test_a_message_is_translated_by_its_template_with_its_values():
    table = Sentences(
        {
            "{file}: {what}": "« {file} » : {what}",
            "{count} of {all} are {how}": "{all}, dont {count} {how}",
            "{names} and {count} more": "{names} et {count} autres",
            "damaged": "abîmé",
        },
        {"; ": " ; "},
    )
    assert table.translated(Message("{count} of {all} are {how}", 3, 16, "(very)")) == "16, dont 3 (very)"
    cause = Message("{file}: {what}", Message("{names} and {count} more", "a {b}", 2), "damaged")
    assert table.translated(cause) == "« a {b} et 2 autres » : abîmé"
    assert table.translated(join("; ", [cause, "else"])) == "« a {b} et 2 autres » : abîmé ; else"
    # A message without a line is not translated, nor is a plain string that only looks like a message.
    assert table.translated(Message("{file}: {what}!", "a", "damaged")) is None
    assert table.translated("a.png: damaged") is None and table.translated("") is None
    # A log of another program can lack values.
    assert table.translated(from_json("a: b", {"key": "{file}: {what}", "values": {"file": "a"}})) is None


def test_english_stays_as_it_is_and_chinese_is_translated_line_by_line():
    text = join("\n", [Message("{name} = {side}: must be a multiple of 8", "a.b", 3), "something new", "blurred"])
    assert texts.sayer("en").translate(text) == "a.b = 3: must be a multiple of 8\nsomething new\nblurred"
    expected = ["a.b = 3：必須是 8 的倍數", "something new", "模糊"]
    assert texts.sayer("zh-Hant").translate(text).split("\n") == expected


def test_chinese_is_written_as_in_taiwan():
    """Punctuation after Chinese characters has full width, and the words are those of Taiwan, not of the mainland."""
    content = vars(texts.source("zh-Hant"))
    every = [text for part in ("texts", "sections", "choices", "sentences") for text in content[part].values()]
    for text in [*every, *itertools.chain(*content["options"].values())]:
        assert not re.search(r"[\u4e00-\u9fff][,;:?!(]", text), text
        assert not re.search(r"文件|默認|信息|內存|數據|軟件|程序員|視頻|屏幕|網絡|質量|支持|圖像|卸載|緩存", text), (
            text
        )


# -- all messages ---------------------------------------------------------------------------------------------------


def plans(tiny_sd1: Path) -> Iterator[plan.Plan]:
    """Yield plans of all presets, with each kind of length, and with photos of one size and of several sizes."""
    lengths: list[dict[str, Any]] = [
        {"train.steps": 30},
        {"train.steps": 500, "train.batch_size": 1, "train.gradient_accumulation_steps": 1},
        {"train.epochs": 3},
        {"train.epochs": 3, "train.gradient_accumulation_steps": 4},
        {"train.steps_per_image": 20},
        {"train.steps_per_image": 20, "train.batch_size": 1},
    ]
    variations: list[dict[str, Any]] = [*lengths, {"adapter.method": "rslora", "adapter.train_text_encoder": True}]
    variations += [{"memory.device": "cuda"}, {"memory.device": "cuda", "memory.stream_base": True}]
    changes_of_plan = {"memory.base_storage": "full", "memory.gradient_checkpointing": False}
    variations += [{"memory.compile": True} | changes_of_plan]
    variations += [{"model.prediction_type": "v_prediction_zero_snr"}]
    for preset, changed in itertools.product(config.preset_names(), variations):
        base = "pocket" if preset.endswith("pocket") else str(tiny_sd1)
        settings = config.load(preset, {"model.base": base, "data.name": "sks toy", "memory.device": "cpu"} | changed)
        info = families.describe(settings.model)
        for count in (1, 16):
            items = [
                SimpleNamespace(photo=SimpleNamespace(relative=f"{n}.png", repeats=1), buckets=((64, 64),))
                for n in range(count)
            ]
            report = SimpleNamespace(items=items, photos=[item.photo for item in items], class_photos=[], chunks=1)
            yield plan.make(settings, info, report)


@pytest.mark.slow
def test_every_line_of_a_plan_is_translated(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_matmul_speed", lambda: 1e10)
    all_plans = list(plans(tiny_sd1))
    for seconds in (12, 600, 9000, 300_000, None):
        all_plans.append(dataclasses.replace(all_plans[0], seconds=seconds))
    for ram in (0, 1, 10**12):
        all_plans.append(dataclasses.replace(all_plans[0], host=10**9, ram=ram))
    lines = [line for one in all_plans for line in one.lines()]
    assert lacking(lines) == []
    # The translated plan contains none of these English words.
    translated = texts.sayer("zh-Hant").translate(join("\n", all_plans[1].lines()))
    assert not re.search(r"\b(photos?|steps?|about|modules|weights|each|draw|encode|held|estimate)\b", translated), (
        translated
    )


def test_notes_about_a_base_are_translated():
    sure = Message(
        "prediction type: {kind}, {why}", noise_schedule.name("v_prediction", True), "as its key v_pred says"
    )
    notes = [
        *("as its key v_pred says", NOTHING_SAYS, INPAINTING, sure, clip_tokenizer.FROM_HUB, clip_tokenizer.TO_FETCH),
        *(text_encoders.T5_FROM_HUB, text_encoders.T5_TO_FETCH, checks.NOT_COUNTED),
        *(*other_models.KINDS.values(), *other_models._PARTS, *map(other_models._other, other_models._MODELS)),
        other_models.what_encoder({"text_encoder": ["a", "RobertaModel"]}, "text_encoder", "CLIP"),
        str(clip_tokenizer.missing("x.safetensors", 1)),
        str(clip_tokenizer.missing("x.safetensors", clip_tokenizer.WORDS + 1)),
    ]
    assert lacking(notes) == []
    assert texts.sayer("zh-Hant").translate(sure) == "預測類型：v_prediction（終端 SNR 為零），依檔案中的鍵 v_pred"


def bad_photos(photos: Path) -> None:
    """Write photos with each problem that the check can find."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "sharp.png")
    (photos / "copy.png").write_bytes((photos / "sharp.png").read_bytes())
    large = np.kron(
        np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((24, 24, 1), np.uint8)
    )
    Image.fromarray(large).save(photos / "one.png")
    Image.fromarray(large).save(photos / "other.jpg", quality=60)
    Image.fromarray(noise[:32, :32]).save(photos / "small.png")
    Image.fromarray(noise[:, :30]).resize((100, 333)).save(photos / "narrow.png")
    Image.fromarray(large).filter(ImageFilter.GaussianBlur(14)).save(photos / "blurred.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[:64]).save(photos / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([noise, np.zeros((96, 96), np.uint8)])).save(photos / "clear.png")
    Image.fromarray(noise).convert("CMYK").save(photos / "cmyk.jpg")
    Image.fromarray(noise).save(photos / "profile.png", icc_profile=b"no profile")
    frames = [Image.fromarray(np.roll(noise, n, 0)) for n in range(2)]
    frames[0].save(photos / "frames.gif", save_all=True, append_images=frames[1:])
    frames[0].save(photos / "pages.tif", save_all=True, append_images=frames[1:])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("hello")
    (photos / "odd.jpg").write_bytes(b"\x00\x01\x02" * 99)
    (photos / "cut.jpg").write_bytes((photos / "cmyk.jpg").read_bytes()[:2000])
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (photos / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + header + b"\0" * 40)
    Image.new("L", (10, 10)).save(photos / "one.mask.png")
    Image.new("L", (96, 96), 255).save(photos / "sharp.mask.png")
    (photos / "sharp.txt").write_text("sks toy on the left")
    (photos / "sharp.caption").write_text("another")
    (photos / "small.txt").write_text("a long caption, " * 60)
    (photos / "narrow.txt").write_text("")
    (photos / "clear.txt").write_bytes("sks toy in a caf\xe9".encode("cp1252"))
    (photos / "nobody.txt").write_text("no photo of that name")
    (photos / "film.mp4").write_bytes(b"film")
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "a"}\n{"file_name": "gone.png", "text": "b"}\n'
    )
    for place in ("10_sks toy", "10_sks toy/deeper"):
        (photos / place).mkdir()
        Image.fromarray(noise[::-1]).save(photos / place / "below.png")


def test_every_finding_about_photos_is_translated(tmp_path: Path):
    base = families.describe("pocket")
    (tmp_path / "bad").mkdir()
    bad_photos(tmp_path / "bad")
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.effect_noise((90, 64), 80).convert("RGB").save(bare / "1.png")
    lines: list[str] = []
    kinds: set[str] = set()
    for place, name in itertools.product(("bad", "bare"), ("sks toy", "sks", "")):
        settings = DataConfig(folder=str(tmp_path / place), name=name, resolution=64, flip=True, variants=2)
        report = checks.check(settings, base)
        lines += [*report.errors, *report.warnings, *report.notes]
        lines += [finding for item in report.items for finding in item.findings]
        kinds |= {key for key, findings in vars(report).items() if key in ("errors", "warnings", "notes") and findings}
    assert kinds == {"errors", "warnings", "notes"}
    assert lacking(lines) == []
    # The test covers nearly all sentences of checks, decode and photo_folder.
    assert len({re.sub(r"\d+|\"[^\"]*\"|[\w /]+\.\w{3,4}", "", line) for line in lines}) > 40


@pytest.mark.parametrize("kind", ["nothing", "files", "deeper", "file", "picture", "gone"])
def test_why_a_folder_is_refused_is_translated(kind: str, tmp_path: Path):
    place = tmp_path / "photos"
    if kind in ("file", "picture"):
        place = place.with_suffix(".txt" if kind == "file" else ".png")
        place.touch()
    elif kind != "gone":
        place.mkdir()
    else:
        (tmp_path / "photo").mkdir()
    if kind == "files":
        (place / "a.mp4").touch()
        (place / "README").touch()
    if kind == "deeper":
        (place / "a" / "b").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "a" / "b" / "1.png")
    with pytest.raises(LorakitError) as caught:
        photo_folder.scan(place)
    assert lacking([str(caught.value)]) == []
    translated = texts.sayer("zh-Hant").translate(str(caught.value)).replace(str(tmp_path), "")
    assert not re.search(r"found|nothing|without|only|level|mean", translated), translated


def problems(tables: dict[str, Any], **overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.from_tables(tables, {key.replace("__", "."): value for key, value in overrides.items()})
    return caught.value.problems


def test_every_problem_of_a_config_is_translated(tmp_path: Path):
    steps = {"train": {"steps": 1}}
    problem_lines = problems({"trian": {}, "zzz": {}, "data": 3})
    # Give each option a wrong value of each type.
    for wrong in (object, 10**12, -(10**12), float("nan"), True, "nonsense", ["nonsense"], [], [3], 0, 0.5, None):
        for method in config.ADAPTER_SECTIONS:
            settings = {k.key: wrong for k in config.options(method) if k.key != "adapter.method"}
            with pytest.raises(ConfigError) as caught:
                config.from_tables({}, settings | {"adapter.method": method})
            problem_lines += caught.value.problems
    for wrong in ("adafacto", "l", ["kohyo"]):
        problem_lines += problems(steps, optimizer__name=wrong, adapter__method=wrong, output__formats=wrong)
    problem_lines += problems(steps, trian__step=1, train__zzz=1)
    problem_lines += problems({})
    problem_lines += problems({}, train__steps=1, train__epochs=1)
    problem_lines += problems({}, train__steps=1, train__epochs=1, train__steps_per_image=1)
    contradictions: list[dict[str, Any]] = [
        {"optimizer__text_encoder_learning_rate": 1e-4},
        {"adapter__new_tokens": 2},
        {"train__init_from": "a", "adapter__method": "pissa"},
        {"train__prior_loss_weight": 0.5},
        {"train__prior_prompts": ("a sks mug",), "train__prior": "teacher", "data__name": "sks toy"},
        {"train__class_images": 7, "train__prior": "teacher"},
        {"data__variants": 2},
        {"data__flip": True},
        {"data__resolution": 100},
        {"memory__compile": True, "memory__base_storage": "int8"},
        {"memory__compile": True, "memory__gradient_checkpointing": True},
        {"memory__compile": True, "adapter__dropout": 0.1},
    ]
    problem_lines += [line for settings in contradictions for line in problems(steps, **settings)]
    (tmp_path / "broken.toml").write_text("a = ")
    for preset in ("subject-poket", "zzz", tmp_path / "gone.toml", tmp_path / "broken.toml"):
        with pytest.raises(ConfigError) as caught:
            config.load(preset)
        problem_lines += caught.value.problems
    with pytest.raises(ConfigError) as caught:
        config.parse_override("nothing")
    problem_lines += caught.value.problems
    assert lacking(problem_lines) == []


def test_why_a_base_is_refused_is_translated(tmp_path: Path, tiny_sd1: Path):
    messages = []
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").touch()
    (tmp_path / "m.ckpt").touch()
    (tmp_path / "m.txt").touch()
    for name, content in {"e": b"", "p": b"PK\x03\x04", "g": b"GGUF", "w": b"<!doctype", "n": b"x" * 99}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    names = ["gone", "empty", "other", "m.ckpt", "m.txt", *(f"{n}.safetensors" for n in "epgwn")]
    for base in [*(str(tmp_path / name) for name in names), "owner/name"]:
        with pytest.raises(LorakitError) as caught:
            quickstart.describe(base)
        messages.append(str(caught.value))
    assert lacking(messages) == []
