"""The launches of every option: what tests/compiled_sweep.py lowers, beside those of tests/compiled_launches.py.

A function of OPTIONS yields a name and then calls the backend, as those of `compiled_launches.LAUNCHES` do. Between them every argument
that may be None is once absent and once present, every dtype of labels and offsets occurs, and so does every dimension of size 1.
"""

import itertools

import torch
from compiled_launches import VOCAB

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABELS = (torch.int64, torch.int32)
SHAPES = (
    (1, VOCAB),
    (4, 1),
    (1, VOCAB),
    (1, 1),
    (4, 4096),
)  # rows and vocabulary; with the last, the recorder's device shares a row


def token_stats(backend, dtype):
    from mgrpo_kernels.ops.token_stats.specs import Wanted

    kinds, shapes = itertools.cycle(LABELS), itertools.cycle(SHAPES)
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        for everything in (True, False):
            (rows, vocab), labels_dtype = next(shapes), next(kinds)
            yield f"{wanted}, {rows} x {vocab}, {labels_dtype}, {'with' if everything else 'without'} mask and temperature a row"
            # Every second call has rows that are slices of a longer sequence, and labels are wanted or not at all.
            logits = (
                torch.zeros(1, rows + 1, vocab, dtype=dtype)[:, :-1]
                if everything
                else torch.zeros(1, rows, vocab, dtype=dtype)
            )
            labels = torch.zeros(1, rows, 3 if everything else 1, dtype=labels_dtype) if wanted[0] else None
            row = torch.ones(1, rows)
            mask, temperature = (row.bool(), row) if everything else (None, 0.7)
            backend.forward(logits, labels, mask, temperature, Wanted(*wanted))
            grads = [None if labels is None else labels.float(), *(row if want else None for want in wanted[1:])]
            backend.backward(torch.empty_like(logits), *grads, logits, labels, mask, temperature, row, row)
    yield "rows of stride 0"
    logits = torch.zeros(1, 64, dtype=dtype).expand(8, 64)
    row = torch.ones(8)
    backend.forward(logits, torch.zeros(8, 1, dtype=torch.int64), None, 1, Wanted(True, True, True))
    backend.backward(torch.zeros(8, 64, dtype=dtype), None, row, row, logits, None, None, 1, row, row)


def linear_token_stats(backend, dtype):
    from mgrpo_kernels.ops._statistics import EVERYTHING
    from mgrpo_kernels.ops.linear_token_stats.specs import Entries, Head

    for flags in itertools.product((False, True), repeat=4):
        rows, vocab = ((64, 512), (1, 1))[sum(flags) % 2]
        with_bias, with_softcap, per_row, with_labels = flags
        yield f"{rows} x {vocab}, bias {with_bias}, softcap {with_softcap}, temperature a row {per_row}, labels {with_labels}"
        weight = torch.zeros(vocab, 8, dtype=dtype)
        row = torch.ones(rows)
        head = Head(
            weight,
            weight[:, 0] if with_bias else None,
            row if per_row else 1,
            1,
            30 if with_softcap else None,
            per_row * 1,
            None,
        )
        labels = torch.zeros(rows, dtype=LABELS[per_row]) if with_labels else None
        x = torch.zeros(rows, vocab, dtype=dtype if with_softcap else torch.float32)
        grad, hidden = torch.zeros(rows, vocab, dtype=dtype), torch.zeros(rows, 8, dtype=dtype)
        state, coefficients = torch.zeros(6, rows), torch.ones(4, rows)
        backend.GpuPasses().state(x, head, labels, state)
        backend.GpuPasses().gradient(x, head, labels, coefficients.t().contiguous().t(), row, grad)
        if dtype.itemsize == 2:
            backend.FusedPasses().fill(x if with_bias else None, hidden, head, labels, state)
            backend.FusedPasses().fill_gradient(grad, hidden, head, labels, coefficients, row, grad)
        entries = Entries.empty(rows, backend.entries_room(vocab), hidden.device)
        backend.TopPasses(EVERYTHING, entries, 0, 1).state(x, head, labels, state)
        backend.select(head, coefficients.t().contiguous().t(), row, 0.5, entries)


def kept_token_stats(backend, dtype):
    for (rows, kept, vocab, width), need_bias in itertools.product(((64, 24, 512, 40), (1, 1, 1, 1)), (False, True)):
        yield f"{rows} x {kept} of {vocab} x {width}, bias {need_bias}"
        hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(vocab, width, dtype=dtype)
        ids, grad = torch.zeros(rows, kept, dtype=torch.int32), torch.zeros(rows, kept)
        backend.logits(hidden, weight, ids, None)
        backend.hidden_gradient(grad, weight, ids, None)
        backend.weight_gradient(grad, hidden, ids, weight, need_bias, None)


