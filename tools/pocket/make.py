"""`python -m tools.pocket.make --work DIR --output DIR` makes the bundled model from nothing. Rerun to go on."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tools.pocket.recipe import SHIPPED, SMOKE, Recipe


def _quiet() -> None:
    """One thread a worker, and none of the libraries' progress bars."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def stages(recipe: Recipe, work: Path, output: Path, processes: int) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Every stage: the file that shows it is done, and what to run. Later stages read the files of earlier ones."""
    from tools.pocket import autoencoder, dataset, decoder, denoiser, export, text, tokenizer, train_classifier, workers

    def table() -> None:
        from tools.pocket import measure

        values, images = measure.table(output, 512 if recipe is SHIPPED else 16, steps=30 if recipe is SHIPPED else 4)
        measure.sheet(images[:64], work / "samples.png")
        print(measure.text_table(values), flush=True)
        (work / "table.json").write_text(json.dumps(values, indent=2) + "\n")

    def ship() -> None:
        export.export(recipe, work, output)
        (work / "export.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    renders = work / "renders"
    last = renders / f"captions-{-(-recipe.pictures // dataset.SHARD) - 1:04d}.json"
    steps: dict[str, tuple[Path, Callable[[], None]]] = {
        "render": (last, lambda: dataset.make(renders, recipe.pictures, recipe.size, processes)),
        "tokenizer": (
            work / "tokenizer" / "special_tokens_map.json",
            lambda: tokenizer.make(work / "tokenizer", recipe.captions, recipe.max_tokens),
        ),
        "autoencoder": (work / "vae.pt", lambda: workers.launch(autoencoder.train, processes, recipe, work)),
        "text": (work / "text.pt", lambda: workers.launch(text.train, processes, recipe, work)),
        "judge": (
            work / "classifier.safetensors",
            lambda: workers.launch(train_classifier.train, processes, recipe, work),
        ),
        "latents": (work / "states.npy", lambda: workers.launch(denoiser.prepare, processes, recipe, work)),
        "unet": (work / "unet.pt", lambda: workers.launch(denoiser.train, processes, recipe, work)),
        "decoder": (work / "decoder.pt", lambda: workers.launch(decoder.train, processes, recipe, work)),
        "export": (work / "export.json", ship),
        "table": (work / "table.json", table),
    }
    if recipe.decoder_pictures == 0:
        del steps["decoder"]
    return steps


def make(recipe: Recipe, work: Path, output: Path, processes: int, only: list[str] | None = None) -> None:
    """Run every stage (or `only` these) that is not done yet, and note how long each took."""
    work.mkdir(parents=True, exist_ok=True)
    for name, (result_file, run) in stages(recipe, work, output, processes).items():
        if only and name not in only:
            continue
        if result_file.exists():
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: starts", flush=True)
        start = time.monotonic()
        run()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pocket.make", description="Make lorakit's bundled model from nothing."
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/pocket"),
        help="state, renders, caches and previews (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/pocket-weights"), help="the pipeline's folder (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a run of under a minute that shows that everything works; it draws nothing",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="one-thread workers; 1 on a GPU (default: %(default)s)"
    )
    parser.add_argument("--stages", nargs="+", help="run only these")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error("--processes must be 1 or more")
    _quiet()
    stage_names = list(stages(SMOKE, options.work, options.output, 1))
    if unknown := [name for name in options.stages or () if name not in stage_names]:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(stage_names)}")
    make(SMOKE if options.smoke else SHIPPED, options.work, options.output, options.processes, options.stages)


if __name__ == "__main__":
    main()
