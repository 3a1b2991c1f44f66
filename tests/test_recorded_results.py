"""Recording a result: on idle cores alone, a file at a time, with what the figures depend on."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("machine", "record", "report")
HERE = {
    "device": "AMD EPYC (Zen 5)",
    "cpu": {"name": "AMD EPYC", "generation": "Zen 5", "instruction_sets": ["avx2"]},
    "cores": 2,
    "threads": 2,
    "torch": "2.13.0",
    "peers": {"trl": "1.16.0"},
    "python_version": "3.11.7",
    "backend": "native",
    "cpu_capability": "AVX512",
}


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def machine(modules):
    return modules.machine


@pytest.fixture
def record(modules, monkeypatch):
    """record.py on a machine of its own, with runs of pytest that take no time."""
    record = modules.record
    monkeypatch.setattr(record.machine, "describe", lambda: dict(HERE))
    monkeypatch.setattr(record.machine, "commit", lambda: "0123456789abcdef")
    monkeypatch.setattr(record, "LOOK", 0.0)
    monkeypatch.setattr(record, "PATIENCE", 0.0)
    monkeypatch.delenv("MGRPO_BENCH_SMALL", raising=False)
    return record


class Account:
    """An account of the machine in which others use some cores during each file, and between the files."""

    def __init__(self, monkeypatch, machine, between=0.0, during=None):
        self.between, self.during, self.now, self.used, self.file = between, during or {}, 0.0, 0.0, None
        self.sample_class = machine.Sample
        monkeypatch.setattr(machine, "sample", self.sample)

    def sample(self):
        self.now += 1.0
        self.used += self.during.get(self.file, 0.0) if self.file else self.between
        return self.sample_class(self.used, 0.0, self.now)


def pretend(monkeypatch, record, account, fails=(), calls=None):
    """Let pytest write a row for each file that it is called with."""

    def run(command, **_):
        name = Path(command[3]).stem
        if calls is not None:
            calls.append(name)
        account.file = name
        place = next(Path(each.partition("=")[2]) for each in command if each.startswith("--benchmark-json="))
        info = {"p50_ms": 1.23456789, "ratio_to_ours": 2.0}
        rows = [
            {"name": f"{name}[trl]", "params": {"provider": "trl"}, "extra_info": info, "stats": {"data": [1.0] * 999}},
            {"name": f"{name}[skipped]", "params": {"provider": "liger"}, "extra_info": {}},
        ]
        place.write_text(json.dumps({"benchmarks": rows}))
        return SimpleNamespace(returncode=1 if name in fails else 0)

    original = record.run_file

    def run_file(*arguments):
        try:
            return original(*arguments)
        finally:
            account.file = None

    monkeypatch.setattr(record, "run_file", run_file)
    monkeypatch.setattr(record.subprocess, "run", run)


def main(monkeypatch, record, *arguments):
    monkeypatch.setattr(sys, "argv", ["record.py", *map(str, arguments)])
    return record.main()


def test_chosen_rows_are_asked_for_and_named(machine, record, monkeypatch, tmp_path):
    path, commands = tmp_path / "result.json", []
    pretend(monkeypatch, record, Account(monkeypatch, machine))
    run = record.subprocess.run
    monkeypatch.setattr(
        record.subprocess, "run", lambda command, **more: commands.append(command) or run(command, **more)
    )
    assert main(monkeypatch, record, "--only", "bench_ema", "--rows", "float32", "--out", path) == 0
    assert "-k=float32" in commands[0]
    assert json.loads(path.read_text())["files"]["bench_ema"]["rows"] == "float32"


def test_a_run_on_idle_cores_is_recorded_in_small(machine, record, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    pretend(monkeypatch, record, Account(monkeypatch, machine))
    assert main(monkeypatch, record, "--out", path) == 0
    result = json.loads(path.read_text())
    assert (result["idle"], result["small"], result["machine_info"]) == (True, False, HERE)
    assert [row["name"] for row in result["benchmarks"]] == [f"{name}[trl]" for name in record.FILES]
    assert result["benchmarks"][0]["extra_info"]["p50_ms"] == 1.2346
    assert "stats" not in result["benchmarks"][0]
    about = result["files"]["bench_ema"]
    assert about["commit"] == "0123456789abcdef"
    assert about["cores_used_by_others"] == {"before": 0.0, "during": 0.0, "after": 0.0}
    assert {"date", "seconds", "load_average_before", "load_average_after"} <= set(about)


def test_busy_cores_are_refused(machine, record, monkeypatch, tmp_path, capsys):
    path, calls = tmp_path / "result.json", []
    pretend(monkeypatch, record, Account(monkeypatch, machine, between=0.5), calls=calls)
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema") == 1
    assert "other processes use 0.50 cores, allowed 0.1: nothing is recorded" in capsys.readouterr().err
    assert calls == []
    assert not path.exists()


def test_a_file_during_which_others_worked_is_not_recorded(machine, record, monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    pretend(monkeypatch, record, Account(monkeypatch, machine, during={"bench_ema": 0.4, "bench_scaling": 0.05}))
    assert main(monkeypatch, record, "--out", path, "--only", "bench_iqr_filter", "bench_ema", "bench_scaling") == 1
    said = capsys.readouterr()
    assert "bench_ema: other processes used 0.40 cores meanwhile" in said.err
    assert "again: python benchmarks/record.py --only bench_ema" in said.out
    assert list(json.loads(path.read_text())["files"]) == ["bench_iqr_filter", "bench_scaling"]


def test_a_file_whose_benchmarks_fail_is_not_recorded(machine, record, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    pretend(monkeypatch, record, Account(monkeypatch, machine), fails=["bench_ema"])
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema", "bench_iqr_filter") == 1
    assert list(json.loads(path.read_text())["files"]) == ["bench_iqr_filter"]


def test_what_was_finished_before_an_interruption_is_kept_and_continued(machine, record, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    account = Account(monkeypatch, machine)
    pretend(monkeypatch, record, account)
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema") == 0
    finished = path.read_text()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(patch, record, "--out", path, "--only", "bench_iqr_filter")
    assert path.read_text() == finished
    assert main(monkeypatch, record, "--out", path, "--only", "bench_linear_token_stats") == 0
    result = json.loads(path.read_text())
    assert list(result["files"]) == ["bench_linear_token_stats", "bench_ema"]  # in the order of the command's list
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema") == 0
    assert len(json.loads(path.read_text())["benchmarks"]) == 2  # in the place of the old row, not beside it


@pytest.mark.parametrize("change", [{"torch": "2.14.0"}, {"cores": 4}, {"peers": {}}, {"device": "AMD EPYC (Zen 3)"}])
def test_files_of_another_machine_or_version_are_not_mixed(machine, record, monkeypatch, tmp_path, change):
    path = tmp_path / "result.json"
    pretend(monkeypatch, record, Account(monkeypatch, machine))
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema") == 0
    monkeypatch.setattr(record.machine, "describe", lambda: HERE | change)
    with pytest.raises(SystemExit, match=f"{next(iter(change))} was"):
        main(monkeypatch, record, "--out", path, "--only", "bench_iqr_filter")


def test_a_trial_is_marked_and_not_continued_as_a_result(machine, record, monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    pretend(monkeypatch, record, Account(monkeypatch, machine, between=2.0, during={"bench_ema": 2.0}))
    assert main(monkeypatch, record, "--out", path, "--only", "bench_ema", "--even-if-busy") == 0
    assert json.loads(path.read_text())["idle"] is False
    with pytest.raises(SystemExit, match="its other files were taken with"):
        main(monkeypatch, record, "--out", path, "--only", "bench_ema")


def test_without_the_native_backend_nothing_is_recorded(record, monkeypatch, tmp_path):
    monkeypatch.setattr(record.machine, "describe", lambda: HERE | {"backend": "reference"})
    with pytest.raises(SystemExit, match="the native backend is not built here"):
        main(monkeypatch, record, "--out", tmp_path / "result.json")


def test_freed_memory_is_kept_for_the_next_tensor(machine):
    settings = machine.keeping_memory()
    if not settings:
        pytest.skip("jemalloc is not installed")
    text = """if True:
        import resource, torch
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    command = [sys.executable, "-c", text]
    faults = [
        int(subprocess.run(command, env={**os.environ, **each}, capture_output=True, text=True, check=True).stdout)
        for each in (settings, {"LD_PRELOAD": ""})
    ]
    assert faults[0] < 100 < 10_000 < faults[1]


