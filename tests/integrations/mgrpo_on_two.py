"""Run on two ranks: the scripted rollouts of test_trl_mgrpo.py, a prompt's group split over the processes.

Each rank compares its part with what one process made of the whole, then trains a step, after which the ranks must agree.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trl_mgrpo import G, P, examples, first_digit, responses, shake, train_alike, trainer_of
from trl import GRPOTrainer

base, want, place = sys.argv[1:]
trainer = trainer_of(base, Path(place), per_device_train_batch_size=P * G // 2, gradient_accumulation_steps=1)
shake(trainer.momentum)
rank, rows = dist.get_rank(), P * G // 2
assert dist.get_world_size() == 2
assert rows % G != 0
script = responses()
whole = [row for each in script for row in (*each[False], *each[True])]
mine = whole[rank * rows : (rank + 1) * rows]


def scripted(self, prompt_ids, images, fields, copies, has_tool_images=False):
    chosen = self.by_momentum(rows) == self.momentum._swapped
    said = [row for row, keep in zip(mine, chosen.tolist(), strict=True) if keep]
    assert len(said) == len(prompt_ids)
    return said, None


own, GRPOTrainer._generate_single_turn = GRPOTrainer._generate_single_turn, scripted
trainer.model.train()
part = slice(rank * rows, (rank + 1) * rows)
output = trainer._generate_and_score_completions(examples(trainer)[part])
found = torch.load(want, weights_only=True)
torch.testing.assert_close(output["advantages"], found["advantages"][part], rtol=1e-5, atol=1e-6)
assert torch.equal(output["completion_mask"].bool().any(1), found["trains"][part])
assert output["num_items_in_batch"] == found["tokens"]
assert output["sequences_in_batch"] == found["trains"].sum()

GRPOTrainer._generate_single_turn = own
trainer = trainer_of(
    base,
    Path(place),
    per_device_train_batch_size=P * G // 2,
    gradient_accumulation_steps=1,
    max_steps=2,
    extract=first_digit,
)
train_alike(trainer)
