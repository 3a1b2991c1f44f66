"""tests/gpu proves itself without a GPU, and so do the parts of scripts/gpu_check that report and that unpack wheels.

What it does when a row hangs or crashes is in tests/test_gpu_check_faults.py.
"""

import collections
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import compiled_launches
import pytest
from gpu_check import results, rows, stages, wheels
from gpu_check.summary import MAIN_SHAPE, summary

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("outside_xdist")  # the processes that these tests start are no workers
# What a CPU cannot show, by function: how many cases wait for a GPU.
DEVICE_ONLY = {
    "test_accumulate_is_in_float32": 4,
    "test_triton_is_chosen": 1,
    "test_no_host_sync": 11,
    "test_with_a_tolerance_the_host_waits_for_the_steps_alone": 1,
    "test_the_watch_for_syncs_works": 1,
    "test_a_bad_label_is_nan_in_its_row_alone": 6,
    "test_cuda_graph": 5,
    "test_one_triton_kernel": 4,
    "test_linear_token_stats": 2,  # peak memory
    "test_linear_policy_loss": 2,  # likewise
    "test_more_than_2_to_31_elements": 1,
}


NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def pytest_of_gpu_tests(*arguments, **environment):
    settings = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MGRPO_GPU_TESTS_ON")
    }
    paths = os.pathsep.join(filter(None, [str(ROOT / "scripts"), settings.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
    )


# A pytest plugin that names the kernels which Triton's interpreter ran.
NAMES_KERNELS = """
import atexit, os
from triton.runtime import interpreter

ran, launch = set(), interpreter.GridExecutor.__call__

def named(self, *args, **kwargs):
    ran.add(f"{self.fn.__module__}.{self.fn.__name__}")
    return launch(self, *args, **kwargs)

interpreter.GridExecutor.__call__ = named
atexit.register(lambda: open(os.environ["KERNELS"], "w").write("\\n".join(ran)))
"""


def test_gpu_tests_pass_on_a_cpu(tmp_path):
    """The first case of each test and every 16th after it; all of them: CONTRIBUTING.md has the command."""
    log = tmp_path / "rows.jsonl"
    environment = {
        "MGRPO_GPU_TESTS_ON": "cpu",
        "MGRPO_GPU_TESTS_EVERY": "16",
        rows.LOG: str(log),
        rows.RUN: "tests/gpu",
    }
    done = pytest_of_gpu_tests("-p", "gpu_check.recorder", **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (marked,) = (line["device_only"] for line in rows.parse(log.read_bytes()) if "device_only" in line)
    assert collections.Counter(name.partition("::")[2].partition("[")[0] for name in marked) == DEVICE_ONLY
    outcomes = collections.defaultdict(set)
    for name, row in rows.read(log)["tests/gpu"].rows.items():
        outcomes[row["outcome"]].add(name)
    assert set(outcomes) == {"passed", "skipped"}
    assert outcomes["skipped"] <= set(marked)
    assert not outcomes["passed"] & set(marked)


def test_the_smoke_tests_launch_every_kernel(tmp_path):
    (tmp_path / "names_kernels.py").write_text(NAMES_KERNELS)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        "MGRPO_GPU_TESTS_ON": "cpu",
        "TRITON_INTERPRET": "1",
        "KERNELS": str(tmp_path / "kernels"),
        "PYTHONPATH": paths,
    }
    done = pytest_of_gpu_tests("-p", "names_kernels", "-k", "test_gpu_smoke", **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    ran = {compiled_launches.name_of(*each.rsplit(".", 1)) for each in (tmp_path / "kernels").read_text().split()}
    assert ran == compiled_launches.kernels_in_source()


def test_without_a_gpu_the_folder_is_one_skip():
    done = pytest_of_gpu_tests(**NO_GPU)
    assert "no GPU on this machine" in done.stdout
    assert "1 skipped" in done.stdout
    # Asked for by name, it is not skipped: it fails.
    done = pytest_of_gpu_tests("tests/gpu/test_gpu_memory.py", "-k", "31_elements", MGRPO_GPU_TESTS_ON="cuda", **NO_GPU)
    assert done.returncode == 1, done.stdout


# What pytest would select where there is a GPU: collection alone needs none.
COLLECTS = """
import sys, torch, pytest
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "a GPU"
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "benchmarks/bench_linear_token_stats.py", *sys.argv[1:]]))
"""


def test_the_head_runs_beside_eager_compile_and_every_peer(monkeypatch, tmp_path):
    commands = []
    check = stages.Check(tmp_path, 9.0, dry=False)
    monkeypatch.setattr(
        check, "run", lambda run, command, kind, seconds, **environment: commands.append((command, environment))
    )
    stages.head_benchmarks(check, 140.0)
    ((command, environment),) = commands
    done = subprocess.run(
        [sys.executable, "-c", COLLECTS, *command[command.index("-p") :]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **check.environment, **environment, rows.LOG: str(tmp_path / "log"), rows.RUN: "head"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line.partition("[")[2].rstrip("]") for line in done.stdout.splitlines() if "[" in line]
    assert all(name.startswith("qwen2.5-7b-bfloat16-") for name in collected)
    steps = [name.removeprefix("qwen2.5-7b-bfloat16-") for name in collected]
    providers = ("ours", "eager", "compile", "trl", "liger", "verl", "cce", "torch", "quack")
    assert steps[: 3 * 6] == [f"{name}-{step}" for name in providers[:6] for step in ("forward", "backward", "both")]
    named = (*providers, "ours, liger")
    assert {f"{name}-{step}" for name in named for step in ("forward", "backward", "both")} <= set(steps)


def test_targets_are_met_or_missed_by_how_much(tmp_path, monkeypatch):
    log = tmp_path / "rows.jsonl"

    def benchmark(op, provider, step, share, milliseconds, **paired):
        params = {"provider": provider, "step": step, "shape": MAIN_SHAPE, "dtype": "bfloat16"}
        rows.append(
            log,
            {
                "run": f"benchmarks/bench_{op}.py",
                "row": f"{op}[{provider}-{step}]",
                "outcome": "passed",
                "params": params,
                "benchmark": {
                    "name": f"bench_{op}[x]",
                    "params": params,
                    "extra_info": {"share_of_ceiling": share, "p50_ms": milliseconds, **paired},
                },
            },
        )

    def test(name, outcome, figures, text):
        line = {"run": "tests/gpu/a.py", "row": name, "outcome": outcome, "figures": figures, "text": text}
        rows.append(log, line)

    benchmark("token_stats", "ours", "forward", 0.93, 1.0)
    # TRL's row was taken in a slower minute: what counts is ours in that row.
    benchmark("token_stats", "trl", "forward", 0.8, 3.06, ratio_to_ours=1.02)
    benchmark("linear_token_stats", "ours", "both", 0.8, 9.0)
    test("a::test_linear_token_stats[True]", "passed", {"workspace forward": {"MiB": 500.0}}, "")
    test("a::test_no_host_sync[ema]", "failed", {}, "E  RuntimeError: waits")
    machine = {"device": "a GPU", "threads": 8, "torch": "2.11", "peers": {"trl": "1.16.0"}}
    rows.append(
        log,
        {"run": "benchmarks/bench_token_stats.py", "session": {"machine_info": machine, "commit_info": {"id": "abc"}}},
    )
    runs = results.write_all(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    data, read = report.read(tmp_path / "benchmarks.json")
    assert report.title(data) == "a GPU, 8 threads, torch 2.11, trl 1.16.0; commit abc"
    assert [row.provider for row in read] == ["ours", "trl", "ours"]
    text = " ".join(summary(tmp_path, runs, seconds=1.0, notes=[]).split())
    for expected in (
        "from logits, forward: share of copy bandwidth >= 90.0 % 93.0 % met",
        "from logits, forward: ahead of TRL >= 1.05 x 1.02 x MISSED by 0.03 x",
        "from logits, forward: ahead of eager PyTorch >= 10.00 x - not measured",
        "head, both: times four bare matmuls <= 1.30 x 1.25 x met",
        "head, both: the same, past Liger's <= 1.10 x 1.25 x MISSED by 0.15 x",
        "head, forward: workspace <= 512 MiB 500 MiB met",
        "no host sync >= 100.0 % 0.0 % MISSED by 100.0 %",
        "FAILED a::test_no_host_sync[ema]: RuntimeError: waits",
    ):
        assert expected in text, text


def test_make_sets_nothing_up_for_another_interpreter():
    own = {
        name: value for name, value in os.environ.items() if name not in ("ARGS", "PY") and not name.startswith("MAKE")
    }
    command = ["make", "-n", "gpu-check", "PY=python3", "OUT=x"]
    shown = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "python3 scripts/gpu_check --out x"
    shown = subprocess.run([*command, "WHEELS=w"], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "python3 scripts/gpu_check --out x --wheels w"


def wheel(folder, name, version, files):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {
            **files,
            f"{name}-{version}.dist-info/METADATA": f"Name: {name}\nVersion: {version}\n",
        }.items():
            archive.writestr(path, text)


def test_wheels_are_importable_where_the_package_is_not_installed(tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    wheel(folder, "some_peer", "1.2", {"some_peer/__init__.py": "x = 3\n", "tests/__init__.py": "", "scripts/a.py": ""})
    wheel(folder, "in_data", "2.0", {"in_data-2.0.data/platlib/in_data/__init__.py": "x = 4\n"})
    wheel(folder, "torch", "0.1", {"torch/__init__.py": "raise ImportError\n"})
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    unpacked, left_out = wheels.unpack(folder, site)
    assert unpacked == ["in-data 2.0", "some-peer 1.2"]
    assert left_out[0].startswith("broken-1.0-py3-none-any.whl: ")
    assert left_out[1].startswith("torch 0.1: this Python has 2.")
    program = (
        "import some_peer, in_data, importlib.metadata as m; print(some_peer.x, in_data.x, m.version('some-peer'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["3", "4", "1.2"]
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == ["in_data", "some_peer"]
