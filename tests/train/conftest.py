"""A tiny model and its data, made once for all tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from mgrpo_kernels.train.model.policy import Policy, load_policy


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the built-in model, briefly warm-started, so that it sometimes answers."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("tiny") / "base"
    tiny.make_base(place)
    return place


@pytest.fixture
def policy(base: Path) -> Policy:
    return load_policy(str(base), torch.device("cpu"), torch.float32)
