"""Random calls of every op, valid and broken: through the public functions, and directly on the custom ops and the C++ kernels.

A call returns or raises a clean error: TypeError, ValueError or RuntimeError, and no internal assertion. Anything else is a fault, and so is a
valid call that raises. tests/test_fuzz.py runs some hundred calls; scripts/asan.sh runs thousands with the extension built for
AddressSanitizer and UBSan.

    python tests/fuzz_ops.py --calls 5000 --seed 0
    python tests/fuzz_ops.py --calls 1 --seed 0 --first 1234      repeats the call of that number
"""

import argparse
import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import interpreter_speed
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import mgrpo_kernels
from mgrpo_kernels import _native
from mgrpo_kernels.ops.policy_loss import specs

PLAIN = "mgrpo_native"  # the namespace of the C++ kernels
BACKENDS = ("native", "reference")
EXTREME_INTS = (-(2**63), -100, -1, 0, 1, 7, 100_000, 2**31 - 1, 2**62)
EXTREME_FLOATS = (0.0, -1.0, 1e30, float("inf"), float("nan"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.bool)


class Call:
    """A function and its arguments."""

    def __init__(self, name: str, function: Callable, args: tuple = (), keywords: dict | None = None) -> None:
        self.name, self.function, self.args, self.keywords = name, function, list(args), dict(keywords or {})

    def copy(self) -> "Call":
        return Call(self.name, self.function, copied(self.args), copied(self.keywords))

    def __call__(self) -> object:
        return self.function(*self.args, **self.keywords)

    def __str__(self) -> str:
        given = [shown(each) for each in self.args] + [f"{name}={shown(each)}" for name, each in self.keywords.items()]
        return f"{self.name}({', '.join(given)})"


def copied(value):
    """Return a value whose tensors are copies, with their strides."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        copy = copy.copy_(value.detach()) if all(value.stride()) else value.detach().clone()
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(copied(each) for each in value)
    return {name: copied(each) for name, each in value.items()} if isinstance(value, dict) else value


def shown(value) -> str:
    if isinstance(value, torch.Tensor):
        what = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        few = value.device.type == "cpu" and value.layout == torch.strided and value.numel() <= 8
        return f"{what}={value.tolist()}" if few and not value.is_floating_point() else f"{what}@{value.device}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)


# ---------------------------------------------------------------------------------------------------------- valid calls


def floats(draw: random.Random, *shape: int, dtype=torch.float32, grad=False) -> torch.Tensor:
    """Return normal numbers, often not contiguous: every other one, transposed, or one row for all."""
    layout = draw.choice(("contiguous",) * 4 + ("gaps", "gaps", "transposed", "expanded"))
    if layout == "gaps":
        values = torch.randn((*shape, 2)).to(dtype)[..., 0]
    elif layout == "transposed":
        values = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    elif layout == "expanded" and len(shape) > 1:
        values = torch.randn(shape[-1]).to(dtype).expand(shape)
    else:
        values = torch.randn(shape).to(dtype)
    return values.detach().requires_grad_(grad)


def some(draw: random.Random, value):
    return value if draw.random() < 0.5 else None


def bools(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.7


def offsets(draw: random.Random, parts: int, total: int) -> torch.Tensor:
    cuts = sorted(draw.randint(0, total) for _ in range(parts - 1))
    return torch.tensor([0, *cuts, total], dtype=draw.choice((torch.int32, torch.int64)))


def loss_options(draw: random.Random, *, entropy: bool, ref: bool, behaviour: bool) -> dict:
    loss_type = draw.choice(specs.LOSS_TYPES)
    modes = [mode for mode in specs.BEHAVIOUR_MODES if loss_type != "vespo" or mode.startswith(("token", "none"))]
    return {
        "loss_type": loss_type,
        "importance_level": draw.choice(specs.IMPORTANCE_LEVELS),
        "behaviour_mode": draw.choice(modes),
        "kl_estimator": draw.choice(specs.KL_ESTIMATORS),
        "kl_coef": 0.1 if ref else 0.0,
        "entropy_coef": 0.1 if entropy else 0.0,
        "clip_delta": some(draw, 2.0),
        "behaviour_floor": draw.choice((0.0, 0.5)),
        "geometric_cap": some(draw, 1.1) if behaviour else None,
        "off_policy_delta": some(draw, 0.1),
        "max_response_tokens": 9,
    }


def tokens(draw: random.Random, batch: int, *, entropy: bool = True) -> tuple[tuple[int, ...], dict]:
    """Return the shape of a batch of tokens, and the keywords about them that a policy loss takes."""
    packed = draw.random() < 0.5
    length = draw.choice((0, 1, 3, 8, 600))
    shape = (batch * length,) if packed else (batch, length)
    keywords = {
        "mask": some(draw, bools(*shape)),
        "cu_seqlens": offsets(draw, batch, batch * length) if packed and batch else None,
        "ref_logprobs": some(draw, floats(draw, *shape)),
        "behaviour_logprobs": some(draw, floats(draw, *shape)),
    }
    if packed and not batch:
        keywords["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    if entropy:
        keywords["entropy"] = some(draw, floats(draw, *shape, grad=draw.random() < 0.5))
    has_entropy = not entropy or keywords["entropy"] is not None
    has_ref, has_behaviour = (keywords[name] is not None for name in ("ref_logprobs", "behaviour_logprobs"))
    return shape, keywords | loss_options(draw, entropy=has_entropy, ref=has_ref, behaviour=has_behaviour)


def token_stats(draw: random.Random, backend: str) -> Call:
    rows, vocab = draw.choice(((), (3,), (0,), (2, 3), (2, 0, 2))), draw.choice((1, 2, 15, 33, 2100, 9000))
    dtype = draw.choice(DTYPES[: 4 if backend == "reference" else 3])
    many = draw.choice((None, None, 0, 1, 3, 20))
    labels = torch.randint(
        0, vocab, rows if many is None else (*rows, many), dtype=draw.choice((torch.int32, torch.int64))
    )
    stats = draw.sample(("logprob", "entropy", "self_certainty"), draw.randint(1, 3))
    temperature = draw.choice((1.0, 0.5, torch.rand(rows) + 0.5))
    logits = floats(draw, *rows, vocab, dtype=dtype, grad=True)
    keywords = {"stats": tuple(stats), "mask": some(draw, bools(*rows)), "temperature": temperature, "backend": backend}
    return Call("token_stats_from_logits", mgrpo_kernels.token_stats_from_logits, (logits, labels), keywords)


def head(draw: random.Random, rows: tuple[int, ...], backend: str) -> tuple[list[torch.Tensor], dict]:
    width, vocab = draw.choice((1, 5, 64)), draw.choice((1, 7, 65, 300, 1500))
    dtype = draw.choice(DTYPES[: 4 if backend == "reference" else 3])
    hidden, weight = (floats(draw, *shape, dtype=dtype, grad=True) for shape in ((*rows, width), (vocab, width)))
    kept = torch.randint(-1, vocab, (*rows, draw.choice((1, 4, 9))), dtype=draw.choice((torch.int32, torch.int64)))
    keywords = {
        "bias": some(draw, floats(draw, vocab, dtype=dtype, grad=True)),
        "kept": draw.choice((None, None, kept)),
        "gradient_tolerance": draw.choice((None, None, 0.01)),
        "temperature": draw.choice((1.0, 0.5, torch.rand(rows) + 0.5)),
        "logit_scale": draw.choice((1.0, -0.5)),
        "softcap": draw.choice((None, 5.0)),
        "workspace_bytes": draw.choice((None, 2**16)),
        "logits_dtype": draw.choice((torch.float32, dtype)),
        "backend": backend,
    }
    return [hidden, weight, torch.randint(0, vocab, rows)], keywords


def counts(draw: random.Random, number: int, mask: torch.Tensor | None) -> dict:
    """Return the numbers of tokens that a caller may give."""
    unmasked = number if mask is None else int(mask.sum())
    return {"unmasked_tokens": some(draw, unmasked), "tokens_with_gradient": some(draw, draw.randint(unmasked, number))}


def linear_token_stats(draw: random.Random, backend: str) -> Call:
    rows = draw.choice(((), (3,), (0,), (2, 3), (70,)))
    inputs, keywords = head(draw, rows, backend)
    stats = draw.sample(("logprob", "entropy", "self_certainty"), draw.randint(1, 3))
    keywords |= {"stats": tuple(stats), "mask": some(draw, bools(*rows))}
    keywords |= counts(draw, inputs[2].numel(), keywords["mask"])
    return Call("linear_token_stats", mgrpo_kernels.linear_token_stats, tuple(inputs), keywords)


def policy_loss(draw: random.Random, backend: str) -> Call:
    batch = draw.choice((0, 1, 4, 6))
    shape, keywords = tokens(draw, batch)
    logprobs, old = floats(draw, *shape, grad=True), some(draw, floats(draw, *shape))
    if draw.random() < 0.5:
        groups = draw.choice((2 if batch % 2 == 0 else 1, offsets(draw, max(1, batch), batch)))
        keywords |= {"rollout_mask": some(draw, bools(batch)), "scale": draw.choice(specs.SCALES)}
        args = (logprobs, old, floats(draw, batch), groups)
        return Call("grpo_loss", mgrpo_kernels.grpo_loss, args, keywords | {"backend": backend})
    advantages = floats(draw, *draw.choice((shape, (batch,))))
    return Call("policy_loss", mgrpo_kernels.policy_loss, (logprobs, old, advantages), keywords | {"backend": backend})


def linear_policy_loss(draw: random.Random, backend: str) -> Call:
    batch = draw.choice((0, 1, 4))
    shape, keywords = tokens(draw, batch, entropy=False)
    inputs, of_head = head(draw, shape, backend)
    if draw.random() < 0.75:  # the gradient is formed in the forward pass without these alone
        of_head |= {"kept": None, "gradient_tolerance": None}
    advantages = floats(draw, *draw.choice((shape, (batch,))))
    args = (*inputs, some(draw, floats(draw, *shape)), advantages)
    keywords |= counts(draw, inputs[2].numel(), keywords["mask"])
    return Call("linear_policy_loss", mgrpo_kernels.linear_policy_loss, args, keywords | of_head)


def small(draw: random.Random, backend: str) -> Call:
    """The ops on rollouts."""
    batch = draw.choice((0, 1, 4, 40))
    groups = draw.choice((2 if batch % 2 == 0 else 1, offsets(draw, draw.randint(1, 6), batch)))
    mask = some(draw, bools(batch))
    kind = draw.randint(0, 2)
    if kind == 0:
        keywords = {"mask": mask, "backend": backend}
        return Call("iqr_filter", mgrpo_kernels.iqr_filter, (floats(draw, batch), groups), keywords)
    if kind == 1:
        choices = {"scale": draw.choice(specs.SCALES), "baseline": draw.choice(specs.BASELINES)}
        keywords = {"mask": mask, "backend": backend} | choices
        return Call("group_advantages", mgrpo_kernels.group_advantages, (floats(draw, batch), groups), keywords)
    entropy, cut = floats(draw, batch, grad=True), offsets(draw, draw.randint(1, 6), batch)
    keywords = {"mask": mask, "cu_seqlens": cut, "reduction": draw.choice(("mean", "sum"))}
    return Call("trajectory_entropy", mgrpo_kernels.trajectory_entropy, (entropy,), keywords)


def linear(draw: random.Random, backend: str) -> Call:
    """A linear layer of few rows, as the rollouts have."""
    rows, inner, columns = (draw.choice(sizes) for sizes in ((0, 1, 5, 40), (1, 16, 33), (1, 5, 12, 50)))
    weight = floats(draw, columns, inner).float()
    args = floats(draw, rows, inner).float(), weight, some(draw, floats(draw, columns).float())
    return Call("few_rows", lambda *given: torch.ops.mgrpo_native.few_rows(*given), args, {})


def attention_call(
    prompts: int, heads: int, rollouts: int, queries: int, inner: int, outer: int, longest: int, room: int
) -> tuple[torch.Tensor, ...]:
    """Return the tensors of an attention of the newest tokens, in the order of the kernel's arguments."""
    rows = prompts * rollouts
    new = (torch.randn(rows, heads * n, size) for n, size in ((queries, inner), (1, inner), (1, outer)))
    of_prompts = torch.randn(prompts * heads, inner, longest), torch.randn(prompts * heads, longest, outer)
    own = torch.randn(prompts, heads, rollouts, inner, room), torch.randn(prompts, heads, rollouts, room, outer)
    return *new, *of_prompts, torch.randint(0, longest + 1, (prompts,)), *own


def decoder(draw: random.Random, backend: str) -> Call:
    """What the rollouts run between a decoder's products."""
    if draw.random() < 0.4:
        rows, inner = draw.choice((0, 3, 40)), draw.choice((2, 16, 70))
        args = floats(draw, rows, draw.choice((0, 1, 3)), inner).float(), *floats(draw, 2, rows, inner).float()
        return Call("rotate", lambda *given: torch.ops.mgrpo_native.rotate(*given), args, {})
    if draw.random() < 0.3:
        args = tuple(floats(draw, 2, draw.choice((0, 3)), draw.choice((1, 16, 70, 5000))).float())
        return Call("swiglu", lambda *given: torch.ops.mgrpo_native.swiglu(*given), args, {})
    if draw.random() < 0.4:
        columns = draw.choice((1, 16, 70))
        args = floats(draw, draw.choice((0, 3)), columns).float(), floats(draw, columns).float(), 1e-5
        return Call("rms_norm", lambda *given: torch.ops.mgrpo_native.rms_norm(*given), args, {})
    sizes = [
        draw.choice(sizes)
        for sizes in ((0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 1, 3), (0, 1, 17), (0, 1, 40), (0, 1, 20), (1, 8, 33))
    ]
    args = *attention_call(*sizes), draw.randrange(sizes[-1]), draw.choice((None, 1, 12)), 0.3
    return Call("attend_", lambda *given: torch.ops.mgrpo_native.attend_(*given), args, {})


def ema(draw: random.Random, backend: str) -> Call:
    shapes = [draw.choice(((), (0,), (5,), (3, 700), (70_000,))) for _ in range(draw.randint(0, 3))]
    lists = [[torch.randn(shape).to(draw.choice(DTYPES[:4])) for shape in shapes] for _ in range(3)]
    stochastic = draw.random() < 0.5
    keywords = {"emit": some(draw, lists[2]), "stochastic_rounding": stochastic, "seed": 3 if stochastic else None}
    return Call("ema_update_", mgrpo_kernels.ema_update_, (lists[0], lists[1], 0.9), keywords | {"backend": backend})


MAKERS = (token_stats, linear_token_stats, policy_loss, policy_loss, linear_policy_loss, small, ema, linear, decoder)


# --------------------------------------------------------------------------------------------------------- direct calls


class _CustomOps(TorchDispatchMode):
    """Records the calls of the custom ops."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "mgrpo_kernels":
            self.calls.append(Call(str(op), op, args, kwargs).copy())
        return op(*args, **(kwargs or {}))


WITHOUT_TENSORS = {"build_info", "few_rows_is_faster"}


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record every call of a custom op or C++ kernel in the block, with copies of its arguments."""
    calls: list[Call] = []

    def recorder(name: str, op: Callable) -> Callable:
        def record(*args, **keywords):
            calls.append(Call(f"{PLAIN}.{name}", op, args, keywords).copy())
            with _disable_current_modes():  # a mode would look for the operator in the place of which this function is
                return op(*args, **keywords)

        return record

    assert _native.missing() is None, _native.missing()
    plain = torch.ops.mgrpo_native
    names = {
        name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if PLAIN in name
    }
    recorders = {name: recorder(name, getattr(plain, name)) for name in names - WITHOUT_TENSORS}
    with mock.patch.multiple(plain, **recorders), _CustomOps(calls):
        yield calls


def backward(result: object) -> None:
    """Run the backward pass of a public function's result, where it has one: once for a graph that stays, once for one that does not."""
    outputs = [result] if isinstance(result, torch.Tensor) else list(result or ())
    losses = [each.float().sum() for each in outputs if isinstance(each, torch.Tensor) and each.requires_grad]
    if losses:
        total = sum(losses)
        total.backward(retain_graph=True)
        total.backward()


# --------------------------------------------------------------------------------------------------------- broken calls


def broken_tensor(draw: random.Random, x: torch.Tensor):
    """Return something else in the place of a tensor."""
    if x.layout != torch.strided or x.device.type == "meta":  # broken already
        return x
    plain = x.detach()
    dim = draw.randrange(x.dim()) if x.dim() else None
    other: list[Callable] = [
        lambda: None,
        lambda: plain.unsqueeze(draw.randint(0, x.dim())),
        lambda: plain.flatten(),
        lambda: plain.new_empty(0),
        lambda: plain.to(draw.choice(DTYPES)),
        lambda: plain.to("meta"),
        lambda: plain.expand(2, *x.shape),
        lambda: plain.to_sparse() if x.dim() else plain,
    ]
    if dim is not None:
        other += [
            lambda: plain.narrow(dim, 0, max(0, x.shape[dim] - 1)),
            lambda: plain.narrow(dim, 0, max(0, x.shape[dim] - 1)).contiguous(),
            lambda: torch.cat([plain, plain], dim),
            lambda: plain.transpose(dim, 0),
            lambda: plain.transpose(dim, 0).contiguous().transpose(dim, 0),
            lambda: plain[:1].expand(x.shape) if x.shape[0] else plain,
            lambda: plain.select(dim, 0) if x.shape[dim] else plain,
        ]
    if x.numel() and not x.dtype.is_floating_point and x.dtype != torch.bool:
        other += [lambda: changed(plain, draw.randrange(x.numel()), draw.choice(EXTREME_INTS))] * 6
    if x.numel() and x.dtype.is_floating_point:
        other += [lambda: changed(plain, draw.randrange(x.numel()), draw.choice(EXTREME_FLOATS))] * 3
    return draw.choice(other)()


def changed(x: torch.Tensor, index: int, value: float) -> torch.Tensor:
    """Return a copy with one element changed."""
    copy = x.clone(memory_format=torch.contiguous_format)
    bits = torch.iinfo(x.dtype).bits if not x.dtype.is_floating_point else 0
    copy.view(-1)[index] = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, value)) if bits else value
    return copy


