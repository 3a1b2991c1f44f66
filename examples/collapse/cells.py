"""The cells of the collapse study: the options that each run passes to ``python -m mgrpo_kernels.train``.

All cells share :data:`COMMON`, and each adds its own options. ``base`` is not an option of the trainer: it names the model to start from.
"""

from __future__ import annotations

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

MAIN: dict[str, dict[str, object]] = {
    "srt": {"method": "srt"},
    "mgrpo": PAPER,
    "steady": STEADY,
    "srt + momentum": MOMENTUM,
    "srt + IQR": {"method": "srt", "iqr_filter": True},
}
"""What `make study` runs, with three seeds."""

LONG = 9000
"""Ten times the number of steps of the longest-lasting SRT run."""

LAZY: dict[str, object] = {"base": "lazy", "steps": 1000}

REST: dict[str, dict[str, object]] = {
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
    "mgrpo, N = G/2": HALF,
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

CELLS = {**MAIN, **REST}
