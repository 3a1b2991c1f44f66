"""The method as a library: the filter, the vote, the rewards and the advantages of a step's rollouts.

:func:`select` is a pure function from entropies, answers, groups and options to labels, rewards, voters, trained rollouts, advantages and
metrics. :data:`METHODS` is the table of methods, and :class:`MethodOptions` holds their options. The trainer, and MGRPOTrainer for TRL and
for verl, call these.
"""

from mgrpo_kernels.method.agreement import teacher_agreement, top_answer_share
from mgrpo_kernels.method.answer_span import answer_tokens
from mgrpo_kernels.method.fields import Declared, check_fields, fields_of, help_of, option
from mgrpo_kernels.method.gold import ANSWER_FIELDS, Gold, equal_to_gold, gold_in_cell, read_gold
from mgrpo_kernels.method.methods import METHODS, Method, MethodName
from mgrpo_kernels.method.options import MOMENTUM_OPTIONS, SCOPES, SCORERS, MethodOptions
from mgrpo_kernels.method.pruning import survivors
from mgrpo_kernels.method.selection import Selection, select, who_trains
from mgrpo_kernels.method.signals import Outcome, Signals

__all__ = [
    "ANSWER_FIELDS",
    "METHODS",
    "MOMENTUM_OPTIONS",
    "SCOPES",
    "SCORERS",
    "Declared",
    "Method",
    "MethodName",
    "MethodOptions",
    "Outcome",
    "Selection",
    "Signals",
    "answer_tokens",
    "check_fields",
    "Gold",
    "equal_to_gold",
    "fields_of",
    "gold_in_cell",
    "help_of",
    "option",
    "read_gold",
    "select",
    "survivors",
    "teacher_agreement",
    "top_answer_share",
    "who_trains",
]
