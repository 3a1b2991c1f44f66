"""The value of a formula: an exact fraction where it is rational, else digits that identify it.

Two formulas are equal if they have equal values at fixed points, computed to 60 digits. (This is polynomial identity testing: that
two different formulas agree to 25 digits at three arbitrary points is as likely as any other collision of hashes.) The digits are the
canonical key of a formula, so no two formulas are ever compared as such. Every operation is bounded: ``9^{9^{9^9}}`` and
``(x+1)^{1000}`` cost no more than other formulas.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import libmp

from mgrpo_kernels.vote.formulas import Node, symbols_of

MAX_BITS = 100_000  # of an exact numerator or denominator
MAX_FACTORIAL = 5_000
_MAX_MAGNITUDE = 1 << 40  # bits of a binary exponent: beyond, digits would cost more than they say
_PRECISIONS = (60, 90)  # decimal digits; a value counts where both agree
_AGREE = 35  # decimal digits
_KEPT_BITS = 84  # 25 decimal digits
POINTS = 3


class UncertainError(ValueError):
    """A value too large to compute, undefined, or lost to cancellation."""


Key = tuple[Any, ...]


def exact_value(node: Node) -> Fraction | None:
    """Return the value of a rational formula without variables, or None where it is another, or too large.

    Raises:
        ZeroDivisionError: it divides by zero.
    """
    kind = node[0]
    if kind == "number":
        return node[1] if _fits(node[1]) else None
    if kind in ("symbol", "pm"):
        return None
    operands = [exact_value(each) for each in node[1:] if isinstance(each, tuple)]
    if any(each is None for each in operands):
        return None
    value = _exact(kind, node, [each for each in operands if each is not None])
    return value if value is not None and _fits(value) else None


def _fits(value: Fraction) -> bool:
    return max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS


def _exact(kind: str, node: Node, operands: list[Fraction]) -> Fraction | None:
    first = operands[0]
    if kind == "neg":
        return -first
    if kind == "+":
        return first + operands[1]
    if kind == "*":
        return first * operands[1]
    if kind == "/":
        return first / operands[1]
    if kind == "^":
        return _exact_power(first, operands[1])
    if kind == "!":
        return Fraction(math.factorial(int(first))) if first.denominator == 1 and 0 <= first <= MAX_FACTORIAL else None
    if kind == "root":
        return _exact_root(first, operands[1])
    rounded: dict[str, Callable[[Fraction], Any]] = {"abs": abs, "floor": math.floor, "ceiling": math.ceil}
    return Fraction(rounded[node[1]](first)) if node[1] in rounded else None


def _exact_power(base: Fraction, power: Fraction) -> Fraction | None:
    if power.denominator != 1:
        if power.denominator > 64:
            return None
        root = _exact_root(Fraction(power.denominator), base)
        return None if root is None or base < 0 else _exact_power(root, Fraction(power.numerator))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and abs(power) * bits > MAX_BITS:
        return None
    if base in (1, -1):
        return Fraction(1) if base == 1 or power.numerator % 2 == 0 else base
    if base == 0 and power <= 0:
        return Fraction(1) if power == 0 else base / 0
    return base ** int(power) if base != 0 else base


def _exact_root(index: Fraction, radicand: Fraction) -> Fraction | None:
    """Return the real root if it is rational."""
    if index.denominator != 1 or not 2 <= index <= 64 or (radicand < 0 and index % 2 == 0):
        return None
    n, sign = int(index), -1 if radicand < 0 else 1
    roots = []
    for part in (abs(radicand.numerator), radicand.denominator):
        if part.bit_length() > 4096:
            return None
        root = _integer_root(part, n)
        if root**n != part:
            return None
        roots.append(root)
    return Fraction(sign * roots[0], roots[1])


def _integer_root(value: int, n: int) -> int:
    if n == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if middle**n <= value:
            low = middle
        else:
            high = middle - 1
    return low


# --- Numeric values


def values_at_points(node: Node, branch: int = 1) -> list[Any]:
    """Return the value at each point, as mpmath numbers that are certain to 35 digits; one point where there are no variables.

    Args:
        node: a formula.
        branch: 1 or -1, the sign that ± stands for.

    Raises:
        UncertainError: a value cannot be computed.
    """
    names = symbols_of(node)
    return [_certain(node, {name: _point(name, j) for name in names}, branch) for j in range(POINTS if names else 1)]


def _point(name: str, index: int) -> Fraction:
    """Return the value of a variable at a point: arbitrary, but always the same; positive at all points but the last."""
    digest = int.from_bytes(hashlib.sha256(f"{index}:{name}".encode()).digest()[:8], "big")
    value = Fraction(3, 10) + Fraction(2 * digest, 1 << 64)
    return -value if index == POINTS - 1 else value


def _certain(node: Node, point: dict[str, Fraction], branch: int) -> Any:
    """Return the value that two precisions agree on; what shrinks with the precision is a rounding error of zero."""
    results = []
    for digits in _PRECISIONS:
        with mpmath.workdps(digits):
            try:
                results.append(_numeric(node, point, branch))
            except (ZeroDivisionError, OverflowError, ValueError, TypeError, NotImplementedError) as error:
                raise UncertainError(str(error)) from error
    low, high = results
    with mpmath.workdps(_PRECISIONS[1]):
        size = abs(high)
        if not mpmath.isfinite(size):
            raise UncertainError("not finite")
        if abs(low - high) > size * mpmath.mpf(10) ** -_AGREE:
            if abs(low) < mpmath.mpf(10) ** (15 - _PRECISIONS[0]) and size < mpmath.mpf(10) ** (15 - _PRECISIONS[1]):
                return mpmath.mpf(0)
            raise UncertainError("lost to cancellation")
        noise = size * mpmath.mpf(10) ** (20 - _PRECISIONS[1])
        real, imaginary = mpmath.re(high), mpmath.im(high)
        if abs(imaginary) <= noise:
            return real
        return mpmath.mpc(0 if abs(real) <= noise else real, imaginary)


def _guarded(value: Any) -> Any:
    """Return the value, unless its size is beyond what is worth computing with."""
    for part in (mpmath.re(value), mpmath.im(value)):
        _, mantissa, exponent, bits = part._mpf_
        if mantissa and abs(exponent + bits) > _MAX_MAGNITUDE:
            raise OverflowError("too large")
    return value


def _numeric(node: Node, point: dict[str, Fraction], branch: int) -> Any:
    kind = node[0]
    if kind == "number":
        return mpmath.mpf(node[1].numerator) / node[1].denominator
    if kind == "symbol":
        constants = {"π": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}
        if node[1] in constants:
            return +constants[node[1]]
        return mpmath.mpf(point[node[1]].numerator) / point[node[1]].denominator
    if kind == "call":
        return _guarded(_called(node[1], _numeric(node[2], point, branch)))
    operands = [_numeric(each, point, branch) for each in node[1:]]
    return _guarded(_OPERATIONS[kind](*operands) if kind != "pm" else operands[0] + branch * operands[1])


def _power(base: Any, power: Any) -> Any:
    if base == 0:
        if mpmath.re(power) > 0:
            return mpmath.mpf(0)
        raise ZeroDivisionError
    size = abs(power) * abs(mpmath.log(abs(base)))
    if size > _MAX_MAGNITUDE or abs(power) > _MAX_MAGNITUDE:
        raise OverflowError("too large")
    return base**power


def _root(index: Any, radicand: Any) -> Any:
    real = isinstance(radicand, mpmath.mpf) and isinstance(index, mpmath.mpf)
    if real and radicand < 0 and index == int(index) and int(index) % 2 == 1:  # the real cube root of a negative number
        return -_power(-radicand, 1 / index)
    return _power(radicand, 1 / index) if radicand != 0 else radicand


def _factorial(value: Any) -> Any:
    if abs(value) > 10**6:
        raise OverflowError("too large")
    return mpmath.factorial(value)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "neg": lambda a: -a,
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    "!": _factorial,
    "root": _root,
}
_CALLS: dict[str, Callable[[Any], Any]] = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot, "sinh": mpmath.sinh,
    "cosh": mpmath.cosh, "tanh": mpmath.tanh, "arcsinh": mpmath.asinh, "arccosh": mpmath.acosh, "arctanh": mpmath.atanh,
    "exp": mpmath.exp, "ln": mpmath.log, "lg": mpmath.log10, "abs": abs, "floor": mpmath.floor, "ceiling": mpmath.ceil,
    # To base 10 or e: who knows? It is neither, but log a + log b is log ab.
    "log": lambda x: mpmath.log(x) / mpmath.mpf("1.6180339887498948482"),
}  # fmt: skip
_UNBOUNDED = {"ln", "log", "lg", "abs"}  # everything else needs as many digits as its argument is large


def _called(name: str, argument: Any) -> Any:
    if name not in _CALLS:
        raise UncertainError(name)
    if name not in _UNBOUNDED and abs(argument) > mpmath.mpf(10) ** 9:
        raise OverflowError("too large")
    return _CALLS[name](argument)


# --- Keys


def number_key(value: Fraction) -> Key:
    """Return the key of an exact number."""
    return ("number", value)


def value_keys(node: Node) -> list[Key]:
    """Return a formula's keys: one, or two where it has a ±.

    Raises:
        UncertainError: it has no value that can be computed.
    """
    branches = (1, -1) if _has_sign(node) else (1,)
    return list(dict.fromkeys(_value_key(node, branch) for branch in branches))


def _has_sign(node: Node) -> bool:
    return node[0] == "pm" or any(_has_sign(each) for each in node[1:] if isinstance(each, tuple))


def _value_key(node: Node, branch: int) -> Key:
    try:
        exact = exact_value(node)
    except ZeroDivisionError as error:
        raise UncertainError("division by zero") from error
    if exact is not None:
        return number_key(exact)
    return key_of_values(values_at_points(node, branch))


def key_of_values(values: list[Any]) -> Key:
    """Return the key of a function by its values at the points: of a constant, where they are all equal."""
    digits = [digits_of(value) for value in values]
    if len(set(digits)) == 1:
        return constant_key(values[0])
    return ("formula", *digits)


def constant_key(value: Any) -> Key:
    """Return the key of a number known to many digits: as an exact number where it is a fraction of small denominator."""
    if isinstance(value, mpmath.mpf):
        sign, mantissa, exponent, bits = value._mpf_
        if not mantissa:
            return number_key(Fraction(0))
        if abs(exponent + bits) < 256:
            full = (-1) ** sign * Fraction(mantissa) * Fraction(2) ** exponent
            near = full.limit_denominator(10**6)
            if abs(near - full) <= abs(full) / 10**_AGREE:
                return number_key(near)
    return ("real", digits_of(value))


def digits_of(value: Any) -> tuple[Any, ...]:
    """Return the leading 25 digits of a number, as exact integers: of its real part, and of its imaginary part unless that is 0."""
    parts = (mpmath.re(value), mpmath.im(value))
    return tuple(libmp.mpf_pos(part._mpf_, _KEPT_BITS, "n")[:3] for part in (parts if parts[1] != 0 else parts[:1]))
