"""No op reads outside of its tensors: not compiled, not called directly, and with offsets whose values nothing can check on a GPU."""

import fuzz_ops
import pytest
import torch
from contract import BACKENDS, each_backend

from mgrpo_kernels import _native, sequences, trajectory_entropy
from mgrpo_kernels import backend as backends
from mgrpo_kernels.ops.policy_loss import specs

assert _native.missing() is None, _native.missing()  # this loads torch.ops.mgrpo_native

BAD_OFFSETS = ([0, 5, 2**31 - 1], [0, 5, 100_000], [0, 3, 4], [0, 4, 3, 5], [-1, 2, 5], [1, 5])


@pytest.mark.parametrize("bad", BAD_OFFSETS)
@pytest.mark.parametrize("compiled", [False, True])
def test_trajectory_entropy_checks_offsets_in_a_compiled_graph_too(bad, compiled):
    def function(entropy, cu_seqlens):
        return trajectory_entropy(entropy, cu_seqlens=cu_seqlens)

    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    torch.testing.assert_close(function(torch.arange(5.0), torch.tensor([0, 1, 5])), torch.tensor([0.0, 2.5]))
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending offsets from 0 to 5, got"):
        function(torch.arange(5.0), torch.tensor(bad, dtype=torch.int32))


def test_no_sequence_cannot_hold_tokens():
    with pytest.raises(ValueError, match=r"cu_seqlens: expected ascending offsets from 0 to 5, got shape \(1,\)"):
        trajectory_entropy(torch.arange(5.0), cu_seqlens=torch.tensor([0]))


# Of an elementwise op, or of a second copy of a size: shorter is another valid call.
MAY_BE_SHORTER = {
    "mgrpo_native.few_rows.x",  # fewer rows
    "mgrpo_native.rms_norm.x",
    "mgrpo_native.kept_weight_gradient_.total",  # a smaller vocabulary: ids beyond it stand for none
    "mgrpo_kernels.linear_token_stats_backward.logits",  # stored ones: those that are missing are computed again
    "mgrpo_kernels.linear_policy_loss.anchor",
    "mgrpo_kernels.linear_policy_loss_backward.anchor",
    *(f"mgrpo_kernels.linear_policy_loss_backward.grad_{name}" for name in ("hidden", "weight", "bias")),
}


def calls_of(backend):
    """Return calls of every op that the backend runs, and of every C++ kernel: enough of them that each of their tensors is in one."""
    seen, kept = set(), []
    for number in range(300 if backend != "triton" else 80):
        draw = fuzz_ops.random.Random(number)
        torch.manual_seed(number)
        with fuzz_ops.recorded() as calls:
            fuzz_ops.backward(fuzz_ops.MAKERS[number % len(fuzz_ops.MAKERS)](draw, backend)())
        for call in calls:
            call.name = call.name.removesuffix(".default")
            new = {(call.name, name) for name in arguments(call) if can_be_shorter(call, name)}
            if new - seen:
                seen |= new
                kept.append(call)
    return kept


