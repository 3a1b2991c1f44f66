"""The options and the loss types are declared once: everything that repeats them is compared with the declaration."""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
from contract import each_backend

from mgrpo_kernels import grpo_loss, linear_policy_loss, policy_loss
from mgrpo_kernels.ops._schema import Schema
from mgrpo_kernels.ops.policy_loss import OP, options, pack, reference
from mgrpo_kernels.ops.policy_loss.loss_types import LOSSES, SEQUENCE_LENGTHS, rows
from mgrpo_kernels.ops.policy_loss.op import CALL, unpack
from mgrpo_kernels.ops.policy_loss.options import DECLARED, LossKeywords, LossOptions, scalars
from mgrpo_kernels.ops.policy_loss.specs import Groups, Tokens

CSRC = Path(__file__).parents[1] / "csrc" / "cpu"
FUNCTIONS = [policy_loss, grpo_loss, linear_policy_loss]
BEFORE = "mask=None, cu_seqlens=None, ref_logprobs=None, entropy=None, behaviour_logprobs=None"
OF_TOKENS = BEFORE.replace(" entropy=None,", "").replace(
    "mask=None", "mask=None, unmasked_tokens=None, tokens_with_gradient=None"
)
HEAD = (
    "bias=None, temperature=1.0, logit_scale=1.0, softcap=None, kept=None, gradient_tolerance=None, workspace_bytes=None, "
    "logits_dtype=torch.float32, tp_group=None, vocab_start=None"
)
CONTRACT = """loss_type='grpo', importance_level='token', clip_low=0.2, clip_high=0.2, clip_delta=None, kl_coef=0.0, kl_estimator='k3',
kl_bias_correction=False, entropy_coef=0.0, behaviour_mode='token_truncate', behaviour_cap=2.0, behaviour_floor=0.0,
geometric_cap=None, geometric_floor=0.0, off_policy_delta=None, cispo_cap=5.0, sapo_temperature=(1.0, 1.05), vespo_k=(2.0, 3.0),
vespo_lambda=(3.0, 2.0), dppo_tv_bounds=(0.15, 0.15), dppo_kl_bounds=(0.05, 0.05), dppo_cap=20.0, max_response_tokens=None, normalizer=None,
entropy_normalizer=None, backend=None""".replace("\n", " ")
SIGNATURES = [
    f"(logprobs, old_logprobs, advantages, *, {BEFORE}, {CONTRACT})",
    f"(logprobs, old_logprobs, rewards, groups, *, rollout_mask=None, baseline='mean', scale='std', eps=1e-06, {BEFORE}, {CONTRACT})",
    f"(hidden, weight, labels, old_logprobs, advantages, *, {HEAD}, {OF_TOKENS}, {CONTRACT})",
]
OTHER = {
    "loss_type": "sapo",
    "importance_level": "sequence",
    "clip_low": 0.11,
    "clip_high": 0.12,
    "clip_delta": 1.13,
    "kl_coef": 0.14,
    "kl_estimator": "k1",
    "kl_bias_correction": True,
    "entropy_coef": 0.15,
    "behaviour_mode": "sequence_mask",
    "behaviour_cap": 1.16,
    "behaviour_floor": 0.96,
    "geometric_cap": 0.994,
    "geometric_floor": 0.98,
    "off_policy_delta": 0.001,
    "cispo_cap": 1.17,
    "sapo_temperature": (1.18, 1.19),
    "vespo_k": (1.20, 1.21),
    "vespo_lambda": (1.22, 1.23),
    "dppo_tv_bounds": (0.024, 0.025),
    "dppo_kl_bounds": (0.0026, 0.0027),
    "dppo_cap": 1.28,
    "max_response_tokens": 124,
}
"""A value of each option that is neither its default nor that of another option."""


# ------------------------------------------------------------------------------------- what repeats the declaration


@pytest.mark.parametrize(("function", "contract"), zip(FUNCTIONS, SIGNATURES, strict=True))
def test_signatures_are_those_of_the_contract(function, contract):
    signature = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == contract
    hints = typing.get_type_hints(LossOptions)
    for name, parameter in signature.parameters.items():
        if name in hints:
            assert parameter.annotation == str(hints[name]).replace("<class '", "").replace("'>", "")


