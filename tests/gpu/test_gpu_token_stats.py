"""Token statistics from logits on the device."""

import pytest
import torch
from on_device import ALL, DEVICE, INF, NAN, hold, pick, run, same_bits

from mgrpo_kernels import token_stats_from_logits

VOCABS = pick([1, 255, 256, 257, 50257, 151936], [1, 255, 256, 257, 2500])
ROWS = pick([1, 3, 1000], [1, 3, 9])
CHECKED = pick(48, 9)  # rows whose truth is computed


def batch(rows, vocab, dtype, *, labels_each=None, label_dtype=torch.int64, trouble=True):
    """Logits with masked rows of NaN and rows with -inf, labels at both ends, a temperature for each row."""
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    labels = torch.randint(0, vocab, (rows,) if labels_each is None else (rows, labels_each), dtype=label_dtype)
    labels[0], labels[-1] = 0, vocab - 1
    mask = torch.ones(rows, dtype=torch.bool)
    if trouble and rows > 1 and vocab > 1:
        mask[1::7] = False
        logits[1::7], labels[1::7] = NAN, -100
        logits[2::5, 1::2] = torch.where(mask[2::5], -INF, NAN).to(dtype).unsqueeze(1)
    return {"logits": logits.requires_grad_(), "labels": labels, "mask": mask, "temperature": torch.rand(rows) + 0.5}


def everything(inputs, backend, **options):
    return token_stats_from_logits(
        inputs["logits"],
        inputs["labels"],
        stats=ALL,
        mask=inputs["mask"],
        temperature=inputs["temperature"],
        backend=backend,
        **options,
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(vocab, torch.bfloat16) for vocab in VOCABS]
    + [(vocab, dtype) for vocab in (VOCABS[3], VOCABS[-1]) for dtype in (torch.float16, torch.float32)],
)
def test_values_and_gradients(rows, vocab, dtype):
    inputs = batch(rows, vocab, dtype)
    inputs["upstream"] = torch.randn(3, rows)
    got = run(everything, inputs, DEVICE, "triton")
    for name, value in got.items():
        assert (value[~inputs["mask"]] == 0).all(), name
        assert not value[inputs["mask"]].isnan().any(), name
    # Of many long rows the truth of some, the last among them.
    some = torch.linspace(0, rows - 1, min(rows, CHECKED)).long()
    few = {
        name: value.detach()[some].requires_grad_(value.requires_grad)
        for name, value in inputs.items()
        if name != "upstream"
    }
    few["upstream"] = inputs["upstream"][:, some]
    hold(everything, few, got={name: value[some] for name, value in got.items()})


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_many_labels(label_dtype):
    hold(everything, batch(pick(70, 4), pick(5000, 300), torch.float32, labels_each=5, label_dtype=label_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", pick([50257, 4096], [300]))
def test_logits_but_the_last(dtype, vocab):
    inputs = {"logits": torch.randn(3, 5, vocab).to(dtype).requires_grad_(), "labels": torch.randint(0, vocab, (3, 4))}

    def shifted(placed, backend):
        return token_stats_from_logits(placed["logits"][:, :-1], placed["labels"], stats=ALL, backend=backend)

    got = hold(shifted, inputs)
    assert (got["gradient of logits"][:, -1] == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_each_output_alone(name):
    inputs = batch(3, pick(50257, 300), torch.float32)

    def alone(placed, backend):
        labels = placed["labels"] if name == "logprob" else None
        stats = token_stats_from_logits(placed["logits"], labels, stats=(name,), mask=placed["mask"], backend=backend)
        return [getattr(stats, name)]

    hold(alone, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_place_backward(dtype):
    inputs, places = batch(5, pick(50257, 300), dtype), []

    def function(placed, inplace):
        logits = placed["logits"] * 1  # an op's output
        places.append(logits.data_ptr())
        logits.register_hook(lambda grad: places.append(grad.data_ptr()))
        return everything(placed | {"logits": logits}, "triton", inplace_backward=inplace == "in place")

    apart, inside = (run(function, inputs, DEVICE, how) for how in ("apart", "in place"))
    same_bits(apart, inside)
    assert places[2] == places[3]
