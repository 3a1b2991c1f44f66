"""Plots of a run's metrics over its steps."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from mgrpo_kernels.train.watch.names import NAMES

PANELS = (
    ("held-out accuracy", ("eval_accuracy", "eval_greedy", "eval_maj_at_k", "eval_pass_at_k")),
    ("the vote", ("vote_share", "label_accuracy", "reward_mean")),
    ("signs of collapse", ("distinct_labels", "top_answer_share", "pruned_fraction")),
    ("entropy, nats per token", ("entropy",)),
    ("KL, nats per token", ("kl",)),
    ("distance of the momentum model", ("momentum_distance",)),
)
FRACTIONS = ("held-out accuracy", "the vote", "signs of collapse")
"""Panels whose axis shows 0 to 1, so that a small change looks small; unless a reward is no fraction."""
SMOOTHING = 20  # steps of the running mean, which is drawn over the values of the single steps
DARK = "#16181d"  # the page's background on a dark screen


def draw(lines: list[dict[str, Any]], panels: Sequence[tuple[str, tuple[str, ...]]], dark: bool = False) -> bytes:
    """Return a PNG with one plot for each panel."""
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    face = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), DARK)
    with style.context(["dark_background", face] if dark else "default"):
        figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
        for number, (title, keys) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            axes.set_title(title)
            axes.set_xlabel("step")
            drawn: list[float] = []
            for key in keys:
                points = points_of(lines, key)
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                drawn += values
                # A single point is visible only with a marker.
                marker: dict[str, Any] = {"marker": "o", "markersize": 3}
                if key.startswith("eval_"):
                    errors = dict(points_of(lines, f"{key}_error"))
                    bars = [errors.get(step, 0.0) for step in steps]
                    axes.errorbar(steps, values, yerr=bars, label=NAMES[key], capsize=2, elinewidth=0.8, **marker)
                else:
                    (line,) = axes.plot(steps, values, linewidth=0.5, alpha=0.35)
                    marker = marker if len(points) == 1 else {}
                    axes.plot(steps, running_mean(list(values)), color=line.get_color(), label=NAMES[key], **marker)
            if drawn and title in FRACTIONS and min(drawn) >= 0.0 and max(drawn) <= 1.0:
                axes.set_ylim(-0.02, 1.02)
            if axes.get_lines():
                # Below the curves, because matplotlib takes seconds to find a free place among those of a long run.
                axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
            else:
                axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def points_of(lines: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def running_mean(values: list[float]) -> list[float]:
    """Return the mean of each value and the ones before it, SMOOTHING values at most."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - SMOOTHING) : end]
        means.append(sum(window) / len(window))
    return means
