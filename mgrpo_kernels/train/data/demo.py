"""The built-in task: sums modulo 10, and a small model that half guesses them and half works them out.

The model is warm-started on direct answers (``#7``) and on scratchpads (``4+3+3=`` ``360#0``: the running sums, then the
answer) in equal parts. Sums run from the last digit to the first: the digit to add then lies as far back whatever their number,
which a small model learns in a few hundred steps with any seed; the other way round some seeds take thousands. It learns each of those
places apart, though, so that half of the scratchpads are of the longest sums: a model that cannot do those has a majority that is wrong.
Guessing is mostly wrong and working out mostly right, so the majority is right more often than a single sample, and learning from
the majority teaches the model to work the sum out.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo_kernels import linear_token_stats
from mgrpo_kernels.method import equal_to_gold
from mgrpo_kernels.train.data.task import Example, Task
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.train.rollout.transformers import TransformersEngine
from mgrpo_kernels.train.run.files import replace_directory
from mgrpo_kernels.train.score import response_states

OPTIONS: dict[str, Any] = {
    "rollouts": 16,
    "equivalence": "exact",
    "prompts_per_step": 8,
    "max_response_tokens": 12,
    "temperature": 1.0,
    "learning_rate": 2e-4,
    "warmup": 0.0,
    "steps": 300,
    "eval_every": 25,
    "eval_temperature": 1.0,
    "checkpoint_every": 50,
    "log_every": 10,
}
"""What differs from the trainer's defaults where no model is named."""

RISE = {"eval_accuracy": 0.15, "eval_greedy": 0.10}
"""What a demonstration must gain from its first evaluation to its last, in the mean of five seeds; none less than half of it."""
LONGEST = 180
"""Seconds that it may take in all, on two cores."""

CHARACTERS = "0123456789+=#"
TRAIN_SIZE, HELD_OUT_SIZE = 4096, 256
LEAST_DIGITS, MOST_DIGITS = 2, 6
WARM_STEPS, WARM_BATCH, WARM_RATE, WARM_BETAS = 3000, 64, 1e-3, (0.9, 0.95)
WARM_ACCURACY, WARM_CHECK = 0.38, 25
"""The warm start ends at this accuracy, looked at every so many steps: when a model of this size gets the knack of sums depends on
the seed, and what comes after needs one that neither fails nor succeeds at them."""
EXPLANATION = (
    "built-in task: the last digit of a sum. 4+3+3= may be answered by 360#0: running sums from the right, modulo 10; # marks the answer",
    f"warm start, which uses true answers: at most {WARM_STEPS:,} steps, until {WARM_ACCURACY:.0%} of the samples are right",
)
"""What a run says before the warm start."""

SCRATCH_SHARE, CORRUPTED_SHARE, LENGTHENED_SHARE = 0.5, 0.05, 0.5


def make_task(seed: int) -> Task:
    """Return sums of 2 to 6 digits, modulo 10; no held-out sum is trained on."""
    draw = random.Random(f"{seed} sums")
    held_out = list(dict.fromkeys(make_digits(draw) for _ in range(2 * HELD_OUT_SIZE)))[:HELD_OUT_SIZE]
    apart = set(held_out)
    train = [digits for digits in (make_digits(draw) for _ in range(2 * TRAIN_SIZE)) if digits not in apart][
        :TRAIN_SIZE
    ]
    return Task([example(digits) for digits in train], [example(digits) for digits in held_out], after_hash, "exact")


def make_digits(draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(10) for _ in range(draw.randint(LEAST_DIGITS, MOST_DIGITS)))


def example(digits: tuple[int, ...]) -> Example:
    """Return the sum of these digits; its second wording has them in reverse."""

    def prompt(digits: tuple[int, ...]) -> str:
        return "+".join(map(str, digits)) + "="

    return Example(prompt(digits), str(sum(digits) % 10), prompt(digits[::-1]))


