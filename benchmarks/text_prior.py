"""A term of the loss that lorakit does not have: it keeps the text encoder's output for texts without the trigger.

`install` adds it to the training of the bundled base, for measurements (docs/recipes.md, "Where the colours may go").
"""

from __future__ import annotations

from typing import Any

import torch

from lorakit.core import rng
from lorakit.training.loss_step import LossStep


def install(weight: float) -> None:
    """Add the term, with this weight, to the loss of every batch."""
    seed, loss_of = LossStep.seed, LossStep.loss_of

    def seed_term(step: Any, index: int) -> Any:
        step.text_order = torch.Generator(step.family.device)
        step.text_order.manual_seed(rng.seed_for(step.train.seed, index, "untriggered order"))
        return seed(step, index)

    def with_term(step: Any, batch: Any) -> torch.Tensor:
        return loss_of(step, batch) + weight * _distance(step, len(batch.entries))

    LossStep.seed, LossStep.loss_of = seed_term, with_term  # type: ignore[method-assign]


def _distance(step: Any, count: int) -> torch.Tensor:
    """The squared difference of each token's hidden state from the base's, relative to its square there, as a mean.

    The texts are the empty prompt, whose part guidance multiplies, and `count` of the prior's texts at random.
    """
    family, encoded = step.family, step.encoded
    if not hasattr(step, "text_tables"):
        with torch.no_grad(), step.adapter.disabled():
            ids = torch.cat([family.tokens([""])[0], encoded.class_tokens[0]])
            step.text_tables = ids, family.encode_tokens([ids])["encoder_hidden_states"]
    ids, states = step.text_tables
    rows = torch.arange(len(ids), device=family.device)
    if count + 1 < len(ids):
        others = torch.randint(1, len(ids), (count,), generator=step.text_order, device=family.device)
        rows = torch.cat([rows[:1], others])
    now = family.encode_tokens([ids[rows]], grad=True)["encoder_hidden_states"]
    distance = (now - states[rows]).square().sum(dim=-1) / states[rows].square().sum(dim=-1)
    return distance.mean()
