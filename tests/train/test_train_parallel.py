"""Two ranks (gloo) against one process: the same metrics and weights; resharding; a rank that dies; a rank that fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train import export, parallel
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.score import response_states

STEPS = 6
FLAGS = [
    *tiny.FLAGS,
    "--steps",
    str(STEPS),
    "--eval-prompts",
    "5",
    "--keep-checkpoints",
    "0",
    "--plain",
]
"""3 prompts a step and 5 held-out ones: ranks get different numbers of each."""
SPLIT = ["--tokens-per-microbatch", "64", "--gradient-checkpointing"]
"""Many micro-batches, and not as many on each rank; the single process has one."""
ROUNDING = {"behaviour_mismatch": 1e-5}


started: list[subprocess.Popen[str]] = []
SLOWEST = 600
"""Seconds that anything may take, on a machine with much else to do."""


def python(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])]),
        },
    )
    started.append(process)
    return process


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    ranks = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return python("-m", "torch.distributed.run", *ranks, *arguments)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            process.terminate()  # torchrun and forked_ranks.py end their ranks
            process.communicate(timeout=SLOWEST)


def train(*arguments: str, **options: int) -> subprocess.Popen[str]:
    return torchrun("-m", "mgrpo_kernels.train", *arguments, **options)


def train_in_forks(*arguments: str) -> subprocess.Popen[str]:
    """Train where torchrun itself is not the point: two ranks, in half of the time to start."""
    libraries = "torch.distributed.fsdp,transformers.models.llama.modeling_llama"
    return python(str(Path(__file__).parents[1] / "forked_ranks.py"), libraries, "mgrpo_kernels.train", *arguments)


def ended(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=SLOWEST)
    return text


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tiny.output_with(base, tmp_path_factory.mktemp("single") / "run")
    assert command.main([*FLAGS, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of two ranks that nobody disturbed."""
    output = tiny.output_with(base, tmp_path_factory.mktemp("pair") / "run")
    process = train_in_forks(*FLAGS, *SPLIT, "--output", str(output))
    text = ended(process)
    assert process.returncode == 0, text
    assert text.count("written: ") == text.count("step 1/6") == 1  # the second rank says nothing
    return output


def assert_close(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            near = pytest.approx(value, rel=1e-4, abs=ROUNDING.get(key, 1e-6)) if isinstance(value, float) else value
            assert mine[key] == near, (theirs["step"], key)


def assert_same_run(output: Path, single: Path) -> None:
    assert_close(tiny.lines(output), tiny.lines(single))
    samples = [
        [
            {key: each[key] for key in ("step", "prompt", "response", "label", "reward", "pruned")}
            for each in tiny.lines(run, "samples.jsonl")
        ]
        for run in (output, single)
    ]
    assert samples[0] == samples[1]
    weights = [load_file(run / "final" / "model.safetensors") for run in (output, single)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=2e-4)  # of six steps of 1e-3


def cut_back(run: Path, step: int, place: Path) -> Path:
    """Return a copy of a finished run as it was right after the checkpoint of a step."""
    shutil.copytree(run, place, ignore=lambda _, names: [each for each in names if each == "final"], symlinks=True)
    for each in (place / "checkpoints").iterdir():
        if each.name != f"step_{step}":
            each.unlink() if each.is_symlink() else shutil.rmtree(each)
    (place / "checkpoints" / "latest").symlink_to(f"step_{step}")
    return place


def test_two_ranks_equal_one_process(pair: Path, single: Path) -> None:
    lines = tiny.lines(single)
    assert any(line.get("reward_mean") for line in lines)
    assert any(line.get("pruned_fraction") for line in lines)
    assert_same_run(pair, single)
    assert AutoModelForCausalLM.from_pretrained(pair / "final").config.architectures == ["LlamaForCausalLM"]
    assert json.loads((pair / "checkpoints" / "latest" / "run.json").read_text())["ranks"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher", "gated", "--teacher-every", "2", "--teacher-agreement", "0", "--steps", "13"],
        ["--method", "self_harmony", "--min-votes", "1"],
    ],
    ids=["gated teacher", "two wordings"],
)
def test_two_ranks_equal_one_process_with_these_options(base: Path, tmp_path: Path, options: list[str]) -> None:
    one, two = (tiny.output_with(base, tmp_path / name) for name in ("one", "two"))
    assert command.main([*FLAGS, "--eval-every", "0", *options, "--output", str(one)]) == 0
    process = train_in_forks(*FLAGS, *SPLIT, "--eval-every", "0", *options, "--output", str(two))
    text = ended(process)
    assert process.returncode == 0, text
    lines = tiny.lines(one)
    assert any(line.get("reward_mean") for line in lines)
    assert "--teacher" not in options or lines[-1]["teacher_refreshes"] > 0
    assert_same_run(two, one)


