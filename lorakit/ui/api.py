"""What other programs may ask of the front end, by name: docs/front-end.md says how. All of it answers at once."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import gradio as gr

from lorakit.core import foreign_json, image_grid
from lorakit.core.errors import LorakitError
from lorakit.core.messages import join
from lorakit.data import photo_folder
from lorakit.runs import quickstart, run_folder
from lorakit.runs.run_folder import RunFolder
from lorakit.ui import form
from lorakit.ui.workspace import Workspace

# Lines of the log that `run` gives.
LOG_LINES = 50
Json = dict[str, object]
JSON_TYPES = {str: "a text", int: "a whole number", dict: "an object"}


class Api:
    """One for a workspace; `offer` makes its methods endpoints of the page that is being built."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def offer(self) -> None:
        """Name each endpoint as its method."""
        for method in (self.start, self.stop, self.resume, self.runs, self.run, self.captions, self.samples):
            description = (method.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            gr.api(_checked(method), api_name=method.__name__, api_description=description, queue=False)

    def start(
        self,
        photos: str,
        name: str,
        base: str = "pocket",
        quality: str = "balanced",
        options: Json | None = None,
    ) -> Json:
        """Put a run into the queue: {"run": its name}.

        The run checks the photos itself: one that is refused is "failed", and says why.

        Args:
            options: dotted names over what the answers suggest, as `lorakit train --set` takes them.
        """
        if quality not in quickstart.LENGTH_FACTORS:
            raise LorakitError(
                "quality = {quality!r}: must be one of {names}", quality, ", ".join(quickstart.LENGTH_FACTORS)
            )
        options = options or {}
        form.refuse_local(options)
        folder = str(self.workspace.roots.resolve(photos))
        base = form.resolve_path(quickstart.BASE, base, self.workspace.roots) if base != "pocket" else base
        answers: Json = {quickstart.PHOTOS: folder, quickstart.NAME: name, quickstart.BASE: base}
        answers[quickstart.KIND] = options.get(quickstart.KIND, "subject")
        values = form.values(quickstart.config_for_answers(answers, quality, changed=options))
        config, problems = form.read(values, self.workspace.roots)
        if config is None:
            raise LorakitError(join("\n", (line for lines in problems.values() for line in lines)))
        photo_folder.scan(Path(folder))
        job = self.workspace.train(config)
        return {"run": Path(job.folder).name}

    def stop(self, run: str) -> Json:
        """Ask a run to save, export and end, or take it out of the queue if it has not begun."""
        folder = self.workspace.run(run)
        for job in self.workspace.queue.waiting():
            if Path(job.folder) == folder and self.workspace.queue.cancel(job.number):
                return {"run": run, "state": "cancelled"}
        state = run_folder.read(folder).state
        if state in run_folder.LIVE:
            RunFolder(folder).request_stop()
        return {"run": run, "state": state}

    def resume(self, run: str, steps: int = 0) -> Json:
        """Go on with a run from its last checkpoint, to so many steps in all unless 0."""
        folder = self.workspace.run(run)
        state = run_folder.read(folder)
        if state.state == "done" and steps <= state.step:
            raise LorakitError("{run} has ended at step {step}: give more steps than that", run, state.step)
        self.workspace.queue.resume(folder, steps)
        self.workspace.queue.start()
        return {"run": run, "state": "waiting"}

    def runs(self) -> list[Json]:
        """Every run with its state, step and loss, those that wait or begin first, then the newest."""
        return [{"run": name, **asdict(state)} for name, state in self.workspace.runs_and_jobs()]

    def run(self, run: str) -> Json:
        """A run's state, its config, the end of its log, what its self-check found, and the steps that have a file."""
        states = dict(self.workspace.runs_and_jobs())
        if run not in states:
            raise LorakitError("{name!r} is no run", run)
        folder = RunFolder(self.workspace.run(run))
        messages = folder.events("message", "warning", "error")
        return {
            "run": run,
            **asdict(states[run]),
            "config": form.without_local(folder.config_file.read_text(encoding="utf-8"))
            if folder.config_file.is_file()
            else "",
            "log": [str(event.get("message", "")) for event in messages][-LOG_LINES:],
            "report": _json_of(folder.report_file),
            "checkpoints": sorted(int(path.parent.name[5:]) for path in folder.checkpoints.glob("step-*/complete")),
        }

    def captions(self, photos: str, captions: Json | None = None) -> Json:
        """The caption of each photo in a folder by its name; first writes those that are given."""
        folder = self.workspace.roots.resolve(photos)
        paths = {photo.relative: photo.path for photo in photo_folder.scan(folder).photos}
        captions = captions or {}
        for name, text in captions.items():
            if name not in paths or not isinstance(text, str):
                raise LorakitError(
                    "{photo}: a caption must be text" if name in paths else "{photo}: no such photo", name
                )
        for name, text in captions.items():
            self.workspace.save_caption(paths[name], str(text))
        return {photo.relative: photo.caption or "" for photo in photo_folder.scan(folder).photos}

    def samples(self, run: str, step: int = -1) -> Json:
        """The steps at which a run drew pictures; with a step, its pictures as PNG in base64, with their recipes."""
        folder = RunFolder(self.workspace.run(run))
        run_folder.read(folder.path)
        pictures = []
        for path in folder.sample_pictures(step) if step >= 0 else []:
            recipe = foreign_json.loads(str(image_grid.read(path).info.get("lorakit", "{}")))
            pictures.append({"recipe": recipe, "png": base64.b64encode(path.read_bytes()).decode("ascii")})
        return {"run": run, "steps": list(folder.sample_grids()), "pictures": pictures}


def _json_of(file: Path) -> object:
    try:
        return foreign_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _checked(method: Callable[..., object]) -> Callable[..., object]:
    """The method, which refuses arguments of other types than it names; its result as plain JSON values."""
    hints = {name: (typing.get_args(hint) or (hint,))[0] for name, hint in typing.get_type_hints(method).items()}
    types = {name: typing.get_origin(hint) or hint for name, hint in hints.items()}

    signature = inspect.signature(method)

    @functools.wraps(method)
    def endpoint(*values: object) -> object:
        arguments = signature.bind(*values).arguments
        for name, value in arguments.items():
            if value is None and signature.parameters[name].default is None:
                continue
            if not isinstance(value, types[name]) or isinstance(value, bool):
                raise LorakitError("{name}: must be {kind}", name, JSON_TYPES[types[name]])
        return json.loads(json.dumps(method(*values), default=str))

    return endpoint
