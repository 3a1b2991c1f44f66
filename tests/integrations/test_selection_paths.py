"""One contract: given the same rollouts, our trainer, TRL's and verl's agree on labels, rewards, survivors, advantages and metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

import installed_peers
import pytest
import selection_paths as paths
import tiny_trl
import torch

from mgrpo_kernels.integrations.trl import MGRPOConfig, MGRPOTrainer
from mgrpo_kernels.integrations.trl import trainer as of_trl
from mgrpo_kernels.method import METHODS, pruning
from mgrpo_kernels.train import step as steps
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run.learner import make_learner


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_trl.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(base: str) -> Any:
    return load_policy(base, torch.device("cpu"), torch.float32)


@pytest.fixture
def both(base: str, policy: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what gives a case's outcomes of our trainer and of TRL's."""

    def run(case: paths.Case) -> tuple[paths.Found, paths.Found]:
        with monkeypatch.context() as patch:
            if case.all_pruned:
                paths.prune_all(pruning, patch)
            ours = paths.by_trainer(case, lambda config: make_learner(config, demo.make_task(0), policy), patch)
            rows = paths.P * case.G
            data = tiny_trl.prompts().map(lambda row: {"answer": row["gold"], "paraphrase": row["prompt"]})
            args = tiny_trl.settings(
                tmp_path,
                num_generations=case.G,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=1,
                seed=paths.SEED,
                beta=0.0,
                **{"equivalence": "exact", **case.options},
            )
            trainer = MGRPOTrainer(base, None, MGRPOConfig(**args), train_dataset=data, extract=demo.after_hash)
            return ours, paths.by_trl(case, trainer, patch)

    return run


@pytest.mark.parametrize("case", paths.cases(momentum=True), ids=lambda case: case.name)
def test_trl_makes_of_rollouts_what_our_trainer_makes(both: Any, case: paths.Case) -> None:
    ours, theirs = both(case)
    paths.check_same(ours, theirs)
    assert case.all_pruned or ours["advantages"].abs().sum() > 1
    assert case.all_pruned == (not ours["survives"].any())


DEVIATIONS: dict[str, Any] = {
    "TRL takes the first rollouts for the momentum model's": (
        MGRPOTrainer,
        "by_momentum",
        lambda self, rows: torch.arange(rows) % self.num_generations < self.momentum_rollouts,
    ),
    "TRL does not know which rollouts answer the second wording": (
        of_trl,
        "select",
        lambda *a, select=of_trl.select, **k: select(*a, **k | {"second_wording": k["second_wording"].roll(1)}),
    ),
    "TRL asks everybody the first wording": (of_trl, "reworded", lambda rows, *_: rows),
    "TRL draws other coin flips": (MGRPOTrainer, "_generator", lambda self: torch.Generator().manual_seed(9)),
    "TRL prunes with another k": (
        of_trl,
        "select",
        lambda *a, select=of_trl.select, **k: select(*a[:3], dataclasses.replace(a[3], iqr_k=0.0), **k),
    ),
    "the trainer scales advantages otherwise": (
        steps,
        "select",
        lambda *a, select=steps.select, **k: select(*a, **k | {"scale": "none"}),
    ),
    "the trainer does not know who sampled": (
        steps,
        "select",
        lambda *a, select=steps.select, **k: select(*a, **{**k, "by_momentum": None}),
    ),
    "the trainer gives other true answers": (
        steps,
        "select",
        lambda *a, select=steps.select, **k: select(*a, **{**k, "gold": ["9"] * len(k["gold"])}),
    ),
}


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_a_trainer_that_deviates_is_found(both: Any, monkeypatch: pytest.MonkeyPatch, deviation: str) -> None:
    method = "random" if "coin" in deviation else "self_harmony" if "wording" in deviation else "mgrpo"
    monkeypatch.setattr(*DEVIATIONS[deviation])
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        paths.check_same(*both(paths.make_case(8, method=method)))


@pytest.mark.parametrize("method", METHODS)
def test_trl_and_our_trainer_divide_a_group_alike(tmp_path: Any, method: str) -> None:
    for G in range(2, 20):
        votes = {"min_votes": 1}  # co_rewarding's labels take as many momentum rollouts as votes
        settings = tiny_trl.settings(tmp_path, num_generations=G, per_device_train_batch_size=G, method=method, **votes)
        least = 4 if METHODS[method].second_wording == "policy" else 3 if METHODS[method].momentum_share else 2
        if least > G:
            with pytest.raises(UsageError, match=f"rollouts: expected at least {least} with method {method}"):
                build({"method": method, "rollouts": G, **votes})
            with pytest.raises(ValueError, match=f"rollouts: expected at least {least} with method {method}"):
                MGRPOConfig(**settings)
            continue
        ours = build({"method": method, "rollouts": G, **votes}).momentum_rollouts
        assert ours == MGRPOConfig(**settings).momentum_rollouts
        assert ours == (G // 2 if METHODS[method].momentum_share else 0)
        assert G - ours >= 2


def test_verl_in_its_own_process() -> None:
    installed_peers.need("verl")
    checks = installed_peers.ROOT / "tests" / "integrations" / "verl_selection_checks.py"
    env = installed_peers.environment(
        VERL_USE_EXTERNAL_MODULES="mgrpo_kernels.integrations.verl_trainer", VERL_USE_EXTERNAL_PLUGINS="none"
    )
    done = installed_peers.python("-m", "pytest", "-q", "-p", "no:cacheprovider", checks, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
