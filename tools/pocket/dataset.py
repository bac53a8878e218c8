"""The training pictures on disk: pictures, labels and captions, rendered by several processes, resumable."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from lorakit.families.pocket.scene_captions import caption
from lorakit.families.pocket.scenes import render
from lorakit.families.pocket.spec import BODIES, COLOURS, EARS, FIELDS, TOY_DETAILS, look_of, random_spec
from lorakit.families.pocket.textures import texture

SHARD = 2000
TEXTURE_EVERY = 16  # one picture in so many is a texture, for the autoencoder only
VARIANTS = 2  # captions per picture
LABELS = (*FIELDS, "body", "ears", "second", "detail")  # the last four are -1 unless the picture shows a toy


def labels_of(seed: int) -> np.ndarray:
    """(9,) int8: the class of every label of the picture with this seed."""
    spec = random_spec(seed)
    values = [options.index(getattr(spec, field)) for field, options in FIELDS.items()]
    if spec.kind != "toy":
        return np.array([*values, -1, -1, -1, -1], np.int8)
    look = look_of(spec, seed)
    toy = (
        BODIES.index(look.body),
        EARS.index(look.ears),
        tuple(COLOURS).index(look.second),
        TOY_DETAILS.index(look.detail),
    )
    return np.array([*values, *toy], np.int8)


def render_shard(folder: Path, shard: int, size: int, count: int) -> int:
    """Write pictures [shard * SHARD, ...) to `pictures-N.npy`, `labels-N.npy` and `captions-N.json`. The captions file
    is written last, and marks a complete shard."""
    captions_file = folder / f"captions-{shard:04d}.json"
    if captions_file.exists():
        return shard
    seeds = range(shard * SHARD, shard * SHARD + count)
    pictures = np.stack([np.asarray(render(random_spec(s), s, size)) for s in seeds])
    np.save(folder / f"pictures-{shard:04d}.npy", pictures)
    np.save(folder / f"labels-{shard:04d}.npy", np.stack([labels_of(s) for s in seeds]))
    if shard % TEXTURE_EVERY == 0:
        np.save(folder / f"textures-{shard:04d}.npy", np.stack([np.asarray(texture(s, size)) for s in seeds]))
    partial = captions_file.with_suffix(".partial")
    partial.write_text(json.dumps([[caption(random_spec(s), s, v) for v in range(VARIANTS)] for s in seeds]))
    partial.replace(captions_file)
    return shard


def make(folder: Path, count: int, size: int, processes: int) -> None:
    """Render `count` pictures; shards that are already there are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(s, min(SHARD, count - s * SHARD)) for s in range(-(-count // SHARD))]
    if processes == 1:
        for shard, number in jobs:
            render_shard(folder, shard, size, number)
        return
    with ProcessPoolExecutor(processes) as pool:
        for future in [pool.submit(render_shard, folder, shard, size, number) for shard, number in jobs]:
            print(f"rendered shard {future.result() + 1} of {len(jobs)}", flush=True)


def load(folder: Path, name: str) -> np.ndarray:
    """All shards of `pictures`, `labels` or `textures` in one array."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"{name}-*.npy"))])


def captions(folder: Path) -> list[list[str]]:
    """VARIANTS captions for every picture."""
    return [texts for file in sorted(folder.glob("captions-*.json")) for texts in json.loads(file.read_text())]
