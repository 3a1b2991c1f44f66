"""Memory and time of a run, from its options and its model's shape: formulas, and nothing that runs. docs/planning.md writes them out.

Letters: T tokens of the largest micro-batch, N of them response tokens, L layers, d width, f inner width, q and k widths of all queries and
of all keys, V vocabulary, c bytes of a number in the matrix products. Sizes are those of the Llama family's layers, which other decoders
resemble, and of packed sequences. Responses are taken as long as they may get.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from mgrpo_kernels.ops._triton.tuning import Tuning
from mgrpo_kernels.ops.linear_policy_loss.native import WORKSPACE_BYTES
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.rollout.cache import ROOM
from mgrpo_kernels.train.rollout.transformers import LOGITS_BYTES, NOISE_NUMBERS
from mgrpo_kernels.train.score import micro_batches

CACHE_SHARE = 16
"""Tokens in the sampler's cache for each token of a micro-batch: a cached token holds only keys and values, a trained one all
activations of all layers, which is more than 16 times as much in the usual shapes."""
CPU_TILE = 1024, 4096  # rows and columns of the fused head's workspace where its gradient is composed
OPERATIONS_LAYER, OPERATIONS_TOKEN = 100, 60
"""Operations of a layer's forward pass, and of what samples a token from the logits, views included. Backward takes twice as many."""
BY_MODULES = 2.5
"""As many operations' time by the modules' own calls, which FSDP2's hooks and gradient checkpointing need."""


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


