"""The method as a library: from what a step's rollouts are to what becomes of them.

:func:`select` is a pure function from entropies, answers, groups and options to labels, rewards, who votes, who trains, advantages and
metrics. :data:`METHODS` is the table of methods, and :class:`MethodOptions` what can be chosen. The trainer, TRL's MGRPOTrainer and verl's
call these.
"""

from mgrpo_kernels.method.gold import ANSWER_FIELDS, equal_to_gold, read_gold
from mgrpo_kernels.method.methods import METHODS, Method, Signals
from mgrpo_kernels.method.options import MOMENTUM_OPTIONS, SCOPES, SCORERS, MethodOptions, option
from mgrpo_kernels.method.pruning import survivors
from mgrpo_kernels.method.selection import Selection, select, who_trains

__all__ = [
    "ANSWER_FIELDS",
    "METHODS",
    "MOMENTUM_OPTIONS",
    "SCOPES",
    "SCORERS",
    "Method",
    "MethodOptions",
    "Selection",
    "Signals",
    "equal_to_gold",
    "option",
    "read_gold",
    "select",
    "survivors",
    "who_trains",
]
