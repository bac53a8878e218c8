"""Every option of lorakit, on one page.

`load(preset, overrides)` is the only way in. It reads TOML strictly: unknown keys, wrong types and values out of range
are collected and raised together as one `ConfigError`, each with the nearest known name. Nothing writes back into a
`Config`; values that follow from others (trigger, prompts, steps) are properties or computed where used. No torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lorakit.config.option import Option, option
from lorakit.core.registry import FORMATS, METHODS, OPTIMIZERS, TRACKERS, resolve


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    base: str = option(
        "pocket",
        "Base: 'pocket' (bundled), a .safetensors file, a diffusers folder, or a hub id (owner/name[@revision]).",
        path=True,
    )
    tokenizer: str = option(
        "",
        "Folder of the tokenizer for a base in a single file, or of ComfyUI or Forge. Empty: beside it, else CLIP's.",
        path=True,
    )
    vae: str = option(
        "", "VAE in place of the base's own: a folder, a .safetensors file or a hub id. Empty: the base's.", path=True
    )
    text_encoders: str = option(
        "",
        "Text encoders of an SD3 file without them: folder with clip_l, clip_g (t5xxl), or a base. Empty: beside it.",
        path=True,
    )
    t5: bool = option(True, "Use Stable Diffusion 3's T5. false: it is left out and not fetched, which saves 9.5 GB.")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "v_prediction_zero_snr"] = option(
        "auto", "What the base predicts. auto: read from the base, and printed."
    )
    clip_skip: int | None = option(
        None,
        "Read texts at the text encoder's Nth last layer, web UIs' CLIP skip N; 2 for NAI. Unset: as the base.",
        low=1,
        high=24,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The photos, and the words that go with them."""

    folder: str = option(
        "", "Folder of photos. Only captions are written there (photo.txt), if you or a model write any.", path=True
    )
    kind: Literal["subject", "style"] = option("subject", "What the photos have in common: a subject or a style.")
    name: str = option("", "The trigger and what it is, as in 'sks dog' or 'sks style'. The first word is the trigger.")
    instance_prompt: str = option("", "Text of a photo without a caption. Empty: made from kind and name.")
    class_prompt: str = option("", "Text of the whole class, for prior preservation. Empty: made from name.")
    concepts: Literal["ask", "folders", "one"] = option(
        "ask",
        "Subfolders like '20_ohwx man': folders: each its own subject; one: all are data.name; "
        "ask: stop if names differ.",
    )
    max_tokens: int | None = option(
        None,
        "Tokens of a text that are read, 75 and its multiples: in chunks of 75, as web UIs do. Unset: 225 if needed.",
        low=75,
        high=750,
    )
    class_folder: str = option(
        "",
        "Folder of your own class images for prior = 'images'. Empty: reg/, class/ or regularization/ in data.folder.",
        path=True,
    )
    exclude: tuple[str, ...] = option(
        (), "Photos of data.folder to leave out, by name or pattern: 'blurred.jpg', 'old/*'.", private=True
    )
    edits: dict[str, str] = option({}, "Turn, crop, mask photos: {'a.jpg' = 'turn 90, crop 10 0 90 99'}.", private=True)  # noqa: RUF009
    more_folders: dict[str, str] = option({}, "More folders, by concept: {'3_sks cat' = '/photos/cat'}.", path=True)  # noqa: RUF009
    resolution: int = option(
        512,
        "Side of the training square in pixels; buckets keep its area. [512, 768] trains each photo at both.",
        low=64,
        high=4096,
    )
    lower_resolutions: tuple[int, ...] = option(
        (), "Lower sides at which each photo is trained too, once an epoch at each.", low=64, high=4096
    )
    folder_resolutions: dict[str, int] = option(  # noqa: RUF009
        {},
        "Sides for photos of a subfolder, by its name: {'10_faces' = 512}. Not above data.resolution.",
        low=64,
        high=4096,
        private=True,
    )
    max_aspect: float = option(4.0, "Longer side over shorter, beyond which a photo is cropped.", low=1, high=8)
    caption_dropout: float = option(0.0, "Share of texts replaced by the bare instance prompt.", low=0, high=1)
    shuffle_tags: bool = option(
        False, "Shuffle comma-separated tags; the trigger and all before three bars stay first."
    )
    keep_tags: int = option(0, "First tags that are neither shuffled nor dropped.", low=0, high=100)
    tag_dropout: float = option(0.0, "Chance of each other tag to be left out of a text.", low=0, high=0.95)
    caption_prefix: str = option("", "Words in front of every caption.")
    caption_suffix: str = option("", "Words behind every caption.")
    caption_lines: bool = option(False, "Each line of a caption file is a separate caption; one is drawn each time.")
    caption_from_name: bool = option(False, "A photo without a caption has its file name: 'red_car.png' is 'red car'.")
    wildcards: bool = option(False, "Draw one of the words in {braces}, with bars between them, each time.")
    flip: bool = option(False, "Mirror photos as a variant. Leave it off if left and right matter.")
    crop_jitter: float = option(0.0, "Share of the side by which the crop is moved in a variant.", low=0, high=0.25)
    color_jitter: float = option(0.0, "Strength of brightness, contrast and saturation changes.", low=0, high=0.5)
    variants: int = option(1, "Cached variants of each photo that flip and jitter make.", low=1, high=64)
    cache: Literal["memory", "disk"] = option("memory", "Where encoded photos are kept; disk survives the run.")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Every training resolution of the photos, the highest first."""
        return self.resolution, *self.lower_resolutions

    def resolutions_of(self, relative: str) -> tuple[int, ...]:
        """The same for one photo, by its path in the folder."""
        folder, inside, _ = relative.partition("/")
        own = self.folder_resolutions.get(folder) if inside else None
        return self.resolutions if own is None else (own,)

    @property
    def trigger(self) -> str:
        """The trigger: the first word of `name`."""
        return self.name.split()[0] if self.name.split() else ""

    @property
    def noun(self) -> str:
        """The noun: the rest of `name`, e.g. "dog"."""
        return " ".join(self.name.split()[1:])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method has: its size, and the layers it enters. A method without further options adds no class."""

    rank: int = option(16, "Rank of the update.", low=1, high=1024)
    alpha: float | None = option(None, "Scale is alpha / rank. Unset: alpha = rank, so that the scale is 1.", above=0)
    ranks: dict[str, int] = option(  # noqa: RUF009
        {},
        "Ranks of layers by pattern: {'unet.mid_block.*' = 4}. The last match counts; 0: left out.",
        low=0,
        high=1024,
    )
    alphas: dict[str, float] = option({}, "The same for alpha.", above=0)  # noqa: RUF009
    target_modules: Literal["attention", "linear", "linear+conv"] = option(
        "attention",
        "attention: q, k, v, out; linear: every attention-block layer; linear+conv: resnets and samplers too.",
    )
    train_text_encoder: bool = option(False, "Train adapters in the text encoder(s) too.")
    new_tokens: int = option(0, "Vectors to learn for the trigger as a new token (pivotal tuning).", low=0, high=32)

    method: str
    words_only: ClassVar[bool] = False  # vectors of the trigger are trained, and no layers

    @property
    def scale(self) -> float:
        """The factor of the product of the two factors."""
        return self.effective_alpha / (math.sqrt(self.rank) if METHODS[self.method].rank_stabilized else self.rank)

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or the rank if it is unset."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def largest_dropout(self) -> float:
        """The largest dropout probability; 0 without dropout."""
        return max(getattr(self, name, 0.0) for name in ("dropout", "rank_dropout", "module_dropout"))

    @property
    def whole_model(self) -> bool:
        """Whether the base's own weights are trained instead of adapter layers."""
        return bool(METHODS[self.method].whole_model)

    @property
    def trains_text(self) -> bool:
        """Whether training changes the text embeddings."""
        return self.train_text_encoder or self.new_tokens > 0


