"""M-GRPO on TRL's own GRPOTrainer: momentum rollouts, IQR filter, majority vote, momentum update."""

from __future__ import annotations

import dataclasses
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

from mgrpo_kernels import Teacher, extract_answer
from mgrpo_kernels.integrations.trl import loss
from mgrpo_kernels.integrations.trl.columns import columns_of, gold_of, reworded
from mgrpo_kernels.integrations.trl.config import MGRPOConfig
from mgrpo_kernels.integrations.trl.scoring import completion_stats
from mgrpo_kernels.method import MethodOptions, Selection, answer_tokens, select
from mgrpo_kernels.method.agreement import label_free_signs
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.vote.extraction import read_answers

MOMENTUM_FILE = "momentum.pt"
_SCALES = {"group": "std", "batch": "batch", "none": "none"}  # TRL's scale_rewards -> ours


def majority_vote_reward(completions: list[Any], **_: Any) -> list[float]:
    """Stand in for the method's reward, which :class:`MGRPOTrainer` computes from the whole group; TRL requires a function."""
    return [0.0] * len(completions)


class MGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with M-GRPO (arXiv 2512.13070); everything else is TRL's, checkpoints, logging and generation included.

    A step samples ``momentum_rollouts`` of each prompt's ``num_generations`` rollouts from the momentum model, prunes those of low
    entropy, lets the others elect a label, rewards the policy's rollouts that agree with it, and trains on these alone; another ``method``
    rewards and trains as :data:`mgrpo_kernels.method.METHODS` says. After each optimizer step the momentum model moves towards the policy.
    It is saved in each checkpoint and resumed with it.

    With ``use_vllm`` the momentum model's weights are pushed into TRL's own engine for its rollouts, and the policy's for the others.
    The losses are computed by this library; for its head as well, train inside ``with trl.patched():``.

    Args:
        model: as for GRPOTrainer.
        reward_funcs: as for GRPOTrainer; None: the method gives the rewards.
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
            raise TypeError(f"args: expected MGRPOConfig, got {type(args).__name__}")
        for name in ("tools", "environment_factory", "rollout_func"):
            if more.get(name):
                raise ValueError(
                    f"{name}: expected None with MGRPOTrainer, whose rollouts are one turn each, got {name}"
                )
        self.uses_method_rewards = not reward_funcs
        self.extract = extract
        self.options: MethodOptions = args.method_options()
        if self.uses_method_rewards and args.reward_weights is not None:
            raise ValueError(f"reward_weights: expected None without reward_funcs, got {args.reward_weights}")
        if self.options.gold_labels and not self.uses_method_rewards:
            raise ValueError("gold_labels: expected False with reward_funcs, which give the rewards, got True")
        for name in ("teacher", "teacher_votes"):
            if getattr(self.options, name) not in ("ema", "hard", None) and not self.uses_method_rewards:
                got = getattr(self.options, name)
                raise ValueError(
                    f"{name}: expected the method's own rewards, whose vote it reads, got {got!r} with reward_funcs"
                )
        functions: Any = majority_vote_reward if self.uses_method_rewards else reward_funcs
        super().__init__(model, functions, args, **more)
        self.momentum_rollouts = int(args.momentum_rollouts)  # filled in when the config was built
        self.reworded_rollouts = self.options.second_wording_count(self.num_generations)
        self.answer_field, self.paraphrase_field = columns_of(args, self.uses_method_rewards, self.train_dataset)
        for name, used in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if used:
                raise ValueError(
                    f"MGRPOTrainer: expected whole parameters on each process (one process or DDP), got {name}"
                )
        rows = args.generation_batch_size // self.accelerator.num_processes
        if self.use_vllm and rows % args.num_generations:
            raise ValueError(
                f"generation_batch_size: expected whole groups of num_generations {args.num_generations} on each process with vLLM, "
                f"got {rows} rollouts"
            )
        reason = loss.unsupported(self, loss.WITH_GMPO)
        if reason is not None:
            raise ValueError(f"MGRPOTrainer: expected a configuration that the fused loss can run, got {reason}")
        # A list of the parameters that train: with PEFT the average of the adapter alone is kept.
        self._trained = nn.ParameterDict(
            {name.replace(".", "/"): p for name, p in self.model.named_parameters() if p.requires_grad}
        )
        self.momentum: Teacher = self.options.make_teacher(
            self._trained, dtype=getattr(torch, args.momentum_dtype), device=args.momentum_device
        )
        self._signs: dict[
            str, float | None
        ] = {}  # of the rollouts since the last optimizer step, for the momentum model's schedule
        self.add_callback(_MomentumUpdate(self))
        self._stats: dict[str, Tensor] = {}  # (B, R) of this process's rollouts, from generation to reward
        self._selection: Selection | None = None  # of all processes' rollouts, from reward to advantage
        self._random = (-1, generator_for(args.seed, "rewards", 0))  # step, and what its coin flips are drawn from

    def by_momentum(self, rows: int) -> Tensor:
        """Return which of this process's `rows` rollouts are the momentum model's, ``(rows,)`` bool: the last of each group."""
        return self._last_of_group(rows, self.momentum_rollouts)

    def by_second_wording(self, rows: int) -> Tensor:
        """Return which of this process's `rows` rollouts answer the second wording of their question, ``(rows,)`` bool."""
        return self._last_of_group(rows, self.reworded_rollouts)

    def _last_of_group(self, rows: int, count: int) -> Tensor:
        index_in_group: Tensor = (torch.arange(rows) + self.accelerator.process_index * rows) % self.num_generations
        return index_in_group >= self.num_generations - count

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if images is not None or multimodal_fields:
            raise ValueError("prompts: expected text with MGRPOTrainer, got images")
        sample = super()._generate_single_turn
        if not self.model.training:  # an evaluation is of the policy
            completions, said = sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
            self._stats = self._score(prompt_ids, completions, torch.zeros(len(prompt_ids), dtype=torch.bool))
            return completions, said
        momentum = self.by_momentum(len(prompt_ids))
        completions = [None] * len(prompt_ids)
        logprobs: list[Any] = [None] * len(prompt_ids)

        def fill(rows: list[int], copies: int) -> None:
            if not rows:
                return
            tokens, said = sample([prompt_ids[row] for row in rows], None, multimodal_fields, copies)
            for i, row in enumerate(rows):
                completions[row], logprobs[row] = tokens[i], None if said is None else said[i]

        first = ~momentum & ~self.by_second_wording(len(prompt_ids))
        second = ~momentum & ~first  # apart, because an engine may take one prompt for each group
        reworded_by_policy = 0 if self.momentum_rollouts else self.reworded_rollouts
        fill(first.nonzero().flatten().tolist(), num_generations - self.momentum_rollouts - reworded_by_policy)
        fill(second.nonzero().flatten().tolist(), reworded_by_policy)
        with self.momentum.swapped_into(self._trained):
            self._engine_weights_changed()
            fill(momentum.nonzero().flatten().tolist(), self.momentum_rollouts)
        self._engine_weights_changed()
        self._stats = self._score(prompt_ids, completions, momentum)
        return completions, logprobs if self.use_vllm else None

    def _engine_weights_changed(self) -> None:
        if self.use_vllm and self.momentum_rollouts:
            self._last_loaded_step = -1  # TRL then pushes the weights before it generates

    def _needed_stats(self) -> tuple[str, ...]:
        """Return which statistics of the rollouts' tokens the filter and the method read."""
        row, filters = self.options.row, self.options.filters and self.model.training
        needed = {"entropy": filters or (row.needs_entropy and self.uses_method_rewards)}
        needed["self_certainty"] = row.needs_self_certainty and self.uses_method_rewards
        needed["logprob"] = row.needs_logprob and self.uses_method_rewards
        return tuple(name for name, is_needed in needed.items() if is_needed)

    def _score(self, prompts: list[list[int]], completions: list[Any], momentum: Tensor) -> dict[str, Tensor]:
        """Return the needed statistics, ``(B, R)`` each, under the model that sampled a rollout (or the policy, as configured)."""
        names = self._needed_stats()
        if not names:
            return {}
        rows = list(zip(prompts, completions, strict=True))
        width = max(map(len, completions))
        found = {
            name: torch.full((len(rows), width), torch.nan, device=self.accelerator.device, dtype=torch.float32)
            for name in names
        }

        def fill(chosen: Tensor) -> None:
            numbers = chosen.nonzero().flatten().tolist()
            if numbers:
                scored = completion_stats(self, [rows[i] for i in numbers], width, names)
                for name in names:
                    found[name][numbers] = scored[name].float()

        by_policy = ~momentum if self.options.momentum_scored_by == "sampler" else torch.ones_like(momentum)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            fill(by_policy)
            if not by_policy.all():
                with self.momentum.swapped_into(self._trained):
                    fill(~by_policy)
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        per_function: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )  # (B, functions)
        training, device = self.model.training, per_function.device
        own = None
        if not self.uses_method_rewards:
            own = (per_function * self.reward_weights.to(device)).nansum(1)
            own[per_function.isnan().all(1)] = torch.nan
        selection = self._select(inputs, completions, completion_ids_list, own)
        mode = "train" if training else "eval"
        for name, value in (selection.metrics() | (self._signs if training else {})).items():
            if value is not None and (training or selection.vote is not None):
                self._metrics[mode][f"mgrpo/{name}"].append(value)
        if self.uses_method_rewards:
            per_function[:, 0] = selection.rewards.to(device)
        if not training:
            return per_function
        if self.options.filter_scope == "penalise":
            per_function[~selection.survives.to(device)] = 0.0
        self._selection = selection
        # TRL leaves a rollout without any reward out of its baseline and its metrics.
        return per_function.masked_fill(~selection.trains.to(device).unsqueeze(1), float("nan"))

    def _select(self, inputs: Any, completions: Any, ids: list[list[int]], rewards: Tensor | None) -> Selection:
        """Return what becomes of all processes' rollouts; of an evaluation's, which are all the policy's, nothing is pruned."""
        training, device = self.model.training, self.accelerator.device
        options = self.options if training else evaluation_options(self.options)
        finished = [self._is_finished(row) for row in ids]
        ended = [not self.mask_truncated_completions or each for each in finished]
        gold = None if self.answer_field is None else [gold_of(each, self.answer_field) for each in inputs]
        width = max(gather_object([max(map(len, ids))]))
        mask = torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]
        gather = self.accelerator.gather

        def gathered(values: Tensor) -> Tensor:
            rows: Tensor = gather(nn.functional.pad(values, (0, width - values.shape[1])))
            return rows.cpu()

        stats = {name: gathered(values) for name, values in self._stats.items()}
        momentum = self.by_momentum(len(ids)) if training else torch.zeros(len(ids), dtype=torch.bool)
        texts = [_text(each) for each in completions]
        answers = read_answers(self.extract, texts, finished)
        tokens = spans = None
        if options.row.needs_tokens and self.uses_method_rewards:
            tokens = gathered(pad([torch.tensor(row, device=device) for row in ids], padding_value=0))
        if options.weight_of_answer < 1.0:
            spans = gathered(answer_tokens(ids, texts, answers, self._decode, width).to(device))
        by_momentum, answers = gather(momentum.to(device)).cpu(), gather_object(answers)
        second = torch.arange(len(answers)) % self.num_generations >= self.num_generations - self.reworded_rollouts
        selection = select(
            gather(mask.to(device)).cpu(),
            answers,
            self.num_generations if training else int(self.num_generations_eval or 0),
            options,
            by_momentum=by_momentum,
            second_wording=second if training and self.reworded_rollouts else None,
            may_vote=self._may_vote(by_momentum) if training and options.teacher_votes is not None else None,
            may_train=gather(torch.tensor(ended, device=device)).cpu(),
            gold=None if gold is None else gather_object(gold),
            rewards=rewards,
            scale=_SCALES[str(self.scale_rewards)],
            generator=self._generator(),
            entropy=stats.get("entropy"),
            self_certainty=stats.get("self_certainty"),
            logprob=stats.get("logprob"),
            tokens=tokens,
            answer_tokens=spans,
        )
        if training:
            self._signs = label_free_signs(selection, answers, self.num_generations, by_momentum)
        return selection

    def _may_vote(self, by_momentum: Tensor) -> Tensor:
        """Return which of all processes' rollouts vote, ``(B,)`` bool, so that the momentum model has its share of the votes."""
        own = self.num_generations - self.momentum_rollouts
        index = torch.arange(len(by_momentum)) % self.num_generations
        return by_momentum | (index < self.momentum.policy_voters(own, self.momentum_rollouts))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _is_finished(self, ids: list[int]) -> bool:
        """Return whether a completion ended by itself, as TRL decides it."""
        return bool(ids) and ids[-1] in [*self.eos_token_ids, self._tokenizer.pad_token_id]

    def _generator(self) -> torch.Generator:
        """Return what this step's coin flips are drawn from, as ``python -m mgrpo_kernels.train`` draws them."""
        step = self.state.global_step + 1
        if self._random[0] != step:
            self._random = (step, generator_for(self.args.seed, "rewards", step))
        return self._random[1]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.model.training and self.reworded_rollouts:
            assert self.paraphrase_field is not None
            inputs = reworded(inputs, self.by_second_wording(len(inputs)), self.paraphrase_field)
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        assert self._selection is not None
        gather, rows = self.accelerator.gather, output["completion_mask"].shape[0]
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        device = output["completion_mask"].device
        advantages, by_token = self._selection.advantages[mine], self._selection.token_advantages
        if by_token is not None:
            width = output["completion_mask"].shape[1]
            advantages = nn.functional.pad(by_token[mine], (0, width - by_token.shape[1]))
        output["advantages"] = advantages.to(device)
        output["completion_mask"] = output["completion_mask"] * self._selection.trains[mine].to(device).unsqueeze(1)
        output["num_items_in_batch"] = gather(output["completion_mask"].sum()).sum()
        output["sequences_in_batch"] = self._selection.trains.sum().to(device)
        self._stats, self._selection = {}, None
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return loss.grpo_loss(self, model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and how far the momentum model lags behind."""
        if self.model.training:
            self._metrics["train"]["mgrpo/momentum_distance"].append(float(self.momentum.distance(self._trained)))
            if self.momentum.refreshes is not None:
                self._metrics["train"]["mgrpo/teacher_refreshes"].append(float(self.momentum.refreshes))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(self.momentum.state_dict(), directory / MOMENTUM_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / MOMENTUM_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: expected a checkpoint of MGRPOTrainer, with {MOMENTUM_FILE}, got {checkpoint}"
            )
        self.momentum.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def evaluation_options(options: MethodOptions) -> MethodOptions:
    """Return the options for an evaluation, which asks the policy once: no filter, and its majority in place of another vote."""
    method = "srt" if options.row.needs_momentum or options.row.second_wording != "no" else options.method
    changes: dict[str, Any] = {
        "momentum_rollouts": 0,
        "iqr_filter": False,
        "filter_scope": "both",
        "answer_weight": 1.0,
    }
    return dataclasses.replace(options, method=method, **changes)


def _text(completion: Any) -> str:
    """Return the text of a completion, which is a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


class _MomentumUpdate(TrainerCallback):
    """Moves the momentum model after each optimizer step, before anything is saved."""

    def __init__(self, trainer: MGRPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, options = self._trainer, self._trainer.options
        decay = options.decay_at(state.global_step, state.max_steps) if options.teacher == "ema" else None
        trainer.momentum.advance(trainer._signs, decay)
        trainer._signs = {}  # where several steps use the same rollouts, these count once
