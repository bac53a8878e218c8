"""The nodes: photos, check and plan, train, compare, inspect, merge. lorakit runs as a separate process."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from pathlib import Path

from . import child, host

CATEGORY = "lorakit"
PHOTOS = "LORAKIT_PHOTOS"
AUTO = "auto"
PRESETS = [
    AUTO,
    *(
        f"{kind}-{base}"
        for kind in ("subject", "style")
        for base in ("sd15", "sd15-lowmem", "sdxl", "sdxl-lowmem", "sd3", "pocket")
    ),
]
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
# Longest side of a preview during training, in pixels.
PREVIEW = 512

log = logging.getLogger("lorakit")


# -- photos -----------------------------------------------------------------------------------------------------------


class Photos:
    """A folder of photos, or pictures from the graph with captions."""

    CATEGORY, FUNCTION = CATEGORY, "gather"
    RETURN_TYPES, RETURN_NAMES = (PHOTOS, "INT"), ("photos", "count")
    INPUT_IS_LIST = True
    DESCRIPTION = "A folder of photos with captions in .txt files of the same names, or connected pictures."

    @classmethod
    def INPUT_TYPES(cls):
        captions = {
            "default": "",
            "multiline": True,
            "tooltip": "Captions of connected pictures: one line per picture, or one line for all",
        }
        return {
            "required": {
                "folder": ("STRING", {"default": "", "tooltip": "Folder of photos; nothing is written to it"})
            },
            "optional": {"images": ("IMAGE",), "captions": ("STRING", captions)},
        }

    @classmethod
    def IS_CHANGED(cls, folder, images=None, captions=None):
        return contents(Path(folder[0])) if folder[0] else ""

    def gather(self, folder, images=None, captions=None):
        """Return the folder of photos and their number."""
        if folder[0] and images is not None:
            raise child.Failed("Photos: give a folder or connect pictures, not both")
        if images is not None:
            place = save_pictures(images, captions or [""])
        elif folder[0]:
            place = Path(folder[0]).expanduser()
        else:
            raise child.Failed("Photos: name a folder, or connect pictures")
        if not place.is_dir():
            raise child.Failed(f"Photos: {place}: there is no such folder")
        count = sum(path.suffix.lower() in PICTURES for path in place.rglob("*"))
        if not count:
            raise child.Failed(f"Photos: {place} has no pictures")
        return str(place), count


def contents(folder):
    """Return a digest of the names, sizes and times of a folder's files."""
    try:
        files = sorted(path for path in folder.expanduser().rglob("*") if path.is_file())
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        return str(error)
    return hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()


def save_pictures(batches, captions):
    """Write pictures as PNG, with captions. The folder's name is a digest of both, so equal inputs have one folder."""
    from PIL import Image

    pictures = [picture for batch in batches for picture in batch]
    lines = [line.strip() for text in captions for line in text.splitlines() if line.strip()]
    if len(lines) not in (0, 1, len(pictures)):
        raise child.Failed(
            f"Photos: {len(lines)} captions for {len(pictures)} pictures: give one for each, or one for all"
        )
    lines = lines * len(pictures) if len(lines) == 1 else lines
    arrays = [(picture.clamp(0, 1) * 255).round().byte().cpu().numpy() for picture in pictures]
    digest = hashlib.sha256("\n".join(lines).encode())
    for array in arrays:
        digest.update(repr(array.shape).encode() + array.tobytes())
    place = host.work_folder("photos", digest.hexdigest()[:16])
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        half = Path(temporary, "photos")
        half.mkdir()
        for number, array in enumerate(arrays):
            Image.fromarray(array[..., :3]).save(half / f"{number + 1:04d}.png")
            if lines:
                (half / f"{number + 1:04d}.txt").write_text(lines[number] + "\n", encoding="utf-8")
        half.rename(place)
    return place


# -- a run ------------------------------------------------------------------------------------------------------------