def test_keywords_for_type_checkers_are_the_declared_options():
    assert list(typing.get_type_hints(LossKeywords).items()) == list(typing.get_type_hints(LossOptions).items())
    for function in FUNCTIONS:
        assert function.__annotations__["options"] == "Unpack[LossKeywords]"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_docstrings_explain_every_option(function):
    for each in DECLARED:
        assert f"        {each.name}: {each.text}." in function.__doc__
    assert "{options}" not in function.__doc__
    for row in rows():
        assert function is not policy_loss or all(cell in function.__doc__ for cell in row)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_keyword_is_refused_as_python_does(function):
    def plain(*, known=None):
        pass

    plain.__name__ = plain.__qualname__ = function.__name__
    with pytest.raises(TypeError) as wanted:
        plain(clip_hihg=0.3)
    count = sum(each.default is inspect.Parameter.empty for each in inspect.signature(function).parameters.values())
    with pytest.raises(TypeError) as caught:
        function(*[torch.zeros(2, 3)] * count, clip_hihg=0.3)
    assert str(caught.value).startswith(f"{function.__name__}() got an unexpected keyword argument 'clip_hihg'")
    assert f"{function.__name__}() got an unexpected keyword argument 'clip_hihg'" in str(wanted.value)


def test_the_custom_op_takes_every_option_by_name():
    assert tuple(OTHER) == tuple(each.name for each in DECLARED)
    form = LossOptions(**OTHER)
    assert all(getattr(form, each.name) != each.default for each in DECLARED)
    assert options.from_arguments(options.to_arguments(form)) == (form, mock.ANY)
    assert options.from_arguments(options.to_arguments(LossOptions()))[0] == LossOptions()
    tensors = [torch.full((4,), float(i)) for i in range(13)]
    tokens, groups = Tokens(*tensors[:10]), Groups(*tensors[10:], "leave_one_out", "batch", 0.5)
    given = CALL.unpack((*pack(tokens, groups, form), "native"))
    assert unpack(given) == (tokens, groups, form)
    assert unpack(CALL.unpack((*pack(tokens, None, form), "native"))) == (tokens, None, form)
    arguments = torch.ops.mgrpo_kernels.policy_loss.default._schema.arguments
    assert tuple(each.name for each in arguments) == CALL.names


def test_a_value_that_is_missing_or_unknown_is_caught():
    schema = Schema({"a": "float", "b": "float"}, "Tensor")
    assert schema.pack({"b": 2.0, "a": 1.0}) == (1.0, 2.0)
    for wrong in ({"a": 1.0}, {"a": 1.0, "b": 2.0, "c": 3.0}):
        with pytest.raises(AssertionError):
            schema.pack(wrong)
    with pytest.raises(KeyError):
        schema.pack({"a": 1.0, "c": 2.0})
    with pytest.raises(ValueError, match="zip"):
        schema.unpack([1.0])


def test_the_native_kernel_reads_every_number_into_the_field_of_its_name():
    source = (CSRC / "policy_loss.cpp").read_text()
    read = dict(re.findall(r'\.(\w+) = number\("(\w+)"\)', source))
    pairs = re.findall(r'\.(\w+) = \{number\("(\w+)"\), number\("(\w+)"\)\}', source)
    assert all(field == name for field, name in read.items())
    assert all((high, low) == (f"{field}_high", f"{field}_low") for field, high, low in pairs)
    names = {*read, *(name for _, *both in pairs for name in both), *re.findall(r'entry\(numbers, "(\w+)"\)', source)}
    assert names == set(scalars(LossOptions()))
    struct = re.search(r"struct PolicyLossOptions \{(.*?)\n\};", (CSRC / "policy_loss.h").read_text(), re.DOTALL).group(
        1
    )
    fields = re.findall(r"[\w]+(?=[\[,;])", "".join(re.findall(r"float (.*;)", struct)).replace("[2]", ""))
    assert set(fields) == {*read, *(field for field, *_ in pairs)}


def test_the_triton_kernels_are_launched_by_name():
    if sys.platform != "linux":
        pytest.skip("there is no triton for this platform")  # on Linux it is a dependency: its absence is an error
    from mgrpo_kernels.ops.policy_loss import _triton_kernels as kernels
    from mgrpo_kernels.ops.policy_loss import triton

    launched = {}

    def note(kernel, grid, like, *args, **given):
        assert not args, "an argument was passed by its position"
        launched[kernel] = given

    zero, offsets = torch.zeros(8), torch.tensor([0, 8])
    tokens = Tokens(zero, None, None, None, offsets, None, None, None, None, None)
    groups = Groups(torch.zeros(1), torch.tensor([0, 1]), None, "mean", "std", 1e-6)
    form = LossOptions(**OTHER | {"behaviour_mode": "token_mask"})
    with mock.patch.object(triton, "launch", note):
        triton.forward(tokens, groups, form)
        triton.group_advantages(groups)
    for kernel, given in launched.items():
        assert {*given} - {"num_warps"} == set(inspect.signature(kernel.fn).parameters)
    assert set(launched) == {kernels.loss_kernel, kernels.advantages_kernel}
    numbers = scalars(form)
    numbers["lower"], numbers["upper"] = 1.0 - numbers.pop("clip_low"), 1.0 + numbers.pop("clip_high")
    assert {name: launched[kernels.loss_kernel][name] for name in numbers} == numbers
    assert len(set(numbers.values())) == len(numbers)  # so that two which change places are seen


