"""A training run, top to bottom: look at the photos, load the base, encode, train, export, check.

It knows no family, method or format by name: those come through the registry. Everything a viewer needs is in the run
folder, so the process can be watched, stopped and resumed from outside.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import adapters, config as configuration, families, formats
from lorakit.cli.terminal import Terminal
from lorakit.config import Config
from lorakit.core.errors import LorakitError
from lorakit.data import folder as photo_folder
from lorakit.engine import device as devices
from lorakit.formats import metadata
from lorakit.inference import sampling
from lorakit.runs import memory_estimate, report
from lorakit.runs.folder import RunFolder
from lorakit.runs.preflight import Preflight, look
from lorakit.training import checkpoint, optimizers, out_of_memory, selfcheck, validation
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.precompute import embed, encode

# Losses and gradient norms stay on the device and are read together, every so many steps.
READ_EVERY = 10
# Where validation, checkpoints and samples are not set, this many are spread over the run.
PARTS = 5


class Stopped(Exception):
    """The user asked the run to stop; it saved and exported first. `folder` is where."""

    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step
        super().__init__(f"stopped after step {step}; go on with: lorakit resume {folder}")


class NotFinite(LorakitError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class Result:
    """What a finished run left behind.

    Attributes:
        folder: the run folder.
        adapter: the exported adapter in the first format asked for.
        exports: every exported file or folder, by format.
        best: the checkpoint that validation preferred, exported, or None without validation.
        steps: optimizer steps done.
        findings: what the self-check looked at, all of them held.
    """

    folder: Path
    adapter: Path
    exports: dict[str, Path]
    best: Path | None
    steps: int
    findings: list[selfcheck.Finding]


def train(config: Config, *, terminal: Terminal | None = None, seen: Preflight | None = None) -> Result:
    """Run the whole main job.

    Args:
        seen: what `look` found of this config, where it was asked already.

    Raises:
        LorakitError: photos, base or machine do not allow it, training went wrong, or the self-check failed.
        Stopped: after SIGINT, SIGTERM or a `stop` file in the run folder; the state is saved.
    """
    terminal = terminal or Terminal()
    seen = seen or look(config, terminal.say)  # before there is a run folder: what cannot begin leaves none behind
    return _recorded(seen.config, RunFolder.create(seen.config), terminal, None, seen)


def resume(folder: str | Path, *, terminal: Terminal | None = None) -> Result:
    """Go on with a run exactly where its last complete checkpoint stands.

    Raises: as `train`; LorakitError also where there is no checkpoint, or photos or base have changed.
    """
    run = RunFolder.open(Path(folder))
    saved = checkpoint.latest(run.checkpoints)
    if saved is None:
        raise LorakitError(f"{run.path}: no complete checkpoint to resume from; start anew with: lorakit train")
    config = configuration.load(run.config_file)
    if run.threads:
        torch.set_num_threads(run.threads)  # another number adds floats up in another order: other last bits
    return _recorded(config, run, terminal or Terminal(), saved)


def _recorded(config: Config, folder: RunFolder, terminal: Terminal, saved: Path | None, seen: Any = None) -> Result:
    """Run, and leave in the run folder how it ended, whatever happens."""
    try:
        with _stop_signals(folder):
            return _Run(config, folder, terminal, saved).go(seen)
    except Stopped as stop:
        folder.update(state="stopped", message=str(stop))
        raise
    except BaseException as error:
        folder.update(state="failed", message=str(error) or type(error).__name__)
        folder.event("error", message=str(error) or type(error).__name__)
        raise


@contextlib.contextmanager
def _stop_signals(folder: RunFolder) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one interrupts at once."""

    def ask(number: int, _frame: Any) -> None:
        if folder.stop_requested:
            raise KeyboardInterrupt
        folder.request_stop()

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there stops us through the stop file
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _board(folder: Path, wanted: bool) -> Any:
    """TensorBoard's writer in the run folder, or None where it was not asked for."""
    if not wanted:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


