"""Prior preservation: loss terms that keep the base's predictions for the class, and the text encoders' output for
texts without the trigger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorakit.core import rng
from lorakit.runs.memory_estimate import RANDOM_TEXTS_A_PHOTO
from lorakit.training.objective import LossTerm

if TYPE_CHECKING:
    from lorakit.data.dataset import Batch
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning
    from lorakit.training.loss_step import LossStep

# Texts whose words are replaced at random.
RANDOM_TEXTS = 128


@dataclass(frozen=True)
class ReferenceTexts:
    """Texts without the trigger: the empty prompt, then `Precomputed.class_texts` and copies with random tokens.

    Attributes:
        tokens: the input of `Family.encode_tokens`, one row each.
        conditions: their embeddings by the base.
    """

    tokens: list[torch.Tensor]
    conditions: Conditioning


def class_image_term(loss_step: LossStep, count: int) -> LossTerm:
    """The term of `count` class images under the texts that the base drew them for (Ruiz et al. 2022, arXiv
    2208.12242).

    With `train.prior_target = "base"` the target is the base's prediction. It lacks the noise of a single image: an
    adapter that does not change the class has no gradient here, but with the image's own target it has one.
    """
    latents = loss_step.encoded.class_latents
    assert latents is not None, "prior = 'images' comes with class latents"
    mean, std = latents.mean, latents.std
    order = loss_step.generators["class order"]
    rows = torch.randint(len(mean), (count,), generator=order, device=loss_step.family.device)
    noisy, timesteps, target = loss_step.add_noise("class", mean[rows], std[rows])
    sizes = {name: row.expand(count, -1) for name, row in latents.sizes.items()}
    condition = _class_condition(loss_step, latents.text_rows[rows], sizes)
    weight = loss_step.train.prior_loss_weight
    if loss_step.train.prior_target == "image":
        return LossTerm(noisy, timesteps, condition, target, None, weight)
    teacher = loss_step.encoded.class_conditions.index(latents.text_rows[rows]).with_rows(**sizes)
    return LossTerm(noisy, timesteps, condition, None, None, weight, teacher)


def teacher_term(loss_step: LossStep, batch: Batch, instance: LossTerm) -> LossTerm:
    """The term of the noisy photos of `instance` under their texts without the trigger; the target is the base's
    prediction.

    With `train.prior_prompts` each photo gets one of these texts instead with probability 1/2.
    """
    sizes = loss_step.encoded.dataset.buckets[batch.bucket].sizes_of(batch.entries)
    class_rows = loss_step.encoded.class_of[batch.text_rows]
    if count := len(others := loss_step.encoded.other_rows):
        order, device = loss_step.generators["class order"], class_rows.device
        picks = torch.randint(2 * count, class_rows.shape, generator=order, device=device)
        class_rows = torch.where(picks < count, others[picks % count], class_rows)
    base_condition = loss_step.encoded.class_conditions.index(class_rows).with_rows(**sizes)
    condition = _class_condition(loss_step, class_rows, sizes)
    return LossTerm(
        instance.noisy, instance.timesteps, condition, None, None, loss_step.train.prior_loss_weight, base_condition
    )


def teacher_target(loss_step: LossStep, term: LossTerm) -> torch.Tensor:
    """The prediction of the base without the adapter."""
    with torch.no_grad(), loss_step.adapter.disabled():
        target: torch.Tensor = loss_step.family.predict(term.noisy, term.timesteps, term.teacher)
    return target


def random_texts(
    family: Family,
    class_tokens: Sequence[torch.Tensor],
    photo_tokens: Sequence[torch.Tensor],
    triggers: Sequence[str],
    seed: int,
) -> list[torch.Tensor]:
    """Tokens of the empty prompt, of the class texts, and of `RANDOM_TEXTS` texts with random tokens.

    Such a text is one of the class or of a photo, and a random share of its tokens, 0 to 1, is replaced. So are all
    tokens of triggers. A replacement is any token of the vocabulary but these. So the term holds more than the few
    texts of the run, and another word in the trigger's place is none.

    Returns:
        The input of `Family.encode_tokens`. An encoder that cannot be trained gets the text without random tokens.
    """
    draw = rng.generator(seed, 0, "plain texts")
    texts = [torch.cat(pair) for pair in zip(class_tokens, photo_tokens, strict=True)]
    # Half of them are photos' texts.
    of_class, of_photos = len(class_tokens[0]), len(photo_tokens[0])
    of_each = (of_class, RANDOM_TEXTS // 2), (of_photos, RANDOM_TEXTS - RANDOM_TEXTS // 2)
    rows = torch.cat([torch.randint(among, (count,), generator=draw) for among, count in of_each])
    rows[RANDOM_TEXTS // 2 :] += of_class
    shares = torch.rand((RANDOM_TEXTS, 1), generator=draw)
    replaced = torch.rand((RANDOM_TEXTS, class_tokens[0].shape[1]), generator=draw) < shares
    chunks = class_tokens[0].shape[1] // family.tokens([""])[0].shape[1]
    empty, named = family.tokens([""], chunks), family.tokens(triggers)
    copies = [table[rows.to(table.device)] for table in texts]
    encoders: list[Any] = list(family.modules().values())[1:]  # the inputs of encoders that cannot be trained come last
    for place, encoder in enumerate(encoders):
        ids = copies[place].cpu()
        special = empty[place].unique().cpu()  # begin, end and padding
        own = named[place].unique().cpu()
        words = torch.arange(encoder.config.vocab_size)
        words = words[~torch.isin(words, torch.cat([special, own]))]
        random = words[torch.randint(len(words), ids.shape, generator=draw)]
        at_random = (replaced | torch.isin(ids, own)) & ~torch.isin(ids, special)
        copies[place] = torch.where(at_random, random, ids).to(copies[place].device)
    return [torch.cat(tables) for tables in zip(empty, class_tokens, copies, strict=True)]


def text_distance(loss_step: LossStep, count: int) -> torch.Tensor:
    """The squared distance of the text encoders' output from the base's, relative to its square, as a mean, a scalar.

    The texts are the empty prompt, by which guidance multiplies, and `RANDOM_TEXTS_A_PHOTO` random ones for each of
    `count` photos. Hidden states `[B, T, D]` count one by one, as do pooled embeddings `[B, P]`.
    """
    reference = loss_step.encoded.reference_texts
    assert reference is not None, "text_prior_weight comes with reference texts"
    order, device = loss_step.generators["text order"], loss_step.family.device
    rows = torch.randint(1, len(reference.conditions), (RANDOM_TEXTS_A_PHOTO * count,), generator=order, device=device)
    rows = torch.cat([rows.new_zeros(1), rows])
    now = loss_step.family.encode_tokens([table[rows] for table in reference.tokens], grad=True)
    before = reference.conditions.index(rows)
    parts = []
    for name in ("encoder_hidden_states", "pooled"):
        base, output = before.get(name), now.get(name)
        if base is not None and output is not None:
            base = base.float()
            parts.append(((output.float() - base).square().sum(dim=-1) / base.square().sum(dim=-1)).mean())
    return torch.stack(parts).mean()


def _class_condition(loss_step: LossStep, text_rows: torch.Tensor, sizes: dict[str, torch.Tensor]) -> Conditioning:
    condition = loss_step.condition(loss_step.encoded.class_tokens, loss_step.encoded.class_conditions, text_rows)
    return condition.with_rows(**sizes)
