"""Kill training runs at random file operations, resume them, and compare them with an undisturbed run.

    python tests/faults/kills.py FOLDER KILLS

Every run is a fork of this process, which only imports, so a kill costs a second.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import crash  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from short_run import noise, run_config  # noqa: E402

from lorakit.training import run as train, selfcheck  # noqa: E402

STEPS = 4


def in_child(job: Callable[..., object], *arguments: object) -> int:
    """Run `job(*arguments)` in a forked child; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        job(*arguments)
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def begin(base: Path, photos: Path, folder: Path, at: int = -1) -> None:
    """Start a run that is killed at operation number `at` below the folder."""
    selfcheck.examine = lambda *_, **__: iter(())  # it writes no files
    config = run_config(
        base, photos, folder, STEPS, train__save_every=1, train__keep_checkpoints=2, train__prior="none"
    )
    crash.hook().on(folder, at, "sigkill")
    train.train(config)


def go_on(folder: Path, at: int = -1) -> None:
    selfcheck.examine = lambda *_, **__: iter(())
    crash.hook().on(folder, at, "sigkill")
    train.resume(folder)


def _equal(actual: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return actual is not None and all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def main(place: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kill runs `kills` times; count kills, runs, lost runs, differing results and temporary files."""

    def make_base() -> None:
        import tiny

        tiny.save_sd1(place / "base")

    os.environ["LORAKIT_CACHE"] = str(place / "cache")
    (place / "photos").mkdir(parents=True)
    assert in_child(make_base) == 0
    base, photos, draw = place / "base", noise(place / "photos", 3), random.Random(seed)
    assert in_child(begin, base, photos, place / "straight") == 0
    expected = {path.name: load_file(path) for path in (place / "straight").glob("*.safetensors")}
    counts = {"kills": 0, "runs": 0, "lost": 0, "different": 0, "temporary": 0}
    while counts["kills"] < kills:
        folder = place / f"run-{counts['runs']}" / "straight"
        folder.parent.mkdir()
        counts["runs"] += 1
        code = in_child(begin, base, photos, folder, draw.randrange(90))
        for _ in range(20):
            if code != -9:
                break
            counts["kills"] += 1
            at = draw.choice([draw.randrange(70), -1])
            is_run = (folder / "config.toml").is_file()
            code = in_child(go_on, folder, at) if is_run else in_child(begin, base, photos, folder, at)
        if code:
            counts["lost"] += 1
            print(f"{folder}: code {code}", file=sys.stderr)
            continue
        adapters = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        same = all(_equal(adapters.get(file), table) for file, table in expected.items())
        counts["different"] += not same
        counts["temporary"] += sum(path.name.endswith(".tmp") for path in folder.rglob(".*"))
    return counts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
