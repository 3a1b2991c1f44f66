"""Truncated sampling: which entries a sampler keeps, and that the trainer scores and trains over the same ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import Rollouts, interleave, join
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.rollout.truncation import MOST_KEPT, NO_TRUNCATION, Truncation, keep
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.step import train_step

PROMPTS = ["3+4=", "1+2+3+4+5+6=", "9+9+9=", "0+5="]
ALL = ("logprob", "entropy", "self_certainty")
T = 1.1


def expected(z: torch.Tensor, truncation: Truncation) -> list[int]:
    """Return the ids that are kept of one row of logits, by the definition: one rule after another, on all probabilities."""
    p = z.double().softmax(-1)
    ids = p.argsort(descending=True).tolist()
    ids = [each for each in ids if p[each] >= truncation.min_p * p.max()]
    ids = ids[: truncation.top_k or MOST_KEPT]
    total, kept, before = sum(p[each] for each in ids), [], 0.0
    for each in ids:
        if kept and before >= truncation.top_p * total:
            break
        kept.append(each)
        before += p[each]
    return kept


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(top_p=0.9),
        Truncation(top_k=7),
        Truncation(min_p=0.2),
        Truncation(top_p=0.7, top_k=20, min_p=0.05),
        Truncation(top_p=1e-6),
        Truncation(min_p=1.0),
        Truncation(min_p=1e-9),
    ],
)
def test_what_is_kept_and_its_distribution(truncation: Truncation) -> None:
    logits = torch.randn(6, 700) * torch.tensor([0.0, 0.1, 1.0, 2.0, 5.0, 50.0]).unsqueeze(-1)
    logits += torch.linspace(0, 1e-3, 700)  # no ties
    kept = keep(logits, T, truncation)
    stored = kept.stored()
    assert stored.shape[1] <= MOST_KEPT
    for row, z in enumerate(logits / T):
        ids = expected(z, truncation)
        assert stored[row][stored[row] >= 0].tolist() == ids
        want = torch.full((700,), -torch.inf)
        want[ids] = z[ids].log_softmax(-1)
        torch.testing.assert_close(kept.logprobs[row], want[kept.ids[row]], rtol=1e-5, atol=1e-5)
    columns = torch.zeros(6, dtype=torch.int64)
    p = kept.logprobs.double().exp()
    torch.testing.assert_close(
        kept.statistics(columns)["entropy"].double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5
    )


def test_tokens_are_drawn_with_the_probabilities_of_the_kept_set() -> None:
    logits, truncation = torch.tensor([[2.0, 1.0, 0.5, -3.0, 0.0]]), Truncation(top_k=3)
    kept = keep(logits, 1.0, truncation)
    noise = torch.empty(20000, 5).exponential_().log().neg()
    columns = torch.stack([kept.draw(each.unsqueeze(0))[0] for each in noise[:2000]])
    share = torch.bincount(kept.ids[0][columns], minlength=5) / 2000
    torch.testing.assert_close(share[:3], logits[0, :3].softmax(-1), atol=0.04, rtol=0)
    assert share[3:].sum() == 0


def sample(policy: Policy, truncation: Truncation, *, stats: tuple[str, ...] = ALL, room: int = 10**6) -> Rollouts:
    engine = TransformersEngine(policy, 12, room, stats)
    return engine.sample(
        policy.encode(PROMPTS), 3, temperature=T, generator=torch.Generator().manual_seed(0), truncation=truncation
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("truncation", [Truncation(top_p=0.6), Truncation(top_k=3, min_p=0.01)])
def test_the_sampler_and_the_scores_agree(policy: Policy, padded: bool, truncation: Truncation) -> None:
    if padded:
        policy.unpackable = "a test"
    rollouts = sample(policy, truncation)
    prompts = [prompt for prompt in policy.encode(PROMPTS) for _ in range(3)]
    assert rollouts.kept is not None
    assert (rollouts.kept == rollouts.tokens.unsqueeze(-1)).any(-1)[rollouts.mask].all()
    assert (rollouts.kept[~rollouts.mask] == -1).all()
    assert 1 < rollouts.kept.shape[2] <= (3 if truncation.top_k else MOST_KEPT)
    assert not rollouts.logprobs.requires_grad

    def difference(kept: torch.Tensor | None) -> list[float]:
        scores = score(policy, prompts, rollouts.tokens, rollouts.mask, temperature=T, budget=40, stats=ALL, kept=kept)
        own = (rollouts.logprobs, rollouts.entropy, rollouts.self_certainty)
        return [float((one - other).abs().max()) for one, other in zip(scores, own, strict=True)]

    assert max(difference(rollouts.kept)) < 1e-4
    assert min(difference(None)) > 0.01  # the bound would show scores over the whole vocabulary


def test_parts_and_rows_keep_their_sets(policy: Policy) -> None:
    """A cache with little room divides the prompts; joining and interleaving pad the sets."""
    whole, parts = (sample(policy, Truncation(top_p=0.9), room=room) for room in (10**6, 60))
    for one, other in zip(whole, parts, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    narrow = sample(policy, Truncation(top_k=2))
    assert whole.kept is not None
    assert narrow.kept is not None
    both = join([whole, narrow])
    assert both.kept is not None
    n, R, K = narrow.kept.shape
    assert torch.equal(both.kept[-n:, :R, :K], narrow.kept)
    assert (both.kept[-n:, R:] == -1).all()
    assert (both.kept[-n:, :, K:] == -1).all()
    mixed = interleave(whole, narrow, len(PROMPTS))
    assert mixed.kept is not None
    assert torch.equal(mixed.kept[3, :R, :K], narrow.kept[0])


def test_without_truncation_and_greedily_nothing_is_stored(policy: Policy) -> None:
    assert sample(policy, NO_TRUNCATION).kept is None
    engine, ids = TransformersEngine(policy, 12, 10**6), policy.encode(PROMPTS)
    options = {"temperature": 0.0, "generator": torch.Generator().manual_seed(0)}
    plain, greedy = (engine.sample(ids, 1, **options, truncation=each) for each in (NO_TRUNCATION, Truncation(top_k=1)))
    assert greedy.kept is None
    assert torch.equal(plain.tokens, greedy.tokens)


@pytest.mark.parametrize("changes", [{}, {"train_momentum_rollouts": True}])
def test_a_step_scores_and_trains_over_the_kept_sets(policy: Policy, monkeypatch: pytest.MonkeyPatch, changes) -> None:
    learner = tiny.learner(policy, top_p=0.7, **changes)
    from mgrpo_kernels.train import score as scoring
    from mgrpo_kernels.train import update

    seen = []
    for module, name in (
        (update, "linear_policy_loss"),
        (update, "linear_token_stats"),
        (scoring, "linear_token_stats"),
    ):
        function = getattr(module, name)

        def note(*args, function=function, name=name, **options):
            seen.append((name, options["kept"] is not None))
            return function(*args, **options)

        monkeypatch.setattr(module, name, note)
    metrics, _ = train_step(learner, learner.task.train[:3], 1)
    assert {name for name, _ in seen} == {"linear_policy_loss", "linear_token_stats"}
    assert all(has for _, has in seen)
    assert metrics["behaviour_mismatch"] < 1e-4
    assert metrics["loss"] is not None


@pytest.mark.parametrize("flags", [["--top-p", "0.9"], ["--top-k", "4", "--min-p", "0.02"]])
def test_a_run_and_its_resumption(base: Path, tmp_path: Path, flags: list[str]) -> None:
    output, other = tiny.output_with(base, tmp_path / "run"), tmp_path / "other"
    assert command.main([*tiny.FLAGS, *flags, "--eval-every", "0", "--plain", "--output", str(output)]) == 0
    lines = tiny.lines(output)
    assert all(each["behaviour_mismatch"] < 1e-4 for each in lines if each["behaviour_mismatch"] is not None)
    assert any(each["behaviour_mismatch"] is not None for each in lines)

    shutil.copytree(output, other, symlinks=True)
    shutil.rmtree(other / "final")
    shutil.rmtree(other / "checkpoints" / "step_4")
    (other / "checkpoints" / "latest").unlink()
    (other / "checkpoints" / "latest").symlink_to("step_2")
    written = (other / "metrics.jsonl").read_text().split("\n")[:-1]
    text = [each for each in written if json.loads(each)["step"] <= 2]
    (other / "metrics.jsonl").write_text("".join(f"{each}\n" for each in text))
    assert command.main(["--output", str(other), "--resume"]) == 0
    assert tiny.lines(other) == lines
