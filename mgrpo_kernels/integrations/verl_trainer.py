r"""M-GRPO's filter and vote in verl 0.9's trainer: ``trainer.v1.trainer_mode=mgrpo``.

verl's advantage estimators are given no entropy. Its trainer has it, beside the responses, from the pass that scores them
(``_compute_old_log_prob``) on: :class:`MGRPOTrainer` is verl's synchronous trainer whose ``_compute_advantage`` filters, votes, rewards
and takes the advantages there. Importing this module registers it; have verl do so in each of its processes::

    VERL_USE_EXTERNAL_MODULES=mgrpo_kernels.integrations.verl_trainer python -m verl.trainer.main_ppo \
        trainer.use_v1=True trainer.v1.trainer_mode=mgrpo algorithm.adv_estimator=grpo +mgrpo.iqr_k=0.75 ...

All rollouts are the policy's: verl's rollout servers hold one set of weights, so there is no momentum model here. Where the method asks a
question in two wordings, the last sessions of a prompt answer the second one (:class:`TwoWordingsLoop`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from mgrpo_kernels import extract_answer
from mgrpo_kernels.integrations.wordings import second_wording
from mgrpo_kernels.method import MOMENTUM_OPTIONS, Gold, MethodOptions, Selection, answer_tokens, gold_in_cell, select
from mgrpo_kernels.train.data.fields import FIELDS
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.vote.extraction import read_answers

SINGLE_TURN, TWO_WORDINGS = "single_turn_agent", "mgrpo_two_wordings"
"""Names of verl's agent loop of a single turn, and of ours that answers two wordings of a question."""
ONE_MODEL = "verl's rollout servers hold one set of weights, so there is no momentum model"


@register(TWO_WORDINGS)
class TwoWordingsLoop(SingleTurnAgentLoop):
    """verl's single turn, in which a prompt's last sessions answer its second wording. :class:`MGRPOTrainer` adds what it reads."""

    async def run(self, sampling_params: dict[str, Any], **sample: Any) -> Any:
        """Answer the wording of this session."""
        if sample["session_id"] >= sample["first_wording_sessions"]:
            sample["raw_prompt"] = sample["second_wording"]
        return await super().run(sampling_params, **sample)


