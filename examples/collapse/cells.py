"""The cells of the collapse study: what each run passes to ``python -m mgrpo_kernels.train``.

All share :data:`COMMON`. A cell is what it adds to that; the first words of its name are the table's row.
"""

from __future__ import annotations

COMMON = {
    "steps": 2500, "learning_rate": 2e-4, "lr_schedule": "constant", "warmup": 0.0, "eval_every": 50, "checkpoint_every": 0,
    "samples_per_step": 0, "guard": "off", "log_every": 1000,
}  # fmt: skip
"""The built-in task at its own learning rate, which here never falls, for 12 times as many steps as `make train` takes."""

PAPER = {"method": "mgrpo"}
MOMENTUM = {"method": "mgrpo", "iqr_filter": False}

MAIN: dict[str, dict[str, object]] = {
    "srt": {"method": "srt"},
    "srt + momentum": MOMENTUM,
    "srt + IQR": {"method": "srt", "iqr_filter": True},
    "mgrpo": PAPER,
    "gold": {"method": "gold"},
}
"""What `make study` runs, with three seeds."""

REST: dict[str, dict[str, object]] = {
    "random": {"method": "random"},
    "teacher labels only": {"method": "co_rewarding", "momentum_rollouts": 8, "decay_end": 0.99},
    "mgrpo, scope vote": {**PAPER, "filter_scope": "vote"},
    "mgrpo, scope penalise": {**PAPER, "filter_scope": "penalise"},
}

CELLS = {**MAIN, **REST}