def settings():
    """Return the inputs that the nodes Train and Check share."""
    text = {"default": "", "multiline": True}
    return {
        "photos": (PHOTOS,),
        "base": (host.checkpoints(), {"tooltip": "The checkpoint to train on"}),
        "kind": (["subject", "style"],),
        "name": ("STRING", {"default": "sks toy", "tooltip": "A rare word and, for a subject, its class: sks toy"}),
        "preset": (PRESETS, {"tooltip": "auto: chosen by base and kind"}),
        "steps": ("INT", {"default": 0, "min": 0, "max": 1_000_000, "tooltip": "0: the preset's number of steps"}),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
        "prompts": ("STRING", {**text, "tooltip": "Prompts for samples, one per line"}),
        "options": ("STRING", {**text, "tooltip": "Options of lorakit, one per line: adapter.rank = 16"}),
    }


def arguments(photos, base, kind, name, preset, **rest):
    """Return the arguments of a run, without the command."""
    result = [photos, f"--{kind}", name, "--base", host.full_path("checkpoints", base)]
    result += [] if preset == AUTO else ["--preset", preset]
    for prompt in filter(None, map(str.strip, rest["prompts"].splitlines())):
        result += ["--prompt", prompt]
    sets = [f"train.seed={rest['seed']}", *([f"train.steps={rest['steps']}"] if rest["steps"] else [])]
    return result + [word for text in [*sets, *assignments(rest["options"])] for word in ("--set", text)]


def assignments(text):
    """Return `section.key=value` of each line. A line `[section]` sets the section of the lines after it."""
    section, result = "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        header = re.fullmatch(r"\[([\w.]+)\]", line)
        if header:
            section = f"{header[1]}."
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise child.Failed(f"options: {line!r}: write it as section.key = value")
        result.append(f"{section}{key.strip()}={value.strip()}")
    return result