def broken(draw: random.Random, value):
    """Return something else in the place of an argument."""
    if isinstance(value, torch.Tensor):
        return broken_tensor(draw, value)
    if isinstance(value, bool):
        return draw.choice((not value, not value, None, "x"))
    if isinstance(value, int):
        return draw.choice((*EXTREME_INTS, None, "x"))
    if isinstance(value, float):
        return draw.choice((*EXTREME_FLOATS, None, "x"))
    if isinstance(value, str):
        return draw.choice(("", "nonsense", *BACKENDS, None))
    if isinstance(value, dict):
        name = draw.choice(list(value))
        rest = {key: each for key, each in value.items() if key != name}
        return draw.choice((rest, rest | {name: broken(draw, value[name])}))
    if isinstance(value, (list, tuple)) and value:
        at = draw.randrange(len(value))
        rest = value[:at] + value[at + 1 :]
        return draw.choice((rest, [*value, value[0]], [*value[:at], broken(draw, value[at]), *value[at + 1 :]]))
    return draw.choice((0, "x", 1.0, torch.zeros(3), torch.zeros(3, dtype=torch.bool)))


def break_some(draw: random.Random, call: Call) -> Call:
    """Return the call with one to three of its arguments broken."""
    call = call.copy()
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(call.args) + len(call.keywords))
        if at < len(call.args):
            call.args[at] = broken(draw, call.args[at])
        else:
            name = list(call.keywords)[at - len(call.args)]
            call.keywords[name] = broken(draw, call.keywords[name])
    return call


