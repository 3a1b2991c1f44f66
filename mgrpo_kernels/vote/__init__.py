"""Answers: finding them in a text, telling whether two are equal, and the majority vote."""

from mgrpo_kernels.vote.count import Vote, majority_vote
from mgrpo_kernels.vote.equality import EQUIVALENCES, Equivalence, answers_equal
from mgrpo_kernels.vote.extraction import extract_answer

__all__ = ["EQUIVALENCES", "Equivalence", "Vote", "answers_equal", "extract_answer", "majority_vote"]