def test_the_work_of_another_process_is_seen_and_ones_own_is_not(machine):
    def spin(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    before = machine.sample()
    spin(0.5)
    after = machine.sample()
    assert after.own - before.own >= 0.5
    assert after.machine - before.machine >= 0.4  # the account has ticks of 10 ms
    code = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.1)
    before = machine.sample()
    while (
        Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):  # over, but not yet waited for
        time.sleep(0.05)
    after = machine.sample()
    child.wait()
    assert machine.others(before, after) * (after.clock - before.clock) >= 0.25
    assert machine.sample().own - after.own >= 0.5  # once it is waited for, it is the own


def test_the_account_of_the_machine(machine, tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 888 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    ticks = machine.os.sysconf("SC_CLK_TCK")
    assert machine.sample(stat).machine == 165 / ticks  # idle and waiting for a disk are not use; stolen time is
    one, two = machine.Sample(10.0, 1.0, 0.0), machine.Sample(13.0, 2.0, 4.0)
    assert machine.others(one, two) == 0.5


@pytest.mark.parametrize(
    "vendor, family, model, name",
    [
        ("AuthenticAMD", 23, 49, "Zen 2"),
        ("AuthenticAMD", 25, 1, "Zen 3"),
        ("AuthenticAMD", 25, 17, "Zen 4"),
        ("AuthenticAMD", 26, 2, "Zen 5"),
        ("GenuineIntel", 6, 143, "Sapphire Rapids"),
        ("GenuineIntel", 6, 1, "model 1"),
        ("other", 9, 9, "family 9 model 9"),
    ],
)
def test_generations(machine, vendor, family, model, name):
    assert machine.generation(vendor, family, model) == name


@pytest.mark.parametrize(
    "name, generation, slug",
    [
        ("AMD EPYC", "Zen 5", "cpu-epyc-zen5-2cores"),
        ("AMD EPYC 7763 64-Core Processor", "Zen 3", "cpu-epyc-zen3-2cores"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "Sapphire Rapids", "cpu-xeon-sapphirerapids-2cores"),
    ],
)
def test_a_file_for_each_kind_of_machine(machine, name, generation, slug):
    here = HERE | {"device": f"{name} ({generation})", "cpu": {"name": name, "generation": generation}}
    assert machine.slug(here) == slug
    assert machine.slug(here | {"device": "NVIDIA H200"}) == "gpu-h200"


def test_this_machine_is_described(machine):
    here = machine.describe()
    assert here["device"].endswith(")")
    assert here["cores"] >= 1
    assert here["torch"]
    assert isinstance(here["cpu"]["instruction_sets"], list)


def test_committed_results(modules):
    """Those that the pages may show: the other files of the folder are of scripts."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        if '"files"' not in path.read_text(encoding="utf-8"):
            continue
        data, rows = modules.report.read(path)  # which refuses a peer's row without ours
        assert rows, path
        assert (data["idle"], data["small"]) == (True, False), path
        assert path.stem == modules.machine.slug(data["machine_info"])
        assert path.stat().st_size < 120_000, path
        for name, about in data["files"].items():
            assert max(about["cores_used_by_others"].values()) <= modules.record.LIMIT, f"{path}: {name}"
            assert not about["commit"].endswith("-dirty"), f"{path}: {name}"
