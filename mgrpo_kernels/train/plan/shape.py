"""The shape of a model and of a step's work, from which the plan computes memory and time.

Letters: T tokens of the largest micro-batch, N response tokens of it, P tokens of a prompt, R of a response, U prompts, B responses,
c bytes of a number in the matrix products. Sizes are those of the Llama family's layers, which other decoders resemble, and of packed
sequences. Responses are taken as long as they may get.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.score import micro_batches

Shape = tuple[int, ...]


class Model(NamedTuple):
    """A model's shape."""

    groups: tuple[tuple[Shape, ...], ...]  # parameters that FSDP2 gathers together: the rest, then each layer's
    trained: tuple[Shape, ...]  # of these, what trains: all, or an adapter
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    gated: bool  # two products lead into the inner width
    normed: bool  # queries and keys are

    @property
    def parameters(self) -> int:
        return count(self.groups)

    @property
    def whole(self) -> bool:
        """Whether all weights train."""
        return count([self.trained]) == self.parameters

    @property
    def in_layers(self) -> int:
        return count(self.groups[1:])


def count(groups: Sequence[Sequence[Sequence[int]]], ranks: int = 1) -> int:
    """Return the parameters of some groups that the first rank holds, of which each is cut along its first dimension."""
    return sum(prod([-(-shape[0] // ranks), *shape[1:]]) if shape else 1 for group in groups for shape in group)


def model_of(empty: Any) -> Model:
    """Return the shape of a transformers causal language model, which may be on the meta device and have an adapter in it."""
    config = empty.config.get_text_config()
    names = set(getattr(empty, "_no_split_modules", None) or ())
    layers = [module for module in empty.modules() if type(module).__name__ in names]
    inside = [tuple(tuple(each.shape) for each in layer.parameters()) for layer in layers]
    owned = {id(each) for layer in layers for each in layer.parameters()}
    rest = tuple(tuple(each.shape) for each in empty.parameters() if id(each) not in owned)
    trained = tuple(tuple(each.shape) for each in empty.parameters() if each.requires_grad)
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    parts = {part for name, _ in empty.named_parameters() for part in name.split(".")}
    inner, kv_heads = (getattr(config, name, None) for name in ("intermediate_size", "num_key_value_heads"))
    return Model(
        (rest, *inside), trained, config.num_hidden_layers, width, inner or 4 * width, heads * head, (kv_heads or heads) * head, heads,
        config.vocab_size, bool(parts & {"gate_proj", "gate_up_proj"}), "q_norm" in parts,
    )  # fmt: skip


class Micro(NamedTuple):
    """A micro-batch: U prompts and B responses."""

    prompts: int
    responses: int


class Work(NamedTuple):
    """What a rank, that with the most to do, has in a step."""

    prompts: int
    prompt_tokens: int  # of the longest
    response_tokens: int
    policy: int  # rollouts of a prompt
    momentum: int
    evaluated: int  # prompts of an evaluation
    samples: int  # of each of these
    micro: tuple[Micro, ...]

    def tokens(self, micro: Micro) -> int:
        """Return T: a response's last token is not asked for what follows it."""
        return micro.prompts * self.prompt_tokens + micro.responses * (self.response_tokens - 1)

    @property
    def trained(self) -> int:
        """Response tokens that train."""
        return self.response_tokens * sum(each.responses for each in self.micro)


def work_of(config: Config, prompt_tokens: int, held_out: int, ranks: int) -> Work:
    """Return a rank's work where every prompt is that long."""
    rollout = config.rollout
    prompts, response = -(-rollout.prompts_per_step // ranks), rollout.max_response_tokens
    train = config.method.trained_count(config.policy_rollouts)
    train += config.momentum_rollouts if config.method.train_momentum_rollouts else 0
    ids = [[prompt] * prompt_tokens for prompt in range(prompts) for _ in range(train)]
    rows = micro_batches(ids, [response] * len(ids), rollout.tokens_per_microbatch, packed=True)
    micro = tuple(Micro(len({row // train for row in each}), len(each)) for each in rows)
    evaluated = -(-held_out // ranks) if config.eval.eval_every else 0
    return Work(
        prompts, prompt_tokens, response, config.policy_rollouts, config.momentum_rollouts, evaluated, config.eval.eval_samples, micro
    )  # fmt: skip


def width_of(config: Config) -> int:
    """Return c, the bytes of a number in the matrix products."""
    return 2 if config.model.dtype == "bfloat16" else 4


def samplings(work: Work) -> list[tuple[int, int]]:
    """Return (prompts, rollouts of each) of every call of the sampler."""
    calls = [
        (work.prompts, work.policy),
        (work.prompts, work.momentum),
        (work.evaluated, work.samples),
        (work.evaluated, 1),
    ]
    return [call for call in calls if all(call)]