@dataclass(frozen=True, kw_only=True)
class DropoutConfig(AdapterConfig):
    """The options of LoHa and LoKr: those of every method, and dropout of parts of a layer's change."""

    rank_dropout: float = option(
        0.0, "Chance of each rank of a layer (LoHa, LoKr: row) to be left out, for each picture.", low=0, high=0.9
    )
    module_dropout: float = option(0.0, "Chance of each layer's adapter to be left out of a pass.", low=0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(DropoutConfig):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A. The methods built on it have its options."""

    method: str = "lora"
    dropout: float = option(0.0, "Dropout on the adapter's input.", low=0, high=0.9)


class _AdapterSections(Mapping[str, type[AdapterConfig]]):
    """Method -> section class, from `registry.METHODS`."""

    def __getitem__(self, method: str) -> type[AdapterConfig]:
        section: type[AdapterConfig] = resolve(METHODS[method].section)
        return section

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


ADAPTER_SECTIONS = _AdapterSections()


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the learning rate, which is a pure function of the optimizer step."""

    name: str = option(
        "adamw",
        "Optimizer, or module:Class of any installed package, such as torch.optim:RAdam.",
        choices=OPTIMIZERS,
        import_path=True,
    )
    args: dict[str, Any] = option(  # noqa: RUF009
        {}, "More arguments of the optimizer, a table such as {betas = [0.9, 0.95]}."
    )
    learning_rate: float = option(1e-4, "Peak learning rate (a factor, usually 1, for prodigy).", low=0, high=10)
    text_encoder_learning_rate: float | None = option(None, "For text encoders. Unset: the same.", low=0, high=10)
    text_encoder_2_learning_rate: float | None = option(
        None, "For the second text encoder and others after it. Unset: as the first.", above=0, high=10
    )
    text_encoder_stop: float = option(
        1.0, "Share of the run after which text encoders are left as they are.", above=0, high=1
    )
    unet_start: float = option(
        0.0, "Share of the run before which the UNet is left as it is: the text encoder learns first.", low=0, high=0.9
    )
    loraplus_lr_ratio: float = option(
        1.0, "LoRA+: rate of the factor B by that of A; 16 is the paper's. 1: the same.", above=0, high=1000
    )
    rates: dict[str, float] = option(  # noqa: RUF009
        {},
        "Multiples of the learning rate by pattern of layers: {'unet.up_blocks.*' = 0.5}. The last match counts.",
        above=0,
        high=1000,
    )
    weight_decay: float = option(0.01, "Decoupled weight decay.", low=0, high=1)
    lr_scheduler: Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "rex", "wsd"] = option(
        "constant", "Shape after warm-up. wsd: constant, then down at the end."
    )
    warmup_steps: int = option(0, "Optimizer steps over which the rate rises from 0.", low=0)
    warmup_ratio: float = option(0.0, "The same as a share of the run.", low=0, high=0.9)
    min_lr_ratio: float = option(0.0, "Share of the peak rate below which no schedule falls.", low=0, high=1)
    lr_cycles: int = option(2, "Cycles of cosine_with_restarts, each from the peak down.", low=1, high=1000)
    lr_power: float = option(2.0, "Power of polynomial: 1 is linear, 2 falls faster.", above=0)
    lr_decay_ratio: float = option(0.2, "Share of the run over which wsd falls.", low=0.01, high=1)


