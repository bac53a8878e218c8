"""The training loop, with validation, checkpoints and samples between its steps."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit import formats
from lorakit.config.sample_prompts import default_size
from lorakit.core.errors import Stopped, StopRequested
from lorakit.core.events import Events, StopRequest
from lorakit.core.messages import Message
from lorakit.core.names import step_name
from lorakit.core.registry import METHODS, resolve
from lorakit.data import concepts
from lorakit.engine import device_memory
from lorakit.formats import files, metadata
from lorakit.inference import sampling
from lorakit.inference.mode import polled
from lorakit.runs import plan
from lorakit.training import checkpoint, optimizers, out_of_memory
from lorakit.training.checkpoint import NotFinite
from lorakit.training.loss_step import RunningMean
from lorakit.training.parallel import SINGLE, Processes
from lorakit.training.precompute import embed

if TYPE_CHECKING:
    from PIL import Image

    from lorakit.adapters.weights import AdapterWeights
    from lorakit.config import Config
    from lorakit.core.protocols import Map
    from lorakit.families import Family
    from lorakit.families.conditioning import Conditioning
    from lorakit.runs.preflight import Ready
    from lorakit.runs.run_folder import RunFolder
    from lorakit.training.precompute import Precomputed, SampleInputs
    from lorakit.training.trainable import Model

# Losses and gradient norms stay on the device. The host reads them together every READ_EVERY steps.
READ_EVERY = 10
# After more overflows in a row than this, the gradient scale is not the cause.
MAX_SKIPPED = 13


@dataclass(frozen=True)
class Run:
    """A run and its surroundings.

    Attributes:
        ready: config, base, photos and plan.
        folder: the run folder; all output goes there.
        events: passes events to all listeners.
        stop: whether a stop was requested.
        started: start time in seconds since the epoch.
        identity: what a checkpoint depends on in addition to the config: hashes of base and photos.
        processes: the processes that train this run.
    """

    ready: Ready
    folder: RunFolder
    events: Events
    stop: StopRequest
    started: float
    identity: dict[str, str]
    processes: Processes = SINGLE

    @property
    def config(self) -> Config:
        """The config of the run."""
        return self.ready.config

    @contextlib.contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Emit the phase of the run. Inside, an out-of-memory error gets an explanation."""
        self.events.emit("phase", phase=doing)
        with out_of_memory.explain_out_of_memory(doing, self.config):
            yield

    def export(self, weights: AdapterWeights, name: str, step: int) -> dict[str, Path]:
        """Write `weights` in each format of `output.formats`, with the facts of the run as metadata.

        Returns:
            format -> path
        """
        output, plan = self.config.output, self.ready.plan
        facts = metadata.build(
            self.config,
            self.ready.info,
            name=name,
            images=plan.photo_count,
            steps=step,
            epochs=step * self.config.train.gradient_accumulation_steps // plan.batches,
            times=(self.started, time.time()),
            subjects=concepts.counts(self.ready.report.photos, self.config.data),
        )
        if (path := METHODS[self.config.adapter.method].whole_model) and (whole := resolve(path)):
            return dict(whole.save(self, weights, name, facts))
        return formats.save(weights, self.folder.path, name, output.formats, output.dtype, facts, say=self.events.say)

    def draw(
        self,
        family: Family,
        inputs: SampleInputs,
        embeddings: Sequence[Mapping[str, Any]] | None,
        step: int,
        *,
        adapter: str = "",
        map_parts: Map = map,
    ) -> None:
        """Draw the sample prompts and save them as the sample grid of `step`.

        Raises:
            StopRequested: a stop was requested; nothing was written.
        """
        sample = self.config.sample
        size = default_size(sample, self.config.data.resolution)
        poll = functools.partial(self.stop.poll, "the samples are not finished")
        with polled(family.modules().values(), poll):
            parts = sampling.parts(family, inputs.prompts, sample, size, embeddings=embeddings, adapter=adapter)
            draw = functools.partial(sampling.draw_part, family)
            pictures: list[Image.Image] = [picture for (picture,) in map_parts(draw, parts)]
        with self.optional(Message("step {step}: the samples", step)):
            file = self.folder.save_samples(step, pictures, inputs.prompts)
            self.events.emit("sample", step, file=file.name)

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Turn a write error inside into a warning: the run can go on without that file."""
        try:
            yield
        except (OSError, files.Unwritable) as error:
            reason = getattr(error, "strerror", None) or error
            line = Message(
                "{what} cannot be written ({why}); the run continues without it: free disk space", what, reason
            )
            self.events.say(line, warning=True)


@dataclass(frozen=True)
class TrainingState:
    """The state at the end of the loop.

    Attributes:
        history: the validations.
    """

    history: list[dict[str, Any]]


def loop(model: Model, inputs: Precomputed, run: Run, resume_from: Path | None = None) -> TrainingState:
    """Run optimizer steps from the checkpoint `resume_from`, or from step 0, to the last step of the plan.

    Raises:
        Stopped: a stop was requested; the state is saved and the adapter exported.
        NotFinite: a loss or a gradient is not finite.
    """
    total, mean = run.ready.plan.steps, RunningMean()
    readings = Readings(model, inputs, run, mean)
    milestones = Milestones(model, inputs, run, mean)
    step, due = (
        milestones.restore(resume_from) if resume_from else (0, ["save"] + ["sample"] * run.config.sample.at_start)
    )
    run.folder.update(state="running", step=step, steps=total)
    run.events.emit("phase", step, phase="training", steps=total)
    milestones.reach(step, due)
    readings.start(step)
    while step < total:
        with out_of_memory.explain_out_of_memory(f"step {step + 1}", run.config):
            loss, norm = model.optimizer_step(step)
        readings.add(step, loss, norm)
        step += 1
        due = milestones.due(step)
        if run.stop.together(Message("step {step} is saved and exported", step)) or due or step % READ_EVERY == 0:
            try:
                readings.read(step)
                milestones.reach(step, due)
            except NotFinite as problem:
                step = milestones.roll_back(problem)
                milestones.reach(step, [])
            readings.start(step)
    return TrainingState(milestones.history)


class Readings:
    """Losses and gradient norms: stored on the device, read together, logged, and checked for NaN and infinity.

    Args:
        mean: smooths the loss.
    """

    def __init__(self, model: Model, inputs: Precomputed, run: Run, mean: RunningMean):
        self.model, self.dataset, self.run, self.mean = model, inputs.dataset, run, mean
        self.losses, self.norms, self.limited = (torch.zeros(READ_EVERY, device=model.family.device) for _ in range(3))
        self.first, self.clock = 0, 0.0
        self.skipped = self.skipped_in_a_row = 0

    def start(self, step: int) -> None:
        """Start to count steps and time here, so that samples and checkpoints do not count as time of steps."""
        self.first, self.clock = step, time.monotonic()

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Store the figures of step `step`, counted from 0. The host does not wait for them."""
        self.losses[step % READ_EVERY] = loss
        self.norms[step % READ_EVERY] = norm
        if (count := self.model.optimizer_step.limited) is not None:
            self.limited[step % READ_EVERY] = count

    def read(self, step: int) -> None:
        """Read the values added since `start` and emit them as events.

        Raises:
            NotFinite: a loss or a gradient is not finite; the text has the step and its photos.
        """
        config, total = self.run.config, self.run.ready.plan.steps
        losses, norms = self.losses.tolist(), self.norms.tolist()
        limited = self.limited.tolist() if config.train.max_weight_norm else []
        seconds = (time.monotonic() - self.clock) / max(step - self.first, 1)
        smoothed = rate = 0.0
        for number in range(self.first, step):
            loss, norm = losses[number % READ_EVERY], norms[number % READ_EVERY]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._skip(number, loss)
                continue
            self.skipped_in_a_row = 0
            # Before `optimizer.unet_start` the text encoder's rate counts.
            rate = optimizers.learning_rate(config.optimizer, number, total) or optimizers.learning_rate(
                config.optimizer, number, total, "text_encoder"
            )
            smoothed = self.mean.add(loss)
            figures = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "smoothed_loss": smoothed}
            if limited:
                figures["scaled_layers"] = limited[number % READ_EVERY]
            self.run.events.emit("step", number + 1, **figures)
        plan = self.run.ready.plan
        images = plan.rows / plan.batches * config.train.gradient_accumulation_steps
        self.run.events.emit(
            "progress",
            step,
            loss=smoothed,
            learning_rate=rate,
            images_per_second=images / max(seconds, 1e-9),
            memory_mib=device_memory.peak(self.model.family.device) / 2**20,
            eta_s=(total - step) * seconds,
        )

    def _skip(self, number: int, loss: float) -> None:
        """Report that step `number` was skipped because its gradients overflowed in fp16.

        Raises:
            NotFinite: the step was not skipped, or too many were skipped in a row.
        """
        scale = self.model.optimizer_step.loss_scale
        self.skipped_in_a_row += 1
        if scale is None or not math.isfinite(loss) or self.skipped_in_a_row > MAX_SKIPPED:
            raise NotFinite(self._problem(number, loss))
        self.skipped += 1
        line = Message(
            "step {number}: gradients overflow in fp16, so the step is skipped ({skipped} so far)",
            number + 1,
            self.skipped,
        )
        self.run.events.say("{line}; their scale is {scale:g} now", line, scale.scale.item(), warning=True)

    def _problem(self, number: int, loss: float) -> str:
        """Return the message for step `number`: the problem, its photos and what to do."""
        figure = "gradient" if math.isfinite(loss) else "loss"
        parts = self.run.config.train.gradient_accumulation_steps
        names: set[str] = set()
        for index in range(number * parts, (number + 1) * parts):
            batch = self.model.loss_step.batch(index)
            names |= {self.dataset.names(batch.bucket)[i] for i in batch.entries.tolist()}
        latest = checkpoint.latest(self.run.folder.checkpoints)
        intact = Message("; {checkpoint} is intact", latest.name) if latest else ""
        advice = Message("lower optimizer.learning_rate")
        if self.model.family.dtype != torch.float32:
            advice = Message("lower optimizer.learning_rate or use memory.mixed_precision = 'fp32'")
        values = (number + 1, figure, ", ".join(sorted(names)), advice, intact)
        return Message("step {number}: the {figure} is not finite ({names}); {advice}{intact}", *values)


