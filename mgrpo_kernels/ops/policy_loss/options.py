"""The options of the policy losses, declared once: name, type, default, range and documentation.

Everything else that needs the list is generated from it or compared with it by a test: the keywords, signatures and
docstrings of the public functions, the checks, the arguments of the custom ops, what the backends are given, and the
trainer's command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

from mgrpo_kernels import checks
from mgrpo_kernels.ops.policy_loss.loss_types import LOSS_TYPES, table

ImportanceLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
BehaviourMode = Literal[
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
    "none",
]
IMPORTANCE_LEVELS: tuple[ImportanceLevel, ...] = typing.get_args(ImportanceLevel)
KL_ESTIMATORS: tuple[KlEstimator, ...] = typing.get_args(KlEstimator)
BEHAVIOUR_MODES: tuple[BehaviourMode, ...] = typing.get_args(BehaviourMode)

Function = TypeVar("Function", bound=Callable[..., Any])


OFF_POLICY = "off-policy corrections"


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    unset: float | None = None,
    group: str = "",
    **bounds: float,
) -> Any:
    """Return a dataclass field that declares an option.

    Args:
        default: its default.
        text: what it does, as a sentence that can be read alone.
        choices: the values it may have, if it is a name.
        unset: the number that means None in the kernels.
        group: title of the group that lists it in the trainer's --help; empty: that of the loss.
        bounds: above, at_least or at_most of a number, as :func:`mgrpo_kernels.checks.check_number` takes them.
    """
    metadata = {"help": text, "unit": "", "choices": choices, "unset": unset, "bounds": bounds, "group": group}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LossForm:
    """The options that say which loss is computed. The trainer's own options inherit them."""

    loss_type: str = option(
        "grpo", "surrogate and average of the loss, as in the table of loss types", choices=LOSS_TYPES
    )
    importance_level: ImportanceLevel = option(
        "token",
        "whether the importance ratio belongs to the token, or is the geometric mean over its sequence (GSPO, arXiv 2507.18071)",
        choices=IMPORTANCE_LEVELS,
    )
    clip_low: float = option(0.2, "the importance ratio is clipped below 1 minus this value", at_least=0.0, at_most=1.0)
    clip_high: float = option(0.2, "the importance ratio is clipped above 1 plus this value", at_least=0.0)
    clip_delta: float | None = option(
        None,
        "upper bound of the unclipped importance ratio, which limits the loss of tokens with a negative advantage "
        "(arXiv 2505.07291); none: no bound",
        above=0.0,
        unset=math.inf,
    )
    kl_coef: float = option(0.0, "weight of the KL penalty against the reference policy", at_least=0.0)
    kl_estimator: KlEstimator = option(
        "k3",
        "estimator of the KL divergence from d = ref - logprob: k1 is -d, k2 is d^2 / 2, k3 is exp(d) - d - 1 "
        '(J. Schulman, "Approximating KL Divergence")',
        choices=KL_ESTIMATORS,
    )
    kl_bias_correction: bool = option(
        False, "multiply the KL penalty by the importance ratio, which makes it unbiased off-policy (arXiv 2512.02556)"
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    behaviour_mode: BehaviourMode = option(
        "token_truncate",
        "how the weight exp(old - behaviour) is bounded: truncated to [behaviour_floor, behaviour_cap] or set to 0 outside "
        "(mask), for each token, for the product over its sequence or for the geometric mean over its sequence; with "
        "none it is 1",
        choices=BEHAVIOUR_MODES,
        group=OFF_POLICY,
    )
    behaviour_cap: float = option(2.0, "largest weight exp(old - behaviour)", above=0.0, group=OFF_POLICY)
    behaviour_floor: float = option(
        0.0,
        "smallest weight exp(old - behaviour); with token_mask it makes IcePop's mask (arXiv 2510.18855)",
        at_least=0.0,
        group=OFF_POLICY,
    )
    geometric_cap: float | None = option(
        None,
        "sequences whose weights exp(old - behaviour) have a geometric mean above this value are masked; none: no bound",
        above=0.0,
        unset=math.inf,
        group=OFF_POLICY,
    )
    geometric_floor: float = option(
        0.0,
        "sequences whose weights exp(old - behaviour) have a geometric mean below this value are masked",
        at_least=0.0,
        group=OFF_POLICY,
    )
    off_policy_delta: float | None = option(
        None,
        "tokens with a negative advantage are masked if the mean of behaviour - logprob over their sequence, or of old - "
        "logprob without behaviour_logprobs, is above this threshold (DeepSeek-V3.2, arXiv 2512.02556); none: no mask",
        at_least=0.0,
        unset=math.inf,
        group=OFF_POLICY,
    )
    cispo_cap: float = option(5.0, "largest importance ratio of the cispo loss", above=0.0)
    sapo_temperature: tuple[float, float] = option(
        (1.0, 1.05), "temperatures of the sapo loss's gate, for positive advantages and for the others", above=0.0
    )
    vespo_k: tuple[float, float] = option(
        (2.0, 3.0), "exponents k of the vespo loss's weight, for advantages >= 0 and < 0", at_least=0.0
    )
    vespo_lambda: tuple[float, float] = option(
        (3.0, 2.0), "rates lambda of the vespo loss's weight, for advantages >= 0 and < 0", at_least=0.0
    )
    dppo_tv_bounds: tuple[float, float] = option(
        (0.15, 0.15),
        "thresholds of the dppo_tv loss: the largest rise of a token's probability for positive advantages, the largest fall "
        "for the others",
        at_least=0.0,
    )
    dppo_kl_bounds: tuple[float, float] = option(
        (0.05, 0.05),
        "thresholds of the dppo_kl loss: the largest KL divergence of the new from the old probability of a token, where it "
        "rises for positive advantages, and where it falls for the others",
        at_least=0.0,
    )
    dppo_cap: float = option(20.0, "largest importance ratio of the dppo_tv and dppo_kl losses", above=0.0)


@dataclass(frozen=True)
class LossOptions(LossForm):
    """Every scalar option of a policy loss."""

    max_response_tokens: int | None = option(
        None, "longest response allowed; dr_grpo needs it unless a normalizer is given", at_least=1, unset=0.0
    )


class LossKeywords(TypedDict, total=False):
    """The options as keywords, for editors and type checkers. A test compares them with :class:`LossOptions`."""

    loss_type: str
    importance_level: ImportanceLevel
    clip_low: float
    clip_high: float
    clip_delta: float | None
    kl_coef: float
    kl_estimator: KlEstimator
    kl_bias_correction: bool
    entropy_coef: float
    behaviour_mode: BehaviourMode
    behaviour_cap: float
    behaviour_floor: float
    geometric_cap: float | None
    geometric_floor: float
    off_policy_delta: float | None
    cispo_cap: float
    sapo_temperature: tuple[float, float]
    vespo_k: tuple[float, float]
    vespo_lambda: tuple[float, float]
    dppo_tv_bounds: tuple[float, float]
    dppo_kl_bounds: tuple[float, float]
    dppo_cap: float
    max_response_tokens: int | None


class Declared(NamedTuple):
    """One option, as the functions below read it."""

    name: str
    kind: str  # "str", "bool", "float", "int" or "pair"
    may_be_none: bool
    default: Any
    text: str
    choices: tuple[str, ...] | None
    unset: float | None
    bounds: dict[str, float]


def _declared(each: dataclasses.Field[Any]) -> Declared:
    kind, _, none = str(each.type).partition(" | ")
    kind = "pair" if kind == "tuple[float, float]" else kind
    of = each.metadata
    kind = "str" if of["choices"] is not None else kind
    return Declared(each.name, kind, none == "None", each.default, of["help"], of["choices"], of["unset"], of["bounds"])


DECLARED = tuple(_declared(each) for each in dataclasses.fields(LossOptions))
_BY_NAME = {each.name: each for each in DECLARED}
SCHEMA = {"numbers": "float[]", "names": "str[]", "flags": "bool[]"}
"""The options as arguments of a custom op: a few lists, since the time of a call grows with the number of arguments."""


def make_options(function: str, keywords: Mapping[str, Any]) -> LossOptions:
    """Return the checked options that `function` was called with.

    Raises:
        TypeError: an unknown keyword, or an option of the wrong type.
        ValueError: an option out of its range.
    """
    for name, value in keywords.items():
        if name not in _BY_NAME:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        check_option(_BY_NAME[name], value)  # the defaults are good
    options = LossOptions(**keywords)
    check_bounds(options)
    return options


def check_options(options: LossOptions) -> LossOptions:
    """Return `options` if every one is in its range, else raise TypeError or ValueError that names it."""
    for each in DECLARED:
        check_option(each, getattr(options, each.name))
    check_bounds(options)
    return options


def check_bounds(options: LossForm) -> None:
    """Raise ValueError for a lower bound that is above the upper one."""
    for low, high in (("behaviour_floor", "behaviour_cap"), ("geometric_floor", "geometric_cap")):
        floor, cap = getattr(options, low), getattr(options, high)
        if cap is not None and floor > cap:
            raise ValueError(f"{low}: expected at most {high} {cap}, got {floor}")


def check_option(declared: Declared, value: Any) -> None:
    """Raise TypeError or ValueError if `value` is out of the option's range."""
    name, bounds = declared.name, declared.bounds
    if value is None and declared.may_be_none:
        return
    if declared.choices is not None:
        checks.check_choice(name, value, declared.choices)
    elif declared.kind == "bool":
        checks.check_flag(name, value)
    elif declared.kind == "pair":
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name}: expected a pair (advantage >= 0, advantage < 0), got {value!r}")
        for one in value:
            checks.check_number(name, one, **bounds)
    else:
        checks.check_number(name, value, **bounds)


