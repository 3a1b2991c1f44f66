"""Random number generators by purpose. A generator depends only on (seed, purpose, step), so resuming needs no saved state.

Purposes are independent of each other: an evaluation, or more displayed samples, does not change the random numbers of training.
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on `device` for one purpose in one step."""
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
