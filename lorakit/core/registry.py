"""Names that a user may write, and where the code of each is.

This module imports nothing heavy, so `--help` and the config check read the names without loading torch. A new export
format, method or kind of captioners is one file and one line here. A family is one folder and one line, an optimizer
one function and one line. The layers of a method may be those of another method, or a new kind whose tensors
`MethodSpec.factors` names. Other packages add the same by entry points in the groups `lorakit.families`,
`lorakit.adapters`, `lorakit.optimizers`, `lorakit.formats` and `lorakit.captioners`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorakit.core import install
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message

if TYPE_CHECKING:
    from lorakit.families.spec import FamilySpec, ModelVersion
    from lorakit.formats.spec import FormatSpec
    from lorakit.inference.captioners.spec import CaptionerSpec

Spec = TypeVar("Spec")


class Registry(Mapping[str, Spec], Generic[Spec]):
    """Names, each with its spec: lorakit's own names first, then those of entry points.

    Args:
        group: the group of the entry points; each is the "module:attribute" of a spec.
        own: name -> the spec, or its "module:attribute", which is imported when somebody asks for the name.
    """

    def __init__(self, group: str, own: dict[str, Spec | str]):
        self.group, self.own = group, own

    def __getitem__(self, name: str) -> Spec:
        if name in self.own:
            entry = self.own[name]
            return resolve(entry) if isinstance(entry, str) else entry
        path = _entry_points(self.group)[name]
        try:
            spec: Spec = resolve(path)
        except (ImportError, AttributeError) as error:
            raise LorakitError(
                "{name!r} of the entry points {group} cannot be loaded: {problem}", name, self.group, error
            ) from None
        return spec

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in _entry_points(self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own | _entry_points(self.group))

    def __len__(self) -> int:
        return len(self.own | _entry_points(self.group))


@functools.cache
def _entry_points(group: str) -> dict[str, str]:
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=group)}


def resolve(path: str) -> Any:
    """The object at "module:attribute"."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class MethodSpec:
    """One adapter method. Whatever needs torch is named, and imported when it is used.

    Attributes:
        functions: "module:attribute" of an `adapters.method.Method`: PEFT's config, the first weights, the factors.
        trained_weights: "module:function" of (section, shape of a layer's weight) -> how many numbers it trains there.
        section: "module:Class" of its section of the config, a `config.AdapterConfig`; a method with other options
            than LoRA's names its own class, which the config check imports.
        layers: kind of the layers that it gives: "lora", "dora", "loha", "lokr", or the method's name for a new kind.
            A format carries kinds of layers.
        begins_from_base: its first weights are taken from the base, so it cannot start from an adapter.
        rank_stabilized: its scale is alpha / sqrt(rank), not alpha / rank.
        has_product_factors: the change is a product of its factors, so that it is scaled by scaling all of them.
        has_ab_factors: it trains a factor A that begins at random and a factor B that begins at 0.
        factors: names of all tensors of a layer of a new kind. Its scale is 1: what multiplies is among them.
            The kohya format has them by these names; no other program reads them, and the engine is plain there.
        change: "module:function" of (weight in float32, `adapters.weights.ForeignLayer`, strength) -> what such a layer
            adds to a weight, for merging it and for its size.
        whole_model: "module:attribute" of a `training.whole_model.WholeModel`: it trains the base's own weights instead
            of layers of an adapter, and writes a model. `functions` is unused then.
        words_only: it trains the trigger's vectors and no layers, so that its file is an embedding.
        learning_rate: what is usual, where it is another order of magnitude than an adapter's; None where it is not.
    """

    functions: str
    trained_weights: str = "lorakit.adapters.targets:lora_weights"
    section: str = "lorakit.config.schema:LoraConfig"
    layers: str = "lora"
    begins_from_base: bool = False
    rank_stabilized: bool = False
    has_ab_factors: bool = False
    has_product_factors: bool = False
    factors: tuple[str, ...] = ()
    change: str = ""
    whole_model: str = ""
    words_only: bool = False
    learning_rate: float | None = None


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        build: "module:function" of (parameter groups, section of the config) -> torch optimizer, or "module:Class".
        state_bytes: bytes of state for each trained weight, for the memory estimate.
        elementwise: it changes each number by itself, so a group may be one long tensor.
        block_size: its state has one scale for this many numbers; parameters begin at multiples of it.
        capturable: it reads the learning rate and its count of steps on the device, so a CUDA graph can hold its step.
        package: the module that it needs beside lorakit's dependencies.
        extra: the extra of lorakit that installs this package.
        needs_cuda: it runs on CUDA devices only.
        single_rate: it has one learning rate for all groups of parameters.
        is_guess: `state_bytes` is not known but assumed.
        learning_rate: its own default, where `optimizer.learning_rate` is a factor of the rate that it finds.
        per_weight: it can step one weight after the other: it has no state that all of a group share.
    """

    build: str
    state_bytes: float
    elementwise: bool = False
    block_size: int = 1
    capturable: bool = False
    package: str = ""
    extra: str = ""
    needs_cuda: bool = False
    single_rate: bool = False
    is_guess: bool = False
    learning_rate: float | None = None
    per_weight: bool = False


# Two float32 numbers for each weight, as Adam has; few optimizers have more.
ASSUMED_STATE_BYTES = 8
# Classes of other packages whose learning rate is a factor, as that of prodigy; and those with one rate for all.
FINDS_THE_RATE = re.compile(r"prodigy|dadapt|adadelta", re.IGNORECASE)
HAS_ONE_RATE = re.compile(r"prodigy|dadapt", re.IGNORECASE)


def optimizer(name: str) -> OptimizerSpec:
    """The spec of `optimizer.name`: a registered name, or "module:Class" of any installed package."""
    if ":" not in name:
        return OPTIMIZERS[name]
    package = name.partition(":")[0].partition(".")[0]
    rate = 1.0 if FINDS_THE_RATE.search(name) else None
    single = HAS_ONE_RATE.search(name) is not None
    return OptimizerSpec(
        name, ASSUMED_STATE_BYTES, package=package, is_guess=True, learning_rate=rate, single_rate=single
    )


def own_learning_rate(name: object) -> float | None:
    """See `OptimizerSpec.learning_rate`; also None if the name is no optimizer."""
    return optimizer(name).learning_rate if isinstance(name, str) and (":" in name or name in OPTIMIZERS) else None


def missing_package(name: str) -> str | None:
    """Why `optimizer.name` cannot be used on this machine, or None; imports nothing."""
    spec = optimizer(name)
    if not spec.package or importlib.util.find_spec(spec.package) is not None:
        return None
    if spec.extra:
        return Message(
            "optimizer.name = {name!r} needs {package}; {hint}", name, spec.package, install.hint(spec.extra)
        )
    return Message("optimizer.name = {name!r}: the package {package} is not installed", name, spec.package)


def unmet_needs(name: str, *, has_cuda: bool, one_rate: bool) -> list[str]:
    """What `optimizer.name` needs of a run and this run does not have, a line each.

    Args:
        has_cuda: the parameters are, or may come, on a CUDA device.
        one_rate: all groups of parameters have the same learning rate.
    """
    spec, lines = optimizer(name), list[str]()
    if spec.needs_cuda and not has_cuda:
        lines.append(Message("optimizer.name = {name!r} needs a CUDA device: choose 'adamw8bit' or 'adamw'", name))
    if spec.single_rate and not one_rate:
        lines.append(
            Message(
                "optimizer.name = {name!r} has one rate: leave optimizer.text_encoder_learning_rate, "
                "optimizer.loraplus_lr_ratio and optimizer.rates unset",
                name,
            )
        )
    return lines


# The trackers of accelerate, each the module of a package of this name.
TRACKERS = ("tensorboard", "wandb", "trackio", "aim", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab")


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Why `output.trackers` cannot be used on this machine, a line each; imports nothing."""
    packages = {name: name.partition(":")[0].partition(".")[0] for name in names}
    return [
        Message("output.trackers = {name!r}: the package {package} is not installed", name, package)
        if ":" in name
        else Message(
            "output.trackers = {name!r} needs {package}; install it with: {package_2}",
            name,
            package,
            install.command(install.with_bounds(package.replace("_", "-"))),
        )
        for name, package in packages.items()
        if importlib.util.find_spec(package) is None
    ]