class Memory(NamedTuple):
    """Bytes of a rank, by what holds them."""

    held: dict[str, int]  # from the first step on
    moments: dict[str, dict[str, int]]  # beside that, at the moments that hold most

    @property
    def moment(self) -> str:
        """The moment that decides."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.moments[self.moment].values())


def memory(config: Config, model: Model, work: Work, ranks: int, device: str, *, flash: bool = False) -> Memory:
    """Return a rank's memory.

    Args:
        config, model, work: what runs.
        ranks: among how many the weights are sharded.
        device: cpu or cuda.
        flash: flash-attn attends, which needs no mask.
    """
    c = width_of(config)
    mine, whole, trained = count(model.groups, ranks), model.parameters, count([model.trained], ranks)
    away = device == "cuda" and config.method.momentum_device == "cpu"
    held = {
        "weights": 4 * mine,
        "AdamW": 8 * trained,
        "momentum model": 4 * trained * (config.needs_momentum and not away),
        "KL reference": 4 * mine * (config.copies_base and not away),
    }
    cast = c * whole if c < 4 and ranks == 1 else 0  # autocast keeps a copy
    gathered = c * whole if ranks > 1 else 0
    second = c * whole if ranks > 1 else 0  # the momentum model or the reference, in the weights' place
    rollout = {
        "16-bit weights": cast,
        "gathered weights": gathered + second * (config.momentum_rollouts > 0),
        "key-value cache": max(cache_bytes(config, model, work, *each) for each in samplings(work)),
        "logits and noise": max(logits_bytes(config, model, work, *each) for each in samplings(work)),
    }
    if config.rollout.engine == "vllm":
        rollout = {"gathered weights": gathered + second * (config.momentum_rollouts > 0)}
        held |= {"vLLM's weights": 0, "vLLM's cache": 0} | vllm_bytes(config, model, device)
    largest = max(work.micro, key=work.tokens)
    T, N = work.tokens(largest), largest.responses * work.response_tokens
    gradients, several = 4 * trained, len(work.micro) > 1
    workspace, weight = head_bytes(config, model, N, device)
    layer = layer_bytes(config, model, work, largest, flash=flash)
    kept = 8 * T * model.width  # of the last norm
    kept += 4 * T * model.width * model.layers if config.model.gradient_checkpointing else layer * model.layers
    again = layer if config.model.gradient_checkpointing else 0
    passing = T * (4 * model.inner * c + 8 * model.width)  # gradients of a layer's activations, on their way
    at_head = workspace + N * model.width * (8 + (c if c < 4 else 0))
    units = unit_bytes(config, model) if ranks > 1 else 0
    moments = {
        "rollout": rollout,
        "score": {
            "16-bit weights": cast,
            "gathered weights": gathered + second * (config.needs_reference is not None and model.whole),
            "activations": T * (8 * model.width + 3 * model.inner * c + 3 * model.queries * c),
        },
        "update": {
            "16-bit weights": cast,
            "gathered weights": units,
            "gradients": gradients if several else 0,
            "activations": kept,
            "head and backward": weight + max(at_head, again + passing),
        },
        "end of backward": {
            "16-bit weights": cast,
            "gathered weights": units,
            "gradients": gradients,
            "head and backward": (weight if several else 0) + 4 * model.vocabulary * model.width * model.whole,
        },
    }
    used = {name: {what: size for what, size in parts.items() if size} for name, parts in moments.items()}
    if config.needs_reference is None:
        del used["score"]
    return Memory({name: size for name, size in held.items() if size}, used)


def width_of(config: Config) -> int:
    """Return c."""
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


def at_once(config: Config, work: Work, prompts: int, copies: int) -> tuple[int, int]:
    """Return how many prompts, and rollouts of each, the sampler has in its cache at once."""
    budget, R, P = CACHE_SHARE * config.rollout.tokens_per_microbatch, work.response_tokens, work.prompt_tokens
    return min(prompts, max(1, budget // (P + copies * R))), max(1, min(copies, (budget - P) // R))


def cache_bytes(config: Config, model: Model, work: Work, prompts: int, copies: int) -> int:
    """Return the keys and values of a sampling: those of a prompt once, and room for each rollout's own.

    While a layer's room doubles, it has the old one too; what attention reads it copies, a layer at a time.
    """
    U, copies = at_once(config, work, prompts, copies)
    last = work.response_tokens - 1  # is drawn, and not read
    tokens = U * work.prompt_tokens + U * copies * room(last, work.response_tokens)
    return 2 * model.keys * width_of(config) * tokens * model.layers if last else 0


def room(tokens: int, most: int) -> int:
    """Return for how many tokens a rollout has room that has some: it doubles, up to the most."""
    found = min(most, ROOM)
    while found < tokens:
        found = min(most, 2 * found)
    return found


def logits_bytes(config: Config, model: Model, work: Work, prompts: int, copies: int) -> int:
    """Return the logits that wait for their statistics, once more while they are joined; a token's own; and the noise."""
    U, copies = at_once(config, work, prompts, copies)
    one, c = U * copies * model.vocabulary, width_of(config)
    waiting = min(one * c * work.response_tokens, LOGITS_BYTES + one * c)
    noise = 4 * one * max(1, min(work.response_tokens, NOISE_NUMBERS // (copies * model.vocabulary)))
    attended = 2 * U * copies * (2 * model.keys * c + 3 * 4 * model.heads) * (work.prompt_tokens + work.response_tokens)
    return 2 * waiting + noise + noise // U + one * (4 + c) + attended


def vllm_bytes(config: Config, model: Model, device: str) -> dict[str, int]:
    """Return vLLM's share on a CPU. On a GPU it is vllm_memory of the device, which the plan says beside the total."""
    if device != "cpu":
        return {}
    cache = config.vllm.vllm_cache_gib or 1.0
    return {"vLLM's weights": width_of(config) * model.parameters, "vLLM's cache": round(cache * 2**30)}


def layer_bytes(config: Config, model: Model, work: Work, micro: Micro, *, flash: bool = False) -> int:
    """Return what backward keeps of a layer. Norms compute in float32 and keep input and normalised; products keep inputs in c bytes."""
    T, c = work.tokens(micro), width_of(config)
    U, B, rest, P = micro.prompts, micro.responses, work.response_tokens - 1, work.prompt_tokens
    alone = (
        U == B
    )  # a prompt and its response in one piece; else a response's queries see the prompt's keys, copied for each
    keys = T if alone else U * P + B * (P + rest) * (rest > 0)
    mask = 0 if alone or flash else B * rest * (P + rest)
    inputs = 2 if c == 4 else 4 + model.gated  # autocast casts for each product anew what a norm gives to several
    norms = T * (model.width * (2 * 8 + inputs * c) + 8 * (model.queries + model.keys) * model.normed)
    attention = c * (3 * T * model.queries + 2 * keys * model.keys + mask) + 4 * T * model.heads
    return norms + attention + T * (4 if model.gated else 2) * model.inner * c


def head_bytes(config: Config, model: Model, tokens: int, device: str) -> tuple[int, int]:
    """Return the fused head's workspace, and the gradient of its weight before it is added to what is there."""
    c, V = width_of(config), model.vocabulary
    weight = V * model.width * (4 if c == 4 else 6) * model.whole  # of 16 bits a float32 one beside it
    if device == "cpu" and c < 4:
        return c * min(CPU_TILE[0], tokens) * min(CPU_TILE[1], V), weight
    most = WORKSPACE_BYTES if device == "cpu" else Tuning().workspace_bytes
    return c * V * min(tokens, max(1, most // (c * V))), weight


def unit_bytes(config: Config, model: Model) -> int:
    """Return what FSDP2 gathers in an update: the rest's weights all along, two layers' at a time; and a layer's whole gradient."""
    c, rest = width_of(config), count(model.groups[:1])
    layer = max((count([group]) for group in model.groups[1:]), default=0)
    return c * (rest + 2 * layer) + (c + 4) * max(rest, layer)


class Rates(NamedTuple):
    """What a device does in a second."""

    matmul: float  # floating-point operations of matrix products
    bandwidth: float  # bytes of memory
    operation: float  # seconds that an operation takes at least
    draws: float  # random numbers
    link: float  # bytes to other ranks
    passes: int = 1  # over its weight, of a product of few rows: a CPU's library reads it, writes it in its own order, and reads that


class Device(NamedTuple):
    """A data sheet: dense peaks, as the vendor gives them."""

    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, outside tensor cores
    bandwidth: float  # GB/s
    link: float  # GB/s, one way
    memory: float  # GB


DEVICES = {
    "a100-80gb": Device(312, 19.5, 2039, 300, 80),
    "h100-80gb": Device(989, 67, 3350, 450, 80),
    "h200": Device(989, 67, 4800, 450, 141),
    "b200": Device(2250, 75, 8000, 900, 180),
    "l4": Device(121, 30.3, 300, 32, 24),
    "rtx-4090": Device(165, 82.6, 1008, 32, 24),
    "mi300x": Device(1307, 163, 5300, 448, 192),
}
"""From the vendors' public specifications (SXM and OAM boards where there are several)."""
MATMUL_SHARE, BANDWIDTH_SHARE, LINK_SHARE, LAUNCH = 0.4, 0.7, 0.7, 10e-6
"""Assumed: what of a peak is reached, and seconds from one launch to the next in eager PyTorch."""
NOISE_BYTES = 24  # of memory a random number costs a GPU: drawn, then bounded, logarithm and sign in place


def rates_of(device: Device, config: Config) -> Rates:
    """Return what a data sheet lets one expect."""
    peak = 1e12 * (device.bfloat16 if width_of(config) == 2 else device.float32)
    bandwidth = 1e9 * BANDWIDTH_SHARE * device.bandwidth
    return Rates(MATMUL_SHARE * peak, bandwidth, LAUNCH, bandwidth / NOISE_BYTES, 1e9 * LINK_SHARE * device.link)


def seconds(config: Config, model: Model, work: Work, ranks: int, rates: Rates) -> dict[str, float]:
    """Return the seconds of a step's phases, names as in metrics.jsonl without ``time_``. The vote and evaluations are not in it."""
    samples = sum(
        sampling_seconds(config, model, work, copies, ranks, rates) for copies in (work.policy, work.momentum) if copies
    )
    c, whole, trained = width_of(config), model.parameters, count([model.trained], ranks)
    frozen = 0 if model.whole else 1  # of the products, those that give a weight's gradient
    composed = c < 4 and rates.passes > 1  # a CPU's head in 16 bits: its logits are computed again
    share = (ranks - 1) / ranks / rates.link  # seconds for each byte of what is gathered or summed
    update = score = 0.0
    for micro in work.micro:
        layers, head = forward_seconds(config, model, work, micro, ranks, rates)
        score += layers + head
        update += (3 - frozen + config.model.gradient_checkpointing) * layers + (3 - frozen + composed) * head
        update += share * (c * (2 * model.in_layers + count(model.groups[:1])) + 4 * whole)
    update += (40 + 8 * len(work.micro)) * trained / rates.bandwidth  # norm, clipping, AdamW; gradients are added up
    return {
        "rollout": samples + share * whole * (c + 4 * (config.momentum_rollouts > 0)),
        "score": score + share * 4 * whole if config.needs_reference else 0.0,
        "update": update,
        "ema": 12 * trained / rates.bandwidth if config.needs_momentum else 0.0,
    }


def forward_seconds(
    config: Config, model: Model, work: Work, micro: Micro, ranks: int, rates: Rates
) -> tuple[float, float]:
    """Return the seconds of a micro-batch's forward pass: of its layers, and of its head."""
    T, N = work.tokens(micro), micro.responses * work.response_tokens
    seen = work.prompt_tokens + work.response_tokens / 2  # by a token, in the mean
    products = 2 * T * model.in_layers + 4 * T * seen * model.queries * model.layers
    moved = (
        4 * layer_bytes(config, model, work, micro) * model.layers / rates.bandwidth
    )  # and as much is not kept: written, and read
    by = BY_MODULES if ranks > 1 or config.model.gradient_checkpointing else 1
    layers = products / rates.matmul + moved + by * OPERATIONS_LAYER * rates.operation * model.layers
    return layers, 2 * N * model.vocabulary * model.width / rates.matmul


def sampling_seconds(config: Config, model: Model, work: Work, copies: int, ranks: int, rates: Rates) -> float:
    """Return the seconds in which every prompt gets that many responses. A product takes its operations and its weight's bytes."""
    U, c = work.prompts, width_of(config)
    together, each = at_once(config, work, U, copies)
    calls = -(-U // together) * -(-copies // each)
    B, V = U * copies / calls, model.vocabulary
    weights = model.in_layers + V * model.width
    products = 2 * B * weights / rates.matmul + rates.passes * c * weights / rates.bandwidth
    own = (
        3 * B * work.response_tokens / 2 + U / calls * work.prompt_tokens
    )  # tokens of the cache: own ones are copied, then read
    cached = 2 * model.keys * c * own * model.layers / rates.bandwidth
    attended = 4 * B * (work.prompt_tokens + work.response_tokens / 2) * model.queries * model.layers / rates.matmul
    drawn = B * V * (1 / rates.draws + 32 / rates.bandwidth)  # noise; logits are added to it, joined, and read
    by = BY_MODULES if ranks > 1 or config.model.gradient_checkpointing else 1
    operations = (by * OPERATIONS_LAYER * model.layers + OPERATIONS_TOKEN) * rates.operation
    prompt = 2 * U * work.prompt_tokens * model.in_layers / rates.matmul
    return calls * work.response_tokens * (products + cached + attended + drawn + operations) + prompt
