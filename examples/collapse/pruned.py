"""Print whether the rollouts that the IQR filter prunes are wrong more often than the others, and whether pruning changes the labels.

    python -m mgrpo_kernels.train --steps 600 --lr-schedule constant --samples-per-step 16 --guard off --output DIR
    python examples/collapse/pruned.py DIR [DIR ...]

The samples must be all rollouts of a step's first prompt (`--samples-per-step` at least `--rollouts`), and their true answers must be
known. All given runs are combined. Answers are compared as strings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mgrpo_kernels import majority_vote
from mgrpo_kernels.train.watch.lines import read_lines

Rollout = dict[str, Any]
EDGES = (1, 51, 101, 201, 401)
"""The first step of each row of the table."""


def groups_of(run: Path) -> list[list[Rollout]]:
    """Return the rollouts of each step's first prompt."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in read_lines(run / "samples.jsonl"):
        groups.setdefault(rollout["step"], []).append(rollout)
    return list(groups.values())


def right(rollouts: Sequence[Rollout]) -> float:
    """Return the share of rollouts whose answer is the true answer; NaN for an empty sequence."""
    return sum(each["answer"] == each["gold"] for each in rollouts) / len(rollouts) if rollouts else float("nan")


def labels_right(groups: Sequence[Sequence[Rollout]], *, survivors: bool) -> float:
    """Return the share of groups whose majority, among all rollouts or among the rollouts that are kept, is the true answer."""
    right = 0
    for group in groups:
        voters = torch.tensor([not (survivors and each["pruned"]) for each in group])
        (label,) = majority_vote(
            [each["answer"] for each in group], len(group), voters=voters, equivalence="exact"
        ).labels
        right += label == group[0]["gold"]
    return right / len(groups)


def is_dead(group: Sequence[Rollout]) -> bool:
    """Return True if these rollouts all have the same reward, and so an advantage of 0."""
    return len({each["reward"] for each in group}) < 2


def kept(group: Sequence[Rollout]) -> list[Rollout]:
    return [each for each in group if not each["pruned"]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR")
    groups = [group for run in parser.parse_args().runs for group in groups_of(run)]
    print(
        "| steps | pruned | right: kept | right: pruned | label right: all vote | survivors vote | no advantage: all | survivors |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for first, last in zip(EDGES, (*(edge - 1 for edge in EDGES[1:]), None), strict=True):
        some = [group for group in groups if first <= group[0]["step"] and (last is None or group[0]["step"] <= last)]
        if not some:
            continue
        stay, go = (
            [each for group in some for each in kept(group)],
            [each for group in some for each in group if each["pruned"]],
        )
        figures = [
            len(go) / (len(stay) + len(go)),
            right(stay),
            right(go),
            labels_right(some, survivors=False),
            labels_right(some, survivors=True),
            sum(map(is_dead, some)) / len(some),
            sum(is_dead(kept(group)) for group in some) / len(some),
        ]
        print(
            f"| {first} - {last or max(group[0]['step'] for group in some)} | {' | '.join(f'{each:.3f}' for each in figures)} |"
        )


if __name__ == "__main__":
    main()