# A family is recognised from the base's own configuration.
FAMILIES = Registry["FamilySpec"](
    "lorakit.families",
    {
        "sd": "lorakit.families.sd.spec:SPEC",
        "sdxl": "lorakit.families.sdxl.spec:SPEC",
        "sd3": "lorakit.families.sd3.spec:SPEC",
    },
)

METHODS = Registry[MethodSpec](
    "lorakit.adapters",
    {
        "lora": MethodSpec("lorakit.adapters.lora:LORA", has_ab_factors=True, has_product_factors=True),
        # Kalajdzievski 2023, arXiv 2312.03732.
        "rslora": MethodSpec(
            "lorakit.adapters.lora:LORA", rank_stabilized=True, has_ab_factors=True, has_product_factors=True
        ),
        "dora": MethodSpec(
            "lorakit.adapters.dora:DORA",
            "lorakit.adapters.targets:dora_weights",
            layers="dora",
            has_ab_factors=True,
        ),
        "pissa": MethodSpec("lorakit.adapters.pissa:PISSA", begins_from_base=True),
        "loha": MethodSpec(
            "lorakit.adapters.loha:LOHA",
            "lorakit.adapters.targets:loha_weights",
            section="lorakit.config.schema:DropoutConfig",
            layers="loha",
            has_product_factors=True,
        ),
        "lokr": MethodSpec(
            "lorakit.adapters.lokr:LOKR",
            "lorakit.adapters.targets:lokr_weights",
            section="lorakit.config.schema:DropoutConfig",
            layers="lokr",
            has_product_factors=True,
        ),
        # Ruiz et al. 2022, arXiv 2208.12242. The rate is that of diffusers' examples/dreambooth for Stable Diffusion.
        "full": MethodSpec(
            "",
            "lorakit.adapters.targets:all_weights",
            section="lorakit.config.full:FullConfig",
            layers="full",
            begins_from_base=True,
            whole_model="lorakit.training.whole_model:WHOLE_MODEL",
            learning_rate=5e-6,
        ),
        # Gal et al. 2022, arXiv 2208.01618. The rate is that of diffusers' examples/textual_inversion, scaled as there.
        "embedding": MethodSpec(
            "lorakit.adapters.lora:LORA",
            section="lorakit.config.embedding:EmbeddingConfig",
            layers="embedding",
            begins_from_base=True,
            words_only=True,
            learning_rate=2e-3,
        ),
    },
)


