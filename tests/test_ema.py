"""The momentum update and the momentum model."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import CPU, each_backend, on_ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mgrpo_kernels import MomentumModel, ema_update_
from mgrpo_kernels import backend as backends
from mgrpo_kernels import momentum as momentum_module
from mgrpo_kernels.ops.ema import OP, ema_update_op
from mgrpo_kernels.ops.ema.specs import Batch, Span, key, random_bits, round_stochastically

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((), (7,), (33, 5), (0, 3), (70_001,))


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes)
        for dtypes, shape in itertools.product(itertools.product(DTYPES, repeat=3), SHAPES[:4])
    ] + [
        (
            torch.randn(SHAPES[4], generator=generator).bfloat16(),
            torch.randn(SHAPES[4], generator=generator),
            torch.zeros(SHAPES[4]),
        )
    ]


@each_backend(OP)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0, torch.tensor(0.9)])
def test_every_mix_of_dtypes_in_one_call(backend, decay):
    triples = [t for t in make() if backend != "triton" or torch.float64 not in {x.dtype for x in t}]
    ema, params, emit = ([t.clone() for t in each] for each in zip(*triples, strict=True))
    ema_update_(ema, params, decay, emit=emit, backend=backend)
    for (old, param, _), new, copy in zip(triples, ema, emit, strict=True):
        truth = float(decay) * old.double() + (1 - float(decay)) * param.double()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[new.dtype]
        tolerance = max(tolerance, 1e-7 if decay is not None and isinstance(decay, torch.Tensor) else 0)
        torch.testing.assert_close(new.double(), truth, rtol=tolerance, atol=tolerance)
        assert torch.equal(copy, new.to(copy.dtype))
        if decay == 0.0:
            assert torch.equal(new, param.to(new.dtype))
        if decay == 1.0:
            assert torch.equal(new, old)


@each_backend(OP)
@pytest.mark.parametrize("stochastic", [False, True])
def test_all_backends_give_the_same_bits(backend, stochastic):
    triples = [t for t in make() if backend != "triton" or torch.float64 not in {x.dtype for x in t}]
    results = []
    for name in ("reference", backend):
        ema = [t[0].clone() for t in triples]
        ema_update_(ema, [t[1] for t in triples], 0.9, stochastic_rounding=stochastic, seed=3, backend=name)
        results.append(ema)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_backend(OP)
def test_equal_is_a_fixed_point(backend):
    for ema_dtype, dtype in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        param = torch.randn(1000).to(
            torch.bfloat16 if dtype == torch.bfloat16 or ema_dtype == torch.bfloat16 else torch.float16
        )
        param = (
            param.to(torch.float16).to(torch.bfloat16).to(torch.float16)
            if torch.float16 in (ema_dtype, dtype)
            else param
        )
        param, ema = param.to(dtype), param.to(ema_dtype)
        if not torch.equal(param.float(), ema.float()):
            param = ema.to(dtype).to(ema_dtype).to(dtype)
            ema = param.to(ema_dtype)
        before = ema.clone()
        for decay in (0.1, 0.99, 0.7):
            ema_update_([ema], [param], decay, stochastic_rounding=True, seed=1, backend=backend)
        assert torch.equal(ema, before)
    endless = torch.tensor([torch.inf, -torch.inf])
    ema_update_([endless], [endless.clone()], 0.5, backend=backend)
    assert endless.tolist() == [torch.inf, -torch.inf]


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_loses_nothing_on_average(backend, dtype):
    """A step of 1% towards a parameter 1/1000 away is far below half a unit in the last place of a 16-bit number."""
    ema, param = torch.ones(20_000).to(dtype), torch.full((20_000,), 1.001)
    lost = ema.clone()
    ema_update_([lost], [param], 0.99, backend=backend)
    assert (lost == 1).all()
    for seed in range(20):
        ema_update_([ema], [param], 0.99, stochastic_rounding=True, seed=seed, backend=backend)
    expected = 1 + 0.001 * (1 - 0.99**20)
    spread = torch.finfo(dtype).eps * (20 * 0.01 * 0.001 / torch.finfo(dtype).eps) ** 0.5 / 20_000**0.5
    assert abs(ema.double().mean().item() - expected) < 6 * max(spread, 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_to_a_neighbour_with_the_right_probability(dtype):
    for value in (1.0 + 2**-9, -3.3, 1e-3, 3e-7, -1e-6, 65000.0, 0.0):
        values = torch.full((40_000,), value)
        rounded = round_stochastically(values, random_bits(torch.arange(40_000), key(7, 3)), dtype)
        neighbours = rounded.double().unique()
        exact = torch.tensor(value, dtype=torch.float32).double()
        assert 1 <= len(neighbours) <= 2
        assert neighbours[0] <= exact <= neighbours[-1]
        quantum = (neighbours[-1] - neighbours[0]).item()
        assert abs(rounded.double().mean() - exact) <= 4 * quantum / 2 / 200 + 1e-12
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    got = round_stochastically(special, torch.tensor([2**32 - 1] * 3), dtype)
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2].isnan()


def test_random_bits_are_random():
    bits = random_bits(torch.arange(1 << 16), key(0, 0))
    assert bits.min() >= 0
    assert bits.max() < 1 << 32
    for shift in range(32):
        assert abs(((bits >> shift) & 1).double().mean() - 0.5) < 0.01
    low = bits & 0xFFFF
    others = [random_bits(torch.arange(1 << 16), key(*k)) & 0xFFFF for k in ((0, 1), (1, 0))] + [
        random_bits(torch.arange(1 << 16) + (1 << 32), key(0, 0)) & 0xFFFF
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([low.double(), other.double()]))[0, 1]) < 0.02


@each_backend(OP)
def test_strides(backend):
    base = torch.randn(6, 10)
    ema, param = base.t(), torch.randn(10, 6)
    want = 0.9 * ema + 0.1 * param
    outside = torch.zeros(12, 10)
    outside[::2] = base
    view = outside[::2].t()
    ema_update_([ema, view], [param, param], 0.9, backend=backend)
    torch.testing.assert_close(ema, want)
    torch.testing.assert_close(view, want)
    assert (outside[1::2] == 0).all()


@each_backend(OP)
def test_tied_tensors_are_updated_once(backend):
    ema, param = torch.zeros(4), torch.ones(4)
    ema_update_([ema, ema], [param, param], 0.5, backend=backend)
    assert (ema == 0.5).all()
    with pytest.raises(
        ValueError, match=r"ema\[1\]: expected a tensor of its own, got ema\[0\] again with another parameter"
    ):
        ema_update_([ema, ema], [param, torch.zeros(4)], 0.5, backend=backend)


def test_gradients_do_not_matter_and_versions_do():
    ema, param = torch.zeros(3), torch.ones(3, requires_grad=True)
    version = ema._version
    ema_update_([ema], [param], 0.5)
    assert not ema.requires_grad
    assert ema._version > version


@each_backend(OP)
def test_compiles_whole(backend):
    torch._dynamo.reset()
    tied = torch.zeros(2, 2)
    ema, params, emit = (
        [torch.zeros(3), tied, tied],
        [torch.ones(3), torch.ones(2, 2)],
        [torch.ones(3).bfloat16() for _ in range(3)],
    )
    params.append(params[1])
    emit[1], emit[2] = torch.ones(2, 2), torch.ones(2, 2)

    def function(ema, params, emit):
        ema_update_(ema, params, 0.5, emit=emit, stochastic_rounding=True, seed=1, backend=backend)
        return ema[0] * 2

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(ema, params, emit)
    assert all((each == 0.5).all() for each in [*ema, *emit])
    assert (got == 1).all()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([torch.zeros(2)], []), {}, ValueError, "params: expected as many tensors as ema, 1, got 0"),
        (([torch.zeros(2)], [torch.zeros(3)]), {}, ValueError, r"params\[0\]: expected the shape of ema\[0\], \(2,\), got \(3,\)"),
        (([torch.zeros(2)], [torch.zeros(2, dtype=torch.int64)]), {}, TypeError, r"params\[0\]: expected dtype float32"),
        (([torch.zeros(2)], [torch.zeros(2)]), {"emit": []}, ValueError, "emit: expected as many tensors as ema, 1, got 0"),
        (([torch.zeros(2)], [torch.zeros(2)]), {"emit": [torch.zeros(1)]}, ValueError, r"emit\[0\]: expected the shape of ema\[0\]"),
        (([torch.zeros(1).expand(4)], [torch.zeros(4)]), {}, ValueError, r"ema\[0\]: expected memory that does not overlap itself"),
        (([torch.zeros(2)], [torch.zeros(2, device="meta")]), {}, ValueError, r"params\[0\]: expected a tensor on ema\[0\]'s device cpu, got one on meta"),
        (([torch.zeros(2)], [torch.zeros(2)]), {"stochastic_rounding": True}, ValueError, "seed: expected an int with stochastic_rounding, got None"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(args, options, error, message):
    good_ema, good_param = torch.zeros(3), torch.ones(3)
    ema, params = [good_ema, *args[0]], [good_param, *args[1]]
    message = message.replace(r"[0\]", r"[1\]").replace(r"ema, 1, got 0", "ema, 2, got 1")
    if "emit" in options:
        options = {"emit": [torch.zeros(3), *options["emit"]]}
    with pytest.raises(error, match=message):
        ema_update_(ema, params, 0.5, **options)
    assert (good_ema == 0).all()


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), torch.tensor(2.0)])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay: expected .*at least 0.0 and at most 1.0"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], decay)


def _rank(rank, world, path, backend, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(0)
    whole = [
        (torch.randn(9, 10, generator=generator).bfloat16(), torch.randn(9, 10, generator=generator)) for _ in range(3)
    ]
    placements = [Shard(0), Shard(1), Replicate()]
    ema, params = (
        [distribute_tensor(pair[i].clone(), mesh, [place]) for pair, place in zip(whole, placements, strict=True)]
        for i in (0, 1)
    )
    ema_update_(ema, params, 0.9, stochastic_rounding=True, seed=11, backend=backend)
    results[rank] = [each.full_tensor() for each in ema]
    try:
        ema_update_([ema[0]], [params[1]], 0.9)
    except ValueError as error:
        assert "params[0]: expected the placement of ema[0]" in str(error)  # noqa: PT017 - in another process
    else:
        raise AssertionError("another placement must raise")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_shards_round_as_the_whole_would(backend, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        on_ranks(2, _rank, 2, str(tmp_path / "store"), backend, results)
        ranks = [results[rank] for rank in range(2)]
    generator = torch.Generator().manual_seed(0)
    whole = [
        (torch.randn(9, 10, generator=generator).bfloat16(), torch.randn(9, 10, generator=generator)) for _ in range(3)
    ]
    ema = [pair[0] for pair in whole]
    ema_update_(ema, [pair[1] for pair in whole], 0.9, stochastic_rounding=True, seed=11, backend="reference")
    for part in ranks:
        for got, want in zip(part, ema, strict=True):
            assert torch.equal(got, want)


@each_backend(OP)
@pytest.mark.parametrize("span", [Span(0, 60, 0), Span(120, 60, 300), Span(7, 5, 13), Span(2**33 + 5, 6, 2**32)])
def test_a_shard_takes_the_random_bits_of_its_place(backend, span):
    old, new = torch.randn(60).bfloat16(), torch.randn(60)
    got, exact, place = old.clone(), old.float(), torch.arange(60)
    decay = torch.tensor(0.9, dtype=torch.float64)
    backends.choose(OP, backend, CPU, torch.bfloat16)  # which loads the extension
    backends.implementation(OP, backend).update_(Batch([got], [new], [], decay, [key(3, 1)], [span]))
    ema_update_([exact], [new], 0.9, backend="reference")
    index = span.base + place // span.inner * span.stride + place % span.inner
    assert torch.equal(got, round_stochastically(exact, random_bits(index, key(3, 1)), torch.bfloat16))


@each_backend(OP)
def test_random_bits_follow_the_place_in_the_list_whatever_stands_before(backend):
    new, results = 1.0 + 1e-3 * torch.rand(257), []
    one, other, empty = torch.zeros(3), torch.zeros(3), torch.zeros(0)
    for before in ([one, other], [one, one], [one, empty], [empty, one]):  # two tensors; tied; empty ones
        last = torch.ones(257, dtype=torch.bfloat16)
        params = [one if each is one else torch.zeros_like(each) for each in before]
        ema_update_([*before, last], [*params, new], 0.5, stochastic_rounding=True, seed=4, backend=backend)
        results.append(last)
    assert len(results[0].unique()) > 1
    assert all(torch.equal(result, results[0]) for result in results)


@each_backend(OP)
def test_random_bits_differ_from_tensor_to_tensor_and_from_seed_to_seed(backend):
    new, results = 1.0 + 1e-3 * torch.rand(257), []
    for seed in (4, 5):
        ema = [torch.ones(257, dtype=torch.bfloat16) for _ in range(3)]
        ema_update_(ema, [new] * 3, 0.5, stochastic_rounding=True, seed=seed, backend=backend)
        results += ema
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))


@each_backend(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_makes_no_number_of_nan_and_keeps_infinity(backend, dtype):
    raw = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0xFF800000]).to(torch.int32)
    param = raw.view(torch.float32).repeat(40)  # two NaNs that a carry would turn into zeros, another, the infinities
    ema = torch.zeros_like(param, dtype=dtype)
    ema_update_([ema], [param], 0.9, stochastic_rounding=True, seed=1, backend=backend)
    torch.testing.assert_close(ema.float(), param, rtol=0, atol=0, equal_nan=True)


@each_backend(OP)
def test_numbers_below_the_normal_range_of_float16_keep_their_sign(backend):
    param = torch.tensor([-3e-6, 3e-6, -6e-8, 6e-8, -1e-9]).repeat(50)
    ema = torch.zeros_like(param, dtype=torch.float16)
    ema_update_([ema], [param], 0.0, stochastic_rounding=True, seed=1, backend=backend)
    assert (ema.float() * param >= 0).all()
    assert ((ema.float() - param).abs() < 2.0**-24).all()
    assert (ema[0::5] != 0).all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))  # floating-point, and still not averaged


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", [None, CPU])
def test_momentum_model_follows(dtype, device):
    model = Tied().bfloat16()
    momentum = MomentumModel(model, 0.9, dtype, device)
    assert momentum.distance(model) == 0
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    assert set(momentum.ema) == set(start)  # tied weights once
    step(model)
    momentum.update()
    for name, parameter in model.named_parameters():
        want = 0.9 * start[name] + 0.1 * parameter.double()
        torch.testing.assert_close(
            momentum.ema[name].double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    assert momentum.distance(model) > 0
    momentum.update(decay=0.0)
    assert momentum.distance(model) == 0


def test_distance_is_relative_to_the_policy():
    model = Tied()
    momentum = MomentumModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # the average is a third of it
    assert momentum.distance(model).item() == pytest.approx(2 / 3)


def test_swapped_into_restores_every_bit_even_after_an_exception():
    model = Tied()
    momentum = MomentumModel(model, 0.9)
    step(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())

    def inside():
        with momentum.swapped_into(model) as swapped:
            assert swapped is model
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, momentum.ema[name])
            assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
            with pytest.raises(RuntimeError, match="update: expected the policy's own parameters"):
                momentum.update()
            with (
                pytest.raises(RuntimeError, match="swapped_into: expected the policy's own parameters"),
                momentum.swapped_into(model),
            ):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_copy_to_and_state_dict():
    model, other = Tied(), Tied().bfloat16()
    momentum = MomentumModel(model, 0.7)
    step(model)
    momentum.update()
    momentum.copy_to(other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, momentum.ema[name].bfloat16())
    again = MomentumModel(Tied(), 0.1)
    again.load_state_dict(momentum.state_dict())
    assert (again.decay, again.updates) == (0.7, 1)
    assert all(torch.equal(again.ema[name], t) for name, t in momentum.ema.items())
    wrong = nn.Linear(2, 2)
    for call in (momentum.copy_to, lambda m: momentum.swapped_into(m).__enter__(), momentum.distance):
        with pytest.raises(ValueError, match="model: expected the parameters that the momentum model tracks"):
            call(wrong)
    bad = momentum.state_dict()
    bad["ema"] = {**bad["ema"], "norm.weight": torch.zeros(9)}
    kept = {name: t.clone() for name, t in again.ema.items()}
    with pytest.raises(ValueError, match=r"state_dict\[norm.weight\]: expected shape \(4,\), got \(9,\)"):
        again.load_state_dict(bad)
    assert all(torch.equal(kept[name], t) for name, t in again.ema.items())
    with pytest.raises(ValueError, match="state_dict: expected the keys decay, ema, updates, got ema"):
        again.load_state_dict({"ema": {}})


@pytest.fixture
def as_from_a_gpu(monkeypatch):
    """Send the CPU down the path from a GPU to the CPU: what is held and staged is page-locked, and updates end when they are waited for."""
    locked = []
    monkeypatch.setattr(momentum_module, "crosses", lambda one, two: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self.shape) or self.clone())
    monkeypatch.setattr(momentum_module.Transfer, "up", lambda self, tensor, device: tensor.clone())
    return locked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", [False, True])
def test_an_update_from_a_gpu_is_of_the_weights_as_they_were(as_from_a_gpu, dtype, overlap):
    model = Tied()
    late = MomentumModel(model, 0.9, dtype, "cpu")
    assert len(as_from_a_gpu) == len(list(model.parameters()))
    want = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}
    readers = (
        lambda: late.ema,
        lambda: late.state_dict(),
        lambda: late.distance(model),
        lambda: late.copy_to(Tied()),
        lambda: late.swapped_into(model).__enter__(),
        lambda: late.load_state_dict(late.state_dict()),
        lambda: late.update(),
    )
    for number, read in enumerate(readers):
        step(model)
        late.update(0.1 * number, overlap=overlap)
        assert late._pending is not None  # the copies are made; the average is not
        rounded = {"stochastic_rounding": True, "seed": number} if dtype == torch.bfloat16 else {}
        ema_update_(list(want.values()), [p.detach() for p in model.parameters()], 0.1 * number, **rounded)
        if not overlap:
            kept = [p.detach().clone() for p in model.parameters()]
            step(model)  # whoever does not ask for an overlap may write at once
        read()
        assert all(torch.equal(late._ema[name], value) for name, value in want.items()), number
        if not overlap:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(value)
        late._swapped = False
    assert late.updates == len(readers) + 1
    assert len(as_from_a_gpu) == 2 * len(list(model.parameters()))  # staged once


def test_an_update_from_a_gpu_is_checked_before_it_begins(as_from_a_gpu):
    model = Tied()
    momentum = MomentumModel(model, 0.9, device="cpu")
    momentum.update()
    with pytest.raises(ValueError, match="decay: expected at least 0.0 and at most 1.0, got 2"):
        momentum.update(2)
    model.norm.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"params\[\d\]: expected the shape that it had, \(4,\), got \(1,\)"):
        momentum.update()


@pytest.mark.parametrize("overlap", [False, True])
def test_copies_from_a_gpu_follow_what_it_was_given_before(monkeypatch, overlap):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda:0")

    log = mock.Mock()
    # Specified by name: where vLLM's CPU build has been imported, torch.cuda.Stream is a class of its own.
    stream, event = mock.Mock(spec=["wait_stream", "record_event"]), mock.Mock(spec=["synchronize"])
    log.attach_mock(stream, "own")
    log.attach_mock(event, "event")
    current = mock.Mock(spec=["wait_event"])
    log.attach_mock(current, "current")
    stream.record_event.return_value = event
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: contextlib.nullcontext(log.enter(chosen)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    parameters = [torch.randn(3).as_subclass(OnGpu), torch.randn(2, 2)]
    transfer = momentum_module.Transfer()
    transfer.down(parameters, overlap=overlap)
    transfer.wait()
    want = [mock.call.own.wait_stream(current), mock.call.enter(stream), mock.call.own.record_event()]
    want += [] if overlap else [mock.call.current.wait_event(event)]
    assert log.mock_calls == [*want, mock.call.event.synchronize()]
    assert all(torch.equal(to, p) for to, p in zip(transfer.staged, parameters, strict=True))


def test_frozen_parameters_can_be_left_out():
    model = Tied()
    model.norm.requires_grad_(False)
    every, some = MomentumModel(model, 0.9), MomentumModel(model, 0.9, frozen=False)
    assert every.ema.keys() - some.ema.keys() == {"norm.weight", "norm.bias"}
    kept = model.norm.weight.detach().clone()
    step(model)
    with torch.no_grad():
        model.norm.weight.copy_(kept)
    for each in (every, some):
        each.update()
    assert all(torch.equal(value, every.ema[name]) for name, value in some.ema.items())
    with some.swapped_into(model):
        assert torch.equal(model.norm.weight, kept)
        assert torch.equal(model.head.weight, some.ema["embed.weight"])
    model.norm.requires_grad_(True)
    with pytest.raises(
        ValueError, match="model: expected no other trained parameters than at first, got norm.bias, norm.weight"
    ):
        some.update()
    with pytest.raises(ValueError, match="model: expected parameters of a floating dtype to average, got none in Tied"):
        MomentumModel(model.requires_grad_(False), frozen=False)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((object(),), TypeError, "model: expected a torch.nn.Module, got object"),
        ((nn.Linear(1, 1), 1.5), ValueError, "decay: expected at least 0.0 and at most 1.0, got 1.5"),
        (
            (nn.Linear(1, 1), 0.5, torch.int32),
            TypeError,
            "dtype: expected float32, float64, bfloat16 or float16, got torch.int32",
        ),
    ],
)
def test_bad_momentum_model(args, error, message):
    with pytest.raises(error, match=message):
        MomentumModel(*args)


@each_backend(OP)
def test_opcheck(backend):
    ema, params, emit = ([torch.randn(3), torch.randn(2, 2)] for _ in range(3))
    decay = torch.tensor(0.9, dtype=torch.float64)
    torch.library.opcheck(ema_update_op, (ema, params, emit, decay, [], [0, 3, 0, 0, 4, 0], backend))
