"""Every knob of lorakit, on one page.

`load(preset, overrides)` is the only way in. It reads TOML strictly: unknown keys, wrong types and values out of range
are collected and raised together as one `ConfigError`, each with the nearest known name. Nothing writes back into a
`Config`; values that follow from others (trigger, prompts, number of steps) are properties or are computed where used.
This module never imports torch: a preset is checked in a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import LorakitError
from lorakit.knob import Knob, checked, knob, near, shown
from lorakit.registry import ADAPTERS, EXPORTS, OPTIMIZERS


class ConfigError(LorakitError):
    """Something is wrong with what the user asked for. `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is adapted."""

    base: str = knob(
        "pocket",
        "Base: 'pocket' (bundled), a .safetensors file, a diffusers folder, or a hub id (owner/name[@revision]).",
        path=True,
    )
    tokenizer: str = knob(
        "", "Folder of the tokenizer for a base in a single file. Empty: tokenizer/ beside it.", path=True
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction", "v_prediction_zero_snr"] = knob(
        "auto", "What the base predicts. auto: as it says itself, which is printed."
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The photos, and the words that go with them."""

    folder: str = knob("", "Folder of photos. It is only ever read.", path=True)
    kind: Literal["subject", "style"] = knob("subject", "What the photos have in common: a subject or a style.")
    name: str = knob("", "The trigger and what it is, as in 'sks dog' or 'sks style'. The first word is the trigger.")
    instance_prompt: str = knob("", "Text of a photo without a caption. Empty: made from kind and name.")
    class_prompt: str = knob("", "Text that stands for all of the kind, for prior preservation. Empty: made from name.")
    resolution: int = knob(512, "Side of the training square in pixels; buckets keep its area.", low=64, high=4096)
    caption_dropout: float = knob(0.0, "Share of texts replaced by the bare instance prompt.", low=0, high=1)
    shuffle_tags: bool = knob(False, "Shuffle comma-separated tags; the trigger stays first.")
    flip: bool = knob(False, "Mirror images as a variant. Off where left and right matter.")
    crop_jitter: float = knob(0.0, "Share of the side by which the crop is moved in a variant.", low=0, high=0.25)
    color_jitter: float = knob(0.0, "Strength of brightness, contrast and saturation changes.", low=0, high=0.5)
    variants: int = knob(1, "Cached variants of each photo that flip and jitter make.", low=1, high=64)
    cache: Literal["memory", "disk"] = knob("memory", "Where encoded photos are kept; disk survives the run.")

    @property
    def trigger(self) -> str:
        """The rare word itself: the first word of `name`."""
        return self.name.split()[0] if self.name.split() else ""

    @property
    def noun(self) -> str:
        """What the trigger is a kind of: the rest of `name`, e.g. "dog"."""
        return " ".join(self.name.split()[1:])


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """What every method has: its size, and the layers it enters."""

    rank: int = knob(16, "Rank of the update.", low=1, high=1024)
    alpha: float | None = knob(None, "Scale is alpha / rank. Unset: alpha = rank, so that the scale is 1.", above=0)
    target_modules: Literal["attention", "linear", "linear+conv"] = knob(
        "attention",
        "attention: q, k, v, out; linear: every attention-block layer; linear+conv: resnets and samplers too.",
    )
    train_text_encoder: bool = knob(False, "Train adapters in the text encoder(s) too.")
    new_tokens: int = knob(0, "Vectors to learn for the trigger as a word of its own (pivotal tuning).", low=0, high=32)

    @property
    def trains_text(self) -> bool:
        """Whether texts mean something else after each step."""
        return self.train_text_encoder or self.new_tokens > 0


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LayersConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A."""

    method: Literal["lora"] = "lora"
    dropout: float = knob(0.0, "Dropout on the adapter's input.", low=0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class RsLoraConfig(LoraConfig):
    """Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): the scale is alpha / sqrt(rank)."""

    method: Literal["rslora"] = "rslora"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class DoraConfig(LoraConfig):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): direction by LoRA, magnitude learned on its own."""

    method: Literal["dora"] = "dora"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class PissaConfig(LoraConfig):
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that begins as the weight's principal part."""

    method: Literal["pissa"] = "pissa"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class LohaConfig(LayersConfig):
    """LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): two low ranks, multiplied element by element."""

    method: Literal["loha"] = "loha"


@dataclass(frozen=True, kw_only=True)
class LokrConfig(LayersConfig):
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): a Kronecker product of two small matrices."""

    method: Literal["lokr"] = "lokr"


AdapterConfig = LoraConfig | RsLoraConfig | DoraConfig | PissaConfig | LohaConfig | LokrConfig
ADAPTER_SECTIONS: dict[str, type[Any]] = {
    "lora": LoraConfig,
    "rslora": RsLoraConfig,
    "dora": DoraConfig,
    "pissa": PissaConfig,
    "loha": LohaConfig,
    "lokr": LokrConfig,
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning rate, which is a pure function of the optimizer step."""

    name: str = knob("adamw", "Optimizer.", choices=OPTIMIZERS)
    learning_rate: float = knob(1e-4, "Peak learning rate (a factor, usually 1, for prodigy).", low=0, high=10)
    text_encoder_learning_rate: float | None = knob(None, "For text-encoder adapters. Unset: the same.", low=0, high=10)
    weight_decay: float = knob(0.01, "Decoupled weight decay.", low=0, high=1)
    lr_scheduler: Literal["constant", "cosine", "linear"] = knob("constant", "Shape after warm-up.")
    warmup_steps: int = knob(0, "Optimizer steps over which the rate rises from 0.", low=0)


# More steps than anybody means: a slip of the hand is told, not planned.
MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what objective, and what is kept. A step is one optimizer step."""

    steps: int | None = knob(None, "Optimizer steps.", low=1, high=MOST)
    epochs: int | None = knob(None, "Passes over the photos.", low=1, high=MOST)
    steps_per_image: int | None = knob(None, "Optimizer steps for each photo.", low=1, high=MOST)
    batch_size: int = knob(1, "Photos in a batch.", low=1, high=256)
    gradient_accumulation_steps: int = knob(1, "Batches in an optimizer step.", low=1, high=256)
    max_grad_norm: float = knob(1.0, "Gradients are clipped to this norm; 0 turns clipping off.", low=0)
    seed: int = knob(0, "Everything random follows from it.", low=0, high=2**31 - 1)
    prior: Literal["none", "images", "teacher"] = knob(
        "none", "Keep the rest of the model as it was: with class images, or image-free with the base as teacher."
    )
    prior_loss_weight: float = knob(1.0, "Weight of the prior term.", low=0, high=10)
    class_images: int = knob(100, "Class images for prior = 'images'; made once and cached.", low=1, high=10000)
    loss: Literal["mse", "huber"] = knob("mse", "Distance between prediction and target.")
    min_snr_gamma: float | None = knob(None, "Min-SNR weighting (Hang et al. 2023); 5 is usual. Unset: off.", above=0)
    noise_offset: float = knob(0.0, "Per-channel offset of the noise, for very dark or bright pictures.", low=0, high=1)
    masked_loss: bool = knob(False, "Weigh the loss by name.mask.png or the photo's alpha.")
    holdout: float = knob(0.1, "Share of photos kept for validation where there are 10 or more.", low=0, high=0.5)
    validate_every: int = knob(0, "Steps between validations; 0: five times a run.", low=0)
    save_every: int = knob(0, "Steps between checkpoints; 0: five times a run.", low=0)
    keep_checkpoints: int = knob(3, "Newest checkpoints kept.", low=1)
    init_from: str = knob("", "Start from this adapter's weights (a new run, not a resume).", path=True)
    on_nan: Literal["stop", "rollback"] = knob("stop", "Non-finite loss: stop, or once go back to the last checkpoint.")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Where it runs and in what precision."""

    device: Literal["auto", "cuda", "mps", "cpu"] = knob("auto", "auto: CUDA, else MPS, else CPU.")
    mixed_precision: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto", "Precision of the frozen base. auto: bf16 or fp16 on CUDA, fp32 elsewhere. Adapters are always fp32."
    )
    attention: Literal["sdpa", "xformers"] = knob(
        "sdpa", "Attention kernel; xformers is tested against sdpa at the start."
    )
    gradient_checkpointing: bool = knob(False, "Recompute activations in the backward pass: less memory, slower.")
    limit_gib: float | None = knob(
        None, "GiB that a step may take: as few blocks as that needs are recomputed. Unset: none, or all.", above=0
    )
    base_storage: Literal["full", "int8", "nf4"] = knob(
        "full", "How the UNet's frozen weights are kept: in full, or in 8 or 4.5 bits each, which is slower."
    )
    stream_base: bool = knob(
        False,
        "Keep the UNet's frozen weights in the host's memory and copy each to the card in time: less memory, slower.",
    )
    compile: bool = knob(False, "Compile the UNet's blocks for training; the first step of each batch shape pays.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures drawn while it trains and by `lorakit sample`."""

    every: int = knob(0, "Steps between sample grids (one is made at step 0); 0: five times a run.", low=0)
    prompts: tuple[str, ...] = knob((), "Prompts to draw. Empty: made from kind and name.")
    negative_prompt: str = knob("", "What the pictures should not show.")
    steps: int = knob(30, "Denoising steps.", low=1, high=1000)
    guidance: float = knob(7.5, "Classifier-free guidance.", low=0, high=50)
    seed: int = knob(0, "Seed of the pictures.", low=0, high=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written, and where."""

    folder: str = knob("", "Run folder. Empty: runs/<time>-<name>.", path=True)
    formats: tuple[str, ...] = knob(("kohya",), "Formats of the exported adapter.", choices=EXPORTS)
    dtype: Literal["fp16", "bf16", "fp32"] = knob("fp16", "Precision of the exported file.")
    tensorboard: bool = knob(False, "Write TensorBoard logs too.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Every section has defaults; `load` fills and checks them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


SECTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config))
LENGTHS = ("steps", "epochs", "steps_per_image")
DEFAULT_PRESET = "subject-pocket"


def section_type(section: str, method: str = "lora") -> type:
    """The dataclass of a section; `adapter` is a tagged union on `method`."""
    if section == "adapter":
        return ADAPTER_SECTIONS[method]
    return type(getattr(Config(), section))


def knobs(method: str = "lora") -> list[Knob]:
    """Every knob, in the order of this page; the adapter's are those of `method`."""
    found = []
    for section in SECTIONS:
        cls = section_type(section, method)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if section == "adapter" and f.name == "method":
                found.append(Knob(section, "method", str, "lora", "Adapter method.", choices=tuple(ADAPTERS)))
            else:
                found.append(Knob(section, f.name, hints[f.name], f.default, **f.metadata))
    return found


def preset_folder() -> Path:
    """Where the presets lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets that come with lorakit."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def load(preset: str | Path | None = DEFAULT_PRESET, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a preset (a name, or a path to a TOML file; None: defaults alone), lay `overrides` over it and check it all.

    Args:
        overrides: dotted keys, `{"train.steps": 100}`. A length (steps, epochs, steps_per_image), a method or a prior
            given here replaces the preset's, with what belongs to it.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    tables = {} if preset is None else _read_toml(_preset_path(preset))
    return from_tables(tables, overrides or {})


def from_tables(tables: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """As `load`, from tables already read."""
    problems: list[str] = []
    flat: dict[str, Any] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(f"unknown section [{section}]{near(section, SECTIONS)}")
        elif not isinstance(table, Mapping):
            problems.append(f"[{section}] must be a table, not {shown(table)}")
        else:
            flat.update({f"{section}.{name}": value for name, value in table.items()})
    overrides = dict(overrides or {})
    replaced = {"train.class_images", "train.prior_loss_weight"} if "train.prior" in overrides else set()
    if any(f"train.{name}" in overrides for name in LENGTHS):
        replaced |= {f"train.{name}" for name in LENGTHS}
    flat = {key: value for key, value in flat.items() if key not in replaced}
    flat.update(overrides)

    method = flat.get("adapter.method", "lora")
    if method not in tuple(ADAPTER_SECTIONS):  # a tuple, as a method of any type may be asked for
        names = ", ".join(ADAPTER_SECTIONS)
        problems.append(f"adapter.method = {shown(method)}: choose one of {names}{near(method, ADAPTER_SECTIONS)}")
        method = "lora"
    known = {k.key: k for k in knobs(method)}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in flat.items():
        if key == "adapter.method":
            continue
        if key not in known:
            problems.append(f"unknown option {key}{near(key, known)}")
            continue
        problem, value = checked(known[key], value)
        if problem:
            problems.append(problem)
        else:
            values[known[key].section][known[key].name] = value
    config = Config(**{section: section_type(section, method)(**values[section]) for section in SECTIONS})
    problems += [] if problems else _contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def parse_override(text: str) -> tuple[str, Any]:
    """Read `section.key=value` of the command line; the value is read as the knob's type.

    Raises:
        ConfigError: no `=`, or no value where one is needed. An unknown key is left for `load` to report.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError([f"{text!r}: write it as section.key=value, e.g. train.steps=200"])
    known = {k.key: k for k in knobs()}
    kind = known[key].type if key in known else None
    if kind is str or (typing.get_origin(kind) is Literal):
        return key, value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if typing.get_origin(kind) is tuple and not value.startswith("["):
        return key, tuple(part.strip() for part in value.split(","))
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def with_paths_removed(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as tables, without anything that names a place on the user's machine."""
    hidden = {k.key for k in knobs(config.adapter.method) if k.path}
    tables = as_tables(config)
    return {s: {n: v for n, v in t.items() if f"{s}.{n}" not in hidden} for s, t in tables.items()}


def as_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain tables; unset values are left out, as TOML has no null."""
    return {
        section: {
            name: value for name, value in dataclasses.asdict(getattr(config, section)).items() if value is not None
        }
        for section in SECTIONS
    }


def to_toml(config: Config) -> str:
    """The resolved config as TOML text that `load` reads back to an equal `Config`."""
    lines = []
    for section, table in as_tables(config).items():
        lines += [f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in table.items()), ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes as TOML does, but lets the delete character through.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _preset_path(preset: str | Path) -> Path:
    path = Path(preset)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError([f"config file {path} does not exist"])
        return path
    named = preset_folder() / f"{preset}.toml"
    if not named.is_file():
        names = preset_names()
        raise ConfigError([f"unknown preset {str(preset)!r}{near(str(preset), names)}; presets: {', '.join(names)}"])
    return named


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path.name}: not valid TOML: {error}"]) from None


def _contradictions(config: Config) -> list[str]:
    """Options that are each well formed but make no sense together."""
    data, adapter, optimizer, train = config.data, config.adapter, config.optimizer, config.train
    problems = []
    given = [f"train.{name}" for name in LENGTHS if getattr(train, name) is not None]
    if len(given) != 1:
        told = f"{' and '.join(given)} are set" if given else "none is set"
        problems.append(f"set exactly one of {', '.join('train.' + n for n in LENGTHS)}: {told}")
    if optimizer.text_encoder_learning_rate is not None and not adapter.trains_text:
        problems.append("optimizer.text_encoder_learning_rate needs adapter.train_text_encoder = true or new_tokens")
    if adapter.new_tokens and not re.fullmatch(r"[\w-]+", data.trigger):
        problems.append("adapter.new_tokens needs a trigger of letters and digits: begin data.name with one, 'sks dog'")
    if train.init_from and adapter.method == "pissa":
        problems.append("train.init_from makes no sense with adapter.method = 'pissa', which begins from the base")
    if train.prior == "none" and train.prior_loss_weight != TrainConfig.prior_loss_weight:
        problems.append("train.prior_loss_weight has no effect with train.prior = 'none': choose 'images' or 'teacher'")
    if train.prior != "images" and train.class_images != TrainConfig.class_images:
        problems.append(f"train.class_images has no effect with train.prior = {train.prior!r}: choose 'images'")
    changes = data.flip or data.crop_jitter > 0 or data.color_jitter > 0
    if data.variants > 1 and not changes:
        problems.append("data.variants > 1 needs data.flip, data.crop_jitter or data.color_jitter")
    if data.variants == 1 and changes:
        problems.append("data.flip, data.crop_jitter and data.color_jitter need data.variants of 2 or more")
    if config.memory.gradient_checkpointing and config.memory.limit_gib is not None:
        problems.append("memory.limit_gib chooses the blocks to recompute: leave out memory.gradient_checkpointing")
    if data.resolution % 8:
        problems.append(f"data.resolution = {data.resolution}: must be a multiple of 8")
    if config.memory.compile and (config.memory.base_storage != "full" or config.memory.stream_base):
        problems.append("memory.compile needs the weights whole: no memory.stream_base, memory.base_storage = 'full'")
    if config.memory.compile and (config.memory.gradient_checkpointing or config.memory.limit_gib is not None):
        problems.append("memory.compile goes neither with memory.gradient_checkpointing nor with memory.limit_gib")
    if config.memory.compile and getattr(adapter, "dropout", 0.0) > 0:
        problems.append("memory.compile needs adapter.dropout = 0: compiled code would draw other numbers")
    return problems
