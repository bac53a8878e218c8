"""Before a run: the base, the photos, the plan, and every problem that a run would meet before a model is loaded.

`lorakit check` prints it, `lorakit train` refuses by it, and the front end shows it. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import families, formats
from lorakit.adapters import targets, weights_fit
from lorakit.config import (
    BF16_MISSING,
    NO_CLASS_IMAGE_CACHE,
    NO_LATENT_CACHE,
    XFORMERS_MISSING,
    Config,
    DataConfig,
    MemoryConfig,
    optimizer_builder,
    unquote,
)
from lorakit.core import atomic, install, registry, safetensors_header
from lorakit.core.cache_dir import cache_dir
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, abridge, join
from lorakit.core.names import DETERMINERS, shorten
from lorakit.data import captions, checks, concepts, masks, photo_folder
from lorakit.families import BaseInfo
from lorakit.families.describe import BUNDLED
from lorakit.families.pocket.spec import KINDS
from lorakit.formats import compatibility, identify
from lorakit.runs import launch, nvidia, plan, results, run_folder, whole_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Check = Callable[[DataConfig, BaseInfo], checks.Report]

# Of a base's own resolution, from which training at another is a warning: twice and half of it are.
MAX_RESOLUTION_FACTOR = 1.9
# A learning rate above the usual one of a method by so much is a warning.
MAX_RATE_FACTOR = 10
NO_TRIGGER = (
    'data.name = "{name}": its first word, "{word}", would be the trigger, and every text has that word: write a rare '
    'word and then what it is, as in "sks {noun}"'
)
# Above these a run is warned: presets have rates from 1e-4 to 1e-3, and ranks of 8 and 16.
MAX_RATE, MAX_RANK = 0.02, 256
HIGH_RATE = (
    "optimizer.learning_rate = {rate:g}: with {name} 0.0001 to 0.001 is usual for adapters; at this rate the adapter "
    "usually draws noise"
)
HIGH_RANK = "adapter.rank = {rank}: 4 to 128 is usual; more makes the file large and takes memory"
FINE = "No problems found."
NO_NAME = "data.name is empty: say what the photos show, with --subject 'sks toy' or --style 'sks style'"


@dataclass(frozen=True)
class Preflight:
    """The results of all checks before a run starts.

    Attributes:
        config: the requested config, with a hub id pinned to its commit.
        info: the base; None if it cannot be read.
        report: report on the photos; None if the base or the folder cannot be read.
        plan: the plan of the run; None if a problem prevents it.
        problems: reasons why the run cannot start, one message each.
        warnings: reasons why the result may be poor, one message each, including those about the photos.
    """

    config: Config
    info: BaseInfo | None
    report: checks.Report | None
    plan: plan.Plan | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def or_raise(self, advice: Sequence[str] = ()) -> Ready:
        """Return this preflight as `Ready` if it has no problems.

        Raises:
            LorakitError: there are problems; the message lists each on its own line, then the lines of `advice`.
        """
        if self.problems or self.info is None or self.report is None or self.plan is None:
            raise LorakitError(join("\n", [*self.problems, *advice]))
        return Ready(self.config, self.info, self.report, self.plan, (), self.warnings)

    def lines(self) -> list[str]:
        """Notes, warnings and the plan as lines of text, without the problems."""
        notes = self.report.notes if self.report else []
        return [*abridge([*notes, *self.warnings]), *(self.plan.lines() if self.plan else [])]

    def to_text(self) -> str:
        """A table of the photos, then the warnings, the notes and the plan, each under a title, then the verdict."""
        notes = self.report.notes if self.report else []
        sections = {"warnings": abridge(self.warnings), "notes": abridge(notes)}
        sections |= {"the plan": self.plan.lines() if self.plan else []}
        parts = [self.report.table()] if self.report else []
        parts += ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines]
        parts += [] if self.problems or self.warnings else [FINE]
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `lorakit check --json`. Later versions only add keys."""
        return {
            "check": self.report.to_json() if self.report else None,
            "plan": self.plan.to_json() if self.plan else None,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Ready(Preflight):
    """A preflight without problems."""

    info: BaseInfo
    report: checks.Report
    plan: plan.Plan


def preflight(
    config: Config,
    *,
    check: Check = checks.check,
    resume: bool = False,
    fetch: bool = False,
    pipeline: DiffusionPipeline | None = None,
    processes: int | None = None,
) -> Preflight:
    """Check everything that can be checked before the model, or a library that the model needs, is loaded.

    Args:
        check: function that returns the report on the photos; the front end passes one that caches reports.
        resume: whether the run folder exists and the run resumes.
        fetch: whether to download the base's tokenizer if only the hub has it; training needs it, a check does not.
        pipeline: the base as a pipeline in memory, if it is one.
        processes: number of processes that train together on this machine; by default as started by the launcher.
    """
    config, unquoted = _without_quotes(config)
    config, processes, sharing = launch.prepare(config, processes, resume=resume)
    if config.data.concepts == "folders" and not config.data.name:
        config = _with_name(config)
    problems = [*sharing, *_early_problems(config, resume)]
    start_problem = _init_from_problem(config)
    problems += _line(start_problem)
    try:
        config, info = _with_base(config, pipeline, fetch)
    except LorakitError as error:
        problems += [*_lines(error), *_folder_problems(config.data)]
        return Preflight(config, None, None, None, tuple(problems), tuple(unquoted))
    problems += [*_unsuited(info, config), *_line(_max_tokens_problem(config, info))]
    warnings = [*unquoted, *info.warnings, *_line(_rate_warning(config)), *_line(_rank_warning(config))]
    warnings += [*_line(_resolution_warning(config.data, info)), *_line(_noun_warning(config))]
    warnings += _line(nvidia.unused() if config.memory.device == "auto" else None)
    layers = "lora" if config.adapter.whole_model else registry.METHODS[config.adapter.method].layers
    for name in config.adapter_formats:
        problems += _line(registry.FORMATS[name].check(layers, info.family))
        warnings += _line(compatibility.warning(layers, name))
    if config.train.init_from and start_problem is None:
        problems += _line(_misfit(config, info))
    planning = plan.problems(config, info)
    problems += planning
    report = None
    try:
        report = check(config.data, info)
    except LorakitError as error:
        problems += _lines(error)
    if report is None:
        return Preflight(config, info, None, None, tuple(problems), tuple(warnings))
    problems += _photo_problems(config, report)
    planned = None if report.errors or planning else plan.make(config, info, report)
    planned = launch.divide(planned, config, processes, warnings.append)
    return Preflight(
        config,
        info,
        report,
        planned,
        tuple(problems),
        (*warnings, *_text_findings(config, info, report), *report.warnings),
    )


def _text_findings(config: Config, info: BaseInfo, report: checks.Report) -> list[str]:
    """Warnings about the trigger, the prior and the prompts, one message each."""
    trigger = report.trigger_findings if config.adapter.new_tokens == 0 else []
    return [*trigger, *_prior_findings(config, report), *captions.prompt_findings(config.sample, info)]


def _early_problems(config: Config, resume: bool) -> list[str]:
    """Problems that do not depend on the base."""
    problems = [
        *_optimizer_problems(config),
        *_missing_packages(config),
        *_line(plan.device_problem(config.memory.device)),
        *_line(results.notify_problem(config.output.notify)),
        *_line(_precision_problem(config.memory)),
        *([] if config.data.name else [NO_NAME]),
    ]
    if not resume:
        problems += _line(_trigger_problem(config.data))
        place, folders = run_folder.place(config), (config.data.folder, *config.data.more_folders.values())
        problems += dict.fromkeys(
            line for folder in folders for line in _line(run_folder.output_problem(place, folder))
        )
    return problems


def _with_base(config: Config, pipeline: DiffusionPipeline | None, fetch: bool) -> tuple[Config, BaseInfo]:
    """The config with all properties of its base resolved, and the description of the base."""
    if pipeline is not None:
        config = families.with_pipeline(config, pipeline)
        return config, families.describe_pipeline(pipeline, config.model)
    config = replace(config, model=families.pin(config.model))
    info = families.describe(config.model)
    if fetch and not info.tokenizer_problem() and info.fetch_tokenizers():
        info = families.describe(config.model)
    return config, info


def _without_quotes(config: Config) -> tuple[Config, list[str]]:
    """The config without quotes around complete texts, which cmd.exe passes for `--subject 'sks dog'`, and one message
    for each removed pair."""
    lines = list[str]()

    def unquoted(key: str, text: str) -> str:
        if unquote(text) != text.strip():
            lines.append(Message("{key}: the quotes around {text} are left out", key, shorten(text.strip(), 60)))
        return unquote(text)

    data = replace(
        config.data,
        name=unquoted("data.name", config.data.name),
        instance_prompt=unquoted("data.instance_prompt", config.data.instance_prompt),
        class_prompt=unquoted("data.class_prompt", config.data.class_prompt),
    )
    sample = replace(
        config.sample,
        prompts=tuple(unquoted("sample.prompts", prompt) for prompt in config.sample.prompts),
        negative_prompt=unquoted("sample.negative_prompt", config.sample.negative_prompt),
    )
    return (replace(config, data=data, sample=sample), lines) if lines else (config, [])


def _missing_packages(config: Config) -> list[str]:
    """The optional packages that the config needs and that are not installed, except those of the optimizer."""
    problems = registry.missing_trackers(config.output.trackers)
    if config.memory.attention == "xformers" and find_spec("xformers") is None:
        problems.append(Message(XFORMERS_MISSING, install.hint("xformers")))
    return problems


def _trigger_problem(data: DataConfig) -> str | None:
    """The problem with a name whose first word cannot be a trigger because every text contains it, as in "a red bag",
    or None."""
    if data.trigger.lower() not in DETERMINERS:
        return None
    return Message(NO_TRIGGER, shorten(data.name, 60), data.trigger, shorten(data.noun or "dog", 60))


def _max_tokens_problem(config: Config, info: BaseInfo) -> str | None:
    """The reason why a base cannot read texts as long as `data.max_tokens`, or None."""
    if (config.data.max_tokens or 0) <= captions.CHUNK or info.chunked_texts:
        return None
    return Message(
        "data.max_tokens = {tokens}: CLIP reads {few} tokens of a text in base {name}, as in other programs: leave it "
        "unset",
        *(config.data.max_tokens, captions.CHUNK, info.title),
    )


def _optimizer_problems(config: Config) -> list[str]:
    """The reasons why the optimizer cannot be built, or cannot run on this device, as far as they are known without
    torch."""
    optimizer = config.optimizer
    if missing := registry.missing_package(optimizer.name):
        return [missing]
    rates = {optimizer.text_encoder_learning_rate, optimizer.text_encoder_2_learning_rate}
    one_rate = (
        rates <= {None, optimizer.learning_rate} and optimizer.text_encoder_stop == 1 and not optimizer.unet_start
    )
    one_rate = one_rate and optimizer.loraplus_lr_ratio == 1 and not optimizer.rates
    has_cuda = plan.may_be_cuda(config.memory.device)
    unmet = registry.unmet_needs(optimizer.name, has_cuda=has_cuda, one_rate=one_rate)
    has_ema = config.train.ema_decay > 0
    return unmet or _line(optimizer_builder.problem(optimizer, has_cuda=has_cuda, has_ema=has_ema))


def _precision_problem(memory: MemoryConfig) -> str | None:
    """The problem with a precision that the card does not support according to its driver, or None."""
    on_card = memory.mixed_precision == "bf16" and plan.guess_device(memory.device) == "cuda"
    return BF16_MISSING if on_card and nvidia.lacks_bf16() else None


def _photo_problems(config: Config, report: checks.Report) -> list[str]:
    """The reasons why the photos cannot be trained on."""
    masks_lack = masks.problems(report.items) if config.train.masked_loss else []
    triggers = report.long_triggers if config.adapter.new_tokens else []
    return [*report.errors, *triggers, *masks_lack, *_cache_problems(config, report)]


def _cache_problems(config: Config, report: checks.Report) -> list[str]:
    """The reasons why a folder of the disk cache cannot be written."""
    folders = {NO_LATENT_CACHE: "latents"} if config.data.cache == "disk" else {}
    if config.train.prior == "images" and not report.class_photos:
        folders[NO_CLASS_IMAGE_CACHE] = "class-images"
    places = {message: cache_dir() / name for message, name in folders.items()}
    return [
        message.format(folder=place, reason=reason)
        for message, place in places.items()
        if (reason := atomic.refusal(place))
    ]


def _resolution_warning(data: DataConfig, info: BaseInfo) -> str | None:
    """The warning about a resolution far from the base's training resolution, or None."""
    cells = info.configs.get("unet", {}).get("sample_size")
    native = cells * info.downscale if isinstance(cells, int) else data.resolution
    if native / MAX_RESOLUTION_FACTOR < data.resolution < native * MAX_RESOLUTION_FACTOR:
        return None
    return Message(
        "data.resolution = {side}: base {base} draws pictures of {native} pixels a side, and at a "
        "very different size they fall apart: set a size near {native}",
        data.resolution,
        info.title,
        native,
    )


def _noun_warning(config: Config) -> str | None:
    """The warning about a class of subject that the bundled base does not know, or None."""
    noun = config.data.noun if config.data.kind == "subject" and config.model.base == BUNDLED else ""
    if not noun or noun.split()[-1].lower() in KINDS:
        return None
    return Message(
        "the bundled base is for trying things and knows no {noun}, only {kinds} and the like; for real "
        "pictures give --base a Stable Diffusion model",
        shorten(noun, 40),
        ", ".join(KINDS[:4]),
    )


def _unsuited(info: BaseInfo, config: Config) -> list[str]:
    """The options that a base of this kind does not support, one message each."""
    return [*families.unsuited(info, config), *whole_model.problems(config, info)]


def _rate_warning(config: Config) -> str | None:
    """The warning about a learning rate that suits another optimizer or method, or None."""
    optimizer, own = config.optimizer, registry.METHODS[config.adapter.method].learning_rate
    if own is not None and not config.adapter.words_only and optimizer.learning_rate > MAX_RATE_FACTOR * own:
        return Message(
            "optimizer.learning_rate = {rate:g}: for adapter.method = {method!r} {usual:g} is usual; at this "
            "rate a model forgets what it knew",
            optimizer.learning_rate,
            config.adapter.method,
            own,
        )
    usual = registry.own_learning_rate(optimizer.name)
    if own is None and usual is None and optimizer.name in registry.OPTIMIZERS and optimizer.learning_rate > MAX_RATE:
        return Message(HIGH_RATE, optimizer.learning_rate, optimizer.name)
    if usual is None or optimizer.learning_rate >= usual / 10:
        return None
    return Message(
        "optimizer.learning_rate = {rate:g}: for {name} it is a factor, and {usual:g} is usual; at this rate "
        "the adapter hardly changes",
        optimizer.learning_rate,
        optimizer.name,
        usual,
    )


def _rank_warning(config: Config) -> str | None:
    """The warning about a rank far above the usual ones, or None."""
    return Message(HIGH_RANK, config.adapter.rank) if config.adapter.rank > MAX_RANK else None


def _init_from_problem(config: Config) -> str | None:
    """The reason why `train.init_from` is not an adapter, or None. `_misfit` checks whether it fits the base."""
    path = Path(config.train.init_from)
    if not config.train.init_from or path.is_dir():
        return None
    try:
        kind = identify.kind(safetensors_header.read(path).shapes())
    except LorakitError as error:
        return Message("train.init_from: {problem}", error)
    line = Message("train.init_from: {path}: this is {kind}", path, identify.DESCRIPTIONS[kind])
    return None if kind == "adapter" else line


def _misfit(config: Config, info: BaseInfo) -> str | None:
    """The reason why training cannot start from `train.init_from`, or None. The header is checked first, then the
    weights."""
    path = Path(config.train.init_from)
    if path.is_file():
        head = safetensors_header.read(path)
        layers = registry.METHODS[config.adapter.method].layers
        if problem := identify.misfit(head.shapes(), head.metadata, info.family, layers):
            return problem
    names = targets.adapted(info.family, info.layers, config.adapter)
    try:
        shapes = {name: info.layers[name] for name in names}
        weights_fit.require(formats.read(path), config.adapter, info.family, shapes, config.data.trigger)
    except LorakitError as error:
        return str(error)
    return None


def _with_name(config: Config) -> Config:
    """The config with a name taken from the folders, if these name the concepts. If a folder cannot be read, the config
    does not change."""
    try:
        photos = photo_folder.of_config(config.data).photos
    except LorakitError:
        return config
    return replace(config, data=concepts.with_name(config.data, photos))


def _prior_findings(config: Config, report: checks.Report) -> list[str]:
    """Notes on class images in the folder that the prior does not use."""
    if report.class_photos and config.train.prior == "images" and config.train.prior_prompts:
        return ["the class images are your own: nothing is drawn for train.prior_prompts, which are not used"]
    if not report.class_photos or config.train.prior == "images":
        return []
    return [
        Message(
            "class images, not trained as the subject and not used: {count}; train.prior = 'images' uses them",
            len(report.class_photos),
        )
    ]


def _folder_problems(data: DataConfig) -> list[str]:
    """The reasons why the folder of photos cannot be read, for a base that cannot be described."""
    try:
        photo_folder.of_config(data)
    except LorakitError as error:
        return _lines(error)
    return []


def _lines(error: LorakitError) -> list[str]:
    return str(error).splitlines()


def _line(problem: str | None) -> list[str]:
    return [problem] if problem else []