def to_arguments(
    options: LossOptions,
    numbers: Mapping[str, float] = types.MappingProxyType({}),
    names: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, list[Any]]:
    """Return the options, and more numbers and names, as arguments of a custom op."""
    return {
        "numbers": [*scalars(options).values(), *numbers.values()],
        "names": [*(getattr(options, name) for name in CHOICES), *names.values()],
        "flags": [getattr(options, name) for name in FLAGS],
    }


def from_arguments(
    arguments: Mapping[str, Any], numbers: Iterable[str] = (), names: Iterable[str] = ()
) -> tuple[LossOptions, dict[str, Any]]:
    """Return what :func:`to_arguments` was given: the options, and the others by name."""
    of_numbers, of_names, of_flags = (tuple(arguments[name]) for name in SCHEMA)
    options = _options(of_numbers[: len(NUMBERS)], of_names[: len(CHOICES)], of_flags)
    others = dict(zip(numbers, of_numbers[len(NUMBERS) :], strict=True))
    return options, others | dict(zip(names, of_names[len(CHOICES) :], strict=True))


@functools.lru_cache(maxsize=64)
def _options(numbers: tuple[float, ...], names: tuple[str, ...], flags: tuple[bool, ...]) -> LossOptions:
    given: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    given |= zip(CHOICES, names, strict=True)
    given |= zip(FLAGS, flags, strict=True)
    return LossOptions(**{each.name: _value(each, given) for each in DECLARED})


