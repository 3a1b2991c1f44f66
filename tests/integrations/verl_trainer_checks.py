"""M-GRPO's filter and vote in verl's own trainer class. tests/integrations/test_verl_trainer.py runs this in a process of its own."""

import asyncio

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import PPOTrainerSync, agent_loop_tq, get_trainer_cls, trainer_base
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils.tensordict_utils import get_tensordict, list_of_dict_to_tensordict

from mgrpo_kernels import group_advantages, iqr_filter
from mgrpo_kernels.integrations import verl_trainer


class Queue:
    """What verl's trainer asks of TransferQueue, in a dict: a field that nobody has put is left out."""

    def __init__(self):
        self.rows = {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        for i, key in enumerate(keys):
            self.rows.setdefault(key, {}).update({name: values[i] for name, values in fields.items()})
        return KVBatchMeta(partition_id=partition_id, keys=list(keys), tags=tags or [{} for _ in keys])

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        rows = [{k: v for k, v in self.rows[key].items() if k in select_fields} for key in keys]
        return list_of_dict_to_tensordict(rows)


class Tokenizer:
    """Token t is the character t; 0 is special."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(t) for t in tokens.tolist() if t)


def settings(**changes):
    config = OmegaConf.create(
        {
            "algorithm": {
                "adv_estimator": "grpo",
                "use_kl_in_reward": False,
                "gamma": 1.0,
                "lam": 1.0,
                "norm_adv_by_std_in_grpo": True,
                "rollout_correction": None,
            },
            "actor_rollout_ref": {"rollout": {"n": 6, "temperature": 1.0}},
        }
    )
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return config


@pytest.fixture
def queue(monkeypatch):
    found = Queue()
    for module in (trainer_base.tq, verl_trainer.tq):
        monkeypatch.setattr(module, "kv_batch_put", found.kv_batch_put)
        monkeypatch.setattr(module, "kv_batch_get", found.kv_batch_get)
    return found


def trainer(config):
    cls = get_trainer_cls("mgrpo")
    self = cls.__new__(cls)  # the whole of it takes a cluster, engines and a dataset
    self.config, self.options, self.tokenizer = config, verl_trainer.check_config(config), Tokenizer()
    return self


TEXTS = {
    "a": ["#### 7", "so #### 7", "#### 8", "#### 7", "#### 8", "nothing"],
    "b": ["#### 1/2", "#### 0.5", "#### 3", "#### 3", "#### 3", "#### 4"],
}
LEVELS = {
    "a": [1.0, 1.1, 1.2, 1.0, 1.05, 1.15],
    "b": [1.0, 1.1, 0.02, 0.9, 1.0, 0.8],
}  # b's third is far below the others


def fill(queue, extra=()):
    rows, keys, tags = [], [], []
    for i in range(6):  # the groups' rows lie mixed, as after verl's balancing
        for uid in ("b", "a"):
            tokens = torch.tensor([ord(c) for c in TEXTS[uid][i]])
            ones = torch.ones_like(tokens)
            level = torch.full(tokens.shape, LEVELS[uid][i])
            scores = torch.zeros(tokens.shape)
            scores[-1] = 0.25
            rows.append(
                {
                    "uid": uid,
                    "responses": tokens,
                    "response_mask": ones,
                    "loss_mask": ones,
                    "entropy": level,
                    "rm_scores": scores,
                    "old_log_probs": -level,
                }
            )
            keys.append(f"{uid}_{i}_0")
            tags.append({"seq_len": len(tokens)})
    zero = torch.zeros(1)
    rows.append(
        {
            "uid": "pad",
            "responses": torch.tensor([0]),
            "response_mask": zero.long(),
            "loss_mask": zero.long(),
            "entropy": zero + 5,
            "rm_scores": zero,
            "old_log_probs": zero,
        }
    )
    keys.append("pad_0_0")
    tags.append({"is_padding": True})
    for key in extra:
        rows.append(rows[0])
        keys.append(key)
        tags.append({})
    queue.kv_batch_put(keys, "train", list_of_dict_to_tensordict(rows))
    return KVBatchMeta(partition_id="train", keys=keys, tags=tags)


@pytest.mark.parametrize("scope", ["both", "vote", "penalise"])
def test_filter_vote_and_advantages(queue, scope):
    batch, metrics = fill(queue), {}
    trainer(settings(mgrpo__filter_scope=scope))._compute_advantage(batch, metrics)
    kept = iqr_filter(torch.tensor(LEVELS["a"] + LEVELS["b"]), 6).keep
    assert kept.tolist() == [True] * 6 + [True, True, False, True, True, True]
    # a: 7 by three of five answers. b: 0.5 and 3 have two voters each, and 0.5 came first; without the filter 3 would win.
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0])
    want = group_advantages(rewards, 6, mask=kept if scope == "both" else None)
    for uid, part, keep in zip("ab", want.split(6), kept.split(6), strict=True):
        for i in range(6):
            row = queue.rows[f"{uid}_{i}_0"]
            trains = float(keep[i] or scope != "both")
            assert row["rm_scores"].sum() == rewards[i if uid == "a" else 6 + i]
            assert row["rm_scores"][:-1].sum() == 0
            assert torch.equal(row["response_mask"], torch.full_like(row["responses"], int(trains)))
            assert torch.equal(row["loss_mask"], row["response_mask"])
            torch.testing.assert_close(row["advantages"], part[i] * row["response_mask"])
            torch.testing.assert_close(row["returns"], row["advantages"])
    assert queue.rows["pad_0_0"]["advantages"].tolist() == [0.0]
    assert metrics["mgrpo/pruned_fraction"] == pytest.approx(1 / 12)
    assert metrics["mgrpo/vote_share"] == pytest.approx((3 / 5 + 2 / 5) / 2)
    assert metrics["mgrpo/labelled_fraction"] == 1.0
    assert metrics["mgrpo/own_reward"] == pytest.approx(0.25)


def test_rollout_correction_stays_verls(queue):
    correction = {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_rs": None, "bypass_mode": False}
    batch, metrics = fill(queue), {}
    for key in batch.keys:
        queue.rows[key]["rollout_log_probs"] = queue.rows[key]["old_log_probs"] - 0.1
    trainer(settings(algorithm__rollout_correction=correction))._compute_advantage(batch, metrics)
    weights = queue.rows["a_0_0"]["rollout_is_weights"]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.1).exp())
    assert queue.rows["b_2_0"]["response_mask"].sum() == 0


def two_wordings(monkeypatch, rows, **changes):
    """Return our trainer, and verl's batch of these rows as it gives them to the agent loops."""
    self = trainer(settings(mgrpo__method="self_harmony", **changes))
    messages = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {i}"}] for i in (0, 1)
    ]
    columns = {"raw_prompt": messages, "uid": ["u0", "u1"], "index": [0, 1], **rows}
    monkeypatch.setattr(PPOTrainerSync, "_next_train_batch", lambda *_: get_tensordict(columns, {"global_steps": 3}))
    return self, messages


