# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # lorakit: a first run
#
# This notebook trains an adapter on a folder of photos and compares it with its base. The first part uses the small
# base and the photos that lorakit ships. It needs no GPU and takes about two minutes. The second part does the same
# with Stable Diffusion XL and your own photos on a GPU (Colab, Kaggle). Without a GPU it is skipped.
#
# To install lorakit from its folder, run `%pip install -q ./lorakit`, then restart the kernel.

# %%
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from IPython.display import HTML, Image, display

import lorakit
from lorakit.cli.demo import write_photos

WORK = Path(os.environ.get("LORAKIT_NOTEBOOK_FOLDER", "first-run"))  # folder for all files
STEPS = int(os.environ.get("LORAKIT_NOTEBOOK_STEPS", "200"))  # sixteen photos need fewer than the preset's 400

# %% [markdown]
# ## Photos
#
# Sixteen pictures show a toy that the base has never seen. The caption of each picture is in a text file of the same
# name.

# %%
photos = WORK / "photos"
if not photos.exists():
    write_photos("zib", photos)
print(f"{len(list(photos.glob('*.png')))} photos; the first caption: {(photos / '01.txt').read_text().strip()}")
display(*[Image(str(path), width=96) for path in sorted(photos.glob("*.png"))[:3]])

# %% [markdown]
# ## Options
#
# The config is a preset with a few changes. `lorakit.preflight` finds problems before a model is loaded, and shows the
# plan of the run.

# %%
short = {"train.prior": "none", "sample.steps": 2, "sample.at_start": False} if STEPS < 50 else {}  # for tests
config = lorakit.load_config(
    "subject-pocket",
    {
        "data.folder": str(photos),
        "data.name": "sks toy",
        "train.steps": STEPS,
        "sample.prompts": ["a photo of a sks toy in the snow", "a photo of a sks toy at night"],
        "output.folder": str(WORK / "run"),
        **short,
    },
)
ready = lorakit.preflight(config)
print("\n".join([*ready.problems, *ready.lines()]))


# %% [markdown]
# ## Training with live output
#
# A listener is any function that takes an event. This one updates a line of text and a picture.


# %%
class Follow:
    """Shows the progress of a run: a line of text and the newest samples."""

    def __init__(self, samples):
        self.samples = samples
        self.line = display(HTML("starting"), display_id=True)
        self.picture = display(HTML(""), display_id=True)

    def __call__(self, event):
        if event.kind == "phase":
            self.line.update(HTML(event.facts["phase"]))
        elif event.kind == "progress":
            loss, left = event.facts["loss"], event.facts["eta_s"]
            self.line.update(HTML(f"step {event.step}, loss {loss:.4f}, {left or 0:.0f} s left"))
        elif event.kind == "sample":
            self.picture.update(Image(str(self.samples / event.facts["file"])))
        elif event.kind == "warning":
            print(event.facts["message"])
        elif event.kind == "done":
            self.line.update(HTML(f"done: {event.facts['adapter']}"))


result = lorakit.train(config, listeners=[Follow(WORK / "run" / "samples")])

# %% [markdown]
# ## Base and adapter, side by side
#
# The rows use the same seeds. There is one row for each strength; strength 0 is the base without the adapter.

# %%
grid, *pictures = lorakit.sample(result.adapter, config.sample.prompts, strengths=(0, 1), folder=WORK / "compared")
display(Image(str(grid)))

# %% [markdown]
# The file is a LoRA that A1111, Forge and ComfyUI can read. `lorakit.inspect` describes it:

# %%
print(lorakit.inspect(result.adapter).to_text())

# %% [markdown]
# ## The same with Stable Diffusion XL
#
# Put five to thirty of your own photos into the folder `my-photos`, and change `data.name` to what they show. You need
# a GPU with 16 GB; a T4 uses the preset `subject-sdxl-lowmem`.

# %%
mine = Path("my-photos")
if not torch.cuda.is_available():
    print("skipped: no GPU here")
elif not mine.is_dir():
    print("skipped: put photos into the folder my-photos")
else:
    memory = torch.cuda.get_device_properties(0).total_memory
    config = lorakit.load_config(
        "subject-sdxl" if memory > 20e9 else "subject-sdxl-lowmem",
        {
            "model.base": "stabilityai/stable-diffusion-xl-base-1.0",
            "data.folder": str(mine),
            "data.name": "sks toy",
            "output.folder": str(WORK / "sdxl"),
        },
    )
    ready = lorakit.preflight(config)
    print("\n".join([*ready.problems, *ready.lines()]))
    result = lorakit.train(config, listeners=[Follow(WORK / "sdxl" / "samples")])
    grid, *pictures = lorakit.sample(
        result.adapter, config.sample.prompts, strengths=(0, 1), folder=WORK / "sdxl-compared"
    )
    display(Image(str(grid)))
