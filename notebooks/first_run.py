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
# From a folder of photos to an adapter that is compared with its base. The first part takes the small base and the
# photos that lorakit ships and needs no GPU: about two minutes. The second part does the same with Stable Diffusion XL
# and your own photos where there is a GPU (Colab, Kaggle), and is skipped where there is none.
#
# lorakit is installed from its folder: `%pip install -q ./lorakit`. Restart the kernel after that.

# %%
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from IPython.display import HTML, Image, display

import lorakit
from lorakit.cli.demo import write_photos

WORK = Path(os.environ.get("LORAKIT_NOTEBOOK_FOLDER", "first-run"))  # where everything goes
STEPS = int(os.environ.get("LORAKIT_NOTEBOOK_STEPS", "200"))  # the preset's 400 are for five photos; here are sixteen

# %% [markdown]
# ## Photos
#
# Sixteen pictures of a toy that the base has never seen, each with its caption in a text file beside it.

# %%
photos = WORK / "photos"
if not photos.exists():
    write_photos("zib", photos)
print(f"{len(list(photos.glob('*.png')))} photos; the first caption: {(photos / '01.txt').read_text().strip()}")
display(*[Image(str(path), width=96) for path in sorted(photos.glob("*.png"))[:3]])

# %% [markdown]
# ## Options
#
# A preset, and what is different from it. `lorakit.preflight` finds what would keep the run from starting, before a
# model is loaded, and says what the run would do.

# %%
short = {"train.prior": "none", "sample.steps": 2, "sample.at_start": False} if STEPS < 50 else {}  # of a test
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
# ## Training, followed live
#
# A listener is any function that takes an event. This one redraws one line, and one picture.


# %%
class Follow:
    """Shows where a run is: one line and the newest samples, each in a place of its own."""

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
# Equal seeds, one row for each strength: 0 is the base alone.

# %%
grid, *pictures = lorakit.sample(result.adapter, config.sample.prompts, strengths=(0, 1), folder=WORK / "compared")
display(Image(str(grid)))

# %% [markdown]
# The file is a LoRA as A1111, Forge and ComfyUI read it. The same in words:

# %%
print(lorakit.inspect(result.adapter).to_text())

# %% [markdown]
# ## The same with Stable Diffusion XL
#
# Five to thirty photos of your own in the folder `my-photos`, a name for what they show, and a GPU with 16 GB (a T4
# takes the preset `subject-sdxl-lowmem`).

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
