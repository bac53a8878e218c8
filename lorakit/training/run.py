"""A training run from start to end: check photos, load the base, precompute, train, export, check the file.

This module names no family, method or format: those come from the registry. The run folder holds all state, so other
processes can watch, stop and resume the run.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lorakit import families
from lorakit.config import AdapterConfig, Config, resuming
from lorakit.core import image_grid
from lorakit.core.errors import LorakitError, Stopped, StopRequested
from lorakit.core.events import Events, Listener, Stop, StopRequest
from lorakit.core.messages import Message, join
from lorakit.core.names import quote, step_name
from lorakit.core.registry import FORMATS, METHODS, resolve
from lorakit.core.units import count
from lorakit.data import photo_folder
from lorakit.engine import device as devices, quantized_weight
from lorakit.families import loaded
from lorakit.formats import files
from lorakit.runs import launch, nvidia, report, results, run_folder
from lorakit.runs.preflight import Ready, preflight
from lorakit.runs.run_folder import RunFolder
from lorakit.training import checkpoint, optimizers, parallel, selfcheck
from lorakit.training.checkpoint import NotFinite
from lorakit.training.loop import Run, TrainingState, loop
from lorakit.training.precompute import Precomputed, SampleInputs, precompute, tasks
from lorakit.training.trackers import Tracker
from lorakit.training.trainable import Model, trainable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from lorakit.adapters.weights import AdapterWeights
    from lorakit.families import BaseInfo, Family

__all__ = ["NotFinite", "Result", "Stopped", "resume", "start", "train"]


NOT_PINNED = (
    "memory.stream_base: the system does not pin that much of the host's memory, so training waits for copies to the "
    "card; on WSL raise the memory in .wslconfig, or keep the weights smaller with memory.base_storage"
)


@dataclass(frozen=True)
class Result:
    """The results of a finished run.

    Attributes:
        folder: the run folder.
        adapter: the exported adapter in the first format of `output.formats`.
        exports: format -> exported file or folder.
        steps: optimizer steps done.
        findings: the findings of the self-check, all passed.
    """

    folder: Path
    adapter: Path
    exports: dict[str, Path]
    steps: int
    findings: list[selfcheck.Finding]


FINISHED = (
    "{path} is finished at step {count} and {adapter} is written; to train longer: lorakit resume {folder} "
    "--steps {more}"
)
DROPPED = "dropout left layers out of every step, {count} of {total}: they change nothing; train longer to reach them"


@dataclass(frozen=True)
class TrainingResult:
    """The results of training that remain after the model is freed.

    Attributes:
        state: where the loop ended.
        weights: the adapter.
        exports: format -> file or folder.
        base_probe, adapted_probe: outputs of the base without the adapter and with it.
        samples: the sample prompts.
    """

    state: TrainingState
    weights: AdapterWeights
    exports: dict[str, Path]
    base_probe: selfcheck.Probe
    adapted_probe: selfcheck.Probe
    samples: SampleInputs


def train(
    config: Config,
    *,
    listeners: Sequence[Listener] = (),
    stop: Stop | None = None,
    pipeline: DiffusionPipeline | None = None,
) -> Result:
    """Train an adapter as the config says, export it and check the files.

    Args:
        pipeline: a diffusers pipeline in memory to use as the base instead of loading one; it is not changed.
        listeners: functions that take each `Event` of the run.
        stop: called often. When it returns True, the run saves, exports the adapter and ends. A file named `stop` in
            the run folder has the same effect.

    Raises:
        LorakitError: photos, base or machine are not usable, training failed, or the self-check failed.
        Stopped: a stop was requested; the state is saved.
    """
    if launch.world().rank:
        return follow(stop=stop)
    # Before the run folder is created: a run that cannot start leaves none.
    ready = preflight(config, fetch=True, pipeline=pipeline).or_raise()
    _say(ready, listeners)
    return start(ready, listeners=listeners, stop=stop)


def start(ready: Ready, *, listeners: Sequence[Listener] = (), stop: Stop | None = None) -> Result:
    """As `train`, for a config whose preflight has run and was shown."""
    return _run(ready, RunFolder.create(ready.config), listeners, stop, None)


def resume(
    folder: str | Path,
    *,
    from_checkpoint: str = "",
    overrides: Mapping[str, object] | None = None,
    listeners: Sequence[Listener] = (),
    stop: Stop | None = None,
    pipeline: DiffusionPipeline | None = None,
) -> Result:
    """Continue a run from its newest complete checkpoint. Without a checkpoint, start from step 0 in the same folder.

    Args:
        from_checkpoint: name or step of an earlier checkpoint to continue from; later ones are renamed.
        overrides: option -> new value, e.g. {"train.steps": 3000}; see `config.resuming`.
        pipeline: the pipeline that the run was started with, if it was.

    Raises:
        LorakitError: as `train`; also if the run is finished and nothing changes, if photos or base have changed, or if
            an option may not change. The run's state then stays as it was.
    """
    if launch.world().rank:
        return follow(stop=stop)
    run = RunFolder.open(Path(folder))
    try:
        if not overrides and not from_checkpoint and (values := _finished(run.path)):
            raise LorakitError(FINISHED, *values)
        events = Events(*listeners)
        config = resuming.load_changed(run.config_file, overrides or {})
        ready = preflight(config, resume=True, fetch=True, pipeline=pipeline).or_raise()
        newest = _checkpoint(run, from_checkpoint, events)
        if newest is not None:  # report differences before the run's state changes
            checkpoint.load(newest, config=ready.config, identity=_identity(ready))
            _compare_lengths(run, ready, checkpoint.step_of(newest), events)
            if later := checkpoint.options_since(newest, ready.config):
                events.say("the run is older than {options}: it goes on with the default of each", ", ".join(later))
        if unused := checkpoint.set_aside(run.checkpoints, newest):
            events.say("renamed and unused; delete them when you like: {names}", ", ".join(unused), warning=True)
        run.begin(checkpoint.step_of(newest) if newest else 0, config if overrides else None)
    except OSError as error:
        run.unlock()
        raise LorakitError(
            "{run}: cannot be written ({reason}); make room there, then continue with: lorakit resume {folder}",
            *(run.path, error.strerror or error, quote(run.path)),
        ) from None
    except BaseException:
        run.unlock()
        raise
    if run.threads:
        torch.set_num_threads(run.threads)  # with another number the sums have other last bits
    if newest is not None:
        ready = replace(ready, plan=replace(ready.plan, first_step=checkpoint.step_of(newest)))
    _say(ready, listeners)
    if newest is not None:
        at_end = checkpoint.step_of(newest) >= ready.plan.steps
        more = Message(
            "at step {count}, the last one, the files are written again; --steps trains longer", ready.plan.steps
        )
        events.say(more if at_end else Message("continuing from {checkpoint}", newest.name))
    return _run(ready, run, listeners, stop, newest)


def _finished(path: Path) -> tuple[object, ...]:
    """The values of `FINISHED` if a run has nothing left to do: its last step is done and its adapter exists."""
    with contextlib.suppress(LorakitError):  # without state.json the checkpoints show the progress
        state = run_folder.read(path)
        adapter = path / Path(state.adapter).name
        if state.state == "done" and state.step >= state.steps and state.adapter and adapter.exists():
            more = state.steps + max(1, state.steps // 2)
            return path, state.steps, adapter.name, quote(path), more
    return ()


def _checkpoint(run: RunFolder, name: str, events: Events) -> Path | None:
    """The checkpoint to continue from: the named one, else the newest complete one; None to start from step 0."""
    if name:
        return checkpoint.named(run.checkpoints, name)
    newest = checkpoint.newest_complete(run.checkpoints, functools.partial(events.say, warning=True))
    if newest is None and any(run.events("step")):
        events.say("{path} has no complete checkpoint: the run starts again from step 0", run.path, warning=True)
    elif newest is not None and newest != checkpoint.latest(run.checkpoints):
        events.say("continuing from {newest}, the newest complete checkpoint", newest.name, warning=True)
    return newest


def _compare_lengths(run: RunFolder, ready: Ready, step: int, events: Events) -> None:
    """Report how another number of steps changes the learning rate.

    Raises:
        LorakitError: the checkpoint is past the new last step.
    """
    before, after, optimizer = run.steps, ready.plan.steps, ready.config.optimizer
    if step > after:
        raise LorakitError(
            "{path} is at step {step} already, beyond {end}: give more steps, or go back with --from",
            *(run.path, step, after),
        )
    if before in (0, after):
        return
    rates = [optimizers.learning_rate(optimizer, step, total) for total in (before, after)]
    old = f"{rates[0]:.3g}"
    change = Message(", not {old}: {schedule} now ends at step {end}", old, optimizer.lr_scheduler, after)
    line = "the run now ends at step {after}, not {before}; the learning rate at step {step} is {rate:.3g}{change}"
    events.say(
        Message(line, after, before, step, rates[1], change if rates[0] != rates[1] else ""),
        warning=rates[0] != rates[1],
    )


def _identity(ready: Ready) -> dict[str, str]:
    """What a checkpoint depends on in addition to the config."""
    photos = [*ready.report.photos, *ready.report.class_photos]
    return {"base weights": ready.info.hash, "photos": photo_folder.digest(photos)}


def _say(ready: Ready, listeners: Sequence[Listener]) -> None:
    for line in ready.lines():
        Events(*listeners).say(line)


def _run(
    ready: Ready, folder: RunFolder, listeners: Sequence[Listener], stop: Stop | None, resume_from: Path | None
) -> Result:
    """Load the base, precompute, train, export, and check the files."""
    deterministic = devices.deterministic(ready.config.train)
    with (
        _outcome(folder, ready.config.output.notify, Events(*listeners)),
        parallel.join() as processes,
        _begin(ready, folder, listeners, stop, processes) as run,
        deterministic,
    ):
        processes.first(lambda: (ready, folder.path, resume_from))
        load, family, inputs, model, state = _train(run, resume_from)
        with run.phase("checking the exported file"):
            result = _export(run, family, model, inputs.samples, state)
        del family, inputs, model  # free memory: the self-check loads the base again
        return processes.first(lambda: finish(result, run, load))


def follow(*, stop: Stop | None = None) -> Result:
    """Train as a process after the first, in a run that the first has begun or resumed. Return its result.

    Raises:
        EndedElsewhere: the first process has ended the run.
        StopRequested: a stop was requested.
        ProcessLost: another process is gone.
        LorakitError: base or machine are not usable; the first process reports it.
    """
    with parallel.join() as processes:
        assert isinstance(processes, parallel.Group), "a process after the first"
        ready, path, resume_from = cast(tuple[Ready, Path, Path | None], processes.receive())
        request = StopRequest(Events(), *([stop] if stop else []), agree=processes.any)
        run = Run(ready, parallel.SilentFolder(path), Events(), request, time.time(), {}, processes)
        with devices.deterministic(ready.config.train):
            _train(run, resume_from)
        return cast(Result, processes.receive())


def _train(
    run: Run, resume_from: Path | None
) -> tuple[Callable[[], Family], Family, Precomputed, Model, TrainingState]:
    """Load the base, precompute and train, in each process. Return (reload the base, base, inputs, model, last
    state)."""
    load = _loader(run)
    with run.phase("loading the base"):
        family = load()
        loaded.require_finite(family)
        run.events.say(devices.attention(run.config.memory, family))
        if not quantized_weight.is_pinned(family.denoiser):
            run.events.say(NOT_PINNED, warning=True)
    with run.phase("encoding the photos"):
        poll = functools.partial(run.stop.poll, "class images and latents that are complete are kept")
        parts = run.config, family, None, run.ready.report, run.events, poll, run.processes
        inputs = run.processes.first(lambda: precompute(*parts), tasks(family))
        family.release("vae", "text_encoders")
    with run.phase("attaching the adapter"):
        model = trainable(family, inputs, run.ready, run.events.say, run.processes)
    return load, family, inputs, model, loop(model, inputs, run, resume_from)


@contextlib.contextmanager
def _begin(
    ready: Ready,
    folder: RunFolder,
    listeners: Sequence[Listener],
    stop: Stop | None,
    processes: parallel.Processes,
) -> Iterator[Run]:
    """Write the plan and open the log. Inside, events reach the listeners."""
    for line in ready.lines():
        folder.event("message", message=line)
    with contextlib.suppress(OSError):  # then the log cannot be written either, and that is reported
        folder.write_plan(ready.plan.to_json() | {"files": photo_folder.versions(ready.report.photos)})
    trackers = [Tracker(name, ready.config, folder) for name in ready.config.output.trackers]
    with Events(folder.record, *trackers, *listeners) as events:
        # Not in the run's own log, which never contains the path of the run folder.
        Events(*listeners).emit("start", folder.step, folder=str(folder.path.absolute()), steps=ready.plan.steps)
        sources = [lambda: folder.stop_requested, *([stop] if stop else [])]
        request = StopRequest(events, *sources, agree=processes.any)
        yield Run(ready, folder, events, request, time.time(), _identity(ready), processes)


def _export(run: Run, family: Family, model: Model, samples: SampleInputs, state: TrainingState) -> TrainingResult:
    """Export the adapter, run the probe with and without it, and detach it."""
    model.adapter.train(False)
    weights = model.adapter.weights()
    try:
        exports = run.export(weights, run.folder.adapter_name, run.ready.plan.steps)
    except files.Unwritable as error:
        way = Message(
            "the last step is saved; make room, then continue with: lorakit resume {folder}", quote(run.folder.path)
        )
        raise LorakitError("{problem}; {way}", error, way) from None
    model.optimizer_step.discard_graphs()
    prompt, size = samples.first, (run.config.data.resolution, run.config.data.resolution)
    with model.adapter.averaged():
        adapted_probe = selfcheck.probe(family, prompt, size, samples.condition)
    model.adapter.detach()
    base_probe = selfcheck.probe(family, prompt, size, samples.condition)
    return TrainingResult(state, weights, exports, base_probe, adapted_probe, samples)


def finish(result: TrainingResult, run: Run, load: Callable[[], Family]) -> Result:
    """Check each exported file in a newly loaded base, draw samples with the first one, and write the report.

    Raises:
        LorakitError: the self-check failed.
        StopRequested: a stop was requested.
    """
    config, folder, total = run.config, run.folder, run.ready.plan.steps
    adapter = next(iter(result.exports.values()))
    with run.phase("checking the exported file"):
        findings = _self_check(result, run, load)
    with run.optional("the report"):
        folder.write_report([vars(finding) for finding in findings])
        photos, history = run.ready.report, result.state.history
        lessons = report.lesson_lines(folder, config, photos, history)
        report.write(folder, config, run.ready.plan, photos, history, findings, lessons)
        for line in lessons:
            run.events.say(line, warning=True)
    failed = selfcheck.failures(findings)
    if failed:
        causes = join("; ", [Message("{name}: {problem}", finding.name, finding.detail) for finding in failed])
        raise LorakitError("self-check failed for {file}: {causes}", adapter, causes)
    folder.update(state="done", step=total, adapter=adapter.name, message="done and checked")
    run.events.emit("done", adapter=adapter.name)
    return Result(folder.path, adapter, result.exports, total, findings)


def _self_check(result: TrainingResult, run: Run, load: Callable[[], Family]) -> list[selfcheck.Finding]:
    """Return the findings of all exported files. The base with the first file draws the last samples if
    `sample.at_end`.

    On a CPU `lorakit sample` draws the same pictures from that file, to the bit.
    """
    config, exports, folder = run.config, result.exports, run.folder
    findings: list[selfcheck.Finding] = []
    dropped = dropped_layers(result.weights, config.adapter)
    if dropped:
        run.events.say(DROPPED, len(dropped), len(result.weights.layers), warning=True)
    first, whole = next(iter(exports)), METHODS[config.adapter.method].whole_model
    examine = functools.partial(resolve(whole).examine, run) if whole else selfcheck.examine
    for name, file_findings, family in examine(
        exports,
        result.weights,
        result.base_probe,
        result.adapted_probe,
        load=load,
        prompt=result.samples.first,
        size=(config.data.resolution, config.data.resolution),
        dtype=config.output.dtype,
        untrained_layers={*run.ready.info.untrained_layers, *dropped},
    ):
        findings += file_findings
        if family is not None and name == first and config.sample.at_end:
            run.draw(family, result.samples, None, run.ready.plan.steps, adapter=exports[name].stem)
            with run.optional("the preview"):
                last = folder.samples / step_name(run.ready.plan.steps) / "01.png"
                write_previews(last, exports, run.events.say)
        del family  # free its memory for the next one
    for finding in findings:
        verdict = "ok: {name}: {detail}" if finding.passed else "FAILED: {name}: {detail}"
        run.events.say(Message(verdict, finding.name, finding.detail))
    return findings


def dropped_layers(weights: AdapterWeights, adapter: AdapterConfig) -> list[str]:
    """Layers that dropout left out of every step of a short run, so that they did not change. [] if no layer changed at
    all."""
    if not (getattr(adapter, "module_dropout", 0.0) or getattr(adapter, "rank_dropout", 0.0)):
        return []
    zero = [name for name, layer in weights.layers.items() if not all(part.any() for part in layer.factors().values())]
    return zero if len(zero) < len(weights.layers) else []


def write_previews(sample: Path, exports: Mapping[str, Path], say: Callable[[str], None]) -> None:
    """Copy a sample of the first prompt to `<name>.png` next to the adapter, where web UIs look for a preview.

    The copy has no recipe, because the prompt is private. An existing picture that lorakit did not write stays.
    """
    for name, path in exports.items():
        preview = path.with_suffix(".png")
        if name not in FORMATS or FORMATS[name].write_side_files is None or not sample.is_file():
            continue
        if preview.exists() and image_grid.read_software(preview) != "lorakit":
            say(Message("{preview} exists already and is not replaced", preview.name))
            continue
        picture = image_grid.read(sample)
        picture.info = {"Software": "lorakit"}
        image_grid.save(picture, preview)


def _loader(run: Run) -> Callable[..., Family]:
    """Return a function that loads the base as configured. Report the device and the precision."""
    memory = run.config.memory
    device = devices.device(memory)
    lines = devices.prepare(memory, device)
    dtype = devices.dtype(memory, device)
    storage, streams = memory.base_storage, devices.streams(memory, device)
    places = [storage] * (storage != "full") + ["the host's memory"] * streams
    placement = Message(" (the UNet's weights kept in {places})", " in ".join(places)) if places else ""
    threads = torch.get_num_threads()
    run.folder.update(threads=threads)
    where = Message("cpu ({threads})", count(threads, "thread")) if device.type == "cpu" else str(device)
    if device.type == "cpu" and memory.device == "auto" and nvidia.is_expected():
        run.events.say(
            Message("torch {version} does not see the graphics card: `lorakit doctor` says why", torch.__version__),
            warning=True,
        )
    trained = "trained in it" if run.config.adapter.whole_model else "adapter in float32"
    text, precision = "device: {device}, base in {dtype}{placement}, {adapter}", str(dtype).removeprefix("torch.")
    run.events.say(Message(text, where, precision, placement, trained))
    for line in lines:
        run.events.say(line)

    def load(info: BaseInfo = run.ready.info) -> Family:
        return families.load(info, device, dtype, storage, streams, run.config.engine_is_off)

    return load


@contextlib.contextmanager
def _outcome(folder: RunFolder, notify: str, events: Events) -> Iterator[None]:
    """Record in the run folder how the run ended, and notify whoever `output.notify` names."""
    try:
        try:
            yield
        except StopRequested:
            raise Stopped(folder.path, folder.step) from None
        except parallel.ProcessLost as loss:
            newest = checkpoint.latest(folder.checkpoints)
            intact = Message("{name} is intact", newest.name) if newest else "there is no checkpoint yet"
            text = Message("{loss}; {intact}, continue with: lorakit resume {folder}", loss, intact, quote(folder.path))
            raise LorakitError(text) from None
    except Stopped as stop:
        folder.update(state="stopped", message=str(stop))
        raise
    except BaseException as error:
        folder.update(state="failed", message=str(error) or type(error).__name__)
        folder.event("error", message=str(error) or type(error).__name__)
        raise
    finally:
        folder.unlock()
        if problem := results.notify(notify, folder.path, folder.current):
            folder.event("warning", message=problem)
            events.say(problem, warning=True)