class Check:
    """Checks the photos and shows the plan of a run with these settings."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "check", True
    RETURN_TYPES, RETURN_NAMES = ("STRING", "IMAGE"), ("report", "photos")
    DESCRIPTION = "Checks the photos and shows the plan of the run. It loads no model."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": settings()}

    def check(self, photos, **inputs):
        """Return the report, and the first photos as one picture."""
        try:
            text = host.run(["check", *arguments(photos, **inputs)])
        except child.Failed as error:
            text = f"The run cannot start yet:\n{error}"
        found = sorted(path for path in Path(photos).rglob("*") if path.suffix.lower() in PICTURES)
        pictures = []
        for path in found[:16]:
            try:
                pictures.append(host.open_picture(path))
            except OSError:  # the report names the file
                continue
        rows = [pictures[start : start + 4] for start in range(0, len(pictures), 4)]
        preview = host.images([host.sheet(rows)]) if rows else host.images([host.blank()])
        return {"ui": {"text": [text]}, "result": (text, preview)}


class Train:
    """Trains in a separate process. The same settings continue a run that was cancelled."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "train", True
    RETURN_TYPES = ("MODEL", "CLIP", "STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("model", "clip", "lora_name", "samples", "run")
    DESCRIPTION = "Trains a LoRA and copies it into the LoRA folder. Cancel saves the run; queue again to continue."

    @classmethod
    def INPUT_TYPES(cls):
        strength = {
            "default": 1.0,
            "min": -10.0,
            "max": 10.0,
            "step": 0.05,
            "tooltip": "Strength of the LoRA in the outputs model and clip",
        }
        return {
            "required": {**settings(), "strength": ("FLOAT", strength)},
            "optional": {"model": ("MODEL",), "clip": ("CLIP",)},
            "hidden": {"node": "UNIQUE_ID"},
        }

    def train(self, photos, strength, model=None, clip=None, node=None, **inputs):
        """Return model and CLIP with the adapter, the adapter's name, the last samples and the run's folder."""
        line = arguments(photos, **inputs)
        place = run_folder(line, inputs["name"])
        state = read_json(place / "state.json")
        if state.get("state") == "done" and (place / state["adapter"]).is_file():
            host.say(f"a run with these settings has finished already: {place}", node)
        else:
            host.free_memory()
            has_begun = (place / "config.toml").is_file()
            words = ["resume", str(place)] if has_begun else ["train", *line, "--output", str(place)]
            last = child.follow([*words, "--json"], Progress(place, node), host.interrupted)
            if last["event"] == "stopped":
                import comfy.model_management

                host.say(f"{last['message']}; queue the same node again to continue", node)
                comfy.model_management.throw_exception_if_processing_interrupted()
                raise child.Failed(f"{last['message']}; queue the same node again to continue")
            state = read_json(place / "state.json")
        name = install(place / state["adapter"])
        model, clip = host.load(inputs["base"], model, clip)
        if hasattr(model, "clone") and hasattr(clip, "clone"):
            model, clip = host.apply(model, clip, host.full_path("loras", name), strength)
        grids = sorted(place.glob("samples/step-*.png"))
        samples = host.images([host.open_picture(grids[-1])]) if grids else host.images([host.blank()])
        return {"ui": {"text": [f"{name}\n{place}"]}, "result": (model, clip, name, samples, str(place))}


def run_folder(line, name):
    """Return the folder of a run. The same settings and photos give the same folder."""
    digest = hashlib.sha256("\n".join([*line, contents(Path(line[0]))]).encode("utf-8", "replace")).hexdigest()
    stem = re.sub(r"\W+", "-", name).strip("-")[:40] or "run"
    return host.work_folder(f"{stem}-{digest[:8]}")


def read_json(path):
    """Return the content of a JSON file, or {} if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def install(adapter):
    """Copy an adapter into the host's LoRA folder under a name that no file has, and return the name."""
    import folder_paths

    place = folder_paths.get_folder_paths("loras")[0]
    Path(place).mkdir(parents=True, exist_ok=True)
    line = ["install-adapter", str(adapter), "--into", "comfyui", "--at", place, "--any-folder", "--json"]
    return Path(json.loads(host.run(line))["adapter"]).name


class Progress:
    """Shows the events of a run: the progress bar, the newest samples, and lines of text."""

    def __init__(self, place, node):
        self.place, self.node = place, node
        self.bar, self.step, self.preview = None, 0, None

    def __call__(self, event):
        import comfy.utils

        kind = event["event"]
        if kind == "start":
            self.bar = comfy.utils.ProgressBar(event["steps"])
        elif kind == "sample":
            self.preview = ("JPEG", host.open_picture(self.place / "samples" / event["file"]), PREVIEW)
            self.show()
        elif kind in ("step", "checkpoint", "progress"):
            self.step = event.get("step") or self.step
            if kind == "progress":
                self.show()
                host.say(progress_line(event), self.node)
        elif kind == "phase":
            host.say(event["phase"], self.node)
        elif kind in ("message", "warning"):
            log.info("%s", event["message"])

    def show(self):
        """Update the progress bar and the preview."""
        if self.bar is not None:
            self.bar.update_absolute(self.step, preview=self.preview)


def progress_line(event):
    """Return a line with step, loss and remaining time."""
    facts = [f"step {event.get('step')}"]
    facts += [f"loss {event['loss']:.4f}"] if event.get("loss") is not None else []
    facts += [f"{event['eta_s'] / 60:.0f} min left"] if event.get("eta_s") else []
    return ", ".join(facts)


# -- finished adapters ------------------------------------------------------------------------------------------------


class Compare:
    """Draws one prompt with the last checkpoints of a run at each strength."""

    CATEGORY, FUNCTION = CATEGORY, "compare"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("grid",)
    DESCRIPTION = "Draws one prompt with the checkpoints of a run: a column per checkpoint, a row per strength."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "run": ("STRING", {"forceInput": True}),
                "prompt": ("STRING", {"default": "", "tooltip": "Empty: the first sample prompt of the run"}),
                "strengths": ("STRING", {"default": "0, 0.5, 0.75, 1"}),
                "last_checkpoints": (
                    "INT",
                    {"default": 4, "min": 1, "max": 20, "tooltip": "Number of checkpoints, from the last"},
                ),
            }
        }

    def compare(self, run, prompt, strengths, last_checkpoints):
        """Return the grid: a column per checkpoint and a row per strength."""
        steps = sorted(path for path in Path(run, "checkpoints").glob("step-*") if path.is_dir())[-last_checkpoints:]
        if not steps:
            raise child.Failed(f"Compare: {run} has no checkpoints")
        host.free_memory()
        columns = [draw(step, prompt, strengths.replace(" ", "")) for step in steps]
        grid = host.sheet([[column[row] for column in columns] for row in range(len(columns[0]))])
        return (host.images([grid]),)