def after_hash(text: str) -> str | None:
    """Return what follows the only '#', if it is one digit."""
    _, mark, answer = text.partition("#")
    return answer if mark and len(answer) == 1 and answer.isdigit() else None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters; ``$`` ends a response."""
    vocabulary = {token: number for number, token in enumerate(["_", "$", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", unk_token="_", eos_token="$")


def model_config() -> LlamaConfig:
    """Return the model's shape: 2 layers of width 64."""
    return LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def make_model(
    directory: Path,
    seed: int,
    device: torch.device,
    warm_steps: int,
    progress: Callable[[int, int, float, float], None] = lambda *_: None,
    teach: Callable[[random.Random, set[str]], tuple[str, str]] | None = None,
) -> None:
    """Warm-start the model, and leave it with its tokenizer in `directory`, complete or not at all.

    `progress` hears, at each look at it: steps taken, most steps, accuracy, the accuracy that ends it. `teach` gives what to imitate, as
    :func:`lesson` does, which it replaces.
    """
    teach = teach or lesson
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, "demo weights", 0).initial_seed())
        model: Any = LlamaForCausalLM(model_config())
    policy = Policy(model.to(device), make_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_RATE, betas=WARM_BETAS)
    draw = random.Random(f"{seed} warm start")
    held_out = {each.prompt for each in make_task(seed).held_out}
    for step in range(warm_steps):
        if step % WARM_CHECK == 0:
            accuracy = warm_accuracy(policy, seed)
            progress(step, warm_steps, accuracy, WARM_ACCURACY)
            if accuracy >= WARM_ACCURACY:
                break
        loss = warm_loss(policy, [teach(draw, held_out) for _ in range(WARM_BATCH)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    policy.tokenizer.save_pretrained(new)
    replace_directory(new, directory)


def lesson(draw: random.Random, held_out: set[str], lengthened_share: float = LENGTHENED_SHARE) -> tuple[str, str]:
    """Return a prompt that is not held out, and the response to imitate: the answer, or a scratchpad.

    `lengthened_share` of the scratchpads are of sums of the most digits.
    """
    digits = make_digits(draw)
    while example(digits).prompt in held_out:
        digits = make_digits(draw)
    prompt, answer = example(digits)[:2]
    if draw.random() >= SCRATCH_SHARE:
        return prompt, f"#{answer}$"
    if (
        lengthened_share and draw.random() < lengthened_share
    ):  # with 0 nothing is drawn: the study's models stay as they are
        longer = tuple(draw.randrange(10) for _ in range(MOST_DIGITS))
        if (longest := example(longer)).prompt not in held_out:
            digits, prompt = longer, longest.prompt
    total, steps = 0, ""
    for digit in reversed(digits):  # a slip of the pen is carried on, like a real one
        total = draw.randrange(10) if draw.random() < CORRUPTED_SHARE else (total + digit) % 10
        steps += str(total)
    return prompt, f"{steps}#{total}$"


def warm_loss(policy: Policy, lessons: list[tuple[str, str]]) -> torch.Tensor:
    """Return the mean cross-entropy of the responses' tokens."""
    prompts = policy.encode([prompt for prompt, _ in lessons])
    responses = policy.encode([response for _, response in lessons])
    width = max(map(len, responses))
    tokens = torch.tensor([response + [0] * (width - len(response)) for response in responses], device=policy.device)
    lengths = torch.tensor(list(map(len, responses)), device=policy.device)
    packed = response_states(policy, prompts, tokens, torch.arange(width, device=policy.device) < lengths[:, None])
    weight, bias = policy.head()
    logprob = linear_token_stats(packed.hidden, weight, packed.labels, bias=bias, stats=("logprob",)).logprob
    assert logprob is not None
    return -logprob.mean()


def warm_accuracy(policy: Policy, seed: int) -> float:
    """Return the accuracy of sampled answers on some training prompts."""
    examples, copies = make_task(seed).train[:64], 8
    engine = TransformersEngine(policy, OPTIONS["max_response_tokens"], cache_tokens=2**20)
    rollouts = engine.sample(
        policy.encode([each.prompt for each in examples]),
        copies,
        temperature=1.0,
        generator=generator_for(seed, "warm accuracy", 0, policy.device),
    )
    answers = [after_hash(text) for text in policy.decode(rollouts.tokens, rollouts.mask)]
    return float(equal_to_gold(answers, [each.gold for each in examples for _ in range(copies)], "exact").mean())