# ------------------------------------------------------------------------------------------------------------- the runs


def fault(call: Call, *, valid: bool, differentiate: bool) -> str | None:
    """Run a call; return what is wrong with how it ended, or None."""
    try:
        result = call()
        if differentiate:
            backward(result)
    except (TypeError, ValueError, RuntimeError) as error:
        if valid:
            return f"a valid call raised {type(error).__name__}: {error}"
        if "INTERNAL ASSERT" in str(error) and "pybind.cpp" not in str(error):  # PyTorch's reading of the arguments
            return f"an internal assertion failed: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return None


def one(seed: int, number: int, backends: tuple[str, ...], trace: Callable[[str], None]) -> str | None:
    """Make call `number` of a run; return its fault, or None."""
    draw = random.Random(f"{seed} {number}")
    torch.manual_seed(draw.randrange(2**31))
    valid = draw.choice(MAKERS)(draw, draw.choice(backends))
    kind = draw.choice(("valid", "broken", "direct", "direct", "direct"))
    call = break_some(draw, valid) if kind == "broken" else valid
    trace(f"{number} {kind} {call}")
    if kind == "direct":
        with recorded() as calls:
            wrong = fault(call.copy(), valid=True, differentiate=True)
        if wrong or not calls:
            return wrong and f"{call}: {wrong}"
        call = break_some(draw, draw.choice(calls))
        trace(f"{number} {kind} {call}")
    wrong = fault(call, valid=kind == "valid", differentiate=kind != "direct")
    return wrong and f"{call}: {wrong}"


def main() -> None:
    """Run the calls that the command line asks for; exit with 1 and a list if any ends in a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500, help="number of calls")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the run")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="backends to call, separated by commas")
    parser.add_argument("--trace", action="store_true", help="print every call before it is made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    interpreter_speed.prepare()
    # This loads the extension: some calls take its kernels directly.
    assert _native.missing() is None, _native.missing()
    trace = (lambda text: print(text, flush=True)) if options.trace else (lambda text: None)
    faults = []
    for number in range(options.first, options.first + options.calls):
        wrong = one(options.seed, number, tuple(options.backends.split(",")), trace)
        if wrong:
            faults.append(f"call {number}: {wrong}")
            print(faults[-1], flush=True)
    print(f"{options.calls} calls with seed {options.seed}, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
