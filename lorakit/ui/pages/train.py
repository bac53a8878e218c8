"""The page that plans and starts a run: a few basic questions, and a widget for each other option of the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lorakit import config as configuration
from lorakit.config import Config
from lorakit.core import atomic, names
from lorakit.core.errors import LorakitError
from lorakit.core.messages import join
from lorakit.runs import quickstart
from lorakit.runs.plan import Plan
from lorakit.runs.preflight import Preflight
from lorakit.ui import commands, form, widgets
from lorakit.ui.checked import fits
from lorakit.ui.tasks import Progress
from lorakit.ui.texts import Say
from lorakit.ui.workspace import Workspace

AUTOMATIC = ""
# Folder below the runs for the user's own presets.
PRESETS = "presets"


class TrainPage:
    """Builds the page and handles its events.

    `widgets` maps the key of each option to its widget. `draft` is the answers in the browser's storage. `marks` is the
    state of the page between events:

    - "preset": name of the preset, or "" for the automatic one;
    - "values": option's key -> the preset's value;
    - "moved": option's key -> its value, if a change of another option by hand made it differ from the preset's;
    - "shown": option's key -> "changed" or a problem.
    """

    def __init__(self, workspace: Workspace, t: gr.I18n, draft: gr.BrowserState):
        self.workspace, self.draft = workspace, draft
        self.fields = form.fields()
        start = form.values(quickstart.config_for_answers({}, "balanced"))
        self.widgets: dict[str, Any] = {}
        gr.Markdown(t("train.lead"), elem_classes="lk-lead")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                for key in quickstart.BASIC_OPTIONS:
                    more = {"allow_custom_value": True} if key in (quickstart.PHOTOS, quickstart.BASE) else {}
                    self.widgets[key] = self._question(key, start[key], t, **more)
                self.fetch = gr.Button(t("train.fetch"), visible=False, elem_id="base-fetch")
                self.fetch_message = widgets.html(elem_id="base-fetched")
                self.quality = gr.Radio(
                    choices=[(t(f"quality.{name}"), name) for name in quickstart.LENGTH_FACTORS],
                    value="balanced",
                    label=t("train.quality"),
                    info=t("train.quality_help"),
                    elem_id="quality",
                )
                self.start = gr.Button(
                    t("train.start"), variant="primary", size="lg", interactive=False, elem_id="train-start"
                )
                self.message = widgets.html(elem_id="train-message")
            with gr.Column(scale=2, min_width=280):
                self.plan_card = widgets.html(elem_id="train-plan")
        with gr.Accordion(t("train.options"), open=False, elem_id="train-options"):
            with gr.Row(equal_height=True):
                self.preset = gr.Dropdown(
                    choices=[
                        (t("train.automatic"), AUTOMATIC),
                        *((name, name) for name in configuration.preset_names()),
                    ],
                    value=AUTOMATIC,
                    label=t("train.preset"),
                    info=t("train.preset_help"),
                    filterable=False,
                    elem_id="preset",
                )
                self.apply = gr.Button(t("train.apply"), scale=0, min_width=160, elem_id="preset-apply")
            with gr.Row(equal_height=True):
                self.preset_name = gr.Textbox(label=t("train.preset_name"), max_length=60, elem_id="preset-name")
                self.save_preset = gr.Button(t("train.preset_save"), scale=0, min_width=160, elem_id="preset-save")
                self.export_preset = gr.DownloadButton(t("train.preset_export"), visible=False, scale=0, min_width=160)
                narrow: dict[str, Any] = {"scale": 0, "min_width": 160}
                self.import_preset = gr.UploadButton(t("train.preset_import"), file_types=[".toml"], **narrow)
            self.preset_message = widgets.html(elem_id="preset-message")
            self.difference = widgets.html(elem_id="preset-difference")
            self.changed = widgets.html(elem_id="train-changed")
            for section in configuration.SECTIONS:
                basic_keys = (*quickstart.BASIC_OPTIONS, *quickstart.SET_BY_CALLER)
                keys = [key for key, f in self.fields.items() if f.option.section == section and key not in basic_keys]
                if keys:
                    gr.Markdown(t(f"section.{section}"), elem_classes="lk-section")
                    with gr.Row(equal_height=False, elem_classes="lk-options"):
                        for key in keys:
                            self.widgets[key] = widgets.widget(self.fields[key], start[key], t, min_width=240)
        self.keys = list(self.widgets)
        self.marks = gr.State({"preset": AUTOMATIC, "values": start, "moved": {}, "shown": {}})
        self.requests = gr.State(widgets.RequestCounter())

    def _question(self, key: str, value: Any, t: gr.I18n, **more: Any) -> Any:
        field = self.fields[key]
        if "allow_custom_value" not in more:
            return widgets.widget(field, value, t)
        common = {"label": t(f"option.{key}"), "info": t(f"help.{key}"), "elem_id": widgets.element_id(key)}
        default = field.option.default
        folders = (
            [str(path) for path in self.workspace.roots.photo_folders()]
            if key == quickstart.PHOTOS
            else [default, *map(str, self.workspace.bases())]
        )
        return gr.Dropdown(choices=folders, value=value or None, **common, **more)

    @property
    def inputs(self) -> list[Any]:
        """The inputs of `answer`, in order: quality, marks, every widget."""
        return [self.quality, self.marks, *(self.widgets[key] for key in self.keys)]

    @property
    def outputs(self) -> list[Any]:
        """The outputs of `answer`."""
        every = [self.widgets[key] for key in self.keys]
        return [self.plan_card, self.changed, self.start, self.fetch, self.marks, self.draft, *every]

    def form_values(self, values: Sequence[Any]) -> dict[str, Any]:
        """Option's key -> value of its widget."""
        return dict(zip(self.keys, values, strict=True))

    def answer(self, quality: str, marks: dict[str, Any], values: Sequence[Any], say: Say) -> list[Any]:
        """Update the page after an answer. Return the `outputs`.

        Options that the user has not changed get the preset's values, and problems appear at their fields. `plan`
        updates the plan later, because it waits for the check of the photos.
        """
        answers = self.form_values(values)
        marks, adjustments = self._follow(quality, marks, answers)
        answers |= adjustments
        config, problems = self.read(answers, say)
        changed = form.changed(answers, {k: v for k, v in marks["values"].items() if k not in quickstart.BASIC_OPTIONS})
        unanswered = [say("train.required")]  # not marked as an error
        wrong = {key: join("\n", lines) for key, lines in problems.items() if lines != unanswered}
        new_marks = {key: wrong.get(key, "changed" if key in changed else "") for key in self.keys}
        updates = [
            self._update(key, new_marks[key], marks["shown"].get(key, ""), adjustments, say) for key in self.keys
        ]
        marks = marks | {"shown": {key: mark for key, mark in new_marks.items() if mark}}
        if config is None:
            plan: Any = _problems(problems, say)
        else:
            plan = gr.skip() if self.workspace.report(config).done() else widgets.quiet(say("plan.working"))
        draft = self.draft_of(quality, marks, answers)
        fetch = gr.update(visible=self.lacking(answers) is not None)
        return [plan, _changes(changed, say), gr.update(interactive=False), fetch, marks, draft, *updates]

    def plan(self, values: Sequence[Any], say: Say, progress: Progress | None = None) -> tuple[str, Any]:
        """The plan or the problems as HTML, and an update of the start button. Waits until the photos are checked."""
        config, problems = self.read(self.form_values(values), say)
        refused = gr.update(interactive=False)
        if config is None:
            return _problems(problems, say), refused
        result = self.workspace.preflight(config, progress)
        if result.problems or result.plan is None:
            return _problems(self._by_field(result, say), say), refused
        return plan_card(result.plan, result.warnings, say), gr.update(interactive=True)

    def _by_field(self, result: Preflight, say: Say) -> dict[str, list[str]]:
        """The problems of a preflight by key: the first option in the message, or the folder for problems of photos."""
        photos = result.report.errors if result.report else []
        problems: dict[str, list[str]] = {}
        for line in result.problems:
            key = quickstart.PHOTOS if line in photos else form.field_of(line, self.fields)
            problems.setdefault(key, []).append(say.explain(line))
        readable = {item.readable for item in result.report.items} if result.report else set()
        if readable == {True, False}:
            button, tab = say("photos.leave_out"), say("tab.photos")
            problems.setdefault(quickstart.PHOTOS, []).append(say("train.leave_out", button=button, tab=tab))
        return problems

    def _follow(
        self, quality: str, marks: dict[str, Any], answers: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute the new marks, and the values of options to update because the suggested preset has changed.

        Options that the user has changed are not updated. The values consider these changes: for example, if the user
        has set another option of the length, the preset's length is unset.
        """
        adjustments = marks["moved"]
        by_hand = {
            key: now
            for key, (_, now) in form.changed(answers, marks["values"]).items()
            if key not in quickstart.BASIC_OPTIONS and not (key in adjustments and now == adjustments[key])
        }
        try:
            suggestion = self._suggest(answers, quality, marks["preset"])
        except LorakitError:
            return marks, {}
        try:
            combination = self._suggest(answers, quality, marks["preset"], by_hand)
        except LorakitError:  # the option's field shows this problem
            combination = suggestion
        follows = {
            key: value
            for key, value in combination.items()
            if key in self.widgets and key not in quickstart.BASIC_OPTIONS and key not in by_hand
        }
        adjustments = {key: value for key, value in follows.items() if value != suggestion.get(key)}
        marks = marks | {"values": suggestion, "moved": adjustments}
        return marks, {key: value for key, value in follows.items() if answers.get(key) != value}

    def own_presets(self) -> dict[str, str]:
        """Path -> name of the presets that the user has saved."""
        return {str(path): path.stem for path in sorted((self.workspace.runs / PRESETS).glob("*.toml"))}

    def preset_choices(self, say: Say) -> list[tuple[str, str]]:
        """The choices of presets as (name, value). The user's own presets are last."""
        shipped = [(name, name) for name in configuration.preset_names()]
        own = [(f"★ {name}", path) for path, name in self.own_presets().items()]
        return [(say("train.automatic"), AUTOMATIC), *shipped, *own]

    def keep_preset(self, name: str, values: Sequence[Any], say: Say) -> tuple[str, object]:
        """Save the form as a preset. Return a message, and an update of the dropdown.

        The preset contains neither the folder nor the name of the photos. No existing preset is overwritten.
        """
        config, problems = form.read(self.form_values(values), self.workspace.roots)
        lines = [line for key, texts in problems.items() if key not in quickstart.BASIC_OPTIONS for line in texts]
        if config is None and not lines:  # only basic questions are unanswered, which a preset does not need
            start = form.values(quickstart.config_for_answers({}, "balanced"))
            basic = {key: start[key] for key in quickstart.BASIC_OPTIONS}
            config, problems = form.read(self.form_values(values) | basic, self.workspace.roots)
            lines = [line for texts in problems.values() for line in texts]
        if config is None:
            return widgets.problem(say("train.cannot_keep", problem=say.explain(join("\n", lines)))), gr.skip()
        data = replace(config.data, folder="", name="")
        return self._write_preset(name, configuration.to_toml(replace(config, data=data)), say)

    def take_preset(self, file: str, say: Say) -> tuple[str, object]:
        """Save an uploaded preset if it is valid. Return a message, and an update of the dropdown."""
        try:
            config = configuration.load(Path(file))
            tables = configuration.as_tables(config)
            form.refuse_local({f"{section}.{name}": table[name] for section, table in tables.items() for name in table})
        except LorakitError as problem:
            return widgets.problem(say.explain(str(problem).replace(file, Path(file).name))), gr.skip()
        return self._write_preset(Path(file).stem, configuration.to_toml(config), say)

    def _write_preset(self, name: str, text: str, say: Say) -> tuple[str, object]:
        path = self.workspace.runs / PRESETS / f"{names.slug(name)}.toml"
        if not names.slug(name):
            return widgets.problem(say("train.preset_unnamed")), gr.skip()
        if path.exists():
            return widgets.problem(say("train.preset_exists", name=path.stem)), gr.skip()
        try:
            path.parent.mkdir(exist_ok=True)
            atomic.write(path, text)
        except OSError as problem:
            return widgets.problem(f"{path}: {problem.strerror}"), gr.skip()
        message = widgets.good(say("train.preset_kept", name=path.stem))
        return message, gr.update(choices=self.preset_choices(say), value=str(path))

    def export_of(self, preset: str) -> object:
        """An update of the download button, which is visible for the user's own presets."""
        path = Path(preset) if preset in self.own_presets() else None
        return gr.update(visible=path is not None, value=str(self.workspace.staged(path)) if path else None)

    def _suggest(
        self, answers: Mapping[str, Any], quality: str, preset: str, by_hand: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The widget's value of every option for a preset, the answers and the options changed by hand.

        Raises:
            LorakitError: `quickstart.config_for_answers` raises it, or the base is outside of the roots.
        """
        base = answers.get(quickstart.BASE) or ""
        bundled = base == self.fields[quickstart.BASE].option.default
        inside = base if bundled else form.resolve_path(quickstart.BASE, base, self.workspace.roots)
        changed = {key: self.fields[key].read(value) for key, value in (by_hand or {}).items()}
        return form.values(
            quickstart.config_for_answers({**answers, quickstart.BASE: inside}, quality, preset or None, changed)
        )

    def read(self, answers: Mapping[str, Any], say: Say) -> tuple[Config | None, dict[str, list[str]]]:
        """The config of the form or None, and the problems by key. An unanswered question is a problem."""
        config, problems = form.read(answers, self.workspace.roots)
        for key in quickstart.BASIC_OPTIONS:
            if not str(answers.get(key) or "").strip():
                problems.setdefault(key, []).append(say("train.required"))
        if lacking := self.lacking(answers):
            problems.setdefault(lacking[0], []).append(say("train.must_fetch", name=lacking[1]))
        elif config is not None and not problems:
            try:
                quickstart.describe(config.model)
            except LorakitError as problem:
                key = quickstart.VAE if str(problem).startswith(quickstart.VAE) else quickstart.BASE
                problems[key] = [str(problem)]
        text = {key: [say.explain(line) for line in lines] for key, lines in problems.items()}
        return (None if problems else config), text

    def lacking(self, answers: Mapping[str, Any]) -> tuple[str, str] | None:
        """The option and the hub id of a base or a VAE that must be downloaded, or None. Does not use the network."""
        for key in (quickstart.BASE, quickstart.VAE):
            try:
                name = form.resolve_path(key, str(answers.get(key) or "").strip(), self.workspace.roots)
            except LorakitError:
                continue
            if quickstart.must_be_fetched(name, vae=key == quickstart.VAE):
                return key, name
        return None

    def fetch_base(self, values: Sequence[Any], say: Say, progress: Progress = lambda count, total: None) -> str:
        """Download the base or its VAE from the hub, at the user's request. Return a message."""
        lacking = self.lacking(self.form_values(values))
        if lacking is None:
            return ""
        key, name = lacking
        try:
            commands.fetch(name, progress, vae=key == quickstart.VAE)
        except LorakitError as problem:
            return widgets.problem(say.explain(str(problem)))
        return widgets.good(say("train.fetched", name=name))

    def config_of_photos(self, answers: Mapping[str, Any]) -> Config | None:
        """A config for reading the photos, even if other answers are missing or invalid."""
        config, _ = form.read(answers, self.workspace.roots)
        try:
            if config is not None and quickstart.describe(config.model):
                return config
        except LorakitError:  # the field of the base shows this problem
            pass
        start = form.values(quickstart.config_for_answers({}, "balanced"))
        answered = {key: answers[key] for key in (quickstart.PHOTOS, *quickstart.OF_PHOTOS)}
        return form.read(start | answered, self.workspace.roots)[0]

    def draft_of(self, quality: str, marks: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
        """The answers to store in the browser. `restore` reads them."""
        return {"quality": quality, "preset": marks["preset"], "moved": marks["moved"], "values": dict(answers)}

    def restore(self, draft: Mapping[str, Any]) -> list[Any]:
        """Read answers from the browser's storage. Return folder of photos, quality, marks, preset and every widget."""
        if not isinstance(draft, dict) or not isinstance(draft.get("values"), dict):
            return [gr.skip()] * (4 + len(self.keys))
        start = form.values(quickstart.config_for_answers({}, "balanced"))
        values = start | {k: v for k, v in draft["values"].items() if k in self.widgets and fits(self.widgets[k], v)}
        quality = draft["quality"] if draft.get("quality") in quickstart.LENGTH_FACTORS else "balanced"
        preset = (
            draft["preset"]
            if draft.get("preset") in (*configuration.preset_names(), *self.own_presets())
            else AUTOMATIC
        )
        try:
            suggestion = self._suggest(values, quality, preset)
        except LorakitError:
            suggestion = start
        adjustments = draft["moved"] if isinstance(draft.get("moved"), dict) else {}
        marks = {"preset": preset, "values": suggestion, "moved": adjustments, "shown": {}}
        values[quickstart.PHOTOS] = values[quickstart.PHOTOS] or None
        return [values[quickstart.PHOTOS], quality, marks, preset, *(values[key] for key in self.keys)]

    def _update(self, key: str, mark: str, before: str, adjustments: Mapping[str, Any], say: Say) -> Any:
        change: dict[str, Any] = {"value": adjustments[key]} if key in adjustments else {}
        if mark != before:
            wrong = mark not in ("", "changed")
            help = say(f"help.{key}")
            problem = mark.replace("*", "\N{ASTERISK OPERATOR}")  # Gradio renders * as Markdown emphasis
            change["info"] = (
                f"✕ {problem} — {help}" if wrong else f"● {say('train.changed')} — {help}" if mark else help
            )
            change["elem_classes"] = ["lk-wrong"] if wrong else ["lk-changed"] if mark else []
        return gr.update(**change) if change else gr.skip()

    def difference_of(self, preset: str, quality: str, values: Sequence[Any], say: Say) -> str:
        """An HTML table of the changes that the preset would make."""
        answers = self.form_values(values)
        try:
            suggestion = self._suggest(answers, quality, preset)
        except LorakitError as problem:
            return widgets.problem(say.explain(str(problem)))
        differences = form.changed(suggestion, {k: v for k, v in answers.items() if k not in quickstart.BASIC_OPTIONS})
        if not differences:
            return widgets.quiet(say("train.same"))
        head = [say("train.option"), say("train.now"), say("train.then")]
        return widgets.table(
            head,
            [
                [say(f"option.{key}"), _in_words(now, say), _in_words(then, say)]
                for key, (now, then) in differences.items()
            ],
        )

    def apply_preset(self, preset: str, quality: str, marks: dict[str, Any], values: Sequence[Any]) -> list[Any]:
        """Set every option to the preset's value. Return the new `marks`, then an update for each widget."""
        answers = self.form_values(values)
        try:
            suggestion = self._suggest(answers, quality, preset)
        except LorakitError:
            return [gr.skip()] * (1 + len(self.keys))
        updates = [
            gr.skip()
            if key in quickstart.BASIC_OPTIONS or suggestion.get(key) == answers[key]
            else gr.update(value=suggestion[key])
            for key in self.keys
        ]
        return [marks | {"preset": preset, "values": suggestion, "moved": {}}, *updates]

    def begin(self, values: Sequence[Any], say: Say, progress: Progress | None = None) -> tuple[str, str | None]:
        """Add the run to the queue. Return a message, and the name of the run folder or None."""
        config, problems = self.read(self.form_values(values), say)
        if config is None:
            return widgets.problem(
                say("train.cannot", problem=join("\n", (p for one in problems.values() for p in one)))
            ), None
        try:
            job = self.workspace.train(self.workspace.preflight(config, progress).or_raise().config)
        except LorakitError as problem:
            return widgets.problem(say("train.cannot", problem=say.explain(str(problem)))), None
        name = job.folder.rpartition("/")[2].rpartition("\\")[2]
        return widgets.good(say("train.started", name=name)), name


def plan_card(plan: Plan, warnings: Sequence[str], say: Say) -> str:
    """HTML with the plan's figures, warnings, and lines as in `lorakit check`."""
    memory = widgets.memory(max(plan.peaks.values()), say)
    run_time = say("plan.measured") if plan.seconds is None else widgets.duration(plan.seconds, say)
    validation = say("plan.held", count=plan.holdout_count) if plan.holdout_count else ""
    weights = f"{sum(count for _, count in plan.modules.values()) / 1e6:.2f} M"
    estimate = say("plan.estimate")
    figures = widgets.facts(
        [
            (say("plan.steps"), str(plan.steps), ""),
            (say("plan.time"), run_time, estimate if plan.seconds is not None else ""),
            (say("plan.memory"), memory, say.translate(join(", ", (estimate, say("plan.device", device=plan.device))))),
            (say("plan.photos"), str(plan.photo_count), validation),
            (say("plan.trained"), weights, ""),
        ]
    )
    notices = "".join(f"<li>{escape(say.explain(line))}</li>" for line in warnings)
    lines = "".join(f"<li>{escape(say.explain(line, places=True))}</li>" for line in plan.lines())
    return (
        f"<section class=lk-panel><h2>{escape(say('plan.title'))}</h2>{figures}"
        f"{f'<ul class=lk-warnings>{notices}</ul>' if notices else ''}<ul class=lk-lines>{lines}</ul></section>"
    )


def _problems(problems: Mapping[str, Sequence[str]], say: Say) -> str:
    unanswered = all(lines == [say("train.required")] for lines in problems.values())
    titles = {key: f"<b>{escape(say(f'option.{key}'))}</b>: " if key else "" for key in problems}
    kind = "notes" if unanswered else "errors"
    items = "".join(f"<li>{titles[key]}{escape(line)}</li>" for key, lines in problems.items() for line in lines)
    return f"<section class=lk-panel><h2>{escape(say('plan.problems'))}</h2><ul class=lk-{kind}>{items}</ul></section>"


def _changes(changed: Mapping[str, tuple[Any, Any]], say: Say) -> str:
    if not changed:
        return widgets.quiet(say("train.unchanged"))
    text = "; ".join(
        f"{say(f'option.{key}')}: {_in_words(was, say)} → {_in_words(now, say)}" for key, (was, now) in changed.items()
    )
    return f"<p class=lk-changes>● {escape(say('train.changed'))}: {escape(text)}</p>"


def _in_words(value: Any, say: Say) -> str:
    if value is None or value == "":
        return say("train.unset")
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
