"""The UNet: learns to take noise out of cached latents, told by cached text states what they show (v-prediction)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.families.pocket.scene_captions import full_caption
from lorakit.families.pocket.spec import random_spec
from tools.pocket import autoencoder, dataset, text
from tools.pocket.recipe import Recipe
from tools.pocket.workers import Run, Worker, save

PREVIEW_SECONDS = 420.0


def build(recipe: Recipe) -> UNet2DConditionModel:
    """Cross-attention everywhere but at the largest level, where it would cost most and help least."""
    inner = len(recipe.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=recipe.size // 2 ** (len(recipe.vae_channels) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        layers_per_block=1,
        block_out_channels=recipe.unet_channels,
        norm_num_groups=16,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.unet_heads,  # diffusers' old name for the number of heads
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * inner,
        up_block_types=("CrossAttnUpBlock2D",) * inner + ("UpBlock2D",),
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def add_noise(alphas: Tensor, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and their velocity (Salimans and Ho 2022, arXiv 2202.00512), both (n, c, h, w).

    `alphas` (n) are the cumulative products of the noise schedule.
    """
    signal, spread = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
    return signal * latents + spread * noise, signal * noise - spread * latents


def prepare(worker: Worker, recipe: Recipe, work: Path) -> None:
    """Encode every picture and caption once: latents' mean and deviation, text states, and the scale of the latents.

    Each worker encodes its share into the same files; the first one gives them their names when all are done.
    """
    vae = autoencoder.build(recipe).to(worker.device).eval()
    vae.load_state_dict(torch.load(work / "vae.pt", map_location=worker.device, weights_only=True))
    tokens, model = text.load(recipe, work)
    pictures, words = dataset.load(work / "renders", "pictures"), dataset.captions(work / "renders")
    side = recipe.size // 2 ** (len(recipe.vae_channels) - 1)
    shapes = {name: (len(words), recipe.latent_channels, side, side) for name in ("mean", "deviation")}
    shapes["states"] = (len(words), dataset.VARIANTS, recipe.max_tokens, recipe.text_width)
    if worker.first:
        for name, shape in shapes.items():
            np.lib.format.open_memmap(work / f"{name}.partial.npy", "w+", np.float16, shape)
    worker.wait()
    mean, deviation, states = (np.lib.format.open_memmap(work / f"{name}.partial.npy", "r+") for name in shapes)
    for start in range(worker.rank * 512, len(words), worker.world * 512):
        chunk = slice(start, start + 512)
        mean[chunk], deviation[chunk] = autoencoder.encode_all(vae, pictures[chunk], bf16=recipe.bf16)
        flat = [variant for variants in words[chunk] for variant in variants]
        states[chunk] = text.encode(model, tokens, flat).half().numpy().reshape(-1, *shapes["states"][1:])
        if start // 512 % 20 == 0:
            worker.say(f"latents: {start}/{len(words)}")
    for array in (mean, deviation, states):
        array.flush()
    worker.wait()
    if worker.first:
        power = np.square(mean[:8192].astype(np.float32)).mean() + np.square(deviation[:8192].astype(np.float32)).mean()
        np.savez(work / "latents.npz", scale=1.0 / float(np.sqrt(power - mean[:8192].astype(np.float32).mean() ** 2)))
        np.save(work / "empty.npy", text.encode(model, tokens, [""]).half().numpy()[0])
        for name in shapes:
            (work / f"{name}.partial.npy").replace(work / f"{name}.npy")


