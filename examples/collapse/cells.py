"""The cells of the collapse study: the options that each run passes to ``python -m mgrpo_kernels.train``.

All cells share :data:`COMMON`, and each adds its own options. Two are not options of the trainer: ``base`` names the model to start from,
and ``quartiles`` the comparison of the IQR filter (quartiles.py).
"""

from __future__ import annotations

from mgrpo_kernels.method import METHODS

NOT_OPTIONS = ("base", "quartiles")

COMMON = {
    "steps": 2000,
    "learning_rate": 2e-4,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "eval_every": 50,
    "checkpoint_every": 0,
    "samples_per_step": 0,
    "guard": "off",
    "log_every": 1000,
}
"""The built-in task with its own learning rate, kept constant, for several times as many steps as `make train` takes."""

WARM_STEPS = 1500
"""The largest number of warm-start steps; a warm start ends earlier if it reaches the accuracy of `make train`'s warm start."""

LAZY_SHARE, LAZY_RESPONSE = 0.22, "#7$"
"""With ``base: lazy`` this share of the warm start's targets has the same answer whatever the sum, as an answer to collapse onto."""

PAPER: dict[str, object] = {"method": "mgrpo", "momentum_rollouts": 4}
"""The published quarter of 16 rollouts, which is not the trainer's default."""
MOMENTUM: dict[str, object] = {**PAPER, "iqr_filter": False}
TEACHER: dict[str, object] = {"method": "co_rewarding", "momentum_rollouts": 8, "decay_end": 0.99}
HALF: dict[str, object] = {**PAPER, "momentum_rollouts": 8}
HALF_MOMENTUM: dict[str, object] = {**MOMENTUM, "momentum_rollouts": 8}
STEADY: dict[str, object] = {**TEACHER, "iqr_filter": True}
"""Only the momentum model votes, and the filter prunes as in the paper. Chosen on seeds 0 and 1, which the study leaves out."""

EXCESS: dict[str, object] = {**HALF, "vote_by": "excess"}
"""The preset `excess`: chosen on seeds 0, 1, 9 and 10, which the second edition leaves out."""

MAIN: dict[str, dict[str, object]] = {
    "srt": {"method": "srt"},
    "mgrpo": PAPER,
    "mgrpo, N = G/2": HALF,
    "excess": EXCESS,
    "steady": STEADY,
}
"""What `make study` runs, with three seeds."""

LONG = 9000
"""Ten times the number of steps of the longest-lasting SRT run."""

LAZY: dict[str, object] = {"base": "lazy", "steps": 1000}

REST: dict[str, dict[str, object]] = {
    "srt + momentum": MOMENTUM,
    "srt + IQR": {"method": "srt", "iqr_filter": True},
    "gold": {"method": "gold"},
    f"gold, {LONG} steps": {"method": "gold", "steps": LONG},
    "random": {"method": "random"},
    "momentum labels": TEACHER,
    f"steady, {LONG} steps": {**STEADY, "steps": LONG},
    "srt + IQR, scope vote": {"method": "srt", "iqr_filter": True, "filter_scope": "vote"},
    "srt + IQR, scope penalise": {"method": "srt", "iqr_filter": True, "filter_scope": "penalise"},
    "steady, scope vote": {**STEADY, "filter_scope": "vote"},
    "mgrpo, scope vote": {**PAPER, "filter_scope": "vote"},
    "mgrpo, scope penalise": {**PAPER, "filter_scope": "penalise"},
    "mgrpo, m 0.999": {**PAPER, "decay": 0.999},
    f"mgrpo, N = G/2, {LONG} steps": {**HALF, "steps": LONG},
    "mgrpo, KL 0.05": {**PAPER, "kl_coef": 0.05},
    "mgrpo, lr 5e-5": {**PAPER, "learning_rate": 5e-5},
    "mgrpo, k 1.5": {**PAPER, "iqr_k": 1.5},
    "mgrpo, T 1.2": {**PAPER, "temperature": 1.2},
    "mgrpo, G 32": {**PAPER, "rollouts": 32, "momentum_rollouts": 8},
    "mgrpo, min spread 0.5": {**PAPER, "iqr_min_spread": 0.5},
    "srt + IQR, min spread 0.5": {"method": "srt", "iqr_filter": True, "iqr_min_spread": 0.5},
    "srt + momentum, N = G/2": HALF_MOMENTUM,
    "srt, lr 5e-5": {"method": "srt", "learning_rate": 5e-5},
    "lazy: srt": {**LAZY, "method": "srt"},
    "lazy: srt + momentum": {**LAZY, **MOMENTUM},
    "lazy: srt + IQR": {**LAZY, "method": "srt", "iqr_filter": True},
    "lazy: srt + IQR, scope vote": {**LAZY, "method": "srt", "iqr_filter": True, "filter_scope": "vote"},
    "lazy: mgrpo": {**LAZY, **PAPER},
    "lazy: mgrpo, scope vote": {**LAZY, **PAPER, "filter_scope": "vote"},
    "lazy: mgrpo, N = G/2": {**LAZY, **HALF},
    "lazy: srt + momentum, N = G/2": {**LAZY, **HALF_MOMENTUM},
    "lazy: mgrpo, min spread 0.2": {**LAZY, **PAPER, "iqr_min_spread": 0.2},
    "lazy: momentum labels": {**LAZY, **TEACHER},
    "lazy: steady": {**LAZY, **STEADY},
    "lazy: steady, scope vote": {**LAZY, **STEADY, "filter_scope": "vote"},
}