def test_resharding_from_two_ranks_to_one_and_back(pair: Path, single: Path, tmp_path: Path) -> None:
    one = cut_back(pair, 2, tmp_path / "one")
    assert command.main(["--output", str(one), "--resume", "--keep-checkpoints", "0"]) == 0
    assert_same_run(one, single)
    two = cut_back(one, 4, tmp_path / "two")
    process = train_in_forks("--output", str(two), "--resume")
    text = ended(process)
    assert process.returncode == 0, text
    assert "resuming after step 4" in text
    assert_same_run(two, single)


def test_a_dead_rank_ends_all_and_torchrun_resumes(pair: Path, base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    process = train(*FLAGS, *SPLIT, "--output", str(output), restarts=1)
    deadline = time.monotonic() + SLOWEST
    while not checkpoint.latest(output / "checkpoints") or not workers(process.pid):
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    text = ended(process)
    assert process.returncode == 0, text
    assert text.count("resuming after step ") == 1
    assert tiny.lines(output) == tiny.lines(pair)
    for name in ("model.safetensors", "config.json"):
        assert (output / "final" / name).read_bytes() == (pair / "final" / name).read_bytes()


def workers(agent: int) -> list[int]:
    """Return the process ids of the ranks that torchrun has started, in their order."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                stat = (each / "stat").read_text()
                variables = (each / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == agent:
                found += [
                    (int(value.removeprefix(b"RANK=")), int(each.name))
                    for value in variables
                    if value.startswith(b"RANK=")
                ]
    return [number for _, number in sorted(found)]


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(base: Path, tmp_path: Path) -> None:
    output = tiny.output_with(base, tmp_path / "run")
    process = train(
        *FLAGS, "--rollouts", "512", "--checkpoint-every", "0", "--eval-every", "0", "--output", str(output)
    )
    deadline = time.monotonic() + SLOWEST
    while not (output / "samples.jsonl").exists():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    text = ended(process)
    latest = checkpoint.latest(output / "checkpoints")
    assert latest is not None, text
    assert f"stopped after step {checkpoint.step_of(latest)} of {STEPS}; saved {latest}" in text
    assert "exitcode  : 130" in text, text
    assert not workers(process.pid)


@pytest.mark.parametrize(("ranks", "torn_down"), [("1", True), ("2", False)])
def test_a_rank_ends_before_its_interpreter_is_taken_apart(ranks: str, torn_down: bool) -> None:
    program = (
        "import atexit\n"
        "from mgrpo_kernels.train.ending import leave\n"
        "class Held:\n"
        "    def __del__(self): print('taken apart')\n"
        "held = Held()\n"
        "atexit.register(print, 'exit function')\n"
        "leave(130)"
    )
    environment = {**os.environ, "WORLD_SIZE": ranks}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=SLOWEST
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout.split("\n")[0] == "exit function"
    assert ("taken apart" in done.stdout) == torn_down


def test_ranks_agree_shard_and_fail_together(base: Path, tmp_path: Path) -> None:
    process = torchrun(str(Path(__file__).with_name("ranks.py")), str(base), str(tmp_path))
    text = ended(process)
    assert process.returncode == 0, text
    assert text.count("rank done") == 2


def test_gradient_checkpointing_keeps_less_for_the_same_gradient(base: Path) -> None:
    kept, gradients = [], []
    for activations in (False, True):
        policy = load_policy(str(base), torch.device("cpu"), torch.float32)
        if activations:
            parallel.checkpoint_activations(policy.model)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        prompts, tokens = [[3, 4, 12, 5]] * 2, torch.tensor([[2, 3, 4, 1], [5, 6, 1, 0]])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed = response_states(policy, prompts, tokens, tokens > 0)
        direction = torch.linspace(-1, 1, packed.hidden.numel()).view_as(packed.hidden)
        (packed.hidden * direction).sum().backward()  # not the squares, whose sum the last norm fixes
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None])
    assert kept[1] < 0.5 * kept[0]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))


def test_what_another_rank_has_told_is_not_told_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*_: Any, **__: Any) -> int:
        raise parallel.ShownElsewhereError("rank 0: wrong")

    monkeypatch.setattr("mgrpo_kernels.train.run.start.run", run)
    assert command.main([*FLAGS, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == ""


def test_a_restart_needs_its_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert command.main(FLAGS) == 2
    assert (
        "output: expected --output DIR, in which a restart by torchrun finds the run, got none"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("weights", ["policy", "momentum"])
def test_export_of_a_checkpoint(pair: Path, tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "exported"
    flags = ["--run", str(pair), "--weights", weights, "--to", str(place)]
    assert export.main([*flags, "--step", "5"]) == 2
    assert "step: expected one of 2, 4, 6 in" in capsys.readouterr().err
    assert export.main(flags) == 0
    model = AutoModelForCausalLM.from_pretrained(place)
    want = checkpoint.read(pair / "checkpoints" / "step_6", export.WEIGHTS[weights])
    assert all(torch.equal(value, want[name]) for name, value in model.named_parameters())
    final = AutoModelForCausalLM.from_pretrained(pair / "final").state_dict()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items()) == (weights == "policy")
