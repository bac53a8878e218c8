"""The endpoints of the front end for other programs; see docs/front-end.md. No endpoint waits for a run."""

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

# Number of log lines that `run` returns.
LOG_LINES = 50
Json = dict[str, object]
JSON_TYPES = {str: "a text", int: "a whole number", dict: "an object"}


class Api:
    """The endpoints of a workspace. Each public method except `offer` is an endpoint."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def offer(self) -> None:
        """Add the endpoints to the page that is being built. Each has the name of its method."""
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
        """Add a run to the queue and return {"run": its name}.

        The run checks the photos when it starts. If it refuses them, its state becomes "failed" with a message.

        Args:
            photos: folder of photos.
            name: trigger and class, e.g. "sks toy".
            base: base model: a file, a folder or a hub id; "pocket" is the bundled one.
            quality: a key of `quickstart.LENGTH_FACTORS`.
            options: dotted key -> value, as for `lorakit train --set`. They override the options above.

        Raises:
            LorakitError: an argument is invalid, or the folder has no photos.
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
        """Ask a run to save, export and end. If it has not begun, remove it from the queue."""
        folder = self.workspace.run(run)
        for job in self.workspace.queue.waiting():
            if Path(job.folder) == folder and self.workspace.queue.cancel(job.number):
                return {"run": run, "state": "cancelled"}
        state = run_folder.read(folder).state
        if state in run_folder.LIVE:
            RunFolder(folder).request_stop()
        return {"run": run, "state": state}

    def resume(self, run: str, steps: int = 0) -> Json:
        """Continue a run from its last checkpoint. `steps` is the new length of the whole run; 0 keeps the length."""
        folder = self.workspace.run(run)
        state = run_folder.read(folder)
        if state.state == "done" and steps <= state.step:
            raise LorakitError("{run} has ended at step {step}: give more steps than that", run, state.step)
        self.workspace.queue.resume(folder, steps)
        self.workspace.queue.start()
        return {"run": run, "state": "waiting"}

    def runs(self) -> list[Json]:
        """Every run with its state, step and loss. Waiting and starting runs come first, then the newest."""
        return [{"run": name, **asdict(state)} for name, state in self.workspace.runs_and_jobs()]

    def run(self, run: str) -> Json:
        """A run's state, config, last log lines and report, and the steps of its checkpoints."""
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
        """Write the given captions, then return all captions of a folder: name of the photo -> caption."""
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
        """The steps at which a run drew pictures, and the pictures of `step` as base64 PNG with their recipes."""
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
    """Wrap a method so that it checks the types of its arguments and returns only JSON values.

    The wrapper raises LorakitError if an argument has a wrong type.
    """
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
