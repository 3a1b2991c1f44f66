"""Sizes and durations as a person reads them."""

from __future__ import annotations


def size(number: float) -> str:
    """Return a number of bytes, to three digits."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB" if value < 1000 else f"{value:,.0f} TiB"


def duration(seconds: float) -> str:
    """Return a time in the one or two units that fit it: 35 ms, 4.2 s, 12 min, 3 h 20 min, 5 days, 6.8 years."""
    if seconds < 1:
        return f"{seconds * 1e3:.2g} ms"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    days = minutes / 60 / 24
    return f"{days:.0f} days" if days < 730 else f"{days / 365.25:,.1f} years"