def _value(declared: Declared, given: Mapping[str, Any]) -> Any:
    name = declared.name
    if declared.choices is not None:
        return checks.check_choice(name, given[name], declared.choices)
    if declared.kind == "pair":
        return given[f"{name}_high"], given[f"{name}_low"]
    if declared.may_be_none and given[name] == declared.unset:
        return None
    return int(given[name]) if declared.kind == "int" else given[name]


def scalars(options: LossOptions) -> dict[str, float]:
    """Return every number that the kernels read, by name; the two of a pair are ``NAME_high`` and ``NAME_low``."""
    numbers: dict[str, float] = {}
    for each in DECLARED:
        value = getattr(options, each.name)
        if each.kind == "pair":
            numbers[f"{each.name}_high"], numbers[f"{each.name}_low"] = map(float, value)
        elif each.kind in ("float", "int"):
            unset = each.unset
            numbers[each.name] = float(unset if value is None else value)  # type: ignore[arg-type]
    return numbers


NUMBERS = tuple(scalars(LossOptions()))
CHOICES = tuple(each.name for each in DECLARED if each.choices is not None)
FLAGS = tuple(each.name for each in DECLARED if each.kind == "bool")


def takes_options(function: Function) -> Function:
    """Give a function that takes ``**options: Unpack[LossKeywords]`` the signature and the docstring with every option.

    The options follow `behaviour_logprobs` in the signature. In the docstring they take the place of ``{options}``, and the
    table of loss types that of ``{loss_types}``.
    """
    hints = {
        name: hint.__name__ if isinstance(hint, type) else str(hint)
        for name, hint in typing.get_type_hints(LossOptions).items()
    }
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            parameters.append(parameter)
        if parameter.name == "behaviour_logprobs":
            parameters += [
                inspect.Parameter(
                    each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
                )
                for each in dataclasses.fields(LossOptions)
            ]
    function.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    if function.__doc__ is not None:  # python -OO strips docstrings
        text = function.__doc__.replace("{options}", "\n        ".join(map(_sentence, DECLARED)))
        function.__doc__ = text.replace("{loss_types}", "\n        ".join(table()))
    return function


def _sentence(declared: Declared) -> str:
    choices = f" One of {', '.join(declared.choices)}." if declared.choices else ""
    return f"{declared.name}: {declared.text}.{choices}"
