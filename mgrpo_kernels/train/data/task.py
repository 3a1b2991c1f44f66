r"""Prompts: the fields of a row, true answers, the prompt template, and which prompts a step gets.

A row has a question and, where it is known, the true answer: plain (MATH, AMC's ``144.0``, AIME's ``025``), or at the end of a
solution (GSM8K's ``#### 1,080``, MATH's ``\boxed{}``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mgrpo_kernels import extract_answer
from mgrpo_kernels.method import Gold
from mgrpo_kernels.train.config import Config
from mgrpo_kernels.train.config.sections import DEFAULT_TEMPLATE
from mgrpo_kernels.train.data.answers import make_extractor
from mgrpo_kernels.train.data.fields import find_field, gold_in, lookup, question_in
from mgrpo_kernels.train.data.files import read_rows, shown
from mgrpo_kernels.train.data.log import log_info
from mgrpo_kernels.train.data.mixture import mixed, parse_sources
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.functions import Reward
from mgrpo_kernels.train.model.chat import Chat, Turn, wrapper
from mgrpo_kernels.train.model.policy import read_tokenizer
from mgrpo_kernels.train.rng import generator_for
from mgrpo_kernels.vote import Equivalence

logger = logging.getLogger("mgrpo_kernels")


class Example(NamedTuple):
    """One question."""

    prompt: str  # as the model sees it
    gold: Gold | None  # the true answer, or several of which any will do, where it is known
    paraphrase: str | None = None  # the prompt in another wording, where the method reads one

    @property
    def second_wording(self) -> str:
        """The prompt in its other wording."""
        assert self.paraphrase is not None
        return self.paraphrase

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, and its other wording if there is one."""
        return (self.prompt,) if self.paraphrase is None else (self.prompt, self.paraphrase)

    def wordings(self, rollouts: int, reworded: int) -> list[str]:
        """Return the prompt of each of the `rollouts`, of which the last `reworded` answer the second wording."""
        return [self.prompt] * (rollouts - reworded) + [self.second_wording for _ in range(reworded)]


class Task(NamedTuple):
    """What is trained on, and how an answer is read and compared."""

    train: list[Example]
    held_out: list[Example]  # may be empty: no evaluation
    extract: Callable[[str], str | None] = extract_answer
    equivalence: Equivalence = "math"
    reward: Reward | None = None  # the user's own
    sets: tuple[str, ...] = ()  # the name of each held-out prompt's set, where sets have names

    def evaluating(self, most: int | None) -> Task:
        """Return the task with at most this many prompts of each held-out set; None: all of them."""
        names = self.sets or ("",) * len(self.held_out)
        number: Counter[str] = Counter()
        kept = []
        for row, name in enumerate(names):
            number[name] += 1
            if most is None or number[name] <= most:
                kept.append(row)
        sets = tuple(names[row] for row in kept) if self.sets else ()
        return self._replace(held_out=[self.held_out[row] for row in kept], sets=sets)


def load_task(config: Config, *, training: bool = True) -> Task:
    """Return the task that the configuration names, the prompts to train on where `training`; what is odd about the data is logged.

    Raises:
        UsageError: unreadable data, broken row, missing field, no rows, a template without {question}, or a prompt or a true answer
            that is longer than the model's context.
    """
    assert config.model.model is not None
    sources = read_sources(config, "data", config.method.row.needs_gold) if training else []
    evaluated = [] if config.data.eval_data is None else read_sources(config, "eval_data", True)
    held_out = [each for _, part in evaluated for each in part]
    if training and config.method.gold_labels and all(each.gold is None for _, part in sources for each in part):
        raise UsageError(
            f"gold_labels: expected true answers for some of the prompts of {config.data.data}, got none; --answer-field names their field"
        )
    warn_of_repeats([each for _, part in sources for each in part], held_out)
    train = mixed(sources, config.run.seed, shuffle=config.data.shuffle_data, most=config.data.max_examples)
    tokenizer, context = read_tokenizer(config.model.model, config.model.loading)
    check_answers([*train, *held_out], tokenizer, context, config.rollout.max_response_tokens)
    wrap = wrapper(config.model.model, tokenizer, config.data.chat_template, log_info, chat_of(config))

    def prompts(option: str, drafts: list[Draft]) -> tuple[list[Example], tuple[str, ...]]:
        wrapped = [
            Example(wrapped_prompt(wrap, each), each.gold, each.paraphrase and wrapped_prompt(wrap, each.paraphrase))
            for each in drafts
        ]
        names = {id(example): draft.source for example, draft in zip(wrapped, drafts, strict=True)}
        kept = fitting(option, wrapped, tokenizer, context, config)
        return kept, tuple(names[id(each)] for each in kept if names[id(each)])

    extract = make_extractor(config.data)
    evaluated_on, sets = prompts("eval_data", held_out)
    return Task(prompts("data", train)[0], evaluated_on, extract, config.method.equivalence, sets=sets)