TRIED = [name for name in METHODS if name not in ("mgrpo", "srt", "co_rewarding", "gold", "random")]
"""Methods without a longer run above, with their defaults."""

METHOD_STEPS = 150

REPORTED: dict[str, dict[str, object]] = {
    "srt": {"method": "srt"},
    "half": HALF,
    "excess": EXCESS,
    "steady": STEADY,
    "self_harmony, excess": {"method": "self_harmony", "vote_by": "excess"},
}
"""What the second edition compares, on both start models. The number of steps is part of the cell's name."""

LATER: dict[str, dict[str, object]] = {
    "co_rewarding_1": {"method": "co_rewarding_1"},
    "self_harmony": {"method": "self_harmony"},
    "half, cosine": {**HALF, "decay_end": 0.9999},
    "gated, excess, rollback": {
        **EXCESS,
        "teacher": "gated",
        "teacher_every": 50,
        "guard": "rollback",
        "guard_rollbacks": 10,
    },
}
"""Compared with :data:`REPORTED` in the longest runs only: the plain methods with two wordings, a decay of the momentum model that
rises along a cosine as in Co-rewarding-II, and all safeguards at once."""

TOLERANCE = 2**-8
"""The share of each token's logit gradient that the head's backward pass may leave out in the cells that are compared with exact ones."""

SECOND: dict[str, dict[str, object]] = {
    **{f"{method}, {METHOD_STEPS} steps": {"method": method, "steps": METHOD_STEPS} for method in TRIED},
    **{
        f"{base}{name}, {steps} steps": {**start, **options, "steps": steps}
        for base, start in (("", {}), ("lazy: ", LAZY))
        for name, options in REPORTED.items()
        for steps in (300, 600, 1500, 3000)
    },
    **{
        f"{base}{name}, 3000 steps": {**start, **options, "steps": 3000}
        for base, start in (("", {}), ("lazy: ", LAZY))
        for name, options in LATER.items()
    },
    **{
        f"{base}{name}, tolerance, {steps} steps": {
            **start,
            **REPORTED[name],
            "gradient_tolerance": TOLERANCE,
            "steps": steps,
        }
        for base, start in (("", {}), ("lazy: ", LAZY))
        for name in ("srt", "half")
        for steps in (300, 3000)
    },
}

DOSES = (0.0, 0.25, 0.75, 1.0)
"""Weights of the final answer's tokens in OM-GRPO's loss: the doses of its paper (arXiv 2608.03119), and the plain soft vote."""

DOSE: dict[str, dict[str, object]] = {
    f"{base}om_grpo, answer weight {dose}, 300 steps": {
        **start,
        "method": "om_grpo",
        "answer_weight": dose,
        "steps": 300,
    }
    for base, start in (("", {}), ("lazy: ", LAZY))
    for dose in DOSES
}

QUARTILES: dict[str, dict[str, object]] = {
    f"{base}srt{filtered}, 300 steps": {**start, "method": "srt", **options, "steps": 300}
    for base, start in (("", {}), ("lazy: ", LAZY))
    for filtered, options in {
        "": {},
        " + IQR": {"iqr_filter": True},
        **{f" + IQR, {kind}": {"iqr_filter": True, "quartiles": kind} for kind in ("batch", "history", "length")},
    }.items()
}
"""The plain vote, and the IQR filter with each comparison of the entropies."""

COST: dict[str, dict[str, object]] = {f"cost: {method}": {"method": method, "steps": 50} for method in METHODS}
"""For the duration of a step of each method, before any of them has collapsed."""

