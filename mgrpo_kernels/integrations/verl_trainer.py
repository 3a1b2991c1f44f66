r"""M-GRPO's filter and vote in verl 0.9's trainer: ``trainer.v1.trainer_mode=mgrpo``.

verl's advantage estimators are given no entropy. Its trainer has it, beside the responses, from the pass that scores them
(``_compute_old_log_prob``) on: :class:`MGRPOTrainer` is verl's synchronous trainer whose ``_compute_advantage`` filters, votes, rewards
and takes the advantages there. Importing this module registers it; have verl do so in each of its processes::

    VERL_USE_EXTERNAL_MODULES=mgrpo_kernels.integrations.verl_trainer python -m verl.trainer.main_ppo \
        trainer.use_v1=True trainer.v1.trainer_mode=mgrpo algorithm.adv_estimator=grpo +mgrpo.iqr_k=0.75 ...

All rollouts are the policy's: verl's rollout servers hold one set of weights, so there is no momentum model here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from mgrpo_kernels import extract_answer
from mgrpo_kernels.integrations._selection import Options, select


@register_trainer("mgrpo")
class MGRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with M-GRPO's filter, vote and advantages.

    Options, under ``+mgrpo.`` in verl's configuration: see :class:`mgrpo_kernels.integrations._selection.Options`. Rewards of verl's
    own are only logged, as ``mgrpo/own_reward``.
    """

    def __init__(self, config: Any) -> None:
        self.options = check_config(config)
        super().__init__(config=config)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Filter, vote, reward; then verl's own part (rollout correction); then M-GRPO's advantages in place of verl's."""
        sessions = Counter(key.rsplit("_", 1)[0] for key in batch.keys)
        if (most := max(sessions.values(), default=1)) > 1:
            raise ValueError(
                f"batch: want one output for each rollout, got {most} of one: M-GRPO votes on whole responses"
            )
        names = ["uid", "responses", "response_mask", "loss_mask", "entropy", "rm_scores"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        lengths, offsets = data["response_mask"].offsets().diff(), data["response_mask"].offsets()
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        texts = [
            self.tokenizer.decode(tokens[mask.bool()], skip_special_tokens=True)
            for tokens, mask in zip(data["responses"].unbind(), data["response_mask"].unbind(), strict=True)
        ]
        padded = data.select("entropy", "response_mask").to_padded_tensor()
        chosen = select(
            padded["entropy"].float(),
            padded["response_mask"].bool() & real.unsqueeze(-1),
            [extract_answer(text) for text in texts],
            data.get("uid").tolist(),
            self.options,
        )
        metrics.update(chosen.metrics)
        metrics["mgrpo/own_reward"] = _sums(data["rm_scores"])[real].mean().item()

        last = torch.zeros(int(offsets[-1]))
        last[offsets[1:] - 1] = chosen.rewards  # a response's reward stands at its last token
        self._put(batch, rm_scores=_nested(last, offsets))
        batch = super()._compute_advantage(batch, metrics)

        mask = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask", "loss_mask"]
        )
        trains = chosen.trains.repeat_interleave(lengths)
        advantages = chosen.advantages.repeat_interleave(lengths) * mask["response_mask"].values()
        self._put(
            batch,
            advantages=_nested(advantages, offsets),
            returns=_nested(advantages, offsets),
            # What was pruned counts for nothing: no KL, no entropy bonus, no share of the token mean.
            response_mask=_nested(mask["response_mask"].values() * trains, offsets),
            loss_mask=_nested(mask["loss_mask"].values() * trains, offsets),
        )
        return batch

    def _put(self, batch: Any, **fields: Tensor) -> None:
        tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )


def check_config(config: Any) -> Options:
    """Return M-GRPO's options out of verl's configuration.

    Raises:
        ValueError: an option that does not exist or is out of range, or verl options with which there is no entropy, or which would
            take the advantages elsewhere.
    """
    algorithm = config.algorithm
    correction = algorithm.get("rollout_correction", None)
    for name, want, got in (
        ("algorithm.adv_estimator", "grpo", algorithm.adv_estimator),
        ("algorithm.use_kl_in_reward", False, algorithm.use_kl_in_reward),
        ("algorithm.rollout_correction.bypass_mode", False, bool(correction and correction.get("bypass_mode", False))),
    ):
        if got != want:
            raise ValueError(f"{name}: want {want} with trainer_mode mgrpo, got {got}")
    return Options.of(config.get("mgrpo", None) or {})


def _nested(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def _sums(nested: Tensor) -> Tensor:
    return torch.stack([row.sum() for row in nested.unbind()])


__all__ = ["MGRPOTrainer", "check_config"]
