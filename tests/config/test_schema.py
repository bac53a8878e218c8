"""The rules of the config: names, values, contradictions, presets and overrides, and a round trip through TOML."""

import dataclasses
import math
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from lorakit import config
from lorakit.config import ConfigError
from lorakit.config.option import Option, check_value, option as new_option
from lorakit.core.registry import METHODS, MethodSpec

STEPS = {"train.steps": 1}


def problems(overrides: dict[str, Any], tables: dict[str, Any] | None = None) -> list[str]:
    """Return the problems that `from_tables` reports."""
    with pytest.raises(ConfigError) as caught:
        config.from_tables(tables or {}, overrides)
    return caught.value.problems


def problem(key: str, value: Any) -> str:
    """Return the only problem with a value."""
    problem_list = problems({**STEPS, key: value})
    assert len(problem_list) == 1
    return problem_list[0]


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("optimizer.learning_ratte", "optimizer.learning_rate"),
        ("optimizer.lr_warmup_steps", "optimizer.warmup_steps"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("adapter.rnak", "adapter.rank"),
        ("rank", "adapter.rank"),
    ],
)
def test_an_unknown_option_is_an_error_with_the_nearest_name(wrong: str, near: str) -> None:
    assert problem(wrong, 1) == f"unknown option {wrong} (did you mean {near}?)"


def test_an_option_like_nothing_gets_no_hint() -> None:
    assert problem("train.qqqqqqqqqqq", 1) == "unknown option train.qqqqqqqqqqq"


def test_an_unknown_section_is_an_error_with_the_nearest_name() -> None:
    assert problems({}, {"trian": {"steps": 1}, "train": {"steps": 1}}) == [
        "unknown section [trian] (did you mean train?)"
    ]


def test_a_section_must_be_a_table() -> None:
    assert problems({}, {"train": 3})[0] == "[train] must be a table, not 3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(config.LoraConfig):
    method: str = "block"
    block_size: int = new_option(4, "Rows of a block.", low=1)