# Upper bound of a run's length: a larger value is probably a typing error.
MAX_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, objective and checkpoints. A step is one optimizer step."""

    steps: int | None = option(None, "Optimizer steps.", low=1, high=MAX_STEPS)
    epochs: int | None = option(None, "Passes over the photos.", low=1, high=MAX_STEPS)
    steps_per_image: int | None = option(None, "Optimizer steps for each photo.", low=1, high=MAX_STEPS)
    min_steps: int = option(0, "Least number of steps with steps_per_image.", low=0, high=MAX_STEPS)
    batch_size: int = option(1, "Photos in a batch.", low=1, high=256)
    gradient_accumulation_steps: int = option(1, "Batches in an optimizer step.", low=1, high=256)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 turns clipping off.", low=0)
    seed: int = option(0, "Seed of all random numbers.", low=0, high=2**31 - 1)
    prior: Literal["none", "images", "teacher"] = option(
        "none", "Keep the rest of the model as it was: with class images, or with the base as teacher."
    )
    prior_loss_weight: float = option(1.0, "Weight of the prior term.", low=0, high=10)
    prior_target: Literal["image", "base"] = option(
        "image", "What prior = 'images' asks for: the class image, or what the base predicts of it, which leaks less."
    )
    prior_prompts: tuple[str, ...] = option(
        (), "Prompts of other things that must stay as they are, which the prior uses too."
    )
    text_prior_weight: float = option(
        0.0, "Weight of a term that keeps the text encoder's output for texts without the trigger.", low=0, high=100
    )
    class_images: int = option(100, "Class images for prior = 'images'; made once and cached.", low=1, high=10000)
    loss: Literal["mse", "huber"] = option("mse", "Distance between prediction and target.")
    min_snr_gamma: float | None = option(None, "Min-SNR weighting (Hang et al. 2023); 5 is usual. Unset: off.", above=0)
    snr_weighting: Literal["min", "debiased", "soft_min"] = option(
        "min", "Loss weights by noise level. min, soft_min: with min_snr_gamma; debiased: 1 / sqrt(SNR)."
    )
    timestep_sampling: Literal["base", "uniform", "logit_normal"] = option(
        "base", "Noise levels of training: as the base was trained, all alike, or more of the middle ones."
    )
    timestep_shift: float = option(
        1.0,
        "Shift of the noise levels towards noise (above 1) or away from it, as for large pictures.",
        above=0,
        high=20,
    )
    timestep_low: float = option(0.0, "Share of the lowest noise levels to leave out.", low=0, high=0.99)
    timestep_high: float = option(1.0, "Share of the noise levels above which all are left out.", above=0, high=1)
    pyramid_noise: float = option(0.0, "Weight of coarser noise, for each halving. 0: none.", low=0, high=0.9)
    noise_offset: float = option(0.0, "Per-channel offset of the noise, for dark or bright pictures.", low=0, high=1)
    max_weight_norm: float = option(
        0.0,
        "Each layer's change is scaled down to this norm after a step (kohya's scale_weight_norms); 0: no limit.",
        low=0,
    )
    ema_decay: float = option(
        0.0,
        "Decay of an average of the weights, which is exported and drawn; 0.99 for short runs. 0: none.",
        low=0,
        high=0.99999,
    )
    masked_loss: bool = option(False, "Weigh the loss by name.mask.png or the photo's alpha.")
    holdout: float = option(0.1, "Share of photos kept for validation where there are 10 or more.", low=0, high=0.5)
    validate_every: int = option(0, "Steps between validations; 0: five times a run.", low=0)
    validate_at_end: bool = option(True, "Validate after the last step too; it takes long on a CPU.")
    save_every: int = option(0, "Steps between checkpoints; 0: five times a run.", low=0)
    export_every: int = option(0, "Steps after which the adapter is also written as a separate file; 0: never.", low=0)
    keep_checkpoints: int = option(3, "Newest checkpoints kept.", low=1)
    init_from: str = option("", "Start from this adapter's weights (a new run, not a resume).", path=True)
    deterministic: bool = option(
        False, "On CUDA, kernels that give the same bits in each run; slower. A CPU does so anyway."
    )
    on_nan: Literal["stop", "rollback"] = option("stop", "Non-finite loss: stop, or go back to a checkpoint once.")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Device, precision and memory."""

    device: str = option(
        "auto",
        "auto: CUDA, else MPS, else CPU. cuda:1 is the second card.",
        choices=("auto", "cuda", "mps", "cpu"),
        numbered="cuda",
    )
    mixed_precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "Precision of the frozen base. auto: bf16 or fp16 on CUDA, fp32 elsewhere. Adapters are always fp32."
    )
    tf32: bool = option(
        True, "On CUDA, products of float32 numbers in TF32 where the card has it; false: in full precision, slower."
    )
    attention: Literal["sdpa", "xformers"] = option(
        "sdpa", "Attention kernel; xformers is tested against sdpa at the start."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    limit_gib: float | None = option(
        None,
        "GiB that a step may take; as few blocks as that needs are recomputed. auto: what a CUDA card has free.",
        above=0,
        automatic="auto",
    )
    base_storage: Literal["full", "int8", "w8a8", "nf4"] = option(
        "full",
        "How the UNet's frozen weights are stored: in full, 8 or 4.5 bits. w8a8: linear layers multiply in int8.",
    )
    stream_base: bool = option(
        False, "Keep the UNet's frozen weights in the host's memory, copied to the card in time: less memory, slower."
    )
    compile: bool = option(False, "Compile the UNet's blocks for training; the first step of each batch shape pays.")
    engine: Literal["fused", "plain"] = option(
        "fused", "plain: diffusers and PEFT unchanged; no CUDA graphs, flat buffers, compile. Same, slower."
    )
    channels_last: Literal["auto", "on", "off"] = option(
        "auto", "Keep the UNet's pictures channels last. auto: in half precision on a card with Triton."
    )
    triton: bool = option(True, "Use Triton's kernels where a card has it and they agree with torch's; false: torch's.")
    cuda_graphs: bool = option(True, "Replay steps as CUDA graphs where possible; false: same training, slower.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures that are drawn during training and by `lorakit sample`."""

    every: int = option(0, "Steps between sample grids; 0: five times a run.", low=0)
    at_start: bool = option(True, "Draw a grid before the first step, of the base as it is.")
    at_end: bool = option(True, "Draw a grid from the exported file, which shows that it works.")
    prompts: tuple[str, ...] = option(
        (), "Prompts to draw, each with own settings if you like: 'a dog --w 768 --d 7'. Empty: made."
    )
    negative_prompt: str = option("", "What the pictures should not show.")
    steps: int | None = option(
        None, "Denoising steps. Unset: 30, or as few as a distilled base needs.", low=1, high=1000
    )
    guidance: float | None = option(
        None, "Classifier-free guidance. Unset: as the base needs: 7.5, SDXL 6, SD3 5, distilled 1.", low=0, high=50
    )
    seed: int = option(0, "Seed of the pictures.", low=0, high=2**31 - 1)
    width: int = option(0, "Width of the pictures; 0: data.resolution.", low=0, high=4096)
    height: int = option(0, "Height of the pictures; 0: data.resolution.", low=0, high=4096)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The files of a run."""

    folder: str = option("", "Run folder. Empty: runs/<time>-<name>.", path=True)
    formats: tuple[str, ...] = option(("kohya",), "Formats of the exported adapter.", choices=FORMATS)
    dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", "Precision of the exported file.")
    trackers: tuple[str, ...] = option(
        (),
        "Trackers that get figures and sample pictures, or module:Class of accelerate's kind.",
        choices=TRACKERS,
        import_path=True,
    )
    notify: str = option(
        "",
        "At the end of a run: an http or https address that gets a POST of JSON, or a command (docs/how-to.md).",
        private=True,
        local_only=True,
    )


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

    @property
    def engine_is_off(self) -> bool:
        """Whether the base's modules stay unchanged: the engine requires frozen weights."""
        return self.memory.engine == "plain" or self.adapter.whole_model

    @property
    def adapter_formats(self) -> tuple[str, ...]:
        """The adapter formats to write: those of `output`, none if only a model is written."""
        return self.output.formats if "adapter" in getattr(self.adapter, "outputs", ("adapter",)) else ()


SECTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config))
DEFAULTS = Config()
# Error messages that are used before a run, and again where parts of lorakit are used without a run.
DEVICE_MISSING = (
    "memory.device = {device!r}: torch {version} finds no such device here; "
    "`lorakit doctor` says why, memory.device = 'auto' takes what there is"
)
BF16_MISSING = "memory.mixed_precision = 'bf16': this card does not compute in bf16; choose 'fp16' or 'fp32'"
NO_LATENT_CACHE = "{folder}: latents cannot be kept there ({reason}); set data.cache = 'memory' or LORAKIT_CACHE"
NO_CLASS_IMAGE_CACHE = "cannot keep class images in {folder}: {reason}; set LORAKIT_CACHE"
XFORMERS_MISSING = "memory.attention = 'xformers' needs xformers; {hint}"
OFFLOAD_NEEDS_CUDA = (
    "memory.stream_base = true needs a CUDA card to copy weights to, and this is {device}: set it to false"
)
LENGTHS = ("steps", "epochs", "steps_per_image")


def section_type(section: str, method: str = "lora") -> type:
    """The dataclass of a section; `adapter` is a tagged union on `method`."""
    if section == "adapter":
        return ADAPTER_SECTIONS[method]
    return type(getattr(DEFAULTS, section))


@functools.cache
def _types(section: type) -> dict[str, Any]:
    """Name -> type of a section's options."""
    return typing.get_type_hints(section)


def options(method: str = "lora") -> list[Option]:
    """Every option, in the order of this module; the adapter's options are those of `method`."""
    result = []
    for section in SECTIONS:
        cls = section_type(section, method)
        hints = _types(cls)
        for f in dataclasses.fields(cls):
            if section == "adapter" and f.name == "method":
                result.append(Option(section, "method", str, "lora", "Adapter method.", choices=tuple(METHODS)))
                continue
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            facts = {**f.metadata, "choices": tuple(f.metadata.get("choices", ()))}
            result.append(Option(section, f.name, hints[f.name], default, **facts))
    return result