class _Run:
    """One run's parts, made in the order in which they are needed."""

    def __init__(self, config: Config, folder: RunFolder, terminal: Terminal, saved: Path | None):
        self.config, self.folder, self.terminal, self.saved = config, folder, terminal, saved
        self.history: list[dict[str, Any]] = []
        self.best: Path | None = None
        self.retry = 0

    def go(self, seen: Preflight | None = None) -> Result:
        """The story: prepare, train, finish."""
        self.begin(seen or look(self.config, self.terminal.say))
        with out_of_memory.enough("loading the base", self.config):
            self.load()
        with out_of_memory.enough("encoding the photos", self.config):
            self.encode()
        with out_of_memory.enough("attaching the adapter", self.config):
            self.attach()
        self.loop()
        with out_of_memory.enough("checking the exported file", self.config):
            return self.finish()

    # -- prepare ------------------------------------------------------------------------------------------------

    def begin(self, seen: Preflight) -> None:
        """Put on record what the run will do, before any model is loaded."""
        self.started = time.time()
        self.board = _board(self.folder.path, self.config.output.tensorboard)
        self.info, self.photos, self.plan = seen.info, seen.photos, seen.plan
        self.total = self.plan.steps
        self.identity = {"base": self.info.hash, "photos": photo_folder.digest(self.photos.photos)}
        self.folder.write_plan(self.plan.to_json())
        for line in seen.lines():
            self.folder.event("message", message=line)

    def load(self) -> None:
        """The base; its VAE and text encoders come to the device when they are needed."""
        config = self.config
        self.device = devices.device(config.memory)
        self.dtype = devices.dtype(config.memory, self.device)
        storage, streams = config.memory.base_storage, devices.streams(config.memory, self.device)
        places = [storage] * (storage != "full") + ["the host's memory"] * streams
        kept = f" (the UNet's weights kept in {' in '.join(places)})" if places else ""
        threads = torch.get_num_threads()
        self.folder.update(threads=threads)
        where = f"cpu ({threads} thread{'s'[: threads > 1]})" if self.device.type == "cpu" else str(self.device)
        self.say(f"device: {where}, base in {str(self.dtype).removeprefix('torch.')}{kept}, adapter in float32")
        self.base = functools.partial(families.load, self.info, self.device, self.dtype, storage, streams)
        self.family = self.base()
        self.say(devices.attention(config.memory, self.family))

    def encode(self) -> None:
        """Photos, class images and texts through the frozen encoders, which then leave the device."""
        config = self.config
        self.encoded = encode(config, self.family, None, self.photos, self.say)
        self.dataset, self.samples = self.encoded.dataset, self.encoded.samples

    def attach(self) -> None:
        """The adapter in the base, and all that trains it and examines it."""
        config, family, encoded = self.config, self.family, self.encoded
        family.acquire(*(family.modules() if encoded.tokens else ["unet"]))
        seed, trigger = config.train.seed, config.data.trigger
        self.adapter = adapters.attach(family, config.adapter, seed=seed, trigger=trigger)
        for component, (modules, parameters) in self.adapter.describe().items():
            self.say(f"training {component}: {modules} modules, {parameters:,} parameters")
        if config.train.init_from:
            self.adapter.load(formats.read(Path(config.train.init_from)))
            self.say(f"starting from the weights of {Path(config.train.init_from).name}")
        adapters.slim(family, frugal=memory_estimate.frugal(config, self.device.type))
        blocks = memory_estimate.recomputed(config, self.info, self.plan.modules, self.device.type)
        devices.gradient_checkpointing(family, blocks, random=self.adapter.dropout > 0)
        self.step = LossStep(family, self.adapter, encoded, config.train)
        self.update = OptimizerStep(config, self.step, self.total, self.say)
        self.validation = validation.Validation(
            family,
            encoded.held_out or encoded.dataset.plain(),
            encoded.conditions,
            encoded.class_conditions.index(torch.zeros(1, dtype=torch.int64, device=self.device)),
            config.train.seed,
            held_out=encoded.held_out is not None,
        )

    # -- train --------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """Optimizer steps from where the run stands to the end."""
        config = self.config
        start = self._restore() if self.saved else 0
        self.losses = torch.zeros(READ_EVERY, device=self.device)
        self.norms = torch.zeros(READ_EVERY, device=self.device)
        self.folder.update(state="running", step=start, steps=self.total)
        self.read_step = start
        with self.terminal.progress(self.total, start) as self.bar:
            if start == 0:
                self._sample(0)
                self._save(0)
            self.adapter.train(True)
            self.clock = time.monotonic()
            step = start
            while step < self.total:
                with out_of_memory.enough(f"step {step + 1}", config):
                    loss, norm = self.update(step)
                self.losses[step % READ_EVERY] = loss
                self.norms[step % READ_EVERY] = norm
                step += 1
                step = self._after(step)

    def _after(self, step: int) -> int:
        """What is due after `step` steps; the step to go on from, which is an earlier one after a rollback."""
        train, at_end = self.config.train, step == self.total
        stop = self.folder.stop_requested
        due = {
            "validate": at_end or self._due(step, train.validate_every),
            "save": at_end or stop or self._due(step, train.save_every),
            "sample": not at_end and self._due(step, self.config.sample.every),
        }
        if step % READ_EVERY == 0 or stop or any(due.values()):
            try:
                self._read(step)
            except NotFinite as problem:
                if train.on_nan != "rollback" or self.retry:
                    raise
                step, stop, due = self._roll_back(problem), False, dict.fromkeys(due, False)
        if due["validate"]:
            self._validate(step)
        if due["save"]:
            self._save(step)
        if due["sample"]:
            self._sample(step)
        self.adapter.train(True)
        # The time that pictures and checkpoints take is not the steps'.
        self.clock = self.clock if self.read_step != step else time.monotonic()
        if stop and not at_end:
            self._export(self.adapter.weights(), self.folder.adapter_name, step)
            raise Stopped(self.folder.path, step)
        return step

    def _due(self, step: int, every: int) -> bool:
        return step % (every or max(1, math.ceil(self.total / PARTS))) == 0

    def _read(self, step: int) -> None:
        """Fetch the losses since the last read, log them, and stop on one that is not finite."""
        first, self.read_step = self.read_step, step
        losses, norms = self.losses.tolist(), self.norms.tolist()
        seconds = (time.monotonic() - self.clock) / max(step - first, 1)
        images = self.config.train.batch_size * self.config.train.gradient_accumulation_steps
        facts = {
            "images_per_second": images / max(seconds, 1e-9),
            "memory_mib": devices.peak(self.device) / 2**20,
            "eta_s": (self.total - step) * seconds,
        }
        for done in range(first, step):
            loss, norm = losses[done % READ_EVERY], norms[done % READ_EVERY]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(self._not_finite(done + 1, loss))
            rate = optimizers.learning_rate(self.config.optimizer, done, self.total)
            self._log("step", done + 1, {"loss": loss, "gradient_norm": norm, "learning_rate": rate})
            self.bar.step(done + 1, loss, rate, **facts)
        self.folder.update(step=step, loss=self.bar.smoothed, learning_rate=rate, **facts)

    def _not_finite(self, step: int, loss: float) -> str:
        what = "gradient" if math.isfinite(loss) else "loss"
        parts = self.config.train.gradient_accumulation_steps
        names: list[str] = []
        for index in range((step - 1) * parts, step * parts):
            batch = self.step.batch(index)
            names += [self.dataset.names(batch.bucket)[i] for i in batch.entries.tolist()]
        saved = checkpoint.latest(self.folder.checkpoints)
        kept = f"; {saved.name} is intact" if saved else ""
        return (
            f"step {step}: the {what} is not finite ({', '.join(sorted(set(names)))}); "
            f"lower optimizer.learning_rate or use memory.mixed_precision = 'fp32'{kept}"
        )

    def _roll_back(self, problem: NotFinite) -> int:
        saved = checkpoint.latest(self.folder.checkpoints)
        if saved is None:
            raise problem
        self.retry += 1
        self.saved = saved
        step = self._restore()
        self.read_step = step
        self.say(f"{problem}; going back to {saved.name} once, with other noise", warning=True)
        return step

    # -- validate, sample, save ---------------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        self.adapter.train(False)
        metrics = out_of_memory.with_room(self.update.forget, self._measured)
        self.history.append({"step": step, **metrics})
        self._log("validation", step, metrics)
        best, reason = validation.choose_best(self.history)
        if best == step:
            self.best = self._export(self.adapter.weights(), "best", step)[self.config.output.formats[0]]
        self.folder.update(best={"step": best, "reason": reason})
        self.bar.note(f"step {step}: validation mse {metrics['mse']:.4f}, prior drift {metrics['prior_drift']:.2%}")

    def _measured(self) -> dict[str, float]:
        return self.validation.run(self.adapter, **self._conditions_now())

    def _conditions_now(self) -> dict[str, Any]:
        """What trained text encoders make of the texts now; nothing where the base's embeddings still hold."""
        tokens, classes = self.encoded.tokens, self.encoded.class_tokens
        if tokens is None or classes is None:
            return {}
        first = [table[:1] for table in classes]
        return {"conditions": embed(self.family, tokens), "class_condition": embed(self.family, first)}

    def _sample(self, step: int) -> None:
        self.adapter.train(False)
        try:
            pictures = out_of_memory.with_room(self.update.forget, lambda: self._drawn(self.family, self.samples.texts))
        except torch.OutOfMemoryError:
            self.say(f"step {step}: not enough memory to draw samples; training goes on without them", warning=True)
            return
        finally:
            self.family.release("vae")
        self.folder.event("sample", step=step, file=self.folder.save_samples(step, pictures, self.samples.prompts).name)

    def _drawn(self, family: Any, texts: Any, adapter: str = "") -> list[Any]:
        prompts, sampled = self.samples.prompts, self.config.sample
        return sampling.draw(family, prompts, sampled, self.config.data.resolution, texts=texts, adapter=adapter)

    def _save(self, step: int) -> None:
        extra = {"retry": self.retry, "history": self.history, "best": self.best.name if self.best else None}
        checkpoint.save(
            self.folder.checkpoints,
            step,
            self.adapter.state(),
            self.update.optimizer.state_dict(),
            extra,
            config=self.config,
            identity=self.identity,
        )
        checkpoint.rotate(self.folder.checkpoints, self.config.train.keep_checkpoints)
        self.folder.event("checkpoint", step=step)

    def _restore(self) -> int:
        """Put the saved state back; the step it was taken at."""
        assert self.saved is not None
        state = checkpoint.load(self.saved, config=self.config, identity=self.identity)
        self.adapter.load_state(state.adapter)
        self.update.optimizer.load_state_dict(state.optimizer)
        self.history = list(state.extra["history"])
        self.retry = self.step.retry = max(self.retry, state.extra["retry"])
        self.best = self.folder.path / state.extra["best"] if state.extra["best"] else None
        return int(state.step)

    # -- finish -------------------------------------------------------------------------------------------------

    def finish(self) -> Result:
        """Export, check the file against the model in memory, draw from the file, report."""
        config = self.config
        self.adapter.train(False)
        weights = self.adapter.weights()
        exports = self._export(weights, self.folder.adapter_name, self.total)
        first = exports[config.output.formats[0]]
        findings = self._self_check(weights, exports)
        self.folder.write_report([vars(finding) for finding in findings])
        report.write(self.folder, config, self.plan, self.photos, self.history, findings)
        failed = selfcheck.failures(findings)
        if failed:
            causes = "; ".join(f"{finding.name}: {finding.detail}" for finding in failed)
            raise LorakitError(f"self-check failed for {first}: {causes}")
        self.folder.update(state="done", step=self.total, adapter=first.name, message="done and checked")
        self.folder.event("done", adapter=first.name)
        return Result(self.folder.path, first, exports, self.best, self.total, findings)

    def _export(self, weights: Any, name: str, step: int) -> dict[str, Path]:
        """Write every format asked for, under `name`, with what is known of the run in its metadata."""
        output = self.config.output
        facts = metadata.build(
            self.config,
            self.info,
            name=name,
            images=len(self.dataset.photos),
            steps=step,
            epochs=step * self.config.train.gradient_accumulation_steps // self.step.batches_per_epoch,
            started=self.started,
            finished=time.time(),
        )
        return formats.save(weights, self.folder.path, name, output.formats, output.dtype, facts, say=self.say)

    def _self_check(self, weights: Any, exports: dict[str, Path]) -> list[selfcheck.Finding]:
        """Every exported file, read from disk into a base loaded anew."""
        config, prompt, condition = self.config, self.samples.prompts[0], self.samples.condition
        size = (config.data.resolution, config.data.resolution)
        self.update.forget()
        in_memory = selfcheck.probe(self.family, prompt, size, condition)
        self.adapter.detach()
        base = selfcheck.probe(self.family, prompt, size, condition)
        # What is loaded anew needs the room of what was trained.
        del self.family, self.adapter, self.update, self.step, self.validation
        findings: list[selfcheck.Finding] = []
        for name, found, family in selfcheck.examine(
            exports,
            weights,
            base,
            in_memory,
            load=self.base,
            prompt=prompt,
            size=size,
            dtype=config.output.dtype,
            untrained_layers=self.info.untrained_layers,
        ):
            findings += found
            if family is not None and name == config.output.formats[0]:
                self._draw_from_file(family, exports[name])
            del family  # the next one needs its room
        for finding in findings:
            self.say(f"{'ok' if finding.passed else 'FAILED'}: {finding.name}: {finding.detail}")
        return findings

    def _draw_from_file(self, family: Any, path: Path) -> None:
        """The last sample grid, by the exported file: what `lorakit sample` draws of it, to the bit on a CPU."""
        pictures = self._drawn(family, None, path.stem)
        file = self.folder.save_samples(self.total, pictures, self.samples.prompts)
        self.folder.event("sample", step=self.total, file=file.name)

    def _log(self, event: str, step: int, facts: dict[str, Any]) -> None:
        """Figures of a step into the log and, where asked for, onto TensorBoard."""
        self.folder.event(event, step=step, **facts)
        if self.board:
            for name, value in facts.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{name}", value, step)
            self.board.flush()

    def say(self, line: str, *, warning: bool = False) -> None:
        """One line for the person, on the terminal and in the log."""
        self.terminal.say(line, warning=warning)
        self.folder.event("warning" if warning else "message", message=line)
