"""The command tune: search the learning rate, rank and length for a folder of photos with Optuna."""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import config as configuration
from lorakit.cli import threads
from lorakit.cli.imports import model_imports
from lorakit.cli.signals import stop_on_signals
from lorakit.cli.terminal import Terminal, print_json, print_lines, remark
from lorakit.cli.train_commands import Command, add_run_options, exclusion, resolve
from lorakit.config import Config
from lorakit.core import atomic, install
from lorakit.core.errors import ConfigError, LorakitError, Stopped
from lorakit.core.events import Event
from lorakit.core.messages import Message
from lorakit.core.names import quote

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

RANKS = (4, 8, 16, 32)
# The search space: the learning rate from the config's rate divided by RATE_FACTOR to that rate multiplied by it, and
# the number of steps as one of these multiples of the config's.
RATE_FACTOR, LENGTHS = 5.0, (0.5, 1.0, 1.5)
# Number of validations in one trial, and number of trials before the first pruning.
LOOKS, FIRST_TRIALS = 5, 4
LOWEST = "lowest-score.toml"


def add(command: Command) -> None:
    """Add the command of this module by `command(name, run, help)`."""
    tune = command("tune", run_tune, "search a learning rate, a rank and a number of steps for a folder of photos")
    add_run_options(tune)
    tune.add_argument(
        "--output", metavar="DIR", required=True, help="folder for the runs; give the same folder to continue a search"
    )
    tune.add_argument("--trials", type=int, default=12, metavar="COUNT", help="number of runs (default: 12)")
    tune.add_argument(
        "--drift", type=float, default=0.1, metavar="SHARE", help="highest acceptable prior drift (default: 0.1)"
    )


def run_tune(args: argparse.Namespace) -> int:
    """`lorakit tune`."""
    if args.trials < 1 or not 0 <= args.drift < math.inf:
        raise ConfigError(["--trials must be 1 or more, and --drift 0 or more"])
    if find_spec("optuna") is None:
        raise LorakitError("tune needs optuna; {hint}", install.hint("tune"))
    threads.use_idle_cores()
    say = remark if args.json else print_lines
    from lorakit.runs.preflight import preflight

    folder = Path(args.output).resolve()
    args.output = str(folder / "trial")
    result = preflight(resolve(args, Terminal(sys.stderr if args.json else sys.stdout)))
    ready = result.or_raise(exclusion(result))
    if ready.plan.holdout_count == 0:
        raise ConfigError(["tune judges runs by held-out photos: give 10 photos or more, and train.holdout above 0"])
    study = _study(folder, ready.config.train.seed)
    with stop_on_signals() as stop:
        count = args.trials - sum(trial.state.is_finished() for trial in study.trials)
        search = Search(ready.config, ready.plan.steps, folder, args.drift, say, stop)
        if count > 0:
            study.optimize(search, n_trials=count)
    return _tell(study, search, args.json)


def _study(folder: Path, seed: int) -> Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = str(folder / "tune.journal")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(file, lock_obj=JournalFileOpenLock(file))
    except OSError as error:
        raise LorakitError(
            "cannot write to {folder}: {reason}; give another --output", folder, error.strerror or error
        ) from None
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="lorakit",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS),
    )