def chat_of(config: Config) -> Chat:
    """Return how prompts become conversations."""
    data, system = config.data, config.data.system_prompt
    if system is not None:
        system = read_text("system_prompt", system).strip()
    return Chat(system, data.template_arguments, config.model.loading)


def wrapped_prompt(wrap: Callable[[Sequence[Turn]], str], draft: Draft) -> str:
    """Return the prompt as the model gets it.

    Raises:
        UsageError: the chat template has dropped the question, as one does that loops over the parts of a content that is a text.
    """
    prompt = wrap(draft.turns)
    if " ".join(draft.question.split()) not in " ".join(prompt.split()):
        raise UsageError(
            f"chat_template: expected a template that keeps the question, got {shown(prompt)} for {shown(draft.question)}; "
            "--chat-template off gives the prompt as it is"
        )
    return prompt


# --- Examples


class Draft(NamedTuple):
    """One question as the data have it, before the model's chat template."""

    prompt: str  # the question in the prompt template; of a conversation, all that it says
    gold: Gold | None
    turns: tuple[Turn, ...]  # the conversation: one turn of the user's where the data have texts
    question: str  # what the rendered prompt must contain
    source: str = ""  # name of the held-out set
    paraphrase: Draft | None = None  # the question in another wording


def read_examples(config: Config, option: str, needs_gold: bool) -> list[Example]:
    """Read what the option data or eval_data names, without a chat template.

    Raises:
        UsageError: names the file and the row.
    """
    return [Example(each.prompt, each.gold) for _, part in read_sources(config, option, needs_gold) for each in part]


def read_sources(config: Config, option: str, needs_gold: bool) -> list[tuple[float | None, list[Draft]]]:
    """Return each source's weight in the mixture, None if it has none, and its questions.

    Raises:
        UsageError: names the file and the row.
    """
    named: str = getattr(config.data, option)
    return [
        (
            each.weight,
            [draft._replace(source=each.label) for draft in read_source(config, each.name, option, needs_gold)],
        )
        for each in parse_sources(named, option)
    ]


def read_source(config: Config, source: str, option: str, needs_gold: bool) -> list[Draft]:
    """Read one file or data set."""
    template, rows = read_template(config.data.prompt_template), read_rows(source, option)
    prompt_field = find_field("prompt_field", config.data.prompt_field, rows, source, needed=True)
    # Training data may lack a field that is named for the held-out ones.
    needed = needs_gold or (config.data.answer_field is not None and config.data.eval_data is None)
    answer_field = find_field("answer_field", config.data.answer_field, rows, source, needed=needed)
    asks_twice = option == "data" and config.method.row.second_wording != "no"
    paraphrase = ""
    if asks_twice:
        paraphrase = find_field("paraphrase_field", config.data.paraphrase_field, rows, source, needed=True)
    drafts = []
    for row in rows:
        has_answer = lookup(row.values, answer_field) is not None
        gold = gold_in(row, answer_field) if needs_gold or has_answer else None
        if needs_gold and gold is None:
            raise UsageError(
                f"answer_field: expected an answer, or a solution that ends in \\boxed{{}} or ####, in {answer_field!r} "
                f"of {row.location}, got {_length(lookup(row.values, answer_field))}"
            )
        draft = _draft(question_in(row, prompt_field), gold, template)
        if asks_twice:
            reworded = question_in(row, paraphrase, "paraphrase_field")
            draft = draft._replace(paraphrase=_draft(reworded, gold, template))
        drafts.append(draft)
    unread = sum(
        lookup(row.values, answer_field) is not None and draft.gold is None
        for row, draft in zip(rows, drafts, strict=True)
    )
    if unread:
        log_info(
            "%s: %d of %d rows have no answer in %r that can be read; label_accuracy leaves them out",
            option,
            unread,
            len(rows),
            answer_field,
        )
    return drafts


def _length(value: object) -> str:
    characters = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
    return f"{characters} with neither: {shown(value)}"


def _draft(question: str | tuple[Turn, ...], gold: Gold | None, template: str) -> Draft:
    """Return a question in its template. A conversation is complete as it stands; a template other than the default applies to its end."""
    if isinstance(question, str):
        text = template.replace("{question}", question)
        return Draft(text, gold, (Turn("user", text),), question)
    asked = question[-1].content
    if template != DEFAULT_TEMPLATE:
        question = (*question[:-1], Turn("user", template.replace("{question}", asked)))
    return Draft("\n\n".join(turn.content for turn in question), gold, question, asked)


def read_template(text_or_file: str) -> str:
    """Return the template, read from a file where the argument names one.

    Raises:
        UsageError: no {question} in it.
    """
    template = text_or_file if "{question}" in text_or_file else read_text("prompt_template", text_or_file)
    if "{question}" not in template:
        raise UsageError(
            f"prompt_template: expected a text, or a file that exists, with {{question}} in it, got {shown(template)}"
        )
    return template


def read_text(option: str, text_or_file: str) -> str:
    """Return a text, read from a file where the argument names one.

    Raises:
        UsageError: the file cannot be read.
    """
    try:  # a long text is a name too long for a file
        is_file = "\n" not in text_or_file and Path(text_or_file).is_file()
        return Path(text_or_file).read_text(encoding="utf-8") if is_file else text_or_file
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option}: expected a readable text file, got {shown(text_or_file)}: {error}") from error