# ------------------------------------------------------------------------------------- that each option has its effect


def loss_of(backend, **changes):
    """Return loss, gradient and metrics of a batch in which every option matters."""
    generator = torch.Generator().manual_seed(3)

    def noise(scale):
        return torch.randn(6, 40, generator=generator) * scale

    old = noise(1.0) - 2
    logprobs = (old + noise(0.4)).requires_grad_()
    mask = torch.arange(40) < torch.tensor([40, 7, 20, 31, 12, 25])[:, None]
    form = {"kl_coef": 0.1, "entropy_coef": 0.05, "max_response_tokens": 40, "behaviour_cap": 1.1, **changes}
    loss, metrics = policy_loss(
        logprobs,
        old,
        torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -2.0]),
        mask=mask,
        ref_logprobs=old + noise(0.3),
        entropy=noise(1.0).abs(),
        behaviour_logprobs=old + noise(0.1),
        backend=backend,
        **form,
    )
    return torch.cat(
        [loss.detach()[None], torch.autograd.grad(loss, logprobs)[0].flatten(), *(m[None] for m in metrics.values())]
    )


READERS = {name: kind for kind, row in LOSSES.items() for name in row.surrogate.options}
"""A loss type that reads the option, of those that one surrogate alone reads."""


def other_values(declared):
    """Return values that are not the default, one for each number of the option."""
    value = OTHER[declared.name]
    if declared.kind == "pair":
        return [(value[0], declared.default[1]), (declared.default[0], value[1])]
    return [other for other in declared.choices if other != declared.default] if declared.choices else [value]


@each_backend(OP)
@pytest.mark.parametrize("declared", DECLARED, ids=lambda each: each.name)
def test_every_option_reaches_the_backend(backend, declared):
    kind = "dr_grpo" if declared.name == "max_response_tokens" else READERS.get(declared.name, "grpo")
    plain = loss_of("reference", loss_type=kind)
    for value in other_values(declared):
        changes = {"loss_type": kind, declared.name: value}
        got, want = loss_of(backend, **changes), loss_of("reference", **changes)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(want, plain, rtol=1e-3, atol=1e-6), (
            f"{declared.name} = {value!r} changes nothing here"
        )


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_reads_the_options_that_its_row_says(kind):
    plain = loss_of("reference", loss_type=kind)
    for each in DECLARED:
        if each.name in READERS:
            changes = any(
                not torch.equal(loss_of("reference", loss_type=kind, **{each.name: v}), plain)
                for v in other_values(each)
            )
            assert changes == (each.name in LOSSES[kind].surrogate.options), each.name


# ------------------------------------------------------------------------------------- the table of loss types


def test_every_surrogate_is_in_every_backend():
    wanted = {row.surrogate.name for row in LOSSES.values()}
    assert set(reference.SURROGATES) == wanted
    assert set(re.findall(r'is\(surrogate, "(\w+)"\)', (CSRC / "policy_loss_kernel.cpp").read_text())) == wanted
    kernels = (Path(reference.__file__).parent / "_term_triton_kernels.py").read_text()
    assert set(re.findall(r'SURROGATE == "(\w+)"', kernels)) == wanted
    assert all(set(row.surrogate.options) <= {each.name for each in DECLARED} for row in LOSSES.values())


@each_backend(OP)
def test_a_surrogate_that_a_backend_lacks_is_refused(backend):
    row = LOSSES["grpo"]
    unknown = row._replace(surrogate=row.surrogate._replace(name="unheard_of"))
    with (
        mock.patch.dict(LOSSES, grpo=unknown),
        pytest.raises(Exception, match="unheard_of|no such surrogate"),
    ):
        loss_of(backend)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_normalizer_counts_what_the_row_says(kind):
    row = LOSSES[kind]
    wanted = {"tokens": 100, "sequences": 7, SEQUENCE_LENGTHS: 7 * 30}
    assert row.normalizer(100, 7, 30) == wanted[row.counts]
    assert dataclasses.is_dataclass(LossOptions)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossOptions().loss_type = kind