def first_of(value):
    """Return the first tensor of a list, or the value itself."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def can_be_shorter(call, name):
    """Return whether a call is to be refused if this tensor is too short."""
    given = arguments(call)
    tensor = first_of(given[name])
    if not isinstance(tensor, torch.Tensor) or not tensor.dim() or not tensor.shape[0] or "offsets" in name:
        return False  # offsets without an empty last part are valid
    if name == "weight" and given.get("bias") is None:
        return False  # a smaller vocabulary
    if name == "advantages" and "logprob" in given and len(tensor) - 1 == len(given["logprob"]):
        return False  # one of each token
    if name in {"logits", "hidden", "labels"}:  # valid where no other tensor has as many rows
        others = (first_of(value) for other, value in given.items() if other != name)
        if not any(isinstance(each, torch.Tensor) and each.shape[:1] == tensor.shape[:1] for each in others):
            return False
    return f"{call.name}.{name}" not in MAY_BE_SHORTER


def arguments(call):
    """Return a direct call's arguments by the names of its schema."""
    op = call.function if isinstance(call.function, torch._ops.OpOverload) else call.function.default
    names = [argument.name for argument in op._schema.arguments]
    return dict(zip(names, call.args, strict=False)) | call.keywords


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_that_is_too_short_is_refused(backend):
    tried = set()
    for call in calls_of(backend):
        given = arguments(call)
        for name, value in given.items():
            if not can_be_shorter(call, name):
                continue
            short = first_of(value).detach()[:-1]
            broken = given | {name: [short, *value[1:]] if isinstance(value, (list, tuple)) else short}
            tried.add(f"{call.name}.{name}")
            with pytest.raises((TypeError, ValueError), match=r": expected "):
                print(call.name, name, call.function(*fuzz_ops.copied(list(broken.values()))))
    assert len(tried) > 40, sorted(tried)
    assert {"mgrpo_kernels.policy_loss.mask", "mgrpo_kernels.policy_loss.old"} <= tried
    assert backend != "native" or {"mgrpo_native.policy_loss.mask", "mgrpo_native.policy_loss.old"} <= tried


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [[0, 2, 2**40], [0, 9, 4], [-3, 2, 4], [0, 4]])
def test_offsets_are_checked_on_a_cpu_by_every_op(backend, bad):
    ops, bad, values = torch.ops.mgrpo_kernels, torch.tensor(bad), torch.rand(5)
    with pytest.raises(ValueError, match="groups: expected ascending offsets from 0 to 5"):
        ops.iqr_filter(values, bad, None, 0.75, backend)
    with pytest.raises(ValueError, match="groups: expected ascending offsets from 0 to 5"):
        ops.group_advantages(values, bad, None, "mean", "std", 1e-6, backend)
    if backend == "native":
        with pytest.raises(ValueError, match="groups: expected ascending offsets from 0 to 5"):
            torch.ops.mgrpo_native.iqr_filter(values, bad, None, 0.75)
        with pytest.raises(ValueError, match="groups: expected ascending offsets from 0 to 5"):
            torch.ops.mgrpo_native.group_advantages(values, bad, None, 0, 0, 1e-6)


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_the_native_gradient_of_a_label_outside_of_the_vocabulary(label):
    buffer = torch.full((3, 7), 5.0)
    buffer[1] = torch.randn(7)
    gradient, row = torch.full((3, 7), 9.0), torch.ones(1)
    torch.ops.mgrpo_native.token_stats_backward(
        gradient[1:2], torch.ones(1, 1), None, None, buffer[1:2], torch.tensor([[label]]), None, None, 1.0, row, None
    )
    assert gradient[1, 0 if label < 0 else 6].isnan()
    assert gradient[1].isnan().sum() == 1
    assert bool((gradient[[0, 2]] == 9.0).all())


# What a GPU cannot check without a host sync, its kernels keep within bounds. Around each tensor here lies what must not be read.


def guarded(values):
    """Return the values in the middle of memory that is full of other numbers."""
    memory = torch.full((len(values) + 128,), 1e9)
    memory[64:-64] = values
    return memory[64:-64]


@pytest.mark.parametrize(
    ("bad", "same_as"), [([-9, 2, 60], [0, 2, 5]), ([0, 5, 40], [0, 5, 5]), ([9, 5, 50], [5, 5, 5])]
)
def test_triton_kernels_keep_offsets_within_bounds(bad, same_as):
    values, bad, same_as = torch.rand(5), torch.tensor(bad), torch.tensor(same_as)
    iqr = backends.implementation("iqr_filter", "triton").forward
    got, wanted = (iqr(guarded(values), offsets, None, 0.75) for offsets in (bad, same_as))
    for one, other in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)

    loss = backends.implementation("policy_loss", "triton")
    options = specs.LossOptions(importance_level="sequence")
    results = []
    for offsets in (bad, same_as):
        old, ref = guarded(values + 0.1), guarded(values)
        tokens = specs.Tokens(guarded(values), old, torch.ones(2), None, offsets, ref, None, None, None, None)
        results.append(loss.forward(tokens, None, options)[:2])
    assert bool(results[0][0].isfinite())
    torch.testing.assert_close(results[0][1][2:6], results[1][1][2:6])
    groups = specs.Groups(guarded(values), bad, None, "mean", "std", 1e-6)
    assert bool((loss.group_advantages(groups).abs() < 10).all())


def test_no_groups_of_no_rollouts_read_nothing():
    options, empty = specs.LossOptions(), torch.empty(0)
    tokens = specs.Tokens(empty, None, None, None, torch.zeros(1, dtype=torch.int64), None, None, None, None, None)
    groups = specs.Groups(empty, torch.zeros(1, dtype=torch.int64), None, "mean", "std", 1e-6)
    for backend in BACKENDS:
        loss, *_ = backends.implementation("policy_loss", backend).forward(tokens, groups, options)
        assert loss == 0


def test_offsets_on_a_cpu_are_not_copied():
    offsets = torch.tensor([0, 5])
    assert sequences.bounded(offsets, 5) is offsets
    on_other = torch.empty(2, dtype=torch.int64, device="meta")
    assert sequences.bounded(on_other, 5) is not on_other


@each_backend("token_stats")
def test_a_backend_that_does_not_exist_is_a_value_error(backend):
    with pytest.raises(ValueError, match=f"backend: expected one of reference, native, triton, got 'x{backend}'"):
        torch.ops.mgrpo_kernels.iqr_filter(torch.rand(2), torch.tensor([0, 2]), None, 0.75, f"x{backend}")
