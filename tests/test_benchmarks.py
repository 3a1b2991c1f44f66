"""The benchmarks themselves: a time is only taken of a right result, ratios come from rounds, every peer that is here agrees."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mgrpo_kernels import linear_policy_loss, linear_token_stats

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The modules of benchmarks/, as a run with small shapes imports them."""
    names = ("harness", "peers", "report", "timing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGRPO_BENCH_SMALL", "1")
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def harness(modules):
    return modules["harness"]


@pytest.fixture
def peers(modules):
    return modules["peers"]


@pytest.fixture
def report(modules):
    return modules["report"]


@pytest.fixture
def timing(modules):
    return modules["timing"]


class Recorder:
    """pytest-benchmark's fixture, as far as `measure` uses it."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, target, *, args=(), setup=None, rounds):
        for _ in range(rounds):
            args, kwargs = setup() if setup else (args, {})
            result = target(*args, **kwargs)
            self.rounds += 1
        return result


def test_percentiles(timing):
    samples = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert timing.percentile(samples, 0.5) == pytest.approx(3.5)
    assert timing.percentile(samples, 0.2) == pytest.approx(2.0)
    assert timing.percentile([7.0], 0.8) == 7.0


class Machine:
    """A machine whose clock only runs while a provider works, and that becomes three times slower at some moment."""

    def __init__(self, slows_at):
        self.now, self.slows_at = 0.0, slows_at

    def work(self, seconds):
        def call():
            self.now += seconds * (3.0 if self.now >= self.slows_at else 1.0)
            return (torch.zeros(1),)

        return call

    def clock(self, function):
        begin = self.now
        function()
        return self.now - begin


def timed_on(machine, timing, monkeypatch, provider, seconds, ours, **options):
    monkeypatch.setattr(timing, "clock", machine.clock)
    monkeypatch.setattr(timing, "ROUNDS", (21, 21))
    recorder = Recorder()
    timing.measure(
        recorder,
        "forward",
        machine.work(seconds),
        provider=provider,
        check=lambda outputs, grads: None,
        ours=None if ours is None else ("ours", machine.work(ours)),
        ceiling=machine.work(0.5),
        ceiling_name="copy",
        **options,
    )
    return recorder.extra_info


@pytest.mark.parametrize("slows_at", [0.0, 12.0, 31.0, 62.0, 100.0])
def test_a_ratio_stays_right_on_a_machine_that_becomes_slower(timing, monkeypatch, slows_at):
    """21 rounds of ours (1 s), the peer (2 s) and the ceiling (0.5 s) take 73.5 s of a machine that does not slow down."""
    info = timed_on(Machine(slows_at), timing, monkeypatch, "trl", 2.0, 1.0)
    assert info["ratio_to_ours"] == pytest.approx(2.0)
    assert info["ratio_to_ours_p20"] == info["ratio_to_ours_p80"] == pytest.approx(2.0)
    assert info["ratio"] == pytest.approx(4.0)
    assert info["ours"] == "ours"


def test_a_ratio_of_two_rows_would_be_wrong(timing, monkeypatch):
    """What the paired ratio is for: the same two providers, in rows of their own, on the same machine."""
    machine = Machine(40.0)
    mine = timed_on(machine, timing, monkeypatch, "ours", 1.0, None)
    theirs = timed_on(machine, timing, monkeypatch, "trl", 2.0, 1.0)
    assert theirs["p50_ms"] / mine["p50_ms"] == pytest.approx(6.0)
    assert theirs["ratio_to_ours"] == pytest.approx(2.0)


def test_each_round_calls_the_three_in_turn(timing, monkeypatch):
    calls = []

    def called(name):
        def call():
            calls.append(name)
            return (torch.zeros(1),)

        return call

    monkeypatch.setattr(timing, "ROUNDS", (5, 5))
    timing.measure(
        Recorder(),
        "forward",
        called("peer"),
        provider="trl",
        ours=("ours", called("ours")),
        check=lambda outputs, grads: None,
        ceiling=called("ceiling"),
        ceiling_name="copy",
    )
    assert calls == ["ceiling", "ours", "peer", "peer", *["ceiling", "ours", "peer"] * 5]


@pytest.mark.parametrize("patient", [False, True])
def test_a_row_of_a_peer_without_ours_is_refused(timing, monkeypatch, patient):
    with pytest.raises(ValueError, match="trl: expected ours beside it, got None"):
        timed_on(Machine(0.0), timing, monkeypatch, "trl", 2.0, None, patient=patient)
    assert "ratio_to_ours" not in timed_on(Machine(0.0), timing, monkeypatch, "ours", 1.0, None, patient=patient)


def test_a_call_of_minutes_is_paired_once(timing, monkeypatch):
    info = timed_on(Machine(0.0), timing, monkeypatch, "torch", 90.0, 1.0, patient=True)
    assert (info["rounds"], info["ratio_to_ours"]) == (1, pytest.approx(90.0))


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_a_wrong_result_of_either_is_refused(timing, wrong, patient):
    recorder = Recorder()

    def gives(value):
        return lambda: (torch.tensor([value]),)

    def check(outputs, grads):
        assert outputs[0].item() == 1.0, "wrong"

    with pytest.raises(AssertionError, match="wrong"):
        timing.measure(
            recorder,
            "forward",
            gives(2.0 if wrong == "peer" else 1.0),
            provider="trl",
            check=check,
            patient=patient,
            ours=("ours", gives(2.0 if wrong == "ours" else 1.0)),
            ceiling=lambda: None,
            ceiling_name="copy",
        )
    assert recorder.extra_info == {}


def test_a_part_of_an_op_is_compared_with_the_same_part_of_ours(peers):
    for op, providers in peers.PEERS.items():
        for peer in providers.values():
            ours = peers.counterpart(op, peer)
            if ours is None:
                assert peer.name.startswith("ours")
            else:
                assert ours.computes == peer.computes
    part = peers.counterpart("linear_token_stats", peers.PEERS["linear_token_stats"]["torch"])
    assert (part.name, part.computes) == ("ours, logprob", "logprob")
    assert peers.counterpart("linear_policy_loss", peers.PEERS["linear_policy_loss"]["ours, composed"]).name == "ours"


def squares(harness, timing, recorder, step, spoil=lambda outputs: outputs, spoil_grad=1.0, **options):
    """Measure y = x^2 with upstream gradient 3."""
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    upstream = torch.full((3,), 3.0)
    truth = harness.Truth((x.detach() ** 2,), (upstream,), (6.0 * x.detach(),))

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return spoil_grad * grad * 2 * ctx.saved_tensors[0]

    timing.measure(
        recorder,
        step,
        lambda: spoil((Square.apply(x),)),
        (x,),
        (upstream,),
        provider="trl",
        ours=("ours", lambda: (x * x,)),
        check=harness.check_against(truth, 1e-6),
        ceiling=lambda: x.detach() * 1,
        ceiling_name="copy",
        ceilings=2,
        note="kept",
        **options,
    )


@pytest.mark.parametrize("step", ["forward", "backward", "both"])
def test_a_right_result_is_timed(harness, timing, step):
    recorder = Recorder()
    squares(harness, timing, recorder, step)
    info = recorder.extra_info
    assert recorder.rounds == info["rounds"] >= 3
    assert 0 < info["p20_ms"] <= info["p50_ms"] <= info["p80_ms"]
    assert info["share_of_ceiling"] == pytest.approx(2 / info["ratio"])
    assert info["ceiling"] == "copy"
    assert info["note"] == "kept"
    assert 0 < info["ratio_to_ours_p20"] <= info["ratio_to_ours"] <= info["ratio_to_ours_p80"]
    assert info["ours_p50_ms"] > 0
    assert info["ours_peak_memory_bytes"] >= 0


@pytest.mark.parametrize("step", ["forward", "backward", "both"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda outputs: (outputs[0] * 1.001,),
        lambda outputs: (outputs[0] * torch.nan,),
        lambda outputs: (outputs[0][:2],),
        lambda outputs: (outputs[0].sum() * 1.001,),
        lambda outputs: (*outputs, *outputs),
    ],
)
def test_a_wrong_result_is_refused_before_it_is_timed(harness, timing, step, spoil):
    recorder = Recorder()
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        squares(harness, timing, recorder, step, spoil)
    assert recorder.rounds == 0
    assert recorder.extra_info == {}


def test_a_call_that_takes_minutes_is_made_once(harness, timing):
    recorder, calls = Recorder(), []

    def counted(outputs):
        calls.append(1)
        return outputs

    squares(harness, timing, recorder, "both", counted, patient=True)
    assert len(calls) == recorder.rounds == recorder.extra_info["rounds"] == 1
    recorder = Recorder()
    with pytest.raises(AssertionError, match="gradient 0"):
        squares(harness, timing, recorder, "both", spoil_grad=1.01, patient=True)
    assert recorder.extra_info == {}


@pytest.mark.parametrize("computes", ["logprob, entropy", "logprob"])
def test_the_truth_is_the_reference(harness, computes):
    truth = harness.stats_truth("qwen2.5-0.5b", torch.float32, 300, computes)
    hidden, weight, labels = (
        t.detach().requires_grad_(t.is_floating_point())
        for t in harness.head_inputs("qwen2.5-0.5b", torch.float32, 300)
    )
    names = tuple(computes.split(", "))
    stats = linear_token_stats(hidden, weight, labels, stats=names, backend="reference")
    outputs = [getattr(stats, name) for name in names]
    grads = torch.autograd.grad(outputs, (hidden, weight), truth.upstream)
    for got, want in zip((*truth.outputs, *truth.grads), (*outputs, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_loss_truth_is_the_reference(harness):
    truth = harness.loss_truth("qwen2.5-0.5b", torch.float32, 304)
    hidden, weight, labels = harness.head_inputs("qwen2.5-0.5b", torch.float32, 304)
    hidden, weight = hidden.detach().view(8, 38, -1).requires_grad_(), weight.detach().requires_grad_()
    old, advantages = harness.loss_inputs("qwen2.5-0.5b", torch.float32, 304)
    loss = linear_policy_loss(
        hidden, weight, labels.view(8, 38), old, advantages, loss_type="dapo", backend="reference"
    ).loss
    torch.testing.assert_close(truth.outputs[0], loss.detach(), rtol=1e-4, atol=1e-5)
    for got, want in zip(truth.grads, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(got.view_as(want), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", ["backward", "both"])
def test_a_wrong_gradient_is_refused_before_it_is_timed(harness, timing, step):
    recorder = Recorder()
    with pytest.raises(AssertionError, match="gradient 0: relative error 1.00e-02"):
        squares(harness, timing, recorder, step, spoil_grad=1.01)
    assert recorder.rounds == 0


def test_only_backward_is_inside_the_clock(harness, timing, monkeypatch):
    """A graph is built for every round, outside."""
    inside, built = [False], []

    def clock(function):
        inside[0] = True
        function()
        inside[0] = False
        return 1.0

    monkeypatch.setattr(timing, "clock", clock)
    x = torch.ones(3, requires_grad=True)

    def forward():
        built.append(inside[0])
        return (x * 2,)

    truth = harness.Truth((torch.full((3,), 2.0),), (torch.ones(3),), (torch.full((3,), 2.0),))
    recorder = Recorder()
    timing.measure(
        recorder,
        "backward",
        forward,
        (x,),
        truth.upstream,
        provider="eager",
        ours=("ours", forward),
        check=harness.check_against(truth, 1e-6),
        ceiling=lambda: None,
        ceiling_name="nothing",
    )
    assert not any(built)
    assert len(built) == 2 * recorder.rounds + 3  # and one to check ours, one to check the peer, one for its memory


def test_memory_is_seen(timing):
    mib = 2**20
    # So much that the few MiB that the process has free already, and uses again, do not decide.
    got = timing.peak_memory(lambda: torch.ones(256 * mib // 4).sum())
    assert 240 * mib < got < 272 * mib
    assert timing.peak_memory(lambda: None) < 8 * mib  # freed before: not seen again


def test_a_missing_peer_says_so(peers):
    absent = peers.Peer("x", len, peers.PART, (1, 3, 4), "no_such_package.part:function", False, False)
    assert absent.unavailable(torch.device("cpu")) == "peer no_such_package is not installed"
    moved = absent._replace(needs="torch.nn.functional:no_such_function")
    assert moved.unavailable(torch.device("cpu")).endswith("has no torch.nn.functional.no_such_function")
    on_gpu = absent._replace(needs="", gpu_only=True)
    assert on_gpu.unavailable(torch.device("cpu")) == "peer x runs on a GPU only"
    assert on_gpu.unavailable(torch.device("cuda")) is None


def test_verl_kernel_without_its_trainer(peers, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    kernel = tmp_path / "verl" / "utils" / "kernel"
    kernel.mkdir(parents=True)
    (tmp_path / "verl" / "__init__.py").write_text("import a_trainer_that_is_not_here\n")
    (tmp_path / "verl" / "utils" / "__init__.py").write_text("")
    (kernel / "__init__.py").write_text("")
    (kernel / "linear_cross_entropy.py").write_text(
        "def linear_cross_entropy(*args):\n    from . import kernels\n    return kernels.x\n"
    )
    (kernel / "kernels.py").write_text("x = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert peers.load("verl.utils.kernel.linear_cross_entropy:linear_cross_entropy")() == 5
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]


def test_what_gpu_check_runs(harness, peers, monkeypatch):
    monkeypatch.setattr(harness, "GPU", True)
    for op in ("token_stats", "linear_token_stats", "linear_policy_loss", "logits_policy_loss"):
        cases = harness.rows(op, ["qwen2.5-7b", "llama3-8b"], ["bfloat16", "float32"])
        assert len(cases) == 2 * 2 * 3 * len(peers.PEERS[op])
        marked = {case.values for case in cases if any(mark.name == "gpu_check" for mark in case.marks)}
        assert {
            ("qwen2.5-7b", "bfloat16", name, step) for name in ("ours", "eager", "trl") for step in harness.STEPS
        } <= marked
        assert {values[:2] for values in marked} == {("qwen2.5-7b", "bfloat16")}
    for op in ("policy_loss", "ema", "iqr_filter"):
        assert any(case.marks and case.values == ("ours",) for case in harness.simple_rows(op))


def test_what_a_cpu_times(harness, peers, monkeypatch):
    """Whatever a page shows: ours and its peers, forward + backward; of a part of an op, ours computing that part."""
    monkeypatch.setattr(harness, "SMALL", False)
    monkeypatch.setattr(harness, "GPU", False)
    for op in ("token_stats", "linear_token_stats", "linear_policy_loss", "logits_policy_loss"):
        cases = {case.values[1:] for case in harness.rows(op, ["qwen2.5-0.5b"], ["bfloat16", "float32"])}
        assert {
            (dtype, name, "both") for dtype in ("bfloat16", "float32") for name in ("ours", "eager", "compile", "trl")
        } <= cases
        assert not {case for case in cases if case[2] == "backward"}
    assert {("bfloat16", name, "both") for name in ("torch", "ours, logprob")} <= {
        case.values[1:] for case in harness.rows("linear_token_stats", ["qwen2.5-0.5b"], ["bfloat16", "float32"])
    }


def test_every_peer_has_its_words(peers):
    for op, providers in peers.PEERS.items():
        assert f"\n{op} " in peers.__doc__
        assert "ours" in providers
        for peer in providers.values():
            assert peer.function.__doc__, f"{op}: {peer.name}"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Every benchmark with small shapes. torch.compile is eager's function again, and takes minutes: left out."""
    path = tmp_path_factory.mktemp("benchmarks") / "small.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(BENCHMARKS),
        "--benchmark-only",
        "-q",
        "-k",
        "not compile and not real_rollouts",
    ]
    command += [f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it finds a worker's mark of pytest-xdist, which runs this suite in two processes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"MGRPO_BENCH_SMALL": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return path


def test_every_peer_that_is_here_agrees_and_is_timed(small_run, peers, report):
    """`measure` has held each to the reference, outputs and gradients."""
    _, rows = report.read(small_run)
    seen = {(row.op, row.provider) for row in rows}
    for op, providers in peers.PEERS.items():
        for peer in providers.values():
            if (
                peer.name != "compile"
                and peer.unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is None
            ):
                assert (op, peer.name) in seen
    for row in rows:
        info = row.info
        assert 0 < info["p20_ms"] <= info["p50_ms"] <= info["p80_ms"]
        assert info["ratio"] > 0
        assert info["computes"]
        if not row.provider.startswith("ours"):
            assert info["ratio_to_ours"] > 0
            assert info["ours"] == ("ours, logprob" if info["computes"] == "logprob" else "ours")
        entries = {"kept_token_stats": 8, "gradient_tolerance": 3000}.get(row.op, 1000)
        assert "bytes" in info or info["flops"] == 2.0 * info["tokens"] * 64 * entries * info["gemms"]


def test_report_of_a_run(small_run, report, tmp_path, capsys):
    report.main([str(small_run), "--plots", str(tmp_path)])
    text = capsys.readouterr().out
    for op in (
        "linear_token_stats",
        "linear_policy_loss",
        "kept_token_stats",
        "token_stats",
        "policy_loss",
        "ema",
        "iqr_filter",
        "scaling",
    ):
        assert f"### {op}\n" in text
    for name in ("scaling.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def made_up(tmp_path, *, with_percentiles=True):
    info = {
        "p20_ms": 300.0,
        "p50_ms": 400.0,
        "p80_ms": 500.0,
        "ratio": 4.0,
        "ceiling": "matmul",
        "share_of_ceiling": 0.75,
        "gemms": 3,
        "flops": 8e11,
        "peak_memory_bytes": 30 * 2**20,
        "gradient_bytes": 10 * 2**20,
        "computes": "logprob",
        "tokens": 8,
        "ratio_to_ours": 8.0,
        "ratio_to_ours_p20": 7.5,
        "ratio_to_ours_p80": 9.25,
        "ours": "ours, logprob",
    }
    if not with_percentiles:
        del info["p50_ms"]
    params = {"shape": "qwen2.5-7b", "dtype": "bfloat16", "provider": "trl, logprob", "step": "backward"}
    slow = {"name": "bench_linear_token_stats[a]", "params": params, "extra_info": info}
    fast = {**slow, "params": {**params, "provider": "ours, logprob"}, "extra_info": {**info, "p50_ms": 50.0}}
    fast["extra_info"] = {
        key: value for key, value in fast["extra_info"].items() if not key.startswith(("ratio_", "ours"))
    }
    free = {
        **slow,
        "params": {**params, "provider": "quack"},
        "extra_info": {**info, "share_of_ceiling": None, "gemms": 0, "p50_ms": 0.5},
    }
    machine = {"device": "a device", "threads": 2, "torch": "2.13", "peers": {"trl": "1.16.0"}}
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps(
            {"machine_info": machine, "commit_info": {"id": "0123456789abcdef"}, "benchmarks": [slow, fast, free]}
        )
    )
    return path


def test_report_table(report, tmp_path, capsys):
    report.main([str(made_up(tmp_path))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## a device, 2 threads, torch 2.13, trl 1.16.0; commit 0123456789"
    start = lines.index("### linear_token_stats")
    assert lines[start + 2] == (
        "| shape | dtype | pass | provider | computes | ms (p20 - p80) | times ours | times its ceiling | share of ceiling | matmuls | rate | "
        "memory, MiB |"
    )
    key = "| qwen2.5-7b | bfloat16 | backward"
    assert lines[start + 4 : start + 7] == [
        f"{key} | quack | logprob | 0.5 (300 - 500) | 8 (7.5 - 9.25) ours, logprob | 4.00 matmul |  | 0 |  | 20 |",
        f"{key} | ours, logprob | logprob | 50 (300 - 500) |  | 4.00 matmul | 75% | 3 | 16000 GFLOP/s | 20 |",
        f"{key} | trl, logprob | logprob | 400 (300 - 500) | 8 (7.5 - 9.25) ours, logprob | 4.00 matmul | 75% | 3 | 2000 GFLOP/s | 20 |",
    ]


def test_report_refuses_an_older_run(report, tmp_path):
    with pytest.raises(ValueError, match="expected extra_info with p50_ms, got"):
        report.main([str(made_up(tmp_path, with_percentiles=False))])


def test_report_refuses_a_peer_without_ours(report, tmp_path):
    path = made_up(tmp_path)
    path.write_text(path.read_text().replace("ratio_to_ours", "ratio_to_somebody"))
    with pytest.raises(ValueError, match="expected ours timed in a peer's row"):
        report.read(path)
