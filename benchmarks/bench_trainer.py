"""An optimizer step of the trainer beside TRL's GRPOTrainer: sampling, rewards, advantages, loss, AdamW. And what M-GRPO adds to it.

Both take a random model of the same weights, the same prompts in the same order, as many rollouts, of the longest length every one (the
end-of-sequence token is outside the head's vocabulary), reward by majority vote, DAPO's loss, no KL term, the same AdamW. Before a time
counts, one step of TRL is taken again by ours, on TRL's own rollouts: gradient norm and moved weights must agree. Then the two take
their steps in turn. "mgrpo" is our step with momentum rollouts, filter and EMA beside our step without, as many rollouts in all.

Bytes: float32 weights, read once for each token of a response, by forward and by backward, and AdamW's seven reads and writes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from timing import DEVICE, GPU, SMALL, Round, figures, pair, peak_memory, percentile, size, synchronize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo_kernels import majority_vote
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts
from mgrpo_kernels.train.run.learner import make_learner
from mgrpo_kernels.train.step import Learner, train_step


class Size(NamedTuple):
    """A model, and a step of it."""

    layers: int
    width: int
    vocabulary: int
    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int


SIZES = {
    "demo": Size(2, 64, 16, 8, 16, 8, 12),
    "small": Size(4, 256, 8192, 2, 16, 32, 48),
}
if SMALL:
    SIZES = {"demo": Size(1, 16, 16, 2, 4, 4, 3)}
ROUNDS = size(6, 2)
WARM_UP = 2  # steps of each before the first that counts
RATE = 1e-4
ANSWERS = 4
MGRPO = {"method": "mgrpo", "momentum_rollouts": None}


def answer(text: str) -> str:
    """Return a response's answer: something of which a group has a majority."""
    return str(int(text.split(maxsplit=1)[0]) % ANSWERS)


def make_model(shape: Size, place: Path) -> None:
    """Leave a random model and its tokenizer, whose words are numbers, in `place`."""
    torch.manual_seed(0)
    end = shape.vocabulary  # which the head does not have
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(end + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", unk_token="0", eos_token=str(end)).save_pretrained(
        place
    )


def make_task(shape: Size) -> Task:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(1, shape.vocabulary, (64 * shape.prompts, shape.prompt_tokens), generator=draw).tolist()
    return Task([Example(" ".join(map(str, row)), None) for row in rows], [], answer, "exact")


def make_ours(shape: Size, place: Path, task: Task, **changes: Any) -> Learner:
    config = build(
        {
            "model": str(place),
            "data": "of the task",
            "method": "srt",
            "prompts_per_step": shape.prompts,
            "rollouts": shape.group,
            "max_response_tokens": shape.response_tokens,
            "temperature": 1.0,
            "kl_coef": 0.0,
            "learning_rate": RATE,
            "warmup": 0.0,
            "lr_schedule": "constant",
            "eval_every": 0,
            **changes,
        }
    )
    model: Any = LlamaForCausalLM.from_pretrained(place)
    return make_learner(config, task, Policy(model.to(DEVICE), PreTrainedTokenizerFast.from_pretrained(place)))


def ours_step(learner: Learner, shape: Size, step: int) -> dict[str, Any]:
    """Take a step on the prompts that TRL's step of that number has; return its metrics."""
    first = (step - 1) * shape.prompts % len(learner.task.train)
    values, _ = train_step(learner, learner.task.train[first : first + shape.prompts], step)
    assert values["response_tokens"] == shape.response_tokens
    return values