class Search:
    """The objective of the Optuna study: train one trial and return its score.

    Args:
        config: config shared by all trials.
        steps: number of steps of a run of `config`.
        folder: parent folder of the run folders.
        drift: highest prior drift that does not raise the score.
        say: called with a line of text for each trial.
        stop: returns whether a stop was requested.
    """

    def __init__(
        self,
        config: Config,
        steps: int,
        folder: Path,
        drift: float,
        say: Callable[[str], object],
        stop: Callable[[], bool],
    ):
        self.config, self.steps, self.folder, self.drift = config, steps, folder, drift
        self.say, self.stop = say, stop

    def options(self, trial: Trial) -> Config:
        """The config of a trial."""
        rate = self.config.optimizer.learning_rate
        steps = trial.suggest_categorical("train.steps", [max(LOOKS, round(share * self.steps)) for share in LENGTHS])
        overrides = {
            "optimizer.learning_rate": trial.suggest_float(
                "optimizer.learning_rate", rate / RATE_FACTOR, rate * RATE_FACTOR, log=True
            ),
            "adapter.rank": trial.suggest_categorical("adapter.rank", list(RANKS)),
            "train.steps": steps,
            "train.validate_every": max(1, steps // LOOKS),
            "train.save_every": steps,
            "sample.at_start": False,
            "sample.at_end": False,
            "sample.every": steps,
            "output.folder": str(self.folder / f"trial-{trial.number:03d}"),
        }
        shared = self.folder / "shared.toml"
        atomic.write(shared, configuration.to_toml(self.config))
        return configuration.load(shared, overrides)

    def score(self, mse: float, drift: float) -> float:
        """The held-out error `mse`, multiplied by 1 plus the part of `drift` above the accepted drift."""
        return mse * (1 + max(0.0, drift - self.drift))

    def __call__(self, trial: Trial) -> float:
        """Train one trial and return its last score.

        Raises:
            TrialPruned: a stop was requested, or the score is worse than the median of other trials at this validation.
        """
        import optuna

        with model_imports():
            from lorakit.training import run

        config, scores, pruned = self.options(trial), list[float](), list[bool]()

        def follow(event: Event) -> None:
            if event.kind == "validation":
                scores.append(self.score(event.facts["mse"], event.facts["prior_drift"]))
                trial.report(scores[-1], len(scores))
                pruned.append(trial.should_prune())

        try:
            run.train(config, listeners=[follow], stop=lambda: any(pruned) or self.stop())
        except Stopped:
            if self.stop():
                trial.study.stop()
            self.say(
                Message(
                    "trial {number}: ended early at {score:.4f}", trial.number, scores[-1] if scores else float("nan")
                )
            )
            raise optuna.TrialPruned from None
        finally:
            gc.collect()  # frees the base of this trial before the next trial loads its own
        self.say(Message("trial {number}: {options}: score {score:.4f}", trial.number, _text(trial.params), scores[-1]))
        return scores[-1]


def _text(options: Mapping[str, float]) -> str:
    return ", ".join(f"{key.partition('.')[2]} {value:.4g}" for key, value in options.items())


def _tell(study: Study, search: Search, as_json: bool) -> int:
    """Write the config with the lowest score into `LOWEST`, and report it with the results of all trials.

    Raises:
        LorakitError: no trial is complete.
    """
    from lorakit.runs import batch

    complete = [trial for trial in study.trials if trial.value is not None]
    if not complete:
        raise LorakitError("no trial is complete: run the same command again to continue the search")
    lowest = study.best_trial
    name = f"trial-{lowest.number:03d}"
    names = [f"trial-{trial.number:03d}" for trial in study.trials]
    outcomes = [batch.outcome(search.folder / each) for each in names]
    options = search.options(lowest)
    output = replace(search.config.output, folder="")
    own_config = replace(options, output=output, sample=search.config.sample)
    atomic.write(search.folder / LOWEST, configuration.to_toml(own_config))
    if as_json:
        print_json({"lowest": name, "options": lowest.params, "score": lowest.value, "runs": batch.to_json(outcomes)})
        return 0
    drift = next(each.prior_drift for each in outcomes if each.name == name)
    print_lines(
        *batch.table(outcomes),
        Message(
            "lowest score: {options} ({name}): {score:.4f}, prior drift {drift:.2%}",
            _text(lowest.params),
            name,
            lowest.value,
            drift or 0,
        ),
        "The score does not measure likeness: draw with the adapters of two or three trials and choose by eye.",
        Message("train with: lorakit train --preset {file}", quote(search.folder / LOWEST)),
    )
    return 0
