"""Run the nodes in a real ComfyUI server: train, cancel, continue, and compare the delta W that its loader applies.

    python integrations/comfyui/try_server.py COMFYUI_FOLDER --lorakit LORAKIT_PYTHON [--base FILE] [--folder DIR]

Run it with ComfyUI's Python. The server uses its own --base-directory, so ComfyUI's folders do not change. It runs on
the CPU, on loopback. Without --base, the script writes a narrow Stable Diffusion 1.5 with random weights. It takes 4 GB
of disk, 6 GiB of memory and some minutes on two cores, so it is not among the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PORT, STEPS, STRENGTH, BASE = 8199, 20, 0.75, "base.safetensors"
ADDRESS = f"http://127.0.0.1:{PORT}"
OPTIONS = """
train.prior_loss_weight = 0
[train]
holdout = 0
validate_at_end = false
save_every = 10
validate_every = 20
[data]
resolution = 64
[sample]
at_start = true
every = 10
steps = 1
[optimizer]
learning_rate = 1e-2
[adapter]
train_text_encoder = true
[memory]
device = cpu
"""


def main() -> None:
    """Run all checks and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--lorakit", required=True, help="lorakit's Python")
    parser.add_argument("--base", type=Path, help="a Stable Diffusion 1.5 checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        lay_out(folder, args.base or random_base(folder / "random.safetensors", args.lorakit))
        with server(args.comfyui.resolve(), folder, args.lorakit):
            asyncio.run(session(folder))


# Layer names and number of blocks are those of Stable Diffusion 1.5, so ComfyUI recognizes the model. Text encoder and
# VAE have their full size. All blocks of the UNet have 320 channels, so it has a ninth of the weights.
RANDOM = """
import pathlib, sys, types
import small_models as m, torch
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
parts = {"unet": m.unet("sd1", block_out_channels=(320,) * 4), "vae": m.vae("sd1")}
parts["text_encoder"] = m.text(m.CLIPTextModel, m.WORDS, 768, 12, openclip=False)
m.write(pathlib.Path(sys.argv[1]), "sd1", types.SimpleNamespace(**parts), torch.bfloat16)
"""


def random_base(file: Path, python: str) -> Path:
    """Write a base with random weights, with the function that the tests use."""
    file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([python, "-c", RANDOM, str(file)], env=environment, check=True)
    return file


def lay_out(folder: Path, base: Path) -> None:
    """Create ComfyUI's folders with links to the nodes and the base, and with photos of noise."""
    for name in ("custom_nodes", "models/checkpoints", "models/loras", "models/embeddings", "photos", "user", "input"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for link, target in {"custom_nodes/lorakit": HERE, f"models/checkpoints/{BASE}": base}.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target.resolve())
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{number}.png")


@contextlib.contextmanager
def server(comfyui: Path, folder: Path, python: str) -> Iterator[None]:
    """Start ComfyUI's server, wait until it answers, and stop it at the end of the context."""
    words = [sys.executable, "main.py", "--cpu", "--force-fp32", "--disable-api-nodes", "--listen", "127.0.0.1"]
    words += ["--port", str(PORT), "--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    environment = os.environ | {"LORAKIT_PYTHON": python, "PYTHONPATH": str(ROOT)}
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, cwd=comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    ask("/system_stats")
                    break
                if process.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text(encoding="utf-8")[-2000:])
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(60)


def ask(path: str, body: object = None) -> Any:
    """Send a request to the server and return its answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(ADDRESS + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: {error.read().decode()[:2000]}") from None
    return json.loads(text) if text else None


def workflow() -> dict[str, dict[str, Any]]:
    """Return a workflow: photos, check, train, compare, and a checkpoint of the trained models that ComfyUI writes."""
    run = {"base": BASE, "kind": "subject", "name": "sks toy", "preset": "subject-sd15"}
    run |= {"steps": STEPS, "seed": 1, "prompts": "a photo of sks toy", "options": OPTIONS, "photos": ["photos", 0]}
    save = {"model": ["train", 0], "clip": ["train", 1], "vae": ["base", 2], "filename_prefix": "applied"}
    return {
        "photos": {"class_type": "LorakitPhotos", "inputs": {"folder": "PHOTOS", "captions": ""}},
        "check": {"class_type": "LorakitCheck", "inputs": run},
        "train": {"class_type": "LorakitTrain", "inputs": {**run, "strength": STRENGTH}},
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": BASE}},
        "save": {"class_type": "CheckpointSave", "inputs": save},
        "pictures": {"class_type": "SaveImage", "inputs": {"images": ["train", 3], "filename_prefix": "samples"}},
        "compare": {
            "class_type": "LorakitCompare",
            "inputs": {"run": ["train", 4], "prompt": "sks toy", "strengths": "0, 1", "last_checkpoints": 2},
        },
        "grid": {"class_type": "SaveImage", "inputs": {"images": ["compare", 0], "filename_prefix": "grid"}},
    }


async def session(folder: Path) -> None:
    """Queue the workflow, cancel it, queue it again and check the results."""
    nodes = ask("/object_info")
    report("the nodes are there", sorted(name for name in nodes if name.startswith("Lorakit")), bool(nodes))
    graph = workflow()
    graph["photos"]["inputs"]["folder"] = str(folder / "photos")
    begin = time.monotonic()
    first, _ = await queue(graph, cancel_at=3)
    (run,) = (folder / "output/lorakit").glob("sks-toy-*")
    state = json.loads((run / "state.json").read_text())
    interrupted = first["status"]["messages"][-1][0] == "execution_interrupted"
    report(
        "cancel stops and saves",
        f"{state['state']} at step {state['step']}",
        interrupted and state["state"] == "stopped",
    )
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    report("a checkpoint is there to go on from", checkpoints[-1], len(checkpoints) > 0)
    second, counts = await queue(graph)
    texts = second["outputs"]["check"]["text"][0]
    report("the check shows the plan", texts.splitlines()[-1].strip(), "strength: rank" in texts)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    starts = [event["resumed"] for event in log if event["event"] == "start"]
    steps = [event["step"] for event in log if event["event"] == "step"]
    report("the same again goes on", f"{starts}, steps {steps[0]} to {steps[-1]}", starts == [False, True])
    report("no step is done twice", len(steps), steps == list(range(1, STEPS + 1)))
    report("it ends well", second["status"]["status_str"], second["status"]["completed"])
    report("progress and previews reach the page", dict(counts), counts["progress"] > 1 and counts["preview"] > 0)
    name = second["outputs"]["train"]["text"][0].splitlines()[0]
    installed = folder / "models/loras" / name
    report("the file is in the LoRA folder", name, installed.is_file())
    report("ComfyUI lists it", name, name in ask("/models/loras"))
    compare(folder, installed, STRENGTH)
    for prefix in ("samples", "grid"):
        with Image.open(next((folder / "output").glob(f"{prefix}_*.png"))) as picture:
            report(f"{prefix} is a picture", picture.size, min(picture.size) > 32)
    await others(folder, name)
    print(f"{time.monotonic() - begin:.0f} s in all")


async def others(folder: Path, name: str) -> None:
    """Run Inspect, Merge and ComfyUI's own Load LoRA on the file, and check their results."""
    lora = {"model": ["base", 0], "clip": ["base", 1], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    graph = {
        "base": workflow()["base"],
        "inspect": {"class_type": "LorakitInspect", "inputs": {"lora_name": name}},
        "merge": {
            "class_type": "LorakitMerge",
            "inputs": {"lora_name": name, "base": BASE, "strength": 1.0, "name": ""},
        },
        "lora": {"class_type": "LoraLoader", "inputs": lora},
        "save": {
            "class_type": "CheckpointSave",
            "inputs": {"model": ["lora", 0], "clip": ["lora", 1], "vae": ["base", 2], "filename_prefix": "applied"},
        },
    }
    done, _ = await queue(graph)
    text = done["outputs"]["inspect"]["text"][0].splitlines()[0]
    report("inspect has ComfyUI's line first", text, text.startswith("ComfyUI: "))
    compare(folder, folder / "models/loras" / name, 1.0)
    merged = folder / "models/checkpoints" / done["outputs"]["merge"]["text"][0]
    with safe_open(merged, "pt") as file:
        report(
            "merge writes a checkpoint",
            merged.name,
            any(key.startswith("model.diffusion") for key in list(file.keys())),
        )


async def queue(graph: dict[str, Any], cancel_at: int = 0) -> tuple[dict[str, Any], Counter[str]]:
    """Queue a workflow and wait; return its history and the number of messages of each type to the page.

    Args:
        cancel_at: cancel as soon as the training is at this step.
    """
    counts: Counter[str] = Counter()
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{ADDRESS}/ws?clientId=try") as socket:
        number = ask("/prompt", {"prompt": graph, "client_id": "try"})["prompt_id"]
        while number not in (history := ask(f"/history/{number}")):
            with contextlib.suppress(asyncio.TimeoutError):
                message = await socket.receive(timeout=2)
                if message.type == aiohttp.WSMsgType.BINARY:
                    counts["text" if message.data[:4] == b"\0\0\0\3" else "preview"] += 1
                elif message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    counts[event["type"]] += 1
                    data = event["data"]
                    if (
                        cancel_at
                        and event["type"] == "progress"
                        and data["node"] == "train"
                        and data["value"] >= cancel_at
                    ):
                        cancel_at = 0
                        ask("/interrupt", {})
        for kind, facts in history[number]["status"]["messages"]:
            if kind == "execution_error":
                raise SystemExit(f"FAILED: {facts['node_type']}: {facts['exception_message']}")
        return history[number], counts


def compare(folder: Path, adapter: Path, strength: float) -> None:
    """Compare the change of each weight by ComfyUI's loader with the product of the factors in the file."""
    keys = gzip.decompress((ROOT / "tests/formats/keys/sd15.tsv.gz").read_bytes()).decode().splitlines()
    names = {by_sgm: by_blocks for _, by_blocks, by_sgm, *_ in (line.split("\t") for line in keys)}
    saved = max((folder / "output").glob("applied_*.safetensors"), key=lambda path: path.stat().st_mtime)
    done, largest, changed = 0, 0.0, 0
    base = folder / "models/checkpoints" / BASE
    with safe_open(base, "pt") as before, safe_open(saved, "pt") as after, safe_open(adapter, "pt") as file:
        stems = {
            key.removesuffix(".lora_down.weight") for key in list(file.keys()) if key.endswith(".lora_down.weight")
        }
        all_keys = set(after.keys())
        for key in list(before.keys()):
            if not key.endswith(".weight") or key not in all_keys or key.startswith("first_stage"):
                continue
            stem = key.removesuffix(".weight").replace("model.diffusion_model.", "lora_unet_")
            stem = stem.replace("cond_stage_model.transformer.", "lora_te_").replace(".", "_")
            stem = names.get(stem, stem)
            change = after.get_tensor(key).double() - before.get_tensor(key).double()
            if stem not in stems:
                changed += bool(change.abs().max() > 1e-7)  # the smallest step of fp16
                continue
            down, up = (file.get_tensor(f"{stem}.lora_{part}.weight").double() for part in ("down", "up"))
            scale = file.get_tensor(f"{stem}.alpha").double() / len(down) * strength
            expected = up.flatten(1) @ down.flatten(1) * scale
            assert expected.abs().max() > 0
            # ComfyUI has the text encoder in fp16 and rounds the sum.
            rounding = torch.finfo(after.get_tensor(key).dtype).eps / 2 * float(after.get_tensor(key).abs().max())
            error = float((change.flatten(1) - expected).abs().max()) - rounding
            largest = max(largest, error / float(expected.abs().max()))
            done += 1
    report("ComfyUI's loader applies every module", f"{done} of {len(stems)}", done == len(stems) > 100)
    report(f"delta W at strength {strength:g} is as trained", f"largest relative error {largest:.1e}", largest < 1e-3)
    report("no other weight is changed", changed, changed == 0)
    saved.unlink()


def report(what: str, fact: object, holds: bool) -> None:
    """Print the line of a check; exit with 1 if it does not hold."""
    print(f"{'ok' if holds else 'FAILED'}: {what}: {fact}", flush=True)
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