def warn_of_repeats(train: Sequence[Example | Draft], held_out: Sequence[Example | Draft]) -> None:
    """Say in the log which prompts stand there twice, and which held-out ones are trained on: spaces make no difference."""

    def same(example: Example | Draft) -> str:
        return " ".join(example.prompt.split())

    for option, examples in (("data", train), ("eval_data", held_out)):
        different = {same(example) for example in examples}
        answers = {(same(example), example.gold) for example in examples}
        if len(different) < len(examples):
            log_info(
                "%s: %d of %d prompts repeat another, %d with another answer; each counts as often as it stands there",
                option,
                len(examples) - len(different),
                len(examples),
                len(answers) - len(different),
            )
    trained = {same(example) for example in train}
    seen = sum(same(example) in trained for example in held_out)
    if seen:
        log_info(
            "eval_data: %d of %d held-out prompts are trained on too: accuracy on them is no measure of new ones",
            seen,
            len(held_out),
        )


def fitting(option: str, examples: list[Example], tokenizer: Any, context: int | None, config: Config) -> list[Example]:
    """Return the examples without those whose prompt leaves too little of the context, where long_prompts is skip.

    Raises:
        UsageError: none is left; or, where it is stop, a prompt fills the context by itself. (The trainer looks at the others.)
    """
    if context is None:
        return examples
    skip = config.data.long_prompts == "skip"
    most = context - config.rollout.max_response_tokens if skip else context - 1  # tokens
    # Few tokenizers make more tokens than bytes, so most prompts need no count.
    doubtful = [i for i, each in enumerate(examples) if max(len(text.encode()) for text in each.prompts) > most]
    lengths = {i: max(map(len, tokenizer(list(examples[i].prompts))["input_ids"])) for i in doubtful}
    long = {index for index, length in lengths.items() if length > most}
    if long and not skip:
        first = min(long)
        raise UsageError(
            f"{option}: expected prompts shorter than the model's context of {context} tokens, or --long-prompts skip, got one of "
            f"{lengths[first]}: {shown(examples[first].prompt)}"
        )
    if long and len(long) == len(examples):
        raise UsageError(
            f"max_response_tokens: expected at most {context - min(lengths.values())}, since a prompt and its response share a context of "
            f"{context}, got {config.rollout.max_response_tokens}, for which every prompt of {option} is too long"
        )
    if long:
        log_info("%s: %d of %d prompts skipped: longer than %d tokens", option, len(long), len(examples), most)
    return [each for index, each in enumerate(examples) if index not in long]


def golds_of(example: Example | Draft) -> tuple[str, ...]:
    return () if example.gold is None else (example.gold,) if isinstance(example.gold, str) else example.gold


def check_answers(examples: Sequence[Example | Draft], tokenizer: Any, context: int | None, longest: int) -> None:
    """Raise UsageError for a true answer longer than the context; say in the log how many are longer than the longest response."""
    golds = list(dict.fromkeys(gold for example in examples for gold in golds_of(example)))
    ids = tokenizer(golds, add_special_tokens=False)["input_ids"] if golds else []
    lengths = [len(each) for each in ids]
    for gold, length in zip(golds, lengths, strict=True):
        if context is not None and length > context:
            raise UsageError(
                f"answer_field: expected answers that fit a context of {context} tokens, got one of {length}: {shown(gold)}"
            )
    too_long = sum(length > longest for length in lengths)
    if too_long:
        log_info(
            "max_response_tokens: %d of %d different true answers are longer than %d tokens: no response can give them",
            too_long,
            len(golds),
            longest,
        )


# --- Steps


def prompts_of_step(size: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return which of `size` examples step `step` (from 1) trains on: epoch after epoch, each in an order of its own."""
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range((step - 1) * per_step, step * per_step):
        epoch, index = divmod(position, size)
        if epoch not in order:
            order[epoch] = torch.randperm(size, generator=generator_for(seed, "data", epoch)).tolist()
        chosen.append(order[epoch][index])
    return chosen


def check_lengths(tokenizer: Any, context: int | None, task: Task, max_response_tokens: int) -> int:
    """Return the tokens of the longest prompt.

    Raises:
        UsageError: an empty prompt, or one that leaves too little of the context for the longest response.
    """
    prompts = [text for example in (*task.train, *task.held_out) for text in example.prompts]
    tokens = tokenizer(prompts)["input_ids"]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise UsageError(f"data: expected prompts of at least one token, got {prompt!r}")
        if context is not None and len(ids) + max_response_tokens > context:
            raise UsageError(
                f"max_response_tokens: expected at most {context - len(ids)}, since a prompt of {len(ids)} tokens and its response "
                f"share a context of {context}, got {max_response_tokens} (prompt {prompt[:40]!r} ...); --long-prompts skip leaves such "
                "prompts out"
            )
    return max(map(len, tokens))
