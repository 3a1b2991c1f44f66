"""The vote over 256 answers to each of 8 prompts, beside math-verify's pairwise comparison and verl's scorer.

Run it as `python benchmarks/bench_vote.py`.

The answers of a prompt are those that a model samples: one in several spellings, some others, and prose. Each row gives the median time
of a whole step's 8 votes and the pairs of answers on which it differs from the truth, which is the number that each spelling was made from.
verl has no vote: its scorer compares each answer with the first of each cluster, as math-verify does in the row above.
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from mgrpo_kernels import majority_vote
from mgrpo_kernels.vote import keys

PROMPTS, GROUP, VALUES = 8, 256, 12
ROUNDS = 5
PEERS = Path(sys.prefix) / "peers"  # where scripts/peers.sh puts verl

Same = Callable[[str, str], bool]


def spellings(value: Fraction) -> list[str]:
    """Return ways to write a number of thousands and halves."""
    whole, plain = value.denominator == 1, f"{float(value):g}" if value < 10**5 else f"{float(value):.1f}"
    ways = [
        plain,
        f"{float(value):,.2f}",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"${plain}$",
        f"x = {plain}",
    ]
    ways += [f"{plain} \\text{{ cm}}", f"{value.numerator}/{value.denominator}", f"\\sqrt{{{value**2}}}"]
    return [*ways, f"{int(value):,}", f"\\text{{{value}}}"] if whole else [*ways, f"{int(value)}\\frac{{1}}{{2}}"]


def make_answers(kind: str, seed: int = 0) -> tuple[list[str | None], list[Fraction | None]]:
    """Return the answers of all prompts, and the number that each says."""
    draw, answers, truth = random.Random(seed), list[str | None](), list[Fraction | None]()
    for _ in range(PROMPTS):
        values = [Fraction(draw.randrange(2, 20_000), 2) for _ in range(VALUES)]
        for _ in range(GROUP):
            value = draw.choices(values, weights=[VALUES, *[1] * (VALUES - 1)])[0]
            answers.append(str(value) if kind == "numbers" else draw.choice(spellings(value)))
            truth.append(value)
    return answers, truth


def by_ours(answers: list[str | None]) -> list[int]:
    keys._key_of_short.cache_clear()  # nothing is known from the round before
    return majority_vote(answers, GROUP).cluster.tolist()


def by_pairs(same: Same) -> Callable[[list[str | None]], list[int]]:
    """Return a vote that asks about each new answer and the first of each cluster, as one does who has a function of two answers."""
    return lambda answers: majority_vote(answers, GROUP, equivalence=same).cluster.tolist()


def math_verify() -> Same:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

    @functools.cache
    def read(answer: str) -> list:
        return parse(f"${answer}$", parsing_timeout=None)

    def same(first: str, new: str) -> bool:
        return bool(verify(read(first), read(new), timeout_seconds=None))

    return same


def verl() -> Same:
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
    from verl.utils.reward_score.math_reward import compute_score

    return lambda first, new: compute_score(f"\\boxed{{{new}}}", first) == 1.0


def wrong_pairs(clusters: list[int], truth: list[Fraction | None]) -> float:
    """Return the share of a prompt's pairs of answers that are judged wrongly."""
    wrong = pairs = 0
    for start in range(0, len(truth), GROUP):
        rows = range(start, start + GROUP)
        for i in rows:
            for j in range(i + 1, start + GROUP):
                pairs += 1
                wrong += (clusters[i] == clusters[j]) != (truth[i] == truth[j])
    return wrong / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="times that each vote is taken (default: %(default)s)"
    )
    rounds = parser.parse_args().rounds
    print(f"{PROMPTS} prompts x {GROUP} answers, of which {VALUES} different; median of {rounds} votes")
    for kind in ("numbers", "spellings"):
        answers, truth = make_answers(kind)
        print(
            f"\n{kind}: {len(set(answers))} different texts, for example {', '.join(sorted({str(each) for each in answers[:6]}))}"
        )
        for name, make in (("ours", None), ("math-verify, pairwise", math_verify), ("verl's scorer, pairwise", verl)):
            seconds = []
            try:
                vote = by_ours if make is None else None
                for _ in range(rounds):
                    vote = by_ours if make is None else by_pairs(make())  # what it remembers is its own
                    start = time.perf_counter()
                    clusters = vote(answers)
                    seconds.append(time.perf_counter() - start)
            except ImportError as error:
                print(f"  {name:24} not installed: {error}")
                continue
            print(
                f"  {name:24} {1e3 * statistics.median(seconds):10.1f} ms   wrong pairs {wrong_pairs(clusters, truth):7.2%}"
            )


if __name__ == "__main__":
    main()