def test_the_last_sessions_of_a_prompt_answer_its_second_wording(queue, monkeypatch):
    """Through verl's own dispatch of a batch to its agent loops, as far as the single turn, whose engine is not here."""
    given = [{"role": "user", "content": "the other question 1"}]
    self, messages = two_wordings(monkeypatch, {"paraphrase": ["the other question 0", given]})
    batch, asked = self._next_train_batch(), []

    async def single_turn(self, sampling_params, **sample):
        asked.append((sample["uid"], sample["session_id"], sample["raw_prompt"]))

    async def put(**_):
        pass

    class Worker:
        def __init__(self):
            self.config, self.background_tasks = trainer(settings()).config, set()

        async def _run_agent_loop(self, sampling_params, *, agent_name, trajectory, trace, **sample):
            found = get_class(_agent_loop_registry[agent_name]["_target_"])
            return await found.__new__(found).run(sampling_params, **sample)

        _run_prompt = AgentLoopWorkerTQ.__ray_metadata__.modified_class._run_prompt

    monkeypatch.setattr(SingleTurnAgentLoop, "run", single_turn)
    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_put", put)
    for part in batch.chunk(2):  # verl gives each worker a part
        names = [name for name in part.keys() if name != "global_steps"]  # noqa: SIM118 - a TensorDict
        sample = {name: part[name][0].data if hasattr(part[name][0], "data") else part[name][0] for name in names}
        asyncio.run(Worker()._run_prompt(sample, {}, {"validate": False}))
    first = [("u0", i, messages[0]) for i in range(3)], [("u1", i, messages[1]) for i in range(3)]
    changed = [messages[0][0], {"role": "user", "content": "the other question 0"}]
    assert asked == [
        *first[0],
        *[("u0", i, changed) for i in range(3, 6)],
        *first[1],
        *[("u1", i, given) for i in range(3, 6)],
    ]


