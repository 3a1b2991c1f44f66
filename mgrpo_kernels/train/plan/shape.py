"""The shape of a model and the work of a step, from which the plan computes memory and time.

Symbols: T tokens of the largest micro-batch, N response tokens in it, P tokens of a prompt, R of a response, U prompts, B responses,
c bytes of a number in the matrix products. Sizes are those of the layers of the Llama family, which other decoders resemble, and of packed
sequences. Every response is assumed to have the maximum length.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from mgrpo_kernels.train.config import Config, ModelConfig
from mgrpo_kernels.train.score import micro_batches

Shape = tuple[int, ...]


class Model(NamedTuple):
    """The shape of a model."""

    groups: tuple[tuple[Shape, ...], ...]  # as FSDP2 gathers them: parameters outside the layers, then each layer's
    trained: tuple[Shape, ...]  # the parameters that train: all, or those of an adapter
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    gated: bool  # whether the MLP has a gate, hence two products from `width` to `inner`
    normed: bool  # whether queries and keys are normalised

    @property
    def parameters(self) -> int:
        return count(self.groups)

    @property
    def whole(self) -> bool:
        """Whether all parameters train."""
        return count([self.trained]) == self.parameters

    @property
    def in_layers(self) -> int:
        return count(self.groups[1:])


def count(groups: Sequence[Sequence[Sequence[int]]], ranks: int = 1) -> int:
    """Return how many parameters of some groups the first rank holds if each parameter is sharded along its first dimension."""
    return sum(prod([-(-shape[0] // ranks), *shape[1:]]) if shape else 1 for group in groups for shape in group)


def model_of(empty: Any) -> Model:
    """Return the shape of a transformers causal language model, which may be on the meta device and may have an adapter."""
    config = empty.config.get_text_config()
    names = set(getattr(empty, "_no_split_modules", None) or ())
    layers = [module for module in empty.modules() if type(module).__name__ in names]
    inside = [tuple(tuple(each.shape) for each in layer.parameters()) for layer in layers]
    owned = {id(each) for layer in layers for each in layer.parameters()}
    rest = tuple(tuple(each.shape) for each in empty.parameters() if id(each) not in owned)
    trained = tuple(tuple(each.shape) for each in empty.parameters() if each.requires_grad)
    width = config.hidden_size
    heads = largest(config, "num_attention_heads") or 1  # a model of state-space layers has none
    head = largest(config, "head_dim") or width // heads
    parts = {part for name, _ in empty.named_parameters() for part in name.split(".")}
    inner, kv_heads = (largest(config, name) for name in ("intermediate_size", "num_key_value_heads"))
    return Model(
        groups=(rest, *inside),
        trained=trained,
        layers=config.num_hidden_layers,
        width=width,
        inner=inner or 4 * width,
        queries=heads * head,
        keys=(kv_heads or heads) * head,
        heads=heads,
        vocabulary=config.vocab_size,
        gated=bool(parts & {"gate_proj", "gate_up_proj"}),
        normed="q_norm" in parts,
    )


def largest(config: Any, name: str) -> int | None:
    """Return a size of a configuration, or the largest if it has one for each layer; None if it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # Gemma 4 raises an error of its own for a size that layers differ in
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max((each for each in value if each), default=None) if isinstance(value, Sequence) else value


class Micro(NamedTuple):
    """A micro-batch: U prompts and B responses."""

    prompts: int
    responses: int


class Work(NamedTuple):
    """The work of a step for the rank that has the most."""

    prompts: int
    prompt_tokens: int  # of the longest prompt
    response_tokens: int  # of a response of maximum length
    policy: int  # rollouts per prompt of the policy
    momentum: int  # rollouts per prompt of the momentum model
    evaluated: int  # prompts of an evaluation
    samples: int  # responses to each of these prompts
    micro: tuple[Micro, ...]

    def tokens(self, micro: Micro) -> int:
        """Return T, the tokens of a micro-batch. The last token of a response does not pass through the model."""
        return micro.prompts * self.prompt_tokens + micro.responses * (self.response_tokens - 1)

    @property
    def trained(self) -> int:
        """The number of response tokens that train."""
        return self.response_tokens * sum(each.responses for each in self.micro)


def work_of(config: Config, prompt_tokens: int, held_out: int, ranks: int) -> Work:
    """Return a rank's work if every prompt has `prompt_tokens` tokens and `held_out` prompts are evaluated."""
    rollout = config.rollout
    prompts, response = -(-rollout.prompts_per_step // ranks), rollout.max_response_tokens
    train = config.method.trained_count(config.policy_rollouts)
    train += config.momentum_rollouts if config.method.train_momentum_rollouts else 0
    ids = [[prompt] * prompt_tokens for prompt in range(prompts) for _ in range(train)]
    rows = micro_batches(ids, [response] * len(ids), rollout.tokens_per_microbatch, packed=True)
    micro = tuple(Micro(len({row // train for row in each}), len(each)) for each in rows)
    evaluated = -(-held_out // ranks) if config.eval.eval_every else 0
    return Work(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        response_tokens=response,
        policy=config.policy_rollouts,
        momentum=config.momentum_rollouts,
        evaluated=evaluated,
        samples=config.eval.eval_samples,
        micro=micro,
    )


def width_of(options: ModelConfig) -> int:
    """Return c, the size in bytes of a number in the matrix products."""
    return 2 if options.dtype == "bfloat16" else 4


def samplings(work: Work) -> list[tuple[int, int]]:
    """Return the number of prompts and of responses to each, for every sampling call of a step or an evaluation."""
    calls = [
        (work.prompts, work.policy),
        (work.prompts, work.momentum),
        (work.evaluated, work.samples),
        (work.evaluated, 1),
    ]
    return [call for call in calls if all(call)]