def linear_policy_loss(backend, dtype):
    yield "one element"
    backend.scale_([torch.zeros(1, 1, dtype=dtype)], torch.ones(()))


def policy_loss(backend, dtype):
    from mgrpo_kernels.ops.policy_loss import specs

    optional = ("old", "mask", "ref", "entropy", "behaviour", "normalizer", "entropy_normalizer", "weights")
    for number, (loss_type, level, mode) in enumerate(
        itertools.product(specs.LOSS_TYPES, specs.IMPORTANCE_LEVELS, specs.BEHAVIOUR_MODES)
    ):
        if loss_type == "vespo" and mode.startswith(("sequence", "geometric")):
            continue
        if mode.startswith(("geometric", "none")) and loss_type not in ("grpo", "vespo", "gmpo"):
            continue  # what differs in them does not depend on the loss
        sequences, length = ((8, 512), (1, 1))[number % 2]
        values = torch.zeros(sequences * length, dtype=dtype)
        everything = specs.Tokens(
            values,
            values.float(),
            values,
            values.bool(),
            torch.arange(0, sequences * length + 1, length),
            values,
            values,
            values.half(),
            torch.ones(()),
            torch.ones(()),
            values.float(),
        )
        # Of the optional tensors one is absent, or all but one, each in its turn.
        one = optional[number % len(optional)]
        absent = [one] if number // len(optional) % 2 else [name for name in optional if name != one]
        tokens = everything._replace(**dict.fromkeys(absent))
        options = specs.LossOptions(
            loss_type,
            level,
            clip_delta=(None, 2)[number % 2],
            kl_coef=1,
            kl_estimator=specs.KL_ESTIMATORS[number % 3],
            kl_bias_correction=number % 4 < 2,
            entropy_coef=1,
            behaviour_mode=mode,
            geometric_cap=(None, 1)[number % 2],
            off_policy_delta=(None, None, 1)[number % 3],
            max_response_tokens=1,
        )
        rewards = torch.zeros(sequences)
        groups = specs.Groups(
            rewards,
            torch.tensor([0, sequences]),
            rewards.bool() if number % 2 else None,
            specs.BASELINES[number % 2],
            specs.SCALES[number % 4],
            1,
        )
        yield f"{loss_type}, {level} ratio, {mode}, {sequences} x {length}, without {', '.join(absent)}"
        if number % 3:
            backend.forward(
                tokens._replace(advantages=values[:sequences] if number % 3 == 1 else values), None, options
            )
        else:
            backend.forward(tokens._replace(advantages=None), groups, options)
        backend.group_advantages(groups)


def ema(backend, dtype):
    from mgrpo_kernels.ops.ema.specs import Batch, Span

    decay = torch.tensor(0.9, dtype=torch.float64)
    others = (*DTYPES, torch.float64)
    for to, size, stochastic in itertools.product((dtype, torch.float64), (1, 70_000), (False, True)):
        yield f"{to} from and with a copy in all dtypes, {size} elements, {'stochastic' if stochastic else 'nearest'}"
        start = torch.zeros(size + 1)[size == 1 :]  # not aligned, where it is one element
        pairs = [(start.to(source), start.to(copy)) for source, copy in itertools.product(others, repeat=2)]
        emas, params, emit = [start.to(to) for _ in pairs], [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        keys = [(1, 2)] * len(pairs) if stochastic else []
        backend.update_(Batch(emas, params, emit, decay, keys, [Span(0, size, 0)] * len(pairs)))
        backend.update_(Batch(emas[::4], params[::4], [], decay, keys[::4], [Span(0, size, 0)] * 4))


def iqr_filter(backend, dtype):
    for mask, (offsets, size), kind in itertools.product((False, True), (((0, 1), 1), ((0, 16, 32), 32)), LABELS):
        yield f"{size} entropies, mask {mask}, offsets {kind}"
        entropy = torch.zeros(size)
        backend.forward(entropy, torch.tensor(offsets, dtype=kind), entropy.bool() if mask else None, 1)


OPTIONS = {
    "token_stats": token_stats,
    "linear_token_stats": linear_token_stats,
    "kept_token_stats": kept_token_stats,
    "linear_policy_loss": linear_policy_loss,
    "policy_loss": policy_loss,
    "ema": ema,
    "iqr_filter": iqr_filter,
}
