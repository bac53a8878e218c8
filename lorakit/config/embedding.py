"""The options of textual inversion, with the base frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorakit.config.option import option
from lorakit.config.schema import AdapterConfig, Config, OptimizerConfig, OutputConfig
from lorakit.core.messages import Message

_TEXT_RATES = ("text_encoder_learning_rate", "text_encoder_2_learning_rate", "text_encoder_stop", "unet_start")
NO_EFFECT = (
    "{key} has no effect with adapter.method = 'embedding', which trains the trigger's vectors alone: leave it out"
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(AdapterConfig):
    """Textual inversion (Gal et al. 2022, arXiv 2208.01618): only the trigger's vectors are trained."""

    method: str = "embedding"
    new_tokens: int = option(1, "Vectors to learn for the trigger as a new token.", low=1, high=32)
    init_word: str = option("", "What the trigger's vectors begin as. Empty: the noun of data.name.")

    # Options of adapters with layers; as class variables they are not options here.
    rank: ClassVar[int] = 0  # type: ignore[misc]
    alpha: ClassVar[float | None] = None  # type: ignore[misc]
    ranks: ClassVar[dict[str, int]] = {}  # type: ignore[misc]
    alphas: ClassVar[dict[str, float]] = {}  # type: ignore[misc]
    target_modules: ClassVar[str] = "attention"  # type: ignore[misc]
    train_text_encoder: ClassVar[bool] = False  # type: ignore[misc]
    words_only: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("embedding",)

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0


def problems(config: Config) -> list[str]:
    """Problems of options that have no effect in textual inversion."""
    if not isinstance(config.adapter, EmbeddingConfig):
        return []
    optimizer, output = config.optimizer, config.output
    changed = {f"optimizer.{name}": getattr(optimizer, name) != getattr(OptimizerConfig, name) for name in _TEXT_RATES}
    changed["train.prior"] = config.train.prior != "none"
    changed["output.formats"] = output.formats != OutputConfig.formats
    changed["output.dtype"] = output.dtype == "bf16"  # it is written in float32
    return [Message(NO_EFFECT, key) for key in changed if changed[key]]
