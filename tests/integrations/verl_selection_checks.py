"""The contract of test_selection_paths.py for verl's trainer, beside ours. That file runs this in a process of its own."""

import pytest
import selection_paths as paths
import tiny_trl
import torch
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl_trainer_checks import KVBatchMeta, Tokenizer, settings

from mgrpo_kernels.integrations import verl_trainer
from mgrpo_kernels.method import MethodOptions, Selection, pruning
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run.learner import make_learner

pytest_plugins = ["verl_trainer_checks"]  # its fixture: the queue


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(tiny_trl.make_base(tmp_path_factory.mktemp("base")), torch.device("cpu"), torch.float32)


def fill(queue, case):
    """Put a case's rollouts into the queue, those of the prompts mixed, with a row of padding; return batch and keys in the case's order.

    Rollouts of the second wording come first.
    """
    scores, answers, logprobs = paths.stats(case)["entropy"], paths.gold(case), paths.stats(case)["logprob"]
    rows, keys = [], []
    first = case.G - MethodOptions(**case.options).second_wording_count(case.G)
    for place in [*range(first, case.G), *range(first)]:
        for prompt in range(paths.P):
            i = prompt * case.G + place
            text, ones = case.texts[i], torch.ones(len(case.texts[i]), dtype=torch.long)
            rows.append(
                {
                    "uid": f"prompt{prompt}",
                    "responses": torch.tensor([ord(c) for c in text], dtype=torch.long),
                    "response_mask": ones,
                    "loss_mask": ones,
                    "entropy": scores[i, : len(text)],
                    "rm_scores": torch.zeros(len(text)),
                    "old_log_probs": logprobs[i, : len(text)],
                    "reward_model": {"ground_truth": answers[i]},
                }
            )
            keys.append(f"prompt{prompt}_{place}_0")
    zero = torch.zeros(1)
    rows.append(
        {
            "uid": "pad",
            "responses": torch.tensor([0]),
            "response_mask": zero.long(),
            "loss_mask": zero.long(),
            "entropy": zero,
            "rm_scores": zero,
            "old_log_probs": zero,
            "reward_model": {"ground_truth": "1"},
        }
    )
    tags = [{} for _ in keys] + [{"is_padding": True}]
    queue.kv_batch_put([*keys, "pad_0_0"], "train", list_of_dict_to_tensordict(rows))
    batch = KVBatchMeta(partition_id="train", keys=[*keys, "pad_0_0"], tags=tags)
    return batch, [f"prompt{p}_{i}_0" for p in range(paths.P) for i in range(case.G)]


def by_verl(case, queue, monkeypatch):
    """Return what verl's trainer makes of a case: rewards, who trains and advantages are read from what it puts into the queue."""
    options = {f"mgrpo__{name}": value for name, value in {**case.options, "equivalence": "exact"}.items()}
    trainer = verl_trainer.MGRPOTrainer.__new__(verl_trainer.MGRPOTrainer)
    trainer.config = settings(**options, data__seed=paths.SEED, actor_rollout_ref__rollout__n=case.G)
    trainer.options, trainer.tokenizer, trainer.global_steps = verl_trainer.check_config(trainer.config), Tokenizer(), 1
    caught, select = [], verl_trainer.select
    monkeypatch.setattr(verl_trainer, "extract_answer", demo.after_hash)
    monkeypatch.setattr(verl_trainer, "select", lambda *a, **k: caught.append(select(*a, **k)) or caught[-1])
    batch, keys = fill(queue, case)
    metrics = {}
    trainer._compute_advantage(batch, metrics)
    selection: Selection = caught[0]
    rows = [queue.rows[key] for key in keys]
    logged = {name.removeprefix("mgrpo/"): value for name, value in metrics.items() if name.startswith("mgrpo/")}
    found = paths.Found.of(selection, {**dict.fromkeys(selection.metrics()), **logged})
    filled = [len(row["responses"]) > 0 for row in rows]
    found["rewards"] = torch.tensor([float(row["rm_scores"].sum()) for row in rows])
    found["trains"] = torch.tensor([bool(row["response_mask"].any()) for row in rows])
    if "token_advantages" in found:
        padded = torch.nn.utils.rnn.pad_sequence([row["advantages"] for row in rows], batch_first=True)
        found["token_advantages"] = torch.nn.functional.pad(padded, (0, paths.WIDTH - padded.shape[1]))
    else:
        found["advantages"] = torch.tensor(
            [float(row["advantages"][0]) if some else 0.0 for row, some in zip(rows, filled, strict=True)]
        )
    assert queue.rows["pad_0_0"]["advantages"].tolist() == [0.0]
    return found


def both(case, policy, queue, patch):
    if case.all_pruned:
        paths.prune_all(pruning, patch)
    ours = paths.by_trainer(case, lambda config: make_learner(config, demo.make_task(0), policy), patch)
    return ours, by_verl(case, queue, patch)


@pytest.mark.parametrize("case", paths.cases(momentum=False), ids=lambda case: case.name)
def test_verl_makes_of_rollouts_what_our_trainer_makes(policy, queue, monkeypatch, case):
    ours, theirs = both(case, policy, queue, monkeypatch)
    if case.empty:  # a reward that no token can carry
        empty = torch.tensor([not text for text in case.texts])
        assert empty.any()
        ours["rewards"] = ours["rewards"].masked_fill(empty, 0.0)
    paths.check_same(ours, theirs)
    assert case.all_pruned or ours["advantages"].abs().sum() > 1


def shifted(names, real, second=None, by_group=verl_trainer.by_group):
    order, offsets = by_group(names, real, second)
    return order.roll(1), offsets


def other_half(*args, select=verl_trainer.select, second_wording, **options):
    return select(*args, **options, second_wording=None if second_wording is None else ~second_wording)


@pytest.mark.parametrize(
    ("name", "wrong", "method"),
    [("by_group", shifted, "mgrpo"), ("_gold", lambda _: "9", "mgrpo"), ("select", other_half, "co_rewarding_1")],
)
def test_a_verl_trainer_that_deviates_is_found(policy, queue, monkeypatch, name, wrong, method):
    monkeypatch.setattr(verl_trainer, name, wrong)
    with pytest.raises((AssertionError, ValueError)):  # noqa: PT012
        ours, theirs = both(paths.make_case(8, method=method, momentum_rollouts=0), policy, queue, monkeypatch)
        paths.check_same(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "co_rewarding"},
            "mgrpo.method: expected one whose labels are not the momentum model's, since verl's rollout servers",
        ),
        ({"method": "intuitor"}, "mgrpo.method: expected one without self-certainty, since verl scores log-probs"),
        (
            {"method": "confident_vote"},
            "mgrpo.method: expected one without self-certainty, since verl scores log-probs",
        ),
        ({"method": "co_rewarding_3"}, "mgrpo.method: expected one whose labels are not the momentum model's"),
        ({"method": "srt", "paraphrase_field": "b"}, "mgrpo.paraphrase_field: expected it left out with method srt"),
        (
            {"momentum_rollouts": 4},
            "mgrpo.momentum_rollouts: expected it left out, since verl's rollout servers hold one set",
        ),
        ({"decay": 0.9}, "mgrpo.decay: expected it left out"),
        ({"method": "srt", "filter_scope": "vote"}, "filter_scope: expected the IQR filter"),
    ],
)
def test_what_verl_has_nothing_for_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        verl_trainer.check_config(settings(**{f"mgrpo__{name}": value for name, value in options.items()}))
