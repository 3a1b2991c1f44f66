"""Random numbers by name: a generator follows from (seed, purpose, step) alone, so that resuming needs no state of one.

It also keeps purposes apart: evaluating, or showing more samples, cannot shift what training draws.
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for one purpose in one step."""
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