def draw(step, prompt, strengths):
    """Draw the prompt with a checkpoint; return a picture for each strength."""
    with tempfile.TemporaryDirectory() as temporary:
        line = ["export", str(step), "--to", "kohya", "--output", temporary, "--json"]
        exported = json.loads(host.run(line))["kohya"]
        line = ["sample", exported, "--base", base_of(step.parents[1]), f"--strength={strengths}", "--json"]
        line += ["--prompt", prompt] if prompt.strip() else []
        files = json.loads(host.run([*line, "--output", str(Path(temporary, "pictures"))]))["files"]
        count = strengths.count(",") + 1
        return [host.open_picture(path) for path in files[:: len(files) // count]]


def base_of(run_place):
    """Return the base in a run's config."""
    text = Path(run_place, "config.toml").read_text(encoding="utf-8")
    return json.loads(re.search(r'^base = (".*")$', text, re.MULTILINE)[1])


class Inspect:
    """Describes a LoRA file and shows which programs can read it."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "inspect", True
    RETURN_TYPES, RETURN_NAMES = ("STRING", "STRING"), ("report", "trigger")
    DESCRIPTION = "Shows base, method, rank, trigger and strength of a LoRA file, and the programs that can read it."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"lora_name": (host.loras(),)}}

    def inspect(self, lora_name):
        """Return the report, with ComfyUI's line first, and the trigger for the prompt."""
        report = host.run(["inspect", host.full_path("loras", lora_name)])
        reading = re.search(r"^ +(?:yes|NO) +ComfyUI +(.*)$", report, re.MULTILINE)
        trigger = re.search(r"^ +in prompts +(.*?)(?:  \(<lora:.*)?$", report, re.MULTILINE)
        text = f"ComfyUI: {reading[1] if reading else 'lorakit does not know if ComfyUI reads this'}\n{report}"
        return {"ui": {"text": [text]}, "result": (text, trigger[1] if trigger and "\n  trigger " in report else "")}


class Merge:
    """Merges a LoRA into a checkpoint and writes it under a new name."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "merge", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("checkpoint_name",)
    DESCRIPTION = "Merges a LoRA into a checkpoint and writes the result as a new checkpoint. It replaces no file."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "lora_name": (host.loras(),),
                "base": ([name for name in host.checkpoints() if name != host.BUNDLED],),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
                "name": ("STRING", {"default": "", "tooltip": "Name of the new checkpoint. Empty: from both names"}),
            }
        }

    def merge(self, lora_name, base, strength, name):
        """Write the checkpoint and return its name."""
        import folder_paths

        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or f"{Path(base).stem}-{Path(lora_name).stem}"
        place, number = Path(folder_paths.get_folder_paths("checkpoints")[0]), 1
        target = place / f"{stem}.safetensors"
        while target.exists():
            number += 1
            target = place / f"{stem}-{number}.safetensors"
        line = ["merge", host.full_path("loras", lora_name), "--base", host.full_path("checkpoints", base)]
        host.run([*line, f"--strength={strength}", "--output", str(target), "--json"])
        return {"ui": {"text": [target.name]}, "result": (target.name,)}