def adapter_methods() -> list[str]:
    """The methods that train layers of an adapter."""
    return [name for name, spec in METHODS.items() if not (spec.whole_model or spec.words_only)]


def own_kinds() -> dict[str, MethodSpec]:
    """The kinds of layers that a method brings with it -> the method."""
    return {spec.layers: spec for spec in METHODS.values() if spec.factors}


# Adafactor knows rows and columns, so it is not elementwise. Only torch's AdamW is capturable; the others compute the
# rate on the host.
OPTIMIZERS = Registry[OptimizerSpec](
    "lorakit.optimizers",
    {
        "adamw": OptimizerSpec(
            "lorakit.training.optimizers:adamw", 8, elementwise=True, capturable=True, per_weight=True
        ),
        "adamw8bit": OptimizerSpec(
            "bitsandbytes.optim:AdamW8bit",
            2,
            elementwise=True,
            block_size=256,
            package="bitsandbytes",
            extra="bnb",
            per_weight=True,
        ),
        "paged_adamw8bit": OptimizerSpec(
            "lorakit.training.optimizers:paged_adamw8bit",
            2,
            elementwise=True,
            block_size=256,
            package="bitsandbytes",
            extra="bnb",
            needs_cuda=True,
            per_weight=True,
        ),
        "lion": OptimizerSpec("lorakit.training.optimizers:lion", 4, elementwise=True, per_weight=True),
        "adafactor": OptimizerSpec("lorakit.training.optimizers:adafactor", 1, per_weight=True),
        "prodigy": OptimizerSpec(
            "lorakit.training.optimizers:prodigy",
            16,
            package="prodigyopt",
            extra="prodigy",
            single_rate=True,
            learning_rate=1.0,
        ),
    },
)

FORMATS: Registry[FormatSpec] = Registry(
    "lorakit.formats",
    {
        "kohya": "lorakit.formats.kohya:SPEC",
        "diffusers": "lorakit.formats.diffusers:SPEC",
        "peft": "lorakit.formats.peft:SPEC",
    },
)

# The first kind that a model's files fit is its kind.
CAPTIONERS: Registry[CaptionerSpec] = Registry(
    "lorakit.captioners",
    {
        "tagger": "lorakit.inference.captioners.onnx_tagger:SPEC",
        "image-text": "lorakit.inference.captioners.image_text:SPEC",
    },
)


def versions() -> dict[str, tuple[FamilySpec, ModelVersion]]:
    """What adapters for it are called ("sd1") -> the family and its version."""
    return {version.name: (spec, version) for spec in FAMILIES.values() for version in spec.versions}


def version_titles() -> str:
    """The bases that can be trained, for a person: "Stable Diffusion 1, Stable Diffusion 2, ..."."""
    return ", ".join(version.title for _, version in versions().values())


def components() -> tuple[str, ...]:
    """What adapters may enter in a base of any family: the denoiser, and the text encoders that are trained."""
    encoders = (name for spec in FAMILIES.values() for name in spec.trainable_encoders())
    return "unet", *dict.fromkeys(encoders)


def denoisers() -> set[str]:
    """What diffusers and PEFT call the denoisers, each of which is the "unet" here and in kohya files."""
    return {spec.denoiser for spec in FAMILIES.values()}


def weight_stems() -> dict[str, str]:
    """`FamilySpec.weight_stems` of all families."""
    return {name: stem for spec in FAMILIES.values() for name, stem in spec.weight_stems().items()}


def family_of(version: str) -> FamilySpec:
    """The family of a version, which is what adapters name.

    Raises:
        ValueError: no family has such a version.
    """
    return _version(version)[0]


def version_of(version: str) -> ModelVersion:
    """A version by its name.

    Raises:
        ValueError: no family has such a version.
    """
    return _version(version)[1]


def _version(name: str) -> tuple[FamilySpec, ModelVersion]:
    by_name = versions()
    if name not in by_name:
        raise ValueError(
            Message(
                "unknown family {name!r}; known: {by_name}. A family is named in registry.FAMILIES or by an "
                "entry point of the group {group}",
                name,
                ", ".join(by_name),
                FAMILIES.group,
            )
        )
    return by_name[name]
