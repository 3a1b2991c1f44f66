"""The same rollouts on their way through each trainer: our own step, TRL's MGRPOTrainer and verl's, as far as advantages and metrics.

Samplers and scores are scripted; everything from there on is the trainers' own code.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgrpo_kernels import TokenStats
from mgrpo_kernels.method import METHODS, Selection
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts

P, WIDTH, SEED = 5, 6, 3
SYMBOLS = {character: number + 2 for number, character in enumerate(demo.CHARACTERS)}


@dataclass(frozen=True)
class Case:
    """P prompts with G rollouts each, and the method's options; the last of a prompt's rollouts are the momentum model's."""

    G: int
    options: dict[str, Any]
    empty: bool = False  # whether some responses have no token, which TRL cannot have
    all_pruned: bool = False
    texts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        flags = [name for name in ("empty", "all_pruned") if getattr(self, name)]
        return "-".join([f"G{self.G}", *(f"{name}={value}" for name, value in self.options.items()), *flags])


def make_case(G: int, *, empty: bool = False, all_pruned: bool = False, **options: Any) -> Case:
    """Return a case with a clear majority, a tie, one answer, no answer, and few answers."""
    draw = random.Random(f"{G} {empty}")
    digits = [
        [draw.choice("334") for _ in range(G)],
        [("5", "6")[i % 2] for i in range(G)],
        ["7"] * G,
        [None] * G,
        [draw.choice(["1", "2", "8", None]) for _ in range(G)],
    ]
    texts = [
        draw.choice(["", "1", "12"]) + ("+" if digit is None else f"#{digit}") for each in digits for digit in each
    ]
    if empty:
        texts = ["" if i % 4 == 1 or i // G == 3 else text for i, text in enumerate(texts)]
    return Case(G, options, empty, all_pruned, texts)


def cases(*, momentum: bool) -> list[Case]:
    """Return every method with several group sizes, options, and the corners; without `momentum` what verl can do."""
    none: dict[str, Any] = {} if momentum else {"momentum_rollouts": 0}

    def possible(method: str) -> bool:
        row = METHODS[method]
        needs_teacher = row.needs_momentum or row.second_wording == "momentum"
        return momentum or not (needs_teacher or row.needs_self_certainty)

    def few_votes(method: str) -> dict[str, Any]:  # of three rollouts one is the momentum model's, which alone votes
        return {"min_votes": 1} if METHODS[method].voters == "momentum" else {}

    found = [
        make_case(G, method=method, **few_votes(method), **none)
        for method in METHODS
        if possible(method)
        for G in ((4, 5, 8) if METHODS[method].second_wording == "policy" else (3, 5, 8))
    ]
    found += [
        make_case(7, method=method, iqr_filter=True, **none, **more)
        for method, more in (
            ("mgrpo", {"filter_scope": "vote", "entropy_reduction": "sum"}),
            ("mgrpo", {"filter_scope": "penalise", "iqr_k": 0.1}),
            ("mgrpo", {"iqr_min_spread": 0.3, "iqr_k": 0.0}),
            ("srt", {"min_share": 0.6}),
            ("srt", {"vote_by": "excess"}),
            ("ttrl", {"filter_scope": "penalise", "iqr_k": 0.1}),
            ("soft_vote", {"iqr_k": 0.1}),
            ("rent", {"entropy_reduction": "sum", "iqr_k": 0.1}),
            ("gold", {"filter_scope": "penalise", "iqr_k": 0.1}),
            ("mgrpo", {"gold_labels": True}),
            ("self_harmony", {"vote_by": "excess", "iqr_k": 0.1}),
            ("co_rewarding_1", {"filter_scope": "penalise", "iqr_k": 0.1}),
            ("soft_vote", {"gold_labels": True, "answer_weight": 0.75}),
            ("rent", {"answer_weight": 0.25, "iqr_k": 0.1}),
        )
    ]
    found += [make_case(6, all_pruned=True, method="mgrpo", filter_scope=scope, **none) for scope in ("both", "vote")]
    return (
        found if momentum else found + [make_case(8, empty=True, method=m, **none) for m in ("mgrpo", "ttrl", "gold")]
    )


def gold(case: Case) -> list[str | None]:
    """Return the true answers; with gold labels, those of two prompts are unknown."""
    known = ["3", None, "7", None, "1"] if case.options.get("gold_labels") else "36791"
    return [answer for answer in known for _ in range(case.G)]


def first_wording(prompt: int) -> str:
    return f"{prompt}+{prompt}="


def second_wording(prompt: int) -> str:
    return f"+{prompt}{prompt}="


def tokens(case: Case) -> list[list[int]]:
    return [[SYMBOLS[character] for character in text] for text in case.texts]


def mask(case: Case) -> Tensor:
    return torch.arange(WIDTH) < torch.tensor([len(text) for text in case.texts])[:, None]


def stats(case: Case) -> dict[str, Tensor]:
    """Return the scripted scores ``(B, WIDTH)``: sixteenths, which add up exactly in any order; a prompt's second is far less sure."""
    draw = torch.Generator().manual_seed(case.G)
    entropy = torch.randint(16, 33, (P * case.G, WIDTH), generator=draw) / 16
    entropy[:: case.G] /= 8
    certainty = torch.randint(32, 65, (P * case.G, WIDTH), generator=draw) / 16
    logprob = -torch.randint(0, 33, (P * case.G, WIDTH), generator=draw) / 16
    return {"entropy": entropy, "self_certainty": certainty, "logprob": logprob}


class Found(dict[str, Any]):
    """What a trainer made of a case, by name; tensors in the case's order."""

    @classmethod
    def of(cls, selection: Selection, metrics: dict[str, Any]) -> Found:
        """Return a selection's."""
        assert selection.vote is not None
        names = ("survives", "voters", "rewards", "trains", "advantages")
        found = cls(labels=selection.vote.labels, metrics=metrics, **{name: getattr(selection, name) for name in names})
        if selection.token_advantages is not None:
            found["token_advantages"] = selection.token_advantages
        return found


def check_same(one: Found, other: Found) -> None:
    """Raise AssertionError unless two trainers made the same of a case."""
    assert one["labels"] == other["labels"], (one["labels"], other["labels"])
    assert ("token_advantages" in one) == ("token_advantages" in other)
    for name in ("survives", "voters", "trains", "rewards", "advantages", "token_advantages"):
        if name in one and name in other:
            assert torch.equal(one[name], other[name]), (name, one[name], other[name])
    shared = one["metrics"].keys() & other["metrics"].keys()
    assert {
        "reward_mean",
        "pruned_fraction",
        "vote_share",
        "labelled_fraction",
        "label_accuracy",
        "training_fraction",
    } <= shared
    for name in shared:
        assert one["metrics"][name] == other["metrics"][name], (name, one["metrics"][name], other["metrics"][name])


def prune_all(module: Any, monkeypatch: Any) -> None:
    """Have the filter prune every rollout."""
    real = module.iqr_filter
    monkeypatch.setattr(
        module, "iqr_filter", lambda *a, **k: (f := real(*a, **k))._replace(keep=torch.zeros_like(f.keep))
    )


class Scripted(RolloutEngine):
    """Says a case's responses, in the order that the trainer's step asks for them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.asked = False

    def sample(self, prompts: Any, copies: int, *, momentum: Any = None, **_: Any) -> Rollouts:
        """Return the first `copies` of each prompt's rollouts, or the last where it is asked again: of another model, or in other words."""
        G = self.case.G
        places = range(G - copies, G) if self.asked else range(copies)
        assert momentum is None or self.asked
        self.asked = True
        rows = [p * G + i for p in range(len(prompts)) for i in places]
        ids, which = tokens(self.case), torch.tensor(rows)
        padded = torch.tensor([ids[row] + [0] * (WIDTH - len(ids[row])) for row in rows])
        return Rollouts(
            padded, mask(self.case)[which], torch.zeros(padded.shape), torch.ones(len(rows), dtype=torch.bool)
        )


class Enough(Exception):
    """The step has come to the loss."""


def by_trainer(case: Case, learner_of: Any, monkeypatch: Any) -> Found:
    """Return what a step of ``python -m mgrpo_kernels.train`` makes of a case."""
    config = build(
        {
            **demo.OPTIONS,
            "prompts_per_step": P,
            "rollouts": case.G,
            "kl_coef": 0.0,
            "kl_reference": "none",
            "seed": SEED,
            **case.options,
        }
    )
    learner, caught = learner_of(config), []
    learner.engine = Scripted(case)

    def training_batch(learner: Any, seen: Any, stats: Any, own: Any, selection: Selection) -> None:
        caught.append(selection)
        raise Enough

    scores = stats(case)
    monkeypatch.setattr(steps, "training_batch", training_batch)
    monkeypatch.setattr(steps, "score_by_sampler", lambda *_: TokenStats(**scores))
    examples = [demo.Example(first_wording(p), gold(case)[p * case.G], second_wording(p)) for p in range(P)]
    with contextlib.suppress(Enough):
        steps.train_step(learner, examples, 1)
    return Found.of(caught[0], caught[0].metrics(prompts=P))


def by_trl(case: Case, trainer: Any, monkeypatch: Any) -> Found:
    """Return what TRL's MGRPOTrainer, built with the case's options, makes of a case."""
    from trl import GRPOTrainer

    from mgrpo_kernels.integrations.trl import trainer as module

    caught, ids, scores = [], tokens(case), stats(case)
    momentum, reworded = trainer.by_momentum(P * case.G), trainer.by_second_wording(P * case.G).tolist()
    asked = [(second_wording if again else first_wording)(i // case.G) for i, again in enumerate(reworded)]
    encoded = trainer.processing_class(text=asked)["input_ids"]

    def sample(self: Any, prompt_ids: Any, images: Any, fields: Any, copies: int, has_tool_images: bool = False) -> Any:
        assert len(prompt_ids) == copies * P  # each prompt's rollouts of this model and wording
        mine = [i for i, theirs in enumerate(momentum.tolist()) if theirs == self.momentum._swapped]
        again = [i for i in mine if encoded[i] in prompt_ids]
        assert [encoded[i] for i in again] == prompt_ids
        return [ids[i] for i in again], None

    def completion_stats(trainer: Any, rows: Any, width: int, names: Any) -> dict[str, Tensor]:
        chosen = momentum if trainer.momentum._swapped else ~momentum
        return {name: scores[name][chosen][:, :width] for name in names}

    select = module.MGRPOTrainer._select
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", sample)
    monkeypatch.setattr(module, "completion_stats", completion_stats)
    monkeypatch.setattr(module.MGRPOTrainer, "_select", lambda *a: caught.append(select(*a)) or caught[-1])
    monkeypatch.setattr(
        module.MGRPOTrainer, "_is_finished", lambda *_: True
    )  # as in the other paths, no response is cut
    trainer.model.train()
    answers = gold(case)
    rows = [
        {"prompt": first_wording(p), "answer": answers[i], "paraphrase": second_wording(p)}
        for i, p in enumerate(p for p in range(P) for _ in range(case.G))
    ]
    output = trainer._generate_and_score_completions(rows)
    logged = {
        name.removeprefix("mgrpo/"): each[-1] for name, each in trainer._metrics["train"].items() if "mgrpo/" in name
    }
    found = Found.of(caught[0], {**dict.fromkeys(caught[0].metrics()), **logged})
    given = output["advantages"]
    by_token = given.dim() == 2
    shown = (
        {"token_advantages": torch.nn.functional.pad(given, (0, WIDTH - given.shape[1]))}
        if by_token
        else {"advantages": given}
    )
    return Found(found, trains=output["completion_mask"].bool().any(1), **shown)


__all__ = ["P", "Case", "Found", "by_trainer", "by_trl", "cases", "check_same", "make_case", "prune_all"]
