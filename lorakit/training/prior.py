"""Prior preservation: loss terms that keep the base's predictions for the class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.training.objective import LossTerm

if TYPE_CHECKING:
    from lorakit.data.dataset import Batch
    from lorakit.families.conditioning import Conditioning
    from lorakit.training.loss_step import LossStep


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


def _class_condition(loss_step: LossStep, text_rows: torch.Tensor, sizes: dict[str, torch.Tensor]) -> Conditioning:
    condition = loss_step.condition(loss_step.encoded.class_tokens, loss_step.encoded.class_conditions, text_rows)
    return condition.with_rows(**sizes)