def test_a_second_wording_that_is_missing_is_named(queue, monkeypatch):
    self, _ = two_wordings(monkeypatch, {})
    with pytest.raises(
        ValueError, match="mgrpo.paraphrase_field: expected one of the data's columns .*raw_prompt.*'paraphrase'"
    ):
        self._next_train_batch()
    self, _ = two_wordings(monkeypatch, {"other": ["fine", " "]}, mgrpo__paraphrase_field="other")
    with pytest.raises(
        ValueError, match="paraphrase_field: expected messages or a text in the column 'other' of every row, got ' '"
    ):
        self._next_train_batch()
    self, _ = two_wordings(monkeypatch, {"paraphrase": ["a", "b"], "agent_name": ["single_turn_agent", "tool_agent"]})
    with pytest.raises(ValueError, match="agent_name: expected single_turn_agent in every row .* got tool_agent"):
        self._next_train_batch()
    loop = {"actor_rollout_ref__rollout__agent__default_agent_loop": "tool_agent"}
    with pytest.raises(
        ValueError, match="default_agent_loop: expected single_turn_agent with method self_harmony, got tool_agent"
    ):
        trainer(settings(mgrpo__method="self_harmony", **loop))
    assert trainer(settings(**loop)).options.method == "mgrpo"
    with pytest.raises(ValueError, match="rollouts: expected at least 4 with method self_harmony"):
        trainer(settings(mgrpo__method="self_harmony", actor_rollout_ref__rollout__n=3))


def test_a_batch_of_one_wording_is_verls_own(queue, monkeypatch):
    self, _ = two_wordings(monkeypatch, {})
    self.options = verl_trainer.check_config(settings())
    assert set(self._next_train_batch().keys()) == {"raw_prompt", "uid", "index", "global_steps"}


def test_several_outputs_of_a_rollout_are_refused(queue):
    batch = fill(queue, extra=["a_0_1"])
    with pytest.raises(ValueError, match="batch: expected one output for each rollout, got 2 of one"):
        trainer(settings())._compute_advantage(batch, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm__adv_estimator": "rloo"},
            "algorithm.adv_estimator: expected grpo with trainer_mode mgrpo, got rloo",
        ),
        ({"algorithm__use_kl_in_reward": True}, "algorithm.use_kl_in_reward: expected False"),
        ({"algorithm__rollout_correction": {"bypass_mode": True}}, "bypass_mode: expected False"),
        ({"mgrpo__iqr": 1.0}, "mgrpo: expected one of method, momentum_rollouts, .*iqr_k"),
        ({"mgrpo__iqr_k": -1.0}, "iqr_k: expected at least 0"),
        ({"actor_rollout_ref__rollout__n": 1}, "rollouts: expected at least 2, to compare with each other, got 1"),
        ({"mgrpo__min_votes": 7}, "min_votes: expected at most 6, .* with method mgrpo, got 7"),
        (
            {"mgrpo__vote_by": "excess", "data__train_batch_size": 1},
            "vote_by: expected at least 2 prompts in each step with excess, .* got 1",
        ),
    ],
)
def test_what_it_cannot_do_is_told_when_it_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        get_trainer_cls("mgrpo")(settings(**changes))


@pytest.mark.parametrize(
    ("cell", "gold"),
    [
        ({"ground_truth": "#### 7"}, "7"),
        ({"ground_truth": 7}, "7"),
        ({"ground_truth": np.int64(7)}, "7"),
        ({"ground_truth": np.array(["7", "8"])}, ("7", "8")),
        ({"ground_truth": ["7", "8"]}, ("7", "8")),
        ({"ground_truth": {"target": ["7"]}}, None),
        ({"ground_truth": None}, None),
        ({"style": "rule"}, None),
        (None, None),
    ],
)
def test_the_true_answers_of_a_row(cell, gold):
    assert verl_trainer._gold(cell) == gold


def test_it_is_verls_synchronous_trainer():
    assert issubclass(get_trainer_cls("mgrpo"), PPOTrainerSync)
