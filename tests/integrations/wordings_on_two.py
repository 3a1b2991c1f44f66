"""Run on two ranks: the scripted rollouts of test_trl_wordings.py, a question's two wordings split over two processes.

Each rank compares its part with what one process made of the whole, then trains two steps, after which the ranks must agree.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trl_mgrpo import train_alike
from test_trl_wordings import TWICE, G, P, examples, script, trainer_of

base, wanted, place = sys.argv[1:]
halves = {"per_device_train_batch_size": P * G // 2, "gradient_accumulation_steps": 1}
for method, want in torch.load(wanted, weights_only=True).items():
    trainer = trainer_of(base, Path(place), method, **halves)
    rank, rows = dist.get_rank(), P * G // 2
    assert dist.get_world_size() == 2
    assert rows % G == G // 2  # a wording of the second prompt on each rank
    part = slice(rank * rows, (rank + 1) * rows)
    with pytest.MonkeyPatch.context() as monkeypatch:
        script(trainer, rank * rows, rows, monkeypatch)
        output = trainer._generate_and_score_completions(examples()[part])
    torch.testing.assert_close(output["advantages"], want["advantages"][part], rtol=1e-5, atol=1e-6)
    assert torch.equal(output["completion_mask"], want["completion_mask"][part])
    assert output["num_items_in_batch"] == want["num_items_in_batch"]

trainer = trainer_of(base, Path(place), TWICE[-1], **halves, max_steps=2)
train_alike(trainer)
