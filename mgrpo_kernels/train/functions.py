"""Functions of the user's own, which options name as module:function."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from mgrpo_kernels.method import Gold
from mgrpo_kernels.train.errors import UsageError

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str | None], Sequence[Gold | None]], list[float]]
"""Returns a reward for each response, from prompts, responses, answers and true answers. NaN: the rollout does not train."""
REWARD_KEYWORDS = ("prompts", "responses", "answers", "golds")


def function_of(option: str, name: str) -> Callable[..., Any]:
    """Return the function that an option names.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{option}: expected module:function that can be imported, got {name!r}: {error}; the module must be on PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"{option}: expected a function, got {type(found).__name__} at {name!r}")
    checked: Callable[..., Any] = found
    return checked


def make_reward(name: str | None) -> Reward | None:
    """Return the reward function that --reward names, with checks of what it returns; None without one.

    Raises:
        UsageError: it cannot be imported, or does not take the keywords.
    """
    if name is None:
        return None
    function = function_of("reward", name)
    try:
        inspect.signature(function).bind(**dict.fromkeys(REWARD_KEYWORDS))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"reward: expected a function that takes the keywords {', '.join(REWARD_KEYWORDS)}, or **keywords, got {name}: {error}"
        ) from error

    def rewards(
        prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None], golds: Sequence[Gold | None]
    ) -> list[float]:
        given = function(prompts=list(prompts), responses=list(responses), answers=list(answers), golds=list(golds))
        try:
            found = list(given)
        except TypeError:
            raise UsageError(
                f"reward: expected {name} to return a list of numbers, got {type(given).__name__}"
            ) from None
        if len(found) != len(responses):
            raise UsageError(
                f"reward: expected {name} to return {len(responses)} numbers, one for each response, got {len(found)}"
            )
        return [_number(name, value, response) for value, response in zip(found, responses, strict=True)]

    return rewards


def _number(name: str, value: Any, response: str) -> float:
    """Return a reward as a number; None, for a rollout that shall not train, as NaN."""
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"reward: expected {name} to return finite numbers or None, got {value!r} for the response {response[:60]!r}"
        )
    return number
