"""A warning in the first steps of a run whose responses give no answers, or all the same one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mgrpo_kernels.train.data.files import shown
from mgrpo_kernels.train.data.log import log_info

FIRST_STEPS = 3
"""Steps after which nothing is said any more: the metrics and the collapse guard go on."""
_LEAST_PROMPTS = 5
_EXAMPLES = 3


def warn_of_answers(
    texts: Sequence[str], answers: Sequence[str | None], prompts: Sequence[str], labels: Sequence[str | None]
) -> bool:
    """Log a warning with examples where most responses have no answer, or most prompts the same label; return whether there was one.

    Args:
        texts: B responses.
        answers: their answers.
        prompts: P prompts.
        labels: of each prompt.
    """
    without = [text for text, answer in zip(texts, answers, strict=True) if answer is None]
    if 2 * len(without) > len(texts):
        log_info(
            "no answer was found in %d of %d responses, so they have no part in the vote. For example: %s. Check that --prompt-template "
            "(or the chat template) asks for a form that --answer-from reads, or set --answer-pattern or --answer-extractor; a response "
            "that was cut needs a larger --max-response-tokens",
            len(without),
            len(texts),
            _examples(without),
        )
        return True
    counted = Counter(label for label in labels if label is not None)
    label, count = counted.most_common(1)[0] if counted else ("", 0)
    if len(set(prompts)) >= _LEAST_PROMPTS and 2 * count > len(prompts):
        same = [text for text, answer in zip(texts, answers, strict=True) if answer == label]
        log_info(
            "%s is the label of %d of %d prompts, as if it were read from what all responses share. For example: %s. If it is no "
            "answer, set --answer-from, --answer-pattern or --answer-extractor",
            shown(label),
            count,
            len(prompts),
            _examples(same),
        )
        return True
    return False


def _examples(texts: Sequence[str]) -> str:
    """Return the ends of some texts, where an answer would stand."""
    return "; ".join(shown(text[-50:]) for text in texts[:_EXAMPLES])