def test_an_option_of_another_method_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapter` is a union on `method`: an option of one method is unknown with another."""

    spec = MethodSpec("lorakit.adapters.lora:LORA", section=f"{__name__}:Block")
    monkeypatch.setitem(METHODS.own, "block", spec)
    assert config.from_tables({}, {**STEPS, "adapter.method": "block", "adapter.block_size": 8}).adapter.block_size == 8  # type: ignore[union-attr]
    assert problem("adapter.block_size", 8).startswith("unknown option adapter.block_size")


def test_an_unknown_method_lists_the_methods() -> None:
    assert problem("adapter.method", "lorra") == (
        "adapter.method = 'lorra': choose one of lora, rslora, dora, pissa, loha, lokr, full, embedding "
        "(did you mean lora?)"
    )


@pytest.mark.parametrize("value", [["lora"], {"a": 1}, 1, True])
def test_a_method_that_is_no_text_is_an_error(value: Any) -> None:
    assert "adapter.method" in problem("adapter.method", value)


def test_all_problems_are_reported_at_once() -> None:
    result = problems(
        {"train.stepz": 1, "train.steps": 0, "adapter.rank": "16", "model.bsae": "x", "data.kind": "subjekt"},
        {"modle": {}},
    )
    assert len(result) == 6
    with pytest.raises(ConfigError) as caught:
        config.from_tables({"modle": {}}, {"a.b": 1})
    assert str(caught.value).splitlines() == caught.value.problems


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.resolution", "512", "data.resolution = '512': must be a whole number"),
        ("data.resolution", 512.0, "data.resolution = 512.0: must be a whole number"),
        ("adapter.rank", True, "adapter.rank = True: must be a whole number"),
        ("adapter.alpha", True, "adapter.alpha = True: must be a number"),
        ("optimizer.learning_rate", "1e-4", "optimizer.learning_rate = '1e-4': must be a number"),
        ("optimizer.learning_rate", False, "optimizer.learning_rate = False: must be a number"),
        ("data.flip", 1, "data.flip = 1: must be true or false"),
        ("data.flip", "true", "data.flip = 'true': must be true or false"),
        ("data.name", 7, "data.name = 7: must be text"),
        ("data.name", None, "data.name = None: must be text"),
        ("sample.prompts", ["one", 2], "sample.prompts = ['one', 2]: must be a list of strings"),
        ("sample.prompts", 3, "sample.prompts = 3: must be a list of strings"),
        ("output.formats", [], "output.formats = []: choose from kohya, diffusers, peft"),
        (
            "output.formats",
            ["kohia"],
            "output.formats = ['kohia']: choose from kohya, diffusers, peft (did you mean kohya?)",
        ),
        ("data.kind", "stile", "data.kind = 'stile': choose one of subject, style (did you mean style?)"),
        ("data.kind", 1, "data.kind = 1: choose one of subject, style"),
        ("data.kind", ["style"], "data.kind = ['style']: choose one of subject, style (did you mean style?)"),
        ("optimizer.name", "adamw8", "choose one of adamw, adamw8bit, paged_adamw8bit, lion, adafactor, prodigy"),
        ("adapter.rank", 0, "adapter.rank = 0: must be between 1 and 1024"),
        ("adapter.rank", 1025, "adapter.rank = 1025: must be between 1 and 1024"),
        ("adapter.alpha", 0, "adapter.alpha = 0.0: must be above 0"),
        ("adapter.dropout", 0.91, "adapter.dropout = 0.91: must be between 0 and 0.9"),
        ("train.steps", 0, "train.steps = 0: must be between 1 and 1000000"),
        ("train.steps", 10**23, f"train.steps = {10**23}: must be between 1 and 1000000"),
        ("train.max_grad_norm", -1, "train.max_grad_norm = -1.0: must be 0 or more"),
        ("train.max_grad_norm", math.inf, "train.max_grad_norm = inf: must be 0 or more"),
        ("train.seed", -1, "train.seed = -1: must be between 0 and 2147483647"),
        ("train.seed", 2**31, f"train.seed = {2**31}: must be"),
        ("train.min_snr_gamma", math.nan, "train.min_snr_gamma = nan: must be above 0"),
        ("optimizer.learning_rate", math.nan, "optimizer.learning_rate = nan: must be between 0 and 10"),
        ("optimizer.learning_rate", 11, "optimizer.learning_rate = 11.0: must be between 0 and 10"),
    ],
)
def test_wrong_values(key: str, value: Any, message: str) -> None:
    overrides = {**STEPS, key: value}
    result = problems(overrides)
    assert len(result) == 1
    assert message in result[0]


def test_an_integer_may_stand_for_a_float_but_not_the_other_way() -> None:
    loaded = config.from_tables({}, {**STEPS, "adapter.alpha": 8})
    assert loaded.adapter.alpha == 8.0
    assert type(loaded.adapter.alpha) is float


def test_bounds_themselves_are_inside() -> None:
    for option in config.options():
        for bound in (option.low, option.high):
            if bound is not None and typing.get_origin(option.type) not in (dict, tuple):
                number_type = int if option.type is int or option.type == (int | None) else float
                assert check_value(option, number_type(bound)) == (None, bound), option.key


def test_options_with_a_meaning_for_none_may_be_none() -> None:
    loaded = config.from_tables({}, {**STEPS, "adapter.alpha": None, "train.min_snr_gamma": None})
    assert loaded.adapter.alpha is None
    assert loaded.train.min_snr_gamma is None


# -- contradictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "set exactly one of train.steps, train.epochs, train.steps_per_image: none is set"),
        ({"train.steps": 1, "train.epochs": 1}, "train.steps and train.epochs are set"),
        (
            {"train.steps": 1, "train.epochs": 1, "train.steps_per_image": 1},
            "train.steps and train.epochs and train.steps_per_image are set",
        ),
        ({**STEPS, "optimizer.text_encoder_learning_rate": 1e-5}, "needs adapter.train_text_encoder = true"),
        ({**STEPS, "train.prior_loss_weight": 0.5}, "train.prior_loss_weight has no effect with train.prior = 'none'"),
        ({**STEPS, "train.class_images": 5}, "train.class_images has no effect with train.prior = 'none'"),
        (
            {**STEPS, "train.class_images": 5, "train.prior": "teacher"},
            "train.class_images has no effect with train.prior = 'teacher'",
        ),
        ({**STEPS, "data.variants": 2}, "data.variants > 1 needs data.flip, data.crop_jitter or data.color_jitter"),
        ({**STEPS, "data.flip": True}, "need data.variants of 2 or more"),
        ({**STEPS, "data.color_jitter": 0.1}, "need data.variants of 2 or more"),
        ({**STEPS, "memory.compile": True, "memory.base_storage": "nf4"}, "memory.compile needs unquantized"),
        ({**STEPS, "memory.compile": True, "memory.stream_base": True}, "memory.compile needs unquantized"),
        ({**STEPS, "memory.compile": True, "memory.gradient_checkpointing": True}, "cannot be combined with"),
        ({**STEPS, "memory.compile": True, "memory.limit_gib": 4.0}, "memory.compile cannot be combined with"),
        ({**STEPS, "memory.engine": "plain", "memory.compile": True}, "memory.compile compiles fused blocks"),
        ({**STEPS, "memory.engine": "plain", "memory.base_storage": "nf4"}, "need memory.engine = 'fused'"),
        ({**STEPS, "memory.engine": "plain", "memory.stream_base": True}, "need memory.engine = 'fused'"),
        ({**STEPS, "memory.compile": True, "adapter.dropout": 0.1}, "memory.compile needs adapter.dropout = 0"),
        ({**STEPS, "data.resolution": 516}, "data.resolution = 516: must be a multiple of 8"),
        (
            {**STEPS, "memory.limit_gib": 6, "memory.gradient_checkpointing": True},
            "memory.limit_gib chooses the blocks to recompute: leave out memory.gradient_checkpointing",
        ),
    ],
)
def test_contradictions(overrides: dict[str, Any], message: str) -> None:
    result = problems(overrides)
    assert len(result) == 1
    assert message in result[0]


def test_contradictions_are_reported_at_once() -> None:
    assert len(problems({"data.resolution": 516, "data.flip": True, "train.class_images": 3})) == 4


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.class_images": 5, "train.prior": "images"},
        {"train.prior_loss_weight": 0.5, "train.prior": "teacher"},
        {"data.variants": 4, "data.flip": True},
        {"optimizer.text_encoder_learning_rate": 1e-5, "adapter.train_text_encoder": True},
        {"train.text_prior_weight": 1.0, "adapter.train_text_encoder": True},
        {"optimizer.unet_start": 0.5, "adapter.train_text_encoder": True},
        {"optimizer.text_encoder_learning_rate": 1e-5, "adapter.new_tokens": 2, "data.name": "sks toy"},
    ],
)
def test_options_that_belong_together_are_accepted(overrides: dict[str, Any]) -> None:
    loaded = config.as_tables(config.from_tables({}, {**STEPS, **overrides}))
    assert {key: loaded[key.split(".")[0]][key.split(".")[1]] for key in overrides} == overrides


# -- presets and overrides ------------------------------------------------------------------------------------------


def test_an_override_replaces_a_value_of_the_preset() -> None:
    loaded = config.load("subject-sd15", {"adapter.rank": 7})
    assert loaded.adapter.rank == 7
    assert loaded.data.resolution == config.load("subject-sd15").data.resolution


@pytest.mark.parametrize("length", ["steps", "epochs", "steps_per_image"])
def test_a_length_replaces_the_presets(length: str) -> None:
    train = config.load("subject-sd15", {f"train.{length}": 3}).train
    assert {name: getattr(train, name) for name in config.LENGTHS} == dict.fromkeys(config.LENGTHS) | {length: 3}


def test_a_method_replaces_the_presets() -> None:
    assert config.load("subject-sd15", {"adapter.method": "dora"}).adapter.method == "dora"


@pytest.mark.parametrize("prior", ["none", "teacher"])
def test_a_prior_replaces_the_presets_prior_and_its_options(prior: str) -> None:
    assert config.load("subject-pocket").train.class_images != config.TrainConfig.class_images
    train = config.load("subject-pocket", {"train.prior": prior}).train
    assert (train.prior, train.class_images) == (prior, config.TrainConfig.class_images)
    with pytest.raises(ConfigError, match=r"train\.class_images has no effect"):
        config.load("subject-pocket", {"train.prior": prior, "train.class_images": 5})


def test_no_preset_means_the_defaults() -> None:
    assert config.load(None, STEPS) == config.Config(train=config.TrainConfig(steps=1))


def test_a_file_of_the_user_is_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mein Förmchen.toml"
    file.write_text("\ufeff[train]\nsteps = 3\n[data]\nname = 'sks тест'\n", encoding="utf-8")
    loaded = config.load(file)
    assert (loaded.train.steps, loaded.data.name) == (3, "sks тест")
    assert config.load(str(file)) == loaded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\nsteps = 3", "mine.toml: not valid TOML: "),
        (b"[train]\nsteps = 3\nsteps = 4", "mine.toml: not valid TOML: "),
        (b"[data]\nname = '\xff\xfe'", "mine.toml: not valid TOML: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "mine.toml")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file .*none\.toml does not exist"):
        config.load(tmp_path / "none.toml")


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("subject-sdx")
    assert "unknown preset 'subject-sdx' (did you mean subject-sdxl?); presets: " in str(caught.value)
    assert "style-pocket" in str(caught.value)


# -- overrides of the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=200", ("train.steps", 200)),
        (" train.steps = 200 ", ("train.steps", 200)),
        ("optimizer.learning_rate=1e-4", ("optimizer.learning_rate", 1e-4)),
        ("data.flip=true", ("data.flip", True)),
        ("data.name=sks dog", ("data.name", "sks dog")),
        ("data.name='sks dog'", ("data.name", "sks dog")),
        ("data.name=", ("data.name", "")),
        ("data.name=123", ("data.name", "123")),
        ("model.base=/models/a=b", ("model.base", "/models/a=b")),
        ("memory.mixed_precision=fp16", ("memory.mixed_precision", "fp16")),
        ("adapter.alpha=8", ("adapter.alpha", 8)),
        ("output.formats=kohya, peft", ("output.formats", ("kohya", "peft"))),
        ('sample.prompts=["a, b", "c"]', ("sample.prompts", ["a, b", "c"])),
        ("train.steps=many", ("train.steps", "many")),
        ("nothing.known=3", ("nothing.known", 3)),
        ("optimizer.args={betas=[0.9, 0.95]}", ("optimizer.args", {"betas": [0.9, 0.95]})),
        ("optimizer.args.betas=[0.9, 0.95]", ("optimizer.args.betas", [0.9, 0.95])),
    ],
)
def test_overrides_are_read_as_the_options_type(text: str, value: tuple[str, Any]) -> None:
    assert config.parse_override(text) == value


@pytest.mark.parametrize("text", ["train.steps", "=3", ""])
def test_an_override_without_a_key_or_a_value_shows_how_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as section\.key=value, e\.g\. train\.steps=200"):
        config.parse_override(text)


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        'a "quoted" word',
        "back\\slash C:\\photos\\new",
        "two\nlines\r\nand\ttabs",
        "фото 写真 🦊",
        "a # b = [c]",
        "'''",
        "\x00\x07\x1b\x7f\x85",
        "",
    ],
)
def test_texts_survive_a_round_trip_through_toml(text: str) -> None:
    loaded = config.from_tables({}, {**STEPS, "data.name": text, "sample.prompts": [text, text]})
    assert config.from_tables(tomllib.loads(config.to_toml(loaded))) == loaded


@pytest.mark.parametrize("value", [1e-4, 1e-10, 0.1 + 0.2, 1.0, 10.0, 5e-324])
def test_numbers_survive_a_round_trip_through_toml(value: float) -> None:
    loaded = config.from_tables({}, {**STEPS, "optimizer.learning_rate": value})
    reloaded = config.from_tables(tomllib.loads(config.to_toml(loaded)))
    assert reloaded.optimizer.learning_rate == value
    assert reloaded == loaded


def test_the_resolved_config_has_every_option_that_is_set() -> None:
    loaded = config.load("subject-pocket")
    tables = tomllib.loads(config.to_toml(loaded))
    option_names = {f"{section}.{name}" for section, table in tables.items() for name in table}
    values = {option.key: getattr(getattr(loaded, option.section), option.name) for option in config.options()}
    unset = {key for key, value in values.items() if value is None or value == {}}
    assert option_names | unset == {option.key for option in config.options()}


def test_no_path_of_the_machine_is_in_the_metadata() -> None:
    secret = "/somewhere/private"
    places: dict[str, Any] = {option.key: secret for option in config.options() if option.path}
    assert " ".join(sorted(places)) == (
        "data.class_folder data.folder data.more_folders model.base model.text_encoders model.tokenizer model.vae "
        "output.folder train.init_from"
    )
    places |= {"data.more_folders": {"sks cat": secret}, "data.concepts": "one", "train.prior": "images"}
    loaded = config.load("subject-sd15", {**places, "data.name": "sks dog"})
    assert secret in config.to_toml(loaded)
    public = config.without_paths(loaded)
    assert secret not in str(public) and public["data"]["name"] == "sks dog"


# -- every option -----------------------------------------------------------------------------------------------------

# Other options that an option needs, so that it may change.
OF_TEXT_ENCODERS = [f"optimizer.text_encoder_{name}" for name in ("learning_rate", "2_learning_rate", "stop")]
OF_TEXT_ENCODERS += ["optimizer.unet_start", "train.text_prior_weight"]
SCHEDULES = {
    "min_lr_ratio": "wsd",
    "lr_cycles": "cosine_with_restarts",
    "lr_power": "polynomial",
    "lr_decay_ratio": "wsd",
}
COMPANIONS: dict[str, dict[str, Any]] = {
    **{name: {"adapter.train_text_encoder": True} for name in OF_TEXT_ENCODERS},
    **{f"optimizer.{name}": {"optimizer.lr_scheduler": schedule} for name, schedule in SCHEDULES.items()},
    **{"adapter.new_tokens": {"data.name": "sks toy"}, "data.keep_tags": {"data.shuffle_tags": True}},
    "data.more_folders": {"data.concepts": "one"},
    **{name: {"train.prior": "teacher"} for name in ("train.prior_loss_weight", "train.prior_prompts")},
    **{name: {"train.prior": "images"} for name in ("train.class_images", "train.prior_target", "data.class_folder")},
    **{name: {"train.steps": None} for name in ("train.epochs", "train.steps_per_image")},
    **{"train.min_steps": {"train.steps": None, "train.steps_per_image": 2}, "data.variants": {"data.flip": True}},
    **{name: {"data.variants": 2} for name in ("data.flip", "data.crop_jitter", "data.color_jitter")},
}


def another(option: Option) -> Any:
    """Return a valid value that differs from the default."""
    kinds: Any = typing.get_args(option.type)
    choices = option.choices or (kinds if typing.get_origin(option.type) is typing.Literal else ())
    if typing.get_origin(option.type) is dict:
        tables = {Any: {"betas": [0.9, 0.95], "foreach": False}, str: {"a.jpg": "turn 90"}}
        return tables.get(kinds[1]) or {"*.attn1.*": kinds[1](64)}
    if typing.get_origin(option.type) is tuple:
        return tuple(choices[1:2]) if choices else (256,) if int in kinds else ("something else",)
    if choices:
        return next(choice for choice in choices if choice != option.default)
    if option.type is bool:
        return not option.default
    if option.type is str:
        return "something else"
    if option.type is int or int in kinds:
        higher = 64 if option.high == 4096 else 8
        return max(8, option.low or 0) if option.default is None else option.default + higher
    return 0.5 if option.high is None else option.high * 0.75


@pytest.mark.parametrize("option", config.options(), ids=lambda option: option.key)
def test_every_option_changes_the_resolved_config(option: Option) -> None:
    base = {"train.steps": 99} | COMPANIONS.get(option.key, {})
    value = another(option)
    after = config.from_tables({}, base | {option.key: value})
    assert getattr(getattr(after, option.section), option.name) == value
    assert getattr(getattr(config.Config(), option.section), option.name) != value
    assert config.from_tables(tomllib.loads(config.to_toml(after))) == after


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "trigger", "noun"),
    [("sks toy", "sks", "toy"), ("sks big dog", "sks", "big dog"), ("sks", "sks", ""), ("", "", "")],
)
def test_trigger_and_noun(name: str, trigger: str, noun: str) -> None:
    data = config.from_tables({}, {**STEPS, "data.name": name}).data
    assert (data.trigger, data.noun) == (trigger, noun)


def test_optimizer_arguments_are_a_table_or_single_options() -> None:
    tables = {"optimizer": {"args": {"eps": 1e-6, "betas": [0.9, 0.99]}}}
    loaded = config.from_tables(tables, {**STEPS, "optimizer.args.betas": (0.9, 0.95)})
    assert loaded.optimizer.args == {"eps": 1e-6, "betas": [0.9, 0.95]}
    assert config.from_tables(tomllib.loads(config.to_toml(loaded))) == loaded
    as_table = config.from_tables(tables, {**STEPS, "optimizer.args": {"amsgrad": True}})
    assert as_table.optimizer.args == {"amsgrad": True}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.args", 3, "optimizer.args = 3: must be a table, such as {betas = [0.9, 0.95]}"),
        (
            "optimizer.args.eps",
            None,
            "optimizer.args.eps = None: must be a number, a text, true, false, or a list of these",
        ),
        (
            "optimizer.name",
            "torch.optim:",
            "optimizer.name = 'torch.optim:': choose one of adamw, adamw8bit, paged_adamw8bit, lion, adafactor, "
            "prodigy or write module:Class",
        ),
    ],
)
def test_a_wrong_optimizer_is_an_error(key: str, value: Any, message: str) -> None:
    assert problem(key, value) == message


def test_pissa_does_not_start_from_an_adapter() -> None:
    assert problems({**STEPS, "adapter.method": "pissa", "train.init_from": "a.safetensors"}) == [
        "train.init_from makes no sense with adapter.method = 'pissa', which begins from the base"
    ]


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_methods_without_an_input_of_their_own_have_no_dropout(method: str) -> None:
    (message,) = problems({**STEPS, "adapter.method": method, "adapter.dropout": 0.1})
    assert message.startswith("unknown option adapter.dropout")