def make_trl(shape: Size, place: Path, task: Task, scratch: Path, steps: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def vote(completions: list[str], **_: Any) -> list[float]:
        return majority_vote([answer(text) for text in completions], shape.group, equivalence="exact").agrees.tolist()

    settings = GRPOConfig(
        output_dir=str(scratch), per_device_train_batch_size=shape.prompts * shape.group, num_generations=shape.group,
        gradient_accumulation_steps=1, max_completion_length=shape.response_tokens, temperature=1.0, beta=0.0, epsilon=0.2,
        loss_type="dapo", learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, max_steps=steps, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=not GPU, bf16=False, gradient_checkpointing=False, shuffle_dataset=False,
        disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": each.prompt} for each in task.train])
    return GRPOTrainer(model=str(place), reward_funcs=vote, args=settings, train_dataset=rows)


class Given(RolloutEngine):
    """An engine that hands out rollouts that are there already."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def sample(self, *_: Any, **__: Any) -> Rollouts:
        return self.rollouts


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(each.detach() - before[name]).flatten() for name, each in model.named_parameters()])


def same_step(shape: Size, place: Path, task: Task, completions: torch.Tensor, theirs: torch.nn.Module) -> float:
    """Take TRL's first step again, on its rollouts; raise unless the weights move alike; return the gradient's norm."""
    learner = make_ours(shape, place, task)
    full = torch.ones_like(completions, dtype=torch.bool)
    learner.engine = Given(Rollouts(completions, full, torch.zeros(full.shape, device=DEVICE), full[:, 0]))
    before = {name: each.detach().clone() for name, each in learner.policy.model.named_parameters()}
    values = ours_step(learner, shape, 1)
    mine, other = moved(learner.policy.model, before), moved(theirs, before)
    # AdamW's first step is the gradient's sign times the rate; that of the smallest gradients is chance. Half agree without a reason.
    alike = (mine - other).abs() < 0.05 * RATE
    assert float(mine.abs().median()) > 0.5 * RATE, "no step was taken: no time is taken"
    assert alike.float().mean() > 0.97, f"weights move apart in {1 - alike.float().mean():.1%}: no time is taken"
    return values["grad_norm"]


def pairs_with_trl(shape: Size, place: Path, scratch: Path) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Return the seconds of our steps and of TRL's, which took turns, and our metrics."""
    from transformers import TrainerCallback

    task = make_task(shape)
    learner = make_ours(shape, place, task)
    trl = make_trl(shape, place, task, scratch, ROUNDS + WARM_UP)
    ours: list[float] = []
    theirs: list[float] = []
    metrics: list[dict[str, Any]] = []
    norms: list[float] = []
    seen: list[torch.Tensor] = []
    generate = trl._generate_and_score_completions

    def spy(inputs: Any) -> Any:
        found = generate(inputs)  # afterwards TRL shuffles the rows, among which a tie of votes goes to the first
        if not seen:
            assert found["completion_mask"].all()
            seen.append(found["completion_ids"].clone())
        return found

    trl._generate_and_score_completions = spy

    class Turns(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                synchronize()
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            theirs.append(time.perf_counter() - self.started)
            if state.global_step == 1:
                norms.append(same_step(shape, place, task, seen[0], trl.model))
            start = time.perf_counter()
            metrics.append(ours_step(learner, shape, state.global_step))
            synchronize()
            self.started = time.perf_counter()
            ours.append(self.started - start)

    trl.add_callback(Turns())
    trl.train()
    logged = trl.state.log_history[0]["grad_norm"]
    # TRL adds 1e-4 to the deviation of a group's rewards, we 1e-6.
    assert abs(norms[0] / logged - 1) < 5e-3, f"gradient norms {norms[0]:.6g} and {logged:.6g}: no time is taken"
    return ours[WARM_UP:], theirs[WARM_UP:], metrics[WARM_UP:]


def pairs_of_ours(shape: Size, place: Path) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Return the seconds of M-GRPO's steps and of those without its parts, in turn, and the metrics of the first."""
    task = make_task(shape)
    both = make_ours(shape, place, task, **MGRPO), make_ours(shape, place, task)
    seconds: tuple[list[float], list[float]] = [], []
    metrics: list[dict[str, Any]] = []
    for step in range(1, ROUNDS + WARM_UP + 1):
        for learner, times in zip(both, seconds, strict=True):
            start = time.perf_counter()
            values = ours_step(learner, shape, step)
            synchronize()
            times.append(time.perf_counter() - start)
            if learner is both[0]:
                metrics.append(values)
    return seconds[0][WARM_UP:], seconds[1][WARM_UP:], metrics[WARM_UP:]


def shares(metrics: list[dict[str, Any]], seconds: list[float]) -> dict[str, float]:
    """Return each phase's share of the steps, and that of scoring, filter, vote and EMA together."""
    names = ("rollout", "score", "vote", "update", "ema")
    found = {name: sum(each.get(f"time_{name}", 0.0) for each in metrics) / sum(seconds) for name in names}
    return {**found, "score_vote_ema": found["score"] + found["vote"] + found["ema"]}


@pytest.mark.parametrize("work", ["grpo", "mgrpo"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("provider", ["ours"])
def bench_trainer(benchmark: Any, shape: str, work: str, provider: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="expected trl for its GRPOTrainer: pip install 'mgrpo_kernels[peers]'")
    of = SIZES[shape]
    make_model(of, tmp_path / "model")

    def run() -> tuple[list[float], list[float], list[dict[str, Any]]]:
        if work == "mgrpo":
            return pairs_of_ours(of, tmp_path / "model")
        return pairs_with_trl(of, tmp_path / "model", tmp_path / "trl")

    ours, others, metrics = benchmark.pedantic(run, rounds=1)
    learner = make_ours(of, tmp_path / "model", make_task(of), **(MGRPO if work == "mgrpo" else {}))
    ours_step(learner, of, 1)
    memory = peak_memory(lambda: ours_step(learner, of, 2))
    parameters = sum(each.numel() for each in learner.policy.model.parameters())
    rounds = [Round(other, mine, other) for mine, other in zip(ours, others, strict=True)]
    benchmark.extra_info.update(
        figures([Round(other, None, mine) for other, mine, _ in rounds], 0.0),
        ceiling="TRL's step" if work == "grpo" else "our step without",
        ceiling_p50_ms=1e3 * percentile(others, 0.5),
        peak_memory_bytes=memory,
        computes=work,
        bytes=4 * parameters * (of.response_tokens + 2 + 7),
        shares=shares(metrics, ours),
        parameters=parameters,
        **of._asdict(),
    )
    if work == "grpo":
        benchmark.extra_info.update(pair(rounds), peer="trl")