TRIED: dict[str, dict[str, object]] = {
    "half": HALF,
    "half, min share 0.5": {**HALF, "min_share": 0.5},
    "half, min share 0.375": {**HALF, "min_share": 0.375},
    "half, min share 0.625": {**HALF, "min_share": 0.625},
    "half, min share 0.75": {**HALF, "min_share": 0.75},
    "half, min share 0.875": {**HALF, "min_share": 0.875},
    "half, min share 0.75, hard 50": {**HALF, "min_share": 0.75, "teacher": "hard", "teacher_every": 50},
    "half, excess": {**HALF, "vote_by": "excess"},
    "srt, excess": {"method": "srt", "vote_by": "excess"},
    "half, excess, min share 0.5": {**HALF, "vote_by": "excess", "min_share": 0.5},
    "half, min share 0.75, m 0.999": {**HALF, "min_share": 0.75, "decay": 0.999},
    "half, min share 0.75, m 0.998": {**HALF, "min_share": 0.75, "decay": 0.998},
    "half, min share 0.75, hard 200": {**HALF, "min_share": 0.75, "teacher": "hard", "teacher_every": 200},
    "srt, min share 0.75": {"method": "srt", "min_share": 0.75},
    "half, min share 0.625, votes 0.8": {**HALF, "min_share": 0.625, "teacher_votes": 0.8},
    "momentum labels, min share 0.625": {**TEACHER, "min_share": 0.625},
    "momentum labels, min share 0.75": {**TEACHER, "min_share": 0.75},
    "half, hard 10": {**HALF, "teacher": "hard", "teacher_every": 10},
    "half, hard 50": {**HALF, "teacher": "hard", "teacher_every": 50},
    "half, hard 200": {**HALF, "teacher": "hard", "teacher_every": 200},
    "half, gated 50": {**HALF, "teacher": "gated", "teacher_every": 50},
    "half, votes 0.8": {**HALF, "teacher_votes": 0.8},
    "half, m 0.999": {**HALF, "decay": 0.999},
    "momentum labels": TEACHER,
    "momentum labels, min share 0.5": {**TEACHER, "min_share": 0.5},
    "momentum labels, hard 50": {
        "method": "co_rewarding",
        "momentum_rollouts": 8,
        "teacher": "hard",
        "teacher_every": 50,
    },
    **{
        f"momentum labels, hard {every}, min share {share}": {
            "method": "co_rewarding",
            "momentum_rollouts": 8,
            "teacher": "hard",
            "teacher_every": every,
            "min_share": share,
        }
        for every in (50, 100, 200)
        for share in (0.625, 0.75)
    },
    "srt, min share 0.5": {"method": "srt", "min_share": 0.5},
    "self_harmony": {"method": "self_harmony"},
    "self_harmony, excess": {"method": "self_harmony", "vote_by": "excess"},
    "co_rewarding_1, excess": {"method": "co_rewarding_1", "vote_by": "excess"},
    "co_rewarding_3, excess": {"method": "co_rewarding_3", "vote_by": "excess", "decay_end": 0.99},
    "dcrl, excess": {"method": "dcrl", "vote_by": "excess"},
    "half, excess, KL to momentum 0.1": {**HALF, "vote_by": "excess", "kl_reference": "momentum", "kl_coef": 0.1},
    "soft vote, N = G/2": {"method": "soft_vote", "momentum_rollouts": 8},
    "scrl, N = G/2": {"method": "scrl", "momentum_rollouts": 8},
}
"""What was tried as a default, on seeds that are not reported: `lazy` with few steps."""

CHOICE: dict[str, dict[str, object]] = {
    **{f"choice, lazy: {name}": {**LAZY, "steps": 300, **options} for name, options in TRIED.items()},
    **{
        f"choice, lazy: {name}, {steps} steps": {**LAZY, "steps": steps, **TRIED[name]}
        for name in ("half", "half, excess", "half, min share 0.75", "half, min share 0.75, m 0.999")
        for steps in (1000, 2000)
    },
    **{
        f"choice: {name}, {steps} steps": {"steps": steps, **TRIED[name]}
        for name in ("half", "half, excess", "half, min share 0.75", "half, min share 0.75, m 0.999")
        for steps in (1000, 2000)
    },
    **{
        f"choice: {name}, 3000 steps": {"steps": 3000, **TRIED[name]}
        for name in ("half, excess", "half, excess, KL to momentum 0.1", "self_harmony, excess")
    },
}

FULL = {**MAIN, **REST, **SECOND, **DOSE, **QUARTILES}
"""What `make study-full` runs."""

CELLS = {**FULL, **COST, **CHOICE}
