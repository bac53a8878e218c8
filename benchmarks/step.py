"""Compare lorakit's training step with a plain PEFT + accelerate loop: same model, photos, batch, rank and precision.

    python benchmarks/step.py [--base pocket] [--resolution 64] [--batch 4] [--rounds 5] [--steps 20] [--json FILE]

The plain loop follows the diffusers examples: a DataLoader decodes and resizes the photos, VAE and text encoder run in
each step, PEFT adds LoRA, and each step reads the loss. The loops take turns in one process, so changes of clock rate
affect both; quote the ratio. Memory is the peak of allocated bytes on CUDA. On a CPU it is the peak resident memory of
a process that runs one loop.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from PIL import Image

from lorakit import adapters, config, families
from lorakit.core.events import Events
from lorakit.data import checks
from lorakit.engine import device as devices, device_memory
from lorakit.training.loss_step import LossStep
from lorakit.training.optimizer_step import OptimizerStep
from lorakit.training.precompute import precompute


def main() -> None:
    """Measure, print the table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="pocket", help="base to train (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of photos (default: 16 random pictures)")
    parser.add_argument(
        "--resolution", type=int, default=64, help="training resolution in pixels (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4, help="batch size (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each loop (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each loop in a round")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--only", choices=("lorakit", "plain"), help="run one loop and print its peak memory in bytes")
    parser.add_argument("--json", type=Path, help="write the rows to this JSON file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 2, 4

    with tempfile.TemporaryDirectory() as scratch:
        photos = arguments.photos or random_photos(Path(scratch), arguments.resolution)
        run_config = config.load(
            None,
            {
                "model.base": arguments.base,
                "data.folder": str(photos),
                "data.name": "sks toy",
                "data.resolution": arguments.resolution,
                "adapter.rank": arguments.rank,
                "train.steps": arguments.steps,
                "train.batch_size": arguments.batch,
                "train.holdout": 0.0,
            },
        )
        make = {"lorakit": ours, "plain": plain}
        if arguments.only:
            make[arguments.only](run_config)(arguments.steps)
            print(own_peak())
            return
        loops = {name: loop(run_config) for name, loop in make.items()}
        peaks: dict[str, float] = {}
        for name, loop in loops.items():  # warm-up: allocations, lazy imports, kernel choice
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            loop(2)
            if torch.cuda.is_available():
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
        times = common.alternate(loops, arguments.rounds, arguments.steps)

    if not peaks:
        peaks = {name: peak_alone(name) for name in times}
    rows = common.timing_rows("pocket" if arguments.base == "pocket" else "base", times, arguments.batch, "plain")
    rows += [common.row(f"{name} peak", value, "MiB") for name, value in peaks.items()]
    common.finish(rows, arguments.json)


def peak_alone(name: str) -> float:
    """Return the peak resident memory in MiB of a process that runs one loop with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(printed.split()[-1]) / 2**20


def own_peak() -> float:
    """Return the peak resident bytes of this process. On Linux, `getrusage` could return the parent's larger peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return device_memory.peak(torch.device("cpu"))
    (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def random_photos(folder: Path, size: int) -> Path:
    """Write sixteen pictures of noise at three times the training size. Photos are usually larger than that size."""
    values = np.random.default_rng(0).integers(0, 256, (16, size * 3, size * 3, 3), dtype=np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=90)
    return folder


def base_of(run_config: config.Config) -> families.Family:
    """Load the base in the precision of the config."""
    device = devices.device(run_config.memory)
    return families.load(families.describe(run_config.model.base), device, devices.dtype(run_config.memory, device))


def ours(run_config: config.Config) -> Callable[[int], None]:
    """Return a function that runs a number of steps of lorakit's loop."""
    family = base_of(run_config)
    trains_text = run_config.adapter.train_text_encoder
    family.acquire("unet", *(["text_encoders"] if trains_text else []))
    adapter = adapters.attach(family, run_config.adapter, seed=0)
    photos = checks.check(run_config.data, family.info)
    encoded = precompute(run_config, family, adapter, photos, Events())
    step = LossStep(family, adapter, encoded, run_config.train)
    adapters.optimize_blocks(family)
    adapter.train(True)
    return common.steps_of(OptimizerStep(run_config, step, 1000, print))


class Photos(torch.utils.data.Dataset):
    """Pixels and token ids of each photo. Each access decodes the photo."""

    def __init__(self, folder: Path, size: int, tokenizer: Any):
        self.files, self.size, self.tokenizer = sorted(folder.iterdir()), size, tokenizer

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        side = (self.size, self.size)
        picture = Image.open(self.files[index]).convert("RGB").resize(side, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        length = self.tokenizer.model_max_length
        ids = self.tokenizer("a photo of a sks toy", padding="max_length", max_length=length, return_tensors="pt")
        return {"pixels": pixels, "ids": ids.input_ids[0]}


def plain(run_config: config.Config) -> Callable[[int], None]:
    """Return a function that runs a number of steps of a plain loop with PEFT and accelerate."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    family = base_of(run_config)
    family.acquire("unet", "vae", "text_encoders")
    pipe = family.pipeline()
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    common.torchs_own(unet)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    rank = run_config.adapter.rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=run_config.optimizer.learning_rate)
    photos = Photos(Path(run_config.data.folder), run_config.data.resolution, tokenizer)
    loader = torch.utils.data.DataLoader(photos, batch_size=run_config.train.batch_size, shuffle=True)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(family.dtype, "no")
    accelerator = Accelerator(mixed_precision=precision, cpu=family.device.type == "cpu")
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    unet.train()

    def batches():
        while True:
            yield from loader

    stream = batches()

    def run(count: int) -> None:
        for _ in range(count):
            batch = next(stream)
            with torch.no_grad():
                latents = vae.encode(batch["pixels"].to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
                embeddings = text_encoder(batch["ids"])[0]
            noise = torch.randn_like(latents)
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy.to(family.dtype), timesteps, embeddings.to(family.dtype)).sample
            v = noise_scheduler.config.prediction_type == "v_prediction"
            target = noise_scheduler.get_velocity(latents, noise, timesteps) if v else noise
            loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return run


if __name__ == "__main__":
    main()
