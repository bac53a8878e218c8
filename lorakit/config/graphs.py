"""Whether a training step can be replayed as CUDA graphs. No torch."""

from __future__ import annotations

from lorakit.config.schema import Config


def graphs_off(config: Config) -> str:
    """The reason why steps cannot be replayed as graphs on a CUDA device, or ""."""
    memory = config.memory
    recomputes = memory.gradient_checkpointing or memory.limit_gib is not None
    reasons = {
        "memory.engine = 'plain'": config.engine_is_off,
        "memory.cuda_graphs = false": not memory.cuda_graphs,
        "with gradient checkpointing, dropout would draw different numbers on replay": recomputes
        and config.adapter.largest_dropout > 0,
        "memory.stream_base copies weights during the step": memory.stream_base,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")
