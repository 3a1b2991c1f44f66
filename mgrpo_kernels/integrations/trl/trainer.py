"""M-GRPO on TRL's own GRPOTrainer: momentum rollouts, IQR filter, majority vote, momentum update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from mgrpo_kernels import (
    MomentumModel,
    Vote,
    extract_answer,
    group_advantages,
    iqr_filter,
    majority_vote,
    trajectory_entropy,
)
from mgrpo_kernels.integrations.trl import loss
from mgrpo_kernels.integrations.trl.config import MGRPOConfig

MOMENTUM_FILE = "momentum.pt"
_SCALES = {"group": "std", "batch": "batch", "none": "none"}  # TRL's scale_rewards -> ours


def majority_vote_reward(completions: list[Any], **_: Any) -> list[float]:
    """Stand in for the reward that :class:`MGRPOTrainer` computes from the whole group; TRL wants a function of that name."""
    return [0.0] * len(completions)


class MGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with M-GRPO (arXiv 2512.13070); everything else is TRL's, checkpoints, logging and generation included.

    A step samples ``momentum_rollouts`` of each prompt's ``num_generations`` rollouts from the momentum model, prunes those of low
    entropy, lets the others elect a label, rewards the policy's rollouts that agree with it, and trains on these alone. After each
    optimizer step the momentum model moves towards the policy. It lies in each checkpoint and is resumed with it.

    With ``use_vllm`` the momentum model's weights are pushed into TRL's own engine for its rollouts, and the policy's for the others.
    The losses are computed by this library; for its head as well, train inside ``with trl.patched():``.

    Args:
        model: as for GRPOTrainer.
        reward_funcs: as for GRPOTrainer; None: the majority vote is the reward, and no answers are needed.
        args: MGRPOConfig.
        extract: text of a completion -> its answer, or None. For the vote.
        more: as for GRPOTrainer.

    Raises:
        TypeError: `args` is no MGRPOConfig.
        ValueError: tools, environments, a rollout function, FSDP, DeepSpeed, what the fused loss cannot run, or with vLLM groups that are
            split over processes; when prompts with images come, too.
    """

    _name = "M-GRPO"
    args: MGRPOConfig
    model: Any
    num_generations: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: MGRPOConfig | None = None,
        *,
        extract: Callable[[str], str | None] = extract_answer,
        **more: Any,
    ) -> None:
        if args is None:
            args = MGRPOConfig(output_dir="mgrpo")
        if not isinstance(args, MGRPOConfig):
            raise TypeError(f"args: want MGRPOConfig, got {type(args).__name__}")
        for name in ("tools", "environment_factory", "rollout_func"):
            if more.get(name):
                raise ValueError(f"{name}: want None with MGRPOTrainer, whose rollouts are one turn each, got {name}")
        self.votes = not reward_funcs
        self.extract = extract
        functions: Any = majority_vote_reward if self.votes else reward_funcs
        super().__init__(model, functions, args, **more)
        self.momentum_rollouts = int(args.momentum_rollouts)  # type: ignore[arg-type]  # filled in when the config was built
        for name, used in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if used:
                raise ValueError(
                    f"MGRPOTrainer: want whole parameters on each process (one process or DDP), got {name}"
                )
        rows = args.generation_batch_size // self.accelerator.num_processes
        if self.use_vllm and rows % args.num_generations:
            raise ValueError(
                f"generation_batch_size: want whole groups of num_generations {args.num_generations} on each process with vLLM, "
                f"got {rows} rollouts"
            )
        reason = loss.unsupported(self)
        if reason is not None:
            raise ValueError(f"MGRPOTrainer: want a configuration that the fused loss can run, got {reason}")
        # A list of the parameters that train: with PEFT the average of the adapter alone is kept.
        self._trained = nn.ParameterDict(
            {name.replace(".", "/"): p for name, p in self.model.named_parameters() if p.requires_grad}
        )
        self.momentum = MomentumModel(
            self._trained, decay=args.decay, dtype=getattr(torch, args.momentum_dtype), device=args.momentum_device
        )
        self.add_callback(_MomentumUpdate(self.momentum))
        self._entropy: Tensor | None = None  # (B,) of this process's rollouts, from generation to reward
        self._kept: Tensor | None = None  # (B over all processes,) bool, from reward to advantage
        self._rewards: Tensor | None = None  # likewise, float32

    def by_momentum(self, rows: int) -> Tensor:
        """Return which of this process's `rows` rollouts are the momentum model's, ``(rows,)`` bool: the last of each group."""
        place = (torch.arange(rows) + self.accelerator.process_index * rows) % self.num_generations
        return place >= self.num_generations - self.momentum_rollouts

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if images is not None or multimodal_fields:
            raise ValueError("prompts: want text with MGRPOTrainer, got images")
        sample = super()._generate_single_turn
        if not self.model.training:  # an evaluation is of the policy
            return sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        momentum = self.by_momentum(len(prompt_ids))
        completions: list[Any] = [None] * len(prompt_ids)
        logprobs: list[Any] = [None] * len(prompt_ids)

        def fill(rows: list[int], copies: int) -> None:
            if not rows:
                return
            tokens, said = sample([prompt_ids[row] for row in rows], None, multimodal_fields, copies)
            for i, row in enumerate(rows):
                completions[row], logprobs[row] = tokens[i], None if said is None else said[i]

        fill((~momentum).nonzero().flatten().tolist(), num_generations - self.momentum_rollouts)
        with self.momentum.swapped_into(self._trained):
            self._engine_weights_changed()
            fill(momentum.nonzero().flatten().tolist(), self.momentum_rollouts)
        self._engine_weights_changed()
        self._entropy = self._score(prompt_ids, completions, momentum) if self.args.iqr_filter else None
        return completions, logprobs if self.use_vllm else None

    def _engine_weights_changed(self) -> None:
        if self.use_vllm and self.momentum_rollouts:
            self._last_loaded_step = -1  # TRL then pushes the weights before it generates

    def _score(self, prompts: list[list[int]], completions: list[list[int]], momentum: Tensor) -> Tensor:
        """Return each trajectory's entropy, ``(B,)`` float32, under the model that sampled it (or the policy, as configured)."""
        device, padding = self.accelerator.device, self._tokenizer.pad_token_id
        left = [torch.tensor(ids, device=device) for ids in prompts]
        right = [torch.tensor(ids, device=device) for ids in completions]
        mask = pad([torch.ones_like(ids) for ids in right], padding_value=0, padding_side="right")  # (B, R)
        before = pad([torch.ones_like(ids) for ids in left], padding_value=0, padding_side="left")
        tokens = torch.cat(
            [
                pad(left, padding_value=padding, padding_side="left"),
                pad(right, padding_value=padding, padding_side="right"),
            ],
            1,
        )
        seen = torch.cat([before, mask], 1)
        entropy = torch.full(mask.shape, float("nan"), device=device)

        def fill(rows: Tensor) -> None:
            if rows.numel():
                entropy[rows] = self._get_per_token_logps_and_entropies(
                    self.model,
                    tokens[rows],
                    seen[rows],
                    mask.shape[1],
                    self.args.per_device_train_batch_size,
                    compute_entropy=True,
                )[1]

        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        by_policy = ~momentum if self.args.momentum_scored_by == "sampler" else torch.ones_like(momentum)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            fill(by_policy.nonzero().flatten())
            if not by_policy.all():
                with self.momentum.swapped_into(self._trained):
                    fill((~by_policy).nonzero().flatten())
        return trajectory_entropy(entropy, mask=mask.bool(), reduction=self.args.entropy_reduction)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (B, functions)
        training = self.model.training
        args, device = self.args, per_function.device
        G = self.num_generations if training else int(self.num_generations_eval or 0)
        everyone = torch.ones(per_function.shape[0], dtype=torch.bool, device=device)
        kept = everyone
        if training and self._entropy is not None:
            kept = iqr_filter(self.accelerator.gather(self._entropy), G, k=args.iqr_k).keep
            self._metrics["train"]["mgrpo/pruned_fraction"].append(1 - kept.float().mean().item())
        if self.votes:
            answers = gather_object([self.extract(_text(completion)) for completion in completions])
            vote = majority_vote(answers, G, voters=kept.cpu(), equivalence=args.equivalence, min_share=args.min_share)
            per_function[:, 0] = vote.agrees.to(device)
            self._log_vote(vote, "train" if training else "eval")
        if not training:
            return per_function
        if args.filter_scope == "penalise":
            per_function[~kept] = 0.0
        momentum = self.accelerator.gather(self.by_momentum(len(prompts)).to(device))
        rewards = (per_function * self.reward_weights.to(device)).nansum(1)
        self._kept = ~momentum & ~per_function.isnan().all(1)
        if args.filter_scope == "both":
            self._kept &= kept
        self._rewards = rewards
        # TRL leaves a rollout without any reward out of its baseline and its metrics.
        return per_function.masked_fill(~self._kept.unsqueeze(1), float("nan"))

    def _log_vote(self, vote: Vote, mode: str) -> None:
        labels = [label for label in vote.labels if label is not None]
        self._metrics[mode]["mgrpo/vote_share"].append(vote.share.float().mean().item())
        self._metrics[mode]["mgrpo/labelled_fraction"].append(len(labels) / len(vote.labels))
        self._metrics[mode]["mgrpo/distinct_labels"].append(len(set(labels)) / max(1, len(labels)))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        assert self._kept is not None
        assert self._rewards is not None
        gather, rows = self.accelerator.gather, output["completion_mask"].shape[0]
        trains = self._kept & gather(output["completion_mask"].any(1))  # TRL has masked truncated ones, where asked to
        advantages = group_advantages(
            self._rewards, self.num_generations, mask=trains, scale=_SCALES[str(self.scale_rewards)]
        )
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        output["advantages"] = advantages[mine]
        output["completion_mask"] = output["completion_mask"] * trains[mine].unsqueeze(1)
        output["num_items_in_batch"] = gather(output["completion_mask"].sum()).sum()
        output["sequences_in_batch"] = trains.sum()
        self._metrics["train"]["mgrpo/training_fraction"].append(trains.float().mean().item())
        self._entropy = self._kept = self._rewards = None
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return loss.grpo_loss(self, model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and how far the momentum model lags behind."""
        if self.model.training:
            self._metrics["train"]["mgrpo/momentum_distance"].append(float(self.momentum.distance(self._trained)))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            place = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(self.momentum.state_dict(), place / MOMENTUM_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / MOMENTUM_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: want a checkpoint of MGRPOTrainer, with {MOMENTUM_FILE}, got {checkpoint}"
            )
        self.momentum.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _text(completion: Any) -> str:
    """Return the text of a completion, which is a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


class _MomentumUpdate(TrainerCallback):
    """Moves the momentum model after each optimizer step, before anything is saved."""

    def __init__(self, momentum: MomentumModel) -> None:
        self._momentum = momentum

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._momentum.update()