@register_trainer("mgrpo")
class MGRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with M-GRPO's filter, vote and advantages.

    Its options, under ``+mgrpo.`` in verl's configuration, are those of :class:`mgrpo_kernels.method.MethodOptions` but for the momentum
    model's, and ``paraphrase_field``, the column with the question in another wording. Rewards of verl's own are only logged, as
    ``mgrpo/own_reward``.
    """

    def __init__(self, config: Any) -> None:
        self.options = check_config(config)
        super().__init__(config=config)

    @property
    def first_wording_sessions(self) -> int:
        """Number of each prompt's sessions that answer the first wording of its question: all of them, or the first half."""
        sessions = int(self.config.actor_rollout_ref.rollout.n)
        return sessions - self.options.second_wording_count(sessions)

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """Return verl's batch of prompts; with a method that needs it, those of the second wording too, and the loop that answers both."""
        batch: TensorDict = super()._next_train_batch(num_prompts)
        if self.options.row.second_wording == "no":
            return batch
        loops = set(tu.get(batch, "agent_name", None) or ()) - {SINGLE_TURN}
        if loops:
            raise ValueError(
                f"agent_name: expected {SINGLE_TURN} in every row with method {self.options.method}, got {', '.join(sorted(loops))}"
            )
        field = paraphrase_field(self.config)
        prompts, others = (list(tu.get(batch, name, None) or ()) for name in ("raw_prompt", field))
        if not others:
            raise ValueError(
                f"mgrpo.paraphrase_field: expected one of the data's columns {', '.join(sorted(map(str, batch.keys())))}, got {field!r}"
            )
        reworded = [second_wording(*each, field) for each in zip(prompts, others, strict=True)]
        fields = {"agent_name": TWO_WORDINGS, "first_wording_sessions": self.first_wording_sessions}
        for name, values in {"second_wording": reworded, **{k: [v] * len(prompts) for k, v in fields.items()}}.items():
            tu.assign_non_tensor_stack(batch, name, values)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Filter, vote, reward; then verl's own part (rollout correction); then M-GRPO's advantages in place of verl's."""
        sessions = Counter(key.rsplit("_", 1)[0] for key in batch.keys)
        if (most := max(sessions.values(), default=1)) > 1:
            raise ValueError(
                f"batch: expected one output for each rollout, got {most} of one: M-GRPO votes on whole responses"
            )
        names = ["uid", "responses", "response_mask", "loss_mask", "entropy", "rm_scores", "reward_model"]
        if self.options.row.needs_logprob:
            names.append("old_log_probs")
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        lengths, offsets = data["response_mask"].offsets().diff(), data["response_mask"].offsets()
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        texts = [
            self.tokenizer.decode(tokens[mask.bool()], skip_special_tokens=True)
            for tokens, mask in zip(data["responses"].unbind(), data["response_mask"].unbind(), strict=True)
        ]
        second = None
        if self.options.row.second_wording != "no":
            second = torch.tensor([int(key.rsplit("_", 2)[1]) for key in batch.keys]) >= self.first_wording_sessions
        order, groups = by_group(data.get("uid").tolist(), real, second)
        chosen = self._select(data, texts, order, groups, second)
        metrics.update({f"mgrpo/{name}": value for name, value in chosen.metrics().items() if value is not None})
        metrics["mgrpo/own_reward"] = _sums(data["rm_scores"])[real].mean().item()

        last = torch.zeros(int(offsets[-1]), dtype=torch.float32)
        rewards, trains, advantages = (
            torch.zeros(len(texts), dtype=torch.float32).index_copy(0, order, each.float())
            for each in (chosen.rewards, chosen.trains, chosen.advantages)
        )
        filled = lengths > 0
        last[offsets[1:][filled] - 1] = rewards[filled]  # a response's reward is at its last token
        self._put(batch, rm_scores=_nested(last, offsets))
        batch = super()._compute_advantage(batch, metrics)

        mask = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask", "loss_mask"]
        )
        trains = trains.bool().repeat_interleave(lengths)
        if chosen.token_advantages is None:
            advantages = advantages.repeat_interleave(lengths)
        else:
            by_token = chosen.token_advantages.new_zeros(len(texts), chosen.token_advantages.shape[1])
            by_token = by_token.index_copy(0, order, chosen.token_advantages)
            advantages = by_token[torch.arange(by_token.shape[1]) < lengths[:, None]]
        advantages = advantages * mask["response_mask"].values()
        self._put(
            batch,
            advantages=_nested(advantages, offsets),
            returns=_nested(advantages, offsets),
            # What was pruned counts for nothing: no KL, no entropy bonus, no share of the token mean.
            response_mask=_nested(mask["response_mask"].values() * trains, offsets),
            loss_mask=_nested(mask["loss_mask"].values() * trains, offsets),
        )
        return batch

    def _select(
        self, data: TensorDict, texts: Sequence[str], order: Tensor, groups: Tensor, second: Tensor | None
    ) -> Selection:
        """Return what becomes of the rollouts `order`, which has each prompt's together; `groups` are their offsets.

        `second` ``(B,)`` bool are the rollouts of the data that answer the second wording of their question.
        """
        row, rows = self.options.row, order.tolist()
        fields = {
            "entropy": True,
            "response_mask": True,
            "responses": row.needs_tokens,
            "old_log_probs": row.needs_logprob,
        }
        padded = data.select(*(name for name, needed in fields.items() if needed)).to_padded_tensor()
        truth = data.get("reward_model", None)
        gold = [None] * len(texts) if truth is None else [_gold(each) for each in truth.tolist()]
        longest = self.config.get("data", {}).get("max_response_length", None)
        mask = padded["response_mask"][order].bool()
        finished = [longest is None or length < longest for length in mask.sum(-1).tolist()]
        answers = read_answers(extract_answer, [texts[row] for row in rows], finished)
        return select(
            mask,
            answers,
            groups,
            self.options,
            second_wording=None if second is None else second[order],
            entropy=padded["entropy"][order].float(),
            logprob=padded["old_log_probs"][order].float() if row.needs_logprob else None,
            tokens=padded["responses"][order].long() if row.needs_tokens else None,
            answer_tokens=self._answer_tokens(data, texts, rows, answers, mask)
            if self.options.weight_of_answer < 1.0
            else None,
            gold=[gold[row] for row in rows],
            scale="std" if self.config.algorithm.get("norm_adv_by_std_in_grpo", True) else "none",
            generator=self._generator() if row.needs_generator else None,
        )

    def _answer_tokens(
        self, data: TensorDict, texts: Sequence[str], rows: Sequence[int], answers: Sequence[str | None], mask: Tensor
    ) -> Tensor:
        """Return which tokens of the rollouts `rows` spell their answers; `mask`, ``(B, L)``, has these rollouts in this order."""
        responses = data["responses"].unbind()
        ids = [responses[row][mask[i, : len(responses[row])]].tolist() for i, row in enumerate(rows)]

        def decode(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(torch.tensor(tokens, dtype=torch.int64), skip_special_tokens=True))

        # These are the masked tokens without gaps; the mask may have gaps.
        found = answer_tokens(ids, [texts[row] for row in rows], answers, decode, mask.shape[1])
        return torch.zeros_like(mask).masked_scatter(mask, found[torch.arange(mask.shape[1]) < mask.sum(-1)[:, None]])

    def _generator(self) -> torch.Generator:
        """Return what this step's coin flips are drawn from, as ``python -m mgrpo_kernels.train`` draws them."""
        return generator_for(self.config.get("data", {}).get("seed", None) or 0, "rewards", self.global_steps)

    def _put(self, batch: Any, **fields: Tensor) -> None:
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )


def paraphrase_field(config: Any) -> str:
    """Return the name of the column with the question in another wording."""
    return str((config.get("mgrpo", None) or {}).get("paraphrase_field", None) or FIELDS["paraphrase_field"][0])


def by_group(names: Sequence[Hashable], real: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows that are no padding, those of one prompt together, and where each prompt's begin and end.

    Args:
        names: B names, in any order: rollouts of one prompt have the same.
        real: ``(B,)`` bool, False for padding.
        second: ``(B,)`` bool, rows that come after the others of their prompt.

    Returns:
        Row numbers, and offsets ``(P+1,)``; prompts in the order of their first row, and their rows otherwise in their own order.
    """
    rows: dict[Hashable, list[int]] = {}
    for row in real.nonzero().flatten().tolist():
        rows.setdefault(names[row], []).append(row)
    if second is not None:
        for each in rows.values():
            each.sort(key=second.tolist().__getitem__)
    order = torch.tensor([row for each in rows.values() for row in each], dtype=torch.int64)
    return order, torch.tensor([0, *map(len, rows.values())]).cumsum(0)


def check_config(config: Any) -> MethodOptions:
    """Return the method's options out of verl's configuration.

    Raises:
        ValueError: an option that does not exist or is out of range, what verl has no data for, or verl options with which there is no
            entropy, or which would take the advantages elsewhere.
    """
    algorithm = config.algorithm
    correction = algorithm.get("rollout_correction", None)
    for name, want, got in (
        ("algorithm.adv_estimator", "grpo", algorithm.adv_estimator),
        ("algorithm.use_kl_in_reward", False, algorithm.use_kl_in_reward),
        ("algorithm.rollout_correction.bypass_mode", False, bool(correction and correction.get("bypass_mode", False))),
    ):
        if got != want:
            raise ValueError(f"{name}: expected {want} with trainer_mode mgrpo, got {got}")
    given = dict(config.get("mgrpo", None) or {})
    asked_for = given.pop("paraphrase_field", None)
    options = MethodOptions.from_mapping(given, "mgrpo")
    for name in MOMENTUM_OPTIONS:
        got, default = getattr(options, name), MethodOptions.__dataclass_fields__[name].default
        if got not in (default, 0):
            raise ValueError(f"mgrpo.{name}: expected it left out, since {ONE_MODEL}, got {got!r}")
    if options.row.needs_momentum:
        raise ValueError(
            f"mgrpo.method: expected one whose labels are not the momentum model's, since {ONE_MODEL}, got {options.method}"
        )
    if options.row.needs_self_certainty:
        raise ValueError(
            f"mgrpo.method: expected one without self-certainty, since verl scores log-probs and entropies alone, got {options.method}"
        )
    options = dataclasses.replace(options, momentum_rollouts=0)
    options.check_use(momentum=False)
    for count in (options.momentum_count, options.second_wording_count):
        count(int(config.actor_rollout_ref.rollout.n))  # raises for too few rollouts
    prompts = (config.get("data", None) or {}).get("train_batch_size", None)
    if prompts is not None:
        options.check_prompts(int(prompts))
    loop = (config.actor_rollout_ref.rollout.get("agent", None) or {}).get("default_agent_loop", SINGLE_TURN)
    if options.row.second_wording != "no" and loop != SINGLE_TURN:
        raise ValueError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop: expected {SINGLE_TURN} with method {options.method}, got {loop}"
        )
    if asked_for is not None and options.row.second_wording == "no":
        raise ValueError(
            f"mgrpo.paraphrase_field: expected it left out with method {options.method}, which asks each question in one wording, got "
            f"{asked_for!r}"
        )
    return options


def _gold(reward_model: Any) -> Gold | None:
    """Return the true answer in a cell of verl's column ``reward_model``, or several; None for what only a reward function understands."""
    try:
        return gold_in_cell((reward_model or {}).get("ground_truth", None))
    except TypeError:
        return None


def _nested(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def _sums(nested: Tensor) -> Tensor:
    return torch.stack([row.sum() for row in nested.unbind()])


__all__ = ["MGRPOTrainer", "TwoWordingsLoop", "check_config"]
