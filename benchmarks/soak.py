"""Stop and kill runs at random while queue and front end work, and count lost runs, wrong adapters and leaks.

    python benchmarks/soak.py [--minutes 60] [--json FILE]

Short runs of the bundled model go through the queue while the front end runs. At random moments the script requests a
stop, or kills a run or the queue's worker (SIGKILL). The queue then resumes the run. Each adapter is compared with that
of a run without interruption. The counts of lost runs, different adapters and temporary files must be 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import step as step_benchmark
import torch
from safetensors.torch import load_file

from lorakit import config
from lorakit.core import atomic
from lorakit.core.errors import LorakitError
from lorakit.runs import run_folder
from lorakit.runs.queue import Queue

PORT = 7891
OPTIONS = {"data.name": "sks toy", "data.resolution": 64, "adapter.rank": 2, "train.steps": 12, "train.save_every": 3}
OPTIONS |= {"train.validate_every": 12, "train.validate_at_end": False, "train.holdout": 0.0, "train.prior": "none"}
OPTIONS |= {"sample.at_start": False, "sample.at_end": False, "sample.every": 12, "memory.device": "cpu"}


class Soak:
    """A soak test with its runs, queue and photos in the folder `place`."""

    def __init__(self, place: Path, seed: int):
        self.runs, self.draw = place / "runs", random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        (place / "photos").mkdir()
        photos = step_benchmark.random_photos(place / "photos", 64)
        self.config = config.load("subject-pocket", {**OPTIONS, "data.folder": str(photos)})
        self.queue = Queue(self.runs)
        self.expected: dict[str, torch.Tensor] = {}
        self.peaks: dict[str, int] = {"handles of the front end": 0, "MiB of the front end": 0}

    def turn(self) -> None:
        """Run one job through the queue, with random interruptions, until it is done."""
        job = self.queue.train(self.config)
        self.counts["runs"] += 1
        while True:
            if not self.queue.is_working():
                self.queue.start()
            self._disturb(job.number, calm=not self.expected)
            ended = self.queue.job(job.number)
            if ended is None:
                self.counts["lost"] += 1
                return
            if ended.state == "done":
                break
            if ended.state == "failed":
                print(self.queue.log(job.number)[-2000:], file=sys.stderr)
                self.counts["lost"] += 1
                return
            folder = Path(job.folder)
            # A run that was killed before it wrote its config starts again in the same folder.
            arguments = ("resume", str(folder)) if (folder / "config.toml").is_file() else job.arguments
            job = self.queue.command(arguments, folder)
            self.counts["resumed"] += 1
        (adapter,) = Path(job.folder).glob("*.safetensors")
        tensors = load_file(adapter)
        self.expected = self.expected or tensors
        same = tensors.keys() == self.expected.keys() and all(
            torch.equal(tensors[n], self.expected[n]) for n in tensors
        )
        self.counts["different"] += not same

    def _disturb(self, number: int, calm: bool) -> None:
        """Wait until a job ends. Stop or kill it or the worker at a random moment, unless `calm`."""
        moment = time.monotonic() + self.draw.uniform(2, 25)
        what = None if calm else self.draw.choice(["stop", "kill", "kill", "kill the worker", None])
        while (job := self.queue.job(number)) is not None and job.state in ("waiting", "running"):
            if what and job.state == "running" and time.monotonic() > moment:
                self.counts[what] += 1
                if what == "stop":
                    with contextlib.suppress(OSError, LorakitError):
                        run_folder.RunFolder(job.folder).request_stop()
                for process in self._processes(job.pid if what == "kill" else None):
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                what = None
            if job.state == "waiting" and not self.queue.is_working():
                self.queue.start()
            time.sleep(0.3)

    def _processes(self, pid: int | None) -> list[psutil.Process]:
        """Return the process with this id, or the worker of this queue if `pid` is None."""
        if pid is not None:
            return [psutil.Process(pid)] if psutil.pid_exists(pid) else []
        mine = ["-m", "lorakit.runs.queue", str(self.runs.resolve())]
        running = psutil.process_iter(["cmdline"])
        return [process for process in running if (process.info["cmdline"] or [])[1:] == mine]

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Request the page of the front end, and read its open handles and its memory."""
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=20).read()
            self.counts["pages"] += 1
        with contextlib.suppress(psutil.Error):
            front_end = psutil.Process(process.pid)
            self.peaks["handles of the front end"] = front_end.num_fds()
            self.peaks["MiB of the front end"] = front_end.memory_info().rss >> 20
            for name, value in list(self.peaks.items())[:2]:
                self.peaks.setdefault(f"{name}, first", value)


def main() -> None:
    """Run the soak test, print and write the counts; exit with 1 if a run was lost or an adapter differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="duration (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the interruptions (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the counts to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"LORAKIT_CACHE": str(Path(scratch) / "cache"), "OMP_NUM_THREADS": "1"}
        soak = Soak(Path(scratch), args.seed)
        soak.runs.mkdir()
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "ui.py"),
            "--runs",
            str(soak.runs),
            "--port",
            str(PORT),
        ]
        front_end = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60 * args.minutes
        try:
            while time.monotonic() < end:
                soak.turn()
                soak.watch(front_end)
        finally:
            front_end.terminate()
            front_end.wait()
        time.sleep(1)
        left = [path for path in Path(scratch).rglob(".*") if atomic.TEMPORARY.fullmatch(path.name)]
        soak.counts["temporary files in finished runs"] = sum(".queue" not in path.parts for path in left)
    counts = {**dict(soak.counts), **soak.peaks, "lost": soak.counts["lost"], "different": soak.counts["different"]}
    for name, value in counts.items():
        print(f"{name:<40}{value:>8}")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    raise SystemExit(bool(counts["lost"] or counts["different"]))


if __name__ == "__main__":
    main()