class Milestones:
    """The tasks that are due after certain steps, and the state that a checkpoint holds.

    Attributes:
        history: the results of all validations so far.
        retry: how often the run went back to a checkpoint.
    """

    def __init__(self, model: Model, inputs: Precomputed, run: Run, mean: RunningMean):
        self.model, self.inputs, self.run, self.mean = model, inputs, run, mean
        self.history: list[dict[str, Any]] = []
        self.retry = 0

    def due(self, step: int) -> list[str]:
        """Names of the tasks that are due after `step` steps, in order."""
        train, total = self.run.config.train, self.run.ready.plan.steps
        every = {"validate": train.validate_every, "save": train.save_every, "sample": self.run.config.sample.every}
        if step == total:  # the last samples are drawn from the exported file
            return ["validate"] * train.validate_at_end + ["save"]
        export = ["export"] if train.export_every and step and step % train.export_every == 0 else []
        return export + [name for name, number in every.items() if step % plan.interval(number, total) == 0]

    def reach(self, step: int, due: list[str]) -> None:
        """Do the tasks that are due, in the first process. After a request to stop, save the remaining tasks as still
        due, export the adapter and stop.

        Raises:
            Stopped: a stop was requested.
            NotFinite: weights or optimizer state have NaN or infinity; no task is done. The loss would show it one step
                later.
        """
        self.run.processes.first(lambda: self._reach(step, due), {"draw": self._draw_part})
        self.model.adapter.train(True)

    def _reach(self, step: int, due: list[str]) -> None:
        due = [*due, *(name for name in self.run.folder.take_requests() if name not in due)]
        if due or self.run.stop.requested:
            adapter, optimizer = self.model.adapter, self.model.optimizer_step.optimizer
            checkpoint.require_finite(step, adapter.state(), optimizer.state_dict())
        tasks = {"export": self.export, "validate": self.validate, "save": self.save, "sample": self.sample}
        left, stop = list(due), self.run.stop
        with contextlib.suppress(StopRequested):
            while left and not stop.requested:
                tasks[left[0]](step, left[1:])
                left.pop(0)
        if stop.requested:
            self.save(step, [name for name in left if name != "save"])
            exports: dict[str, Path] = {}
            if step:
                with self.run.optional(Message("step {step}: the adapter", step)):
                    exports = self.run.export(self.model.adapter.weights(), self.run.folder.adapter_name, step)
            raise Stopped(self.run.folder.path, step, next(iter(exports.values()), None))

    def validate(self, step: int, left: list[str]) -> None:
        """Validate the current weights (their average, where there is one)."""
        model, events = self.model, self.run.events
        model.adapter.train(False)
        poll = functools.partial(self.run.stop.poll, "the validation is not finished")
        with polled(model.family.modules().values(), poll), model.adapter.averaged():
            metrics = out_of_memory.retry_after_freeing(model.optimizer_step.discard_graphs, self._measure)
            if step == self.run.ready.plan.steps:
                metrics |= self._gains()
        self.history.append({"step": step, **metrics})
        events.emit("validation", step, **metrics)

    def _measure(self) -> dict[str, Any]:
        """Return the metrics of the current weights."""
        model, class_tokens = self.model, self.inputs.class_tokens
        conditions = self._conditions()
        if conditions is None or class_tokens is None:
            return model.validation.run(model.adapter)
        condition = embed(model.family, [table[:1] for table in class_tokens])
        return model.validation.run(model.adapter, conditions=conditions, class_condition=condition)

    def _gains(self) -> dict[str, dict[str, float]]:
        """Return, per photo, the share of the base's error that the adapter removes, for training and held-out
        photos."""
        model, conditions = self.model, self._conditions()
        gains = {"gains": model.photo_validation.gains(model.adapter, conditions)}
        if model.validation is not model.photo_validation:
            gains["holdout_gains"] = model.validation.gains(model.adapter, conditions)
        return gains

    def _conditions(self) -> Conditioning | None:
        """Embeddings of the texts by the trained text encoders as they are now; None where no text encoder is
        trained."""
        return None if self.inputs.tokens is None else embed(self.model.family, self.inputs.tokens)

    def export(self, step: int, left: list[str]) -> None:
        """Write the adapter of this step under its own name; the final export does not replace it."""
        with self.run.optional(Message("step {step}: the adapter", step)):
            self.run.export(self.model.adapter.weights(), f"{self.run.folder.adapter_name}-{step_name(step)}", step)

    def sample(self, step: int, left: list[str]) -> None:
        """Draw the sample prompts. If memory does not suffice, the run continues without them."""
        model, samples = self.model, self.inputs.samples
        model.adapter.train(False)
        share = functools.partial(self.run.processes.map, "draw")
        draw = functools.partial(self.run.draw, model.family, samples, samples.embeddings, step, map_parts=share)
        try:
            with model.adapter.averaged():
                out_of_memory.retry_after_freeing(model.optimizer_step.discard_graphs, draw)
        except RuntimeError as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            line = Message("step {step}: not enough memory to draw samples; training goes on without them", step)
            self.run.events.say(line, warning=True)
        finally:
            model.family.release("vae")

    def _draw_part(self, part: sampling.Part) -> list[Image.Image]:
        """Run `sampling.draw_part` for the first process; the weights are the same in all processes."""
        model = self.model
        model.adapter.train(False)
        draw = functools.partial(sampling.draw_part, model.family, part)
        try:
            with model.adapter.averaged():
                return out_of_memory.retry_after_freeing(model.optimizer_step.discard_graphs, draw)
        finally:
            model.family.release("vae")

    def save(self, step: int, left: list[str]) -> None:
        """Write a checkpoint. A run that resumes from it does the tasks in `left` first."""
        folder, config = self.run.folder, self.run.config
        extra = {
            "retry": self.retry,
            "history": self.history,
            "smoothed_loss": self.mean.state(),
            "due": left,
        }
        if (loss_scale := self.model.optimizer_step.loss_scale) is not None:
            extra["gradient_scale"] = loss_scale.scale.item()
        checkpoint.save(
            folder.checkpoints,
            step,
            self.model.adapter.state(),
            self.model.optimizer_step.optimizer.state_dict(),
            extra,
            config=config,
            identity=self.run.identity,
        )
        with self.run.optional(Message("step {step}: the list of checkpoints", step)):
            checkpoint.rotate(folder.checkpoints, config.train.keep_checkpoints)
        self.run.events.emit("checkpoint", step)

    def restore(self, path: Path) -> tuple[int, list[str]]:
        """Restore a checkpoint. Return its step, and the tasks that are still due there.

        Raises:
            LorakitError: the checkpoint is damaged, or config, photos or base have changed since.
        """
        run = self.run
        state = run.processes.first(lambda: checkpoint.load(path, config=run.config, identity=run.identity))
        self.model.adapter.load_state(state.adapter)
        self.model.optimizer_step.optimizer.load_state_dict(state.optimizer)
        self.history = list(state.extra["history"])
        self.retry = self.model.loss_step.retry = max(self.retry, state.extra["retry"])
        self.mean.load_state(state.extra["smoothed_loss"])
        if (loss_scale := self.model.optimizer_step.loss_scale) is not None and "gradient_scale" in state.extra:
            loss_scale.scale.fill_(state.extra["gradient_scale"])
        complete = {"sample"} if state.step in run.folder.sample_grids() else set()
        return state.step, [name for name in state.extra["due"] if name not in complete]

    def roll_back(self, problem: NotFinite) -> int:
        """Go back to the newest complete checkpoint, once, with other noise. Return its step.

        Raises:
            NotFinite: `problem`, if `train.on_nan` does not ask for this, the run went back before, or no complete
                checkpoint exists.
        """
        if self.run.config.train.on_nan != "rollback" or self.retry:
            raise problem
        warn = functools.partial(self.run.events.say, warning=True)
        latest = self.run.processes.first(lambda: checkpoint.newest_complete(self.run.folder.checkpoints, warn))
        if latest is None:
            raise problem
        self.retry += 1
        step, _ = self.restore(latest)
        self.run.events.say(
            Message("{problem}; going back to {latest} once, with other noise", problem, latest.name), warning=True
        )
        return step
