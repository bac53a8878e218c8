"""The names that users can select, and the location of their code.

This module imports nothing heavy, so `--help` and the config check read the names without loading torch. A new export
format, method or kind of captioners is one file and one line here. A family is one folder and one line, an optimizer
one function and one line. A method uses the layers of another method, or a new kind of layers whose tensors
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
        group: the group of the entry points; the value of each is the "module:attribute" of a spec.
        own: name -> the spec, or its "module:attribute", which is imported on first access.
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
    """One adapter method. Code that needs torch is given by name and imported on use.

    Attributes:
        functions: "module:attribute" of an `adapters.method.Method`: PEFT's config, the initial weights, the factors.
        trained_weights: "module:function" of (section, shape of a layer's weight) -> number of trained weights in the
            layer.
        section: "module:Class" of its section of the config, a `config.AdapterConfig`. A method with other options than
            LoRA's names its own class, which the config check imports.
        layers: kind of its layers: "lora", "dora", "loha", "lokr", or the method's name for a new kind. A format
            supports kinds of layers.
        begins_from_base: whether its initial weights come from the base, so that it cannot start from an adapter.
        rank_stabilized: whether its scale is alpha / sqrt(rank) instead of alpha / rank.
        has_product_factors: whether delta W is the product of its factors, so that scaling all of them scales it.
        has_ab_factors: whether it has a factor A with random initial values and a factor B that starts at 0.
        factors: names of all tensors of a layer of a new kind. Its scale is 1: a scale must be among the tensors. The
            kohya format writes them under these names; other programs do not read them, and the plain engine is used.
        change: "module:function" of (weight in float32, `adapters.weights.ForeignLayer`, strength) -> delta W, for
            merging such a layer and for its size.
        whole_model: "module:attribute" of a `training.whole_model.WholeModel`: the method trains the base's own weights
            instead of adapter layers, and writes a model. `functions` is unused then.
        words_only: whether it trains the trigger's vectors and no layers, so that its file is an embedding.
        learning_rate: its usual learning rate if that differs by an order of magnitude from an adapter's, else None.
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
        elementwise: whether each value is updated independently, so that a group can be one long tensor.
        block_size: number of values with one scale in its state; parameters start at multiples of it.
        capturable: whether learning rate and step count are read on the device, so that a CUDA graph can capture its
            step.
        package: the module that it needs in addition to lorakit's dependencies.
        extra: the extra of lorakit that installs this package.
        needs_cuda: whether it only runs on CUDA devices.
        single_rate: whether all groups of parameters must have the same learning rate.
        is_guess: whether `state_bytes` is an assumption.
        learning_rate: its default, if `optimizer.learning_rate` is a factor of the rate that it estimates.
        per_weight: whether it can step one weight at a time, without state that a group shares.
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


# Two float32 values for each weight, as in Adam; few optimizers have more.
ASSUMED_STATE_BYTES = 8
# Classes of other packages whose learning rate is a factor, like that of prodigy; and those with one rate for all
# groups.
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
    """See `OptimizerSpec.learning_rate`; also None if the name is not an optimizer."""
    return optimizer(name).learning_rate if isinstance(name, str) and (":" in name or name in OPTIMIZERS) else None


def missing_package(name: str) -> str | None:
    """The reason why `optimizer.name` cannot be used on this machine, or None; imports nothing."""
    spec = optimizer(name)
    if not spec.package or importlib.util.find_spec(spec.package) is not None:
        return None
    if spec.extra:
        return Message(
            "optimizer.name = {name!r} needs {package}; {hint}", name, spec.package, install.hint(spec.extra)
        )
    return Message("optimizer.name = {name!r}: the package {package} is not installed", name, spec.package)


def unmet_needs(name: str, *, has_cuda: bool, one_rate: bool) -> list[str]:
    """Requirements of `optimizer.name` that the run does not meet, one message each.

    Args:
        has_cuda: whether the parameters are, or may be, on a CUDA device.
        one_rate: whether all groups of parameters have the same learning rate.
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


# The trackers of accelerate; each is also the name of its module.
TRACKERS = ("tensorboard", "wandb", "trackio", "aim", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab")


def missing_trackers(names: Sequence[str]) -> list[str]:
    """The reasons why `output.trackers` cannot be used on this machine, one message each; imports nothing."""
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


# A family is recognized from the base's configuration.
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
    """New kinds of layers -> the method that defines them."""
    return {spec.layers: spec for spec in METHODS.values() if spec.factors}


# Adafactor's state depends on rows and columns, so it is not elementwise. Only torch's AdamW is capturable; the others
# compute the rate on the host.
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

# The first kind that matches a model's files is used.
CAPTIONERS: Registry[CaptionerSpec] = Registry(
    "lorakit.captioners",
    {
        "tagger": "lorakit.inference.captioners.onnx_tagger:SPEC",
        "image-text": "lorakit.inference.captioners.image_text:SPEC",
    },
)


def versions() -> dict[str, tuple[FamilySpec, ModelVersion]]:
    """Name of a version ("sd1") -> its family and the version."""
    return {version.name: (spec, version) for spec in FAMILIES.values() for version in spec.versions}


def version_titles() -> str:
    """The titles of the supported bases: "Stable Diffusion 1, Stable Diffusion 2, ..."."""
    return ", ".join(version.title for _, version in versions().values())


def components() -> tuple[str, ...]:
    """The components that can be adapted in a base of any family: the denoiser, and the trainable text encoders."""
    encoders = (name for spec in FAMILIES.values() for name in spec.trainable_encoders())
    return "unet", *dict.fromkeys(encoders)


def denoisers() -> set[str]:
    """The names of the denoisers in diffusers and PEFT; here and in kohya files each is the "unet"."""
    return {spec.denoiser for spec in FAMILIES.values()}


def weight_stems() -> dict[str, str]:
    """`FamilySpec.weight_stems` of all families."""
    return {name: stem for spec in FAMILIES.values() for name, stem in spec.weight_stems().items()}


def family_of(version: str) -> FamilySpec:
    """The family of a version, which adapters name.

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
