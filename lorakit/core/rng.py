"""Randomness as a pure function of (seed, step, purpose).

No random state is kept between steps. So a resumed run draws the same numbers as an uninterrupted one, and sampling or
validation cannot disturb training.
"""

import hashlib

import torch


def seed_for(seed: int, index: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one step. It is a part of a SHA-256, so seeds of adjacent steps are
    unrelated."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, index: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded with `seed_for`."""
    return torch.Generator(device).manual_seed(seed_for(seed, index, purpose))