def train(worker: Worker, recipe: Recipe, work: Path) -> None:
    """The long stage. Every picture is drawn with a new caption variant, latent sample, noise and timestep."""
    torch.manual_seed(recipe.seed)
    model = build(recipe).to(worker.device)
    mean, deviation = np.load(work / "mean.npy"), np.load(work / "deviation.npy")
    states, empty = np.load(work / "states.npy", mmap_mode="r"), np.load(work / "empty.npy")
    scale = float(np.load(work / "latents.npz")["scale"])
    alphas = scheduler().alphas_cumprod.to(worker.device)
    run = Run(
        worker,
        {"unet": model},
        work / "unet.state",
        recipe.unet_pictures,
        recipe.unet_batch,
        recipe.unet_rate,
        recipe.seed,
        recipe.bf16,
        recipe.ema,
        recipe.save_seconds,
        recipe.unet_every,
    )
    worker.say(f"unet: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, latent scale {scale:.4f}")
    preview_time = run.seconds
    while not run.is_finished:
        rng, generator = np.random.default_rng((recipe.seed, run.position, worker.rank, 4)), run.generator
        rows = np.sort(rng.integers(0, len(mean), run.batch))
        sample = torch.from_numpy(mean[rows]).float()
        sample = (
            sample + torch.from_numpy(deviation[rows]).float() * torch.randn(sample.shape, generator=generator)
        ) * scale
        sample = sample.to(worker.device)
        condition = np.stack(
            [states[i, v] for i, v in zip(rows, rng.integers(0, states.shape[1], run.batch), strict=True)]
        )
        condition[rng.random(run.batch) < recipe.empty_captions] = empty
        # One timestep from each of `batch` equal bands: the same mean as independent draws, less spread.
        steps = torch.from_numpy(
            ((rng.permutation(run.batch) + rng.random(run.batch)) * (1000 / run.batch)).astype(np.int64)
        ).to(worker.device)
        noise = torch.randn(sample.shape, generator=generator).to(worker.device)
        noisy, velocity = add_noise(alphas[steps], sample, noise)
        # For so few tokens the plain attention kernel makes a step a quarter faster than the flash kernel.
        with worker.autocast(recipe.bf16), sdpa_kernel(SDPBackend.MATH):
            output = model(noisy, steps, torch.from_numpy(condition).float().to(worker.device)).sample
        loss = F.mse_loss(output.float(), velocity)
        run.step(loss)
        run.note(loss=float(loss.detach()))
        if worker.first and run.seconds > preview_time + PREVIEW_SECONDS:
            preview_time = run.seconds
            preview(run.average, recipe, work)
    if worker.first:
        run.use_average()
        save(model.state_dict(), work / "unet.pt")


@torch.no_grad()
def preview(average: list[Tensor], recipe: Recipe, work: Path) -> None:
    """Draw held-out combinations with the averaged weights into `preview-unet.png`."""
    unet, vae = build(recipe), autoencoder.build(recipe)
    for parameter, value in zip(unet.parameters(), average, strict=True):
        parameter.data.copy_(value)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True))
    tokens, words = text.load(recipe, work)
    prompts = [full_caption(random_spec(4_000_000_000 + i, unseen=True)) for i in range(24)]
    states = text.encode(words, tokens, [*prompts, ""])
    latents = sample(unet.eval(), states[:-1], states[-1:], steps=20, bf16=recipe.bf16)
    pictures = vae.eval().decode(latents / float(np.load(work / "latents.npz")["scale"])).sample
    autoencoder.grid(autoencoder.to_pictures(pictures), 12, 2).save(work / "preview-unet.png")
    (work / "preview-unet.txt").write_text("\n".join(prompts) + "\n")


def load_average(recipe: Recipe, work: Path) -> UNet2DConditionModel:
    """The averaged weights of the newest state file, finished or not."""
    model = build(recipe)
    state = torch.load(work / "unet.state", map_location="cpu", weights_only=True)
    for parameter, value in zip(model.parameters(), state["average"], strict=True):
        parameter.data.copy_(value)
    return model.eval()


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    condition: Tensor,
    empty: Tensor,
    guidance: float = 4.0,
    steps: int = 30,
    seed: int = 0,
    bf16: bool = True,
) -> Tensor:
    """Scaled latents (N, 4, h, w) for conditions (N, tokens, width): DDIM with classifier-free guidance."""
    noise_scheduler = scheduler()
    noise_scheduler.set_timesteps(steps)
    side = unet.config.sample_size
    latents = torch.randn((len(condition), 4, side, side), generator=torch.Generator().manual_seed(seed))
    both = torch.cat([empty.expand_as(condition), condition])
    for step in noise_scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(torch.cat([latents, latents]), step, both).sample.float()
        unconditional, conditional = output.chunk(2)
        latents = noise_scheduler.step(
            unconditional + guidance * (conditional - unconditional), step, latents
        ).prev_sample
    return latents
