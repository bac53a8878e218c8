"""The options of training a model's own weights instead of an adapter's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorakit.config.option import option
from lorakit.config.schema import AdapterConfig, Config, MemoryConfig, OutputConfig
from lorakit.core.messages import Message
from lorakit.core.registry import OPTIMIZERS

# Raised before a run or, if only torch can tell, when it starts.
NO_BF16 = (
    "adapter.method = {method!r}: this card has no bf16, and float16 is too coarse for a model's own weights: set "
    "memory.mixed_precision = 'fp32'"
)
OUTPUTS = ("file", "folder", "adapter")


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): no layers are added, so that nothing has a rank."""

    method: str = "full"
    train_text_encoder: bool = option(False, "Train the text encoder(s) too.")
    outputs: tuple[str, ...] = option(
        ("file",),
        "What is written: the model as one file, as a folder of diffusers, or a LoRA that is extracted from it.",
        choices=OUTPUTS,
    )
    extract_rank: int = option(64, "Rank of the LoRA that is extracted, with outputs = 'adapter'.", low=1, high=1024)

    # Options of adapters; as class variables they are not options here.
    rank: ClassVar[int] = 0  # type: ignore[misc]
    alpha: ClassVar[float | None] = None  # type: ignore[misc]
    ranks: ClassVar[dict[str, int]] = {}  # type: ignore[misc]
    alphas: ClassVar[dict[str, float]] = {}  # type: ignore[misc]
    target_modules: ClassVar[str] = "linear+conv"  # type: ignore[misc]
    new_tokens: ClassVar[int] = 0  # type: ignore[misc]

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0


def problems(config: Config) -> list[str]:
    """Problems of options that cannot be used when the base's own weights are trained."""
    adapter, memory, train, name = config.adapter, config.memory, config.train, config.optimizer.name
    own = Message("adapter.method = {method!r} trains the base's own weights", adapter.method)
    frozen = [n for n in ("base_storage", "stream_base") if getattr(memory, n) != getattr(MemoryConfig, n)]
    if not isinstance(adapter, FullConfig):
        return []
    result: list[str] = [
        Message("{own}: memory.{option} is for frozen ones, leave it out", own, option) for option in frozen
    ]
    checks = {
        Message("{own}: memory.compile is for an adapter's blocks, set it to false", own): memory.compile,
        Message("{own}, which float16 is too coarse for: set memory.mixed_precision to 'bf16' or 'fp32'", own): (
            memory.mixed_precision == "fp16"
        ),
        Message(
            "{own}: train.prior = 'teacher' would need a second copy of the base, choose 'images', as DreamBooth does",
            own,
        ): (train.prior == "teacher"),
        Message(
            "{own}: train.ema_decay needs memory.mixed_precision = 'fp32', as an average in bf16 would not change", own
        ): (train.ema_decay > 0 and memory.mixed_precision != "fp32"),
        Message(
            "{own} one by one, which optimizer.name = {name!r} cannot: choose one of {optimizers}",
            own,
            name,
            ", ".join(n for n in OPTIMIZERS if OPTIMIZERS[n].per_weight),
        ): (name not in OPTIMIZERS or not OPTIMIZERS[name].per_weight),
    }
    result += [problem for problem, applies in checks.items() if applies]
    if "adapter" not in adapter.outputs:
        changed = {
            "adapter.extract_rank": adapter.extract_rank != FullConfig.extract_rank,
            "output.formats": config.output.formats != OutputConfig.formats,
            "output.dtype": config.output.dtype != OutputConfig.dtype,
        }
        result += [
            Message("{key} is for the extracted LoRA: add 'adapter' to adapter.outputs", key)
            for key in changed
            if changed[key]
        ]
    return result
