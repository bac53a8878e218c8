"""Checkpoints: everything that resume needs, in folders that are written atomically.

    checkpoints/step-000100/
        adapter.safetensors     the adapter's own tensors, float32, in the adapter's spelling
        optimizer.safetensors   every tensor of the optimizer's state (8-bit ones too)
        state.json              step, the optimizer's other values, the config, the caller's own values
        complete                written last: SHA-256 of the three above

Nothing is pickled, so a checkpoint from elsewhere cannot run code. A folder without `complete` does not count; one
whose files do not match it is refused with the file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save as serialise

from lorakit.config import Config, as_tables, options, resuming
from lorakit.core import atomic, foreign_json
from lorakit.core.errors import LorakitError
from lorakit.core.messages import Message, join, some
from lorakit.core.names import quote, step_name, unique_path

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
MARKER = "complete"
# Prefix of a checkpoint while a new one of the same step takes its place, between two renames.
REPLACED = ".replaced-"
NO_ROOM = (
    "step {step}: no checkpoint could be written to {folder} ({reason}); those before it are intact. Make {size} free "
    "there and the folder writable, then continue with: lorakit resume {run}"
)


class NotFinite(LorakitError):
    """A loss, a gradient, a weight or the optimizer's state is NaN or infinite."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: step, adapter tensors, the optimizer's `state_dict()`, and the caller's own
    values."""

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    extra: dict[str, Any]


def save(
    folder: Path,
    step: int,
    adapter: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    extra: Mapping[str, Any],
    *,
    config: Config | None = None,
    identity: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: the folder of all checkpoints.
        adapter: name -> tensor.
        optimizer: its `state_dict()`: dicts, lists, tuples, numbers, text, None and tensors.
        extra: JSON values that `load` returns unchanged.
        config: compared when the checkpoint is loaded.
        identity: what the run depends on in addition to the config, e.g. {"base": hash, "photos": hash}; compared when
            the checkpoint is loaded.

    Raises:
        NotFinite: a tensor is not finite; nothing is written.
        LorakitError: the files cannot be written, say because the disk is full; complete checkpoints stay.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _take_tensors(optimizer, "optimizer", tensors)
    if name := _not_finite(adapter, tensors):
        raise NotFinite(
            "step {step}: {name} is not finite, so no checkpoint was written; lower the learning rate", step, name
        )
    state = {
        "step": step,
        "adapter": list(adapter),
        "optimizer": tree,
        "extra": dict(extra),
        "config": None if config is None else _compared(config),
        "identity": dict(identity or {}),
    }
    final, building = folder / step_name(step), folder / f".building-{step_name(step)}-{os.getpid()}"
    _require_folder(folder.parent, step)
    try:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        _write_files(building, adapter, tensors, state)
        replaced = folder / f"{REPLACED}{step_name(step)}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        building.rename(final)
        atomic.sync_folder(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        values = (step, folder, error.strerror or error, _mib(adapter, tensors), quote(folder.parent))
        raise LorakitError(NO_ROOM, *values) from None
    return final


def require_finite(step: int, adapter: Mapping[str, torch.Tensor], optimizer: Mapping[str, object]) -> None:
    """Raise NotFinite, naming the first tensor of weights and optimizer that has NaN or infinity."""
    tensors: dict[str, torch.Tensor] = {}
    _take_tensors(optimizer, "optimizer", tensors)
    if name := _not_finite(adapter, tensors):
        raise NotFinite("step {step}: {name} is not finite; lower the learning rate", step, name)


def _not_finite(*tables: Mapping[str, torch.Tensor]) -> str:
    named = (item for table in tables for item in table.items())
    return next((name for name, x in named if x.is_floating_point() and not torch.isfinite(x).all()), "")


def _mib(*tables: Mapping[str, torch.Tensor]) -> str:
    return f"{sum(tensor.nbytes for table in tables for tensor in table.values()) / 2**20:.0f} MiB"


def _require_folder(run: Path, step: int) -> None:
    if not run.is_dir():
        raise LorakitError(
            "step {step}: {run} is gone: it was deleted or moved during training, so nothing can be "
            "saved; start it again",
            step,
            run,
        )


def _write_files(
    folder: Path, adapter: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: dict[str, Any]
) -> None:
    """Write the files of a checkpoint; the marker, which makes it complete, comes last."""
    # safetensors wants every tensor to own its memory; optimizers share tables among parameters.
    atomic.write(folder / FILES[0], serialise({name: _own(tensor) for name, tensor in adapter.items()}))
    atomic.write(folder / FILES[1], serialise({name: _own(tensor) for name, tensor in optimizer.items()}))
    atomic.write(folder / FILES[2], json.dumps(state))
    atomic.write(folder / MARKER, json.dumps({name: _digest(folder / name) for name in FILES}))


def load(path: Path, *, config: Config | None = None, identity: Mapping[str, str] | None = None) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU.

    Raises:
        LorakitError: files are missing or changed, tensors are missing or unknown, or `config` or `identity` differs
            from the saved one; the text names what differs.
    """
    try:
        digests = foreign_json.loads((path / MARKER).read_text(encoding="utf-8"))
        for name in FILES:
            if _digest(path / name) != digests[name]:
                raise LorakitError("{path} has changed since it was saved; resume from another checkpoint", path / name)
        state = foreign_json.loads((path / FILES[2]).read_text(encoding="utf-8"))
        adapter, tensors = load_file(path / FILES[0]), load_file(path / FILES[1])
    except (OSError, ValueError, KeyError) as error:
        raise LorakitError(
            "{path} is not a complete checkpoint ({problem}); resume from another one", path, error
        ) from None
    _same_names(path / FILES[0], set(adapter), set(state["adapter"]))
    expected: set[str] = set()
    optimizer = _put_tensors(state["optimizer"], tensors, expected)
    _same_names(path / FILES[1], set(tensors), expected)
    if name := _not_finite(adapter, tensors):
        raise LorakitError("{path}: {name} is not finite; resume from another checkpoint", path, name)
    if config is not None and state["config"] is not None:
        _same_config(path, state["config"], _compared(config))
    for what, value in (identity or {}).items():
        if state["identity"].get(what, value) != value:
            raise LorakitError(
                "the {what} changed since {path} was saved, so the run cannot go on exactly where it "
                "stopped; start a new one from its weights with: {command}",
                what,
                path.name,
                resuming.new_run(path),
            )
    return Checkpoint(state["step"], {name: adapter[name] for name in state["adapter"]}, optimizer, state["extra"])


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints, earliest step first."""
    by_name = {path.parent.name: path.parent for path in folder.glob(f"{REPLACED}step-*/{MARKER}")}
    by_name = {name.removeprefix(REPLACED): path for name, path in by_name.items()}
    by_name |= {path.parent.name: path.parent for path in folder.glob(f"step-*/{MARKER}")}
    return [by_name[name] for name in sorted(by_name, key=lambda name: int(name.removeprefix("step-")))]


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    checkpoints = complete(folder)
    return checkpoints[-1] if checkpoints else None


def step_of(path: Path) -> int:
    """The step of a checkpoint, from the name of its folder."""
    return int(path.name.removeprefix(REPLACED).removeprefix("step-"))


def newest_complete(folder: Path, say: Callable[[str], object]) -> Path | None:
    """Return the newest checkpoint whose files are unchanged, or None. `say` gets the problem of each newer one."""
    for path in reversed(complete(folder)):
        try:
            load(path)
            return path
        except LorakitError as error:
            say(Message("{problem}; it is skipped", error))
    return None


def named(folder: Path, name: str) -> Path:
    """Return the checkpoint with that name (step-000120) or of that step (120).

    Raises:
        LorakitError: there is no such checkpoint; the message lists the names that exist.
    """
    by_name = {path.name.removeprefix(REPLACED): path for path in complete(folder)}
    step = step_name(int(name)) if name.isdecimal() else Path(name).name
    if step not in by_name:
        raise LorakitError(
            "{folder} has no checkpoint {name}; it has {names}", folder.parent, name, ", ".join(by_name) or "none"
        )
    return by_name[step]


def set_aside(folder: Path, keep: Path | None) -> list[str]:
    """Rename the checkpoints after `keep` to unused-step-..., so that `keep` is the newest. Return the new names."""
    names = []
    for path in complete(folder):
        if keep is None or step_of(path) > step_of(keep):
            target = unique_path(folder / f"unused-{step_name(step_of(path))}")
            path.rename(target)
            names.append(target.name)
    return names


def rotate(folder: Path, keep: int) -> None:
    """Delete complete checkpoints except the newest `keep` (at least one stays), and what a killed run left
    unfinished."""
    for path in complete(folder)[: -max(keep, 1)]:
        # The marker goes first: if the process is killed in between, no folder looks complete.
        (path / MARKER).unlink()
        shutil.rmtree(path)
    remaining = set(complete(folder))
    for path in [*folder.glob(".building-*"), *folder.glob(f"{REPLACED}*"), *folder.glob("step-*")]:
        if path not in remaining:
            shutil.rmtree(path, ignore_errors=True)


def _take_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as a JSON tree. Its tensors are moved into `tensors`, under their path in the tree.

    JSON has no tuples, no integer keys and no infinity, so each node is [kind, content].
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, Mapping):
        items = []
        for key, item in value.items():
            assert isinstance(key, (str, int)), f"{name}: key {key!r}"
            items.append([key, _take_tensors(item, f"{name}.{key}", tensors)])
        return ["dict", items]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_take_tensors(item, f"{name}.{n}", tensors) for n, item in enumerate(value)]]
    if isinstance(value, float):
        return ["float", value.hex()]
    assert value is None or isinstance(value, (bool, int, str)), f"{name}: {type(value)} cannot be saved"
    return ["value", value]


def _put_tensors(node: Any, tensors: Mapping[str, torch.Tensor], expected: set[str]) -> Any:
    """The inverse of `_take_tensors`. A missing tensor becomes None; the caller reports it by name."""
    kind, content = node
    if kind == "tensor":
        expected.add(content)
        return tensors.get(content)
    if kind == "dict":
        return {key: _put_tensors(item, tensors, expected) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_put_tensors(item, tensors, expected) for item in content]
        return tuple(items) if kind == "tuple" else items
    return float.fromhex(content) if kind == "float" else content


def _same_names(file: Path, actual: set[str], expected: set[str]) -> None:
    if lacking := expected - actual:
        raise LorakitError(
            "{file} lacks tensor {names}; resume from another checkpoint", file, some(sorted(lacking), 1)
        )
    if unknown := actual - expected:
        raise LorakitError(
            "{file} has an unknown tensor {names}; resume from another checkpoint", file, some(sorted(unknown), 1)
        )


def _compared(config: Config) -> dict[str, Any]:
    """Options that must not change in a resumed run, as JSON values: all but paths and those that `resuming` lets
    change."""
    paths = {option.key for option in options(config.adapter.method) if option.path}
    flat = {f"{section}.{name}": value for section, table in as_tables(config).items() for name, value in table.items()}
    compared = {key: value for key, value in flat.items() if key not in paths and not resuming.may_change(key)}
    values: dict[str, Any] = json.loads(json.dumps(compared))
    return values


def options_since(path: Path, config: Config) -> list[str]:
    """Options that did not exist when the checkpoint was saved. The run was trained with their defaults."""
    state = foreign_json.loads((path / FILES[2]).read_text(encoding="utf-8"))
    return [key for key in _compared(config) if state["config"] is not None and key not in state["config"]]


def _same_config(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    defaults = {option.key: option.default for option in options(now["adapter.method"])}
    changed = [
        key
        for key in {**before, **now}
        if before.get(key, defaults.get(key)) != now.get(key) and not resuming.may_change(key)
    ]
    if changed:
        differences = join(
            ", ",
            (
                Message("{key} (was {before}, is {now})", key, _value_text(before.get(key)), _value_text(now.get(key)))
                for key in changed
            ),
        )
        raise LorakitError(
            "{path} was saved with another config: {differences}; a resumed run goes on exactly as it began. "
            "Undo that, or start a new run from its weights with: {command}",
            path.name,
            differences,
            resuming.new_run(path),
        )


def _value_text(value: object) -> str:
    return "unset" if value is None else repr(value)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
