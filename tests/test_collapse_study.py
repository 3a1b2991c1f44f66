"""The collapse study's bookkeeping, and one of its runs, cut short."""

import functools
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "collapse"
NAMES = ("cells", "study", "summary", "paired", "warned", "quartiles", "rules")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield tuple(importlib.import_module(name) for name in NAMES)[:3]
    for name in NAMES:
        sys.modules.pop(name, None)


def run(accuracy, **columns):
    return {
        "cell": "a",
        "seed": 0,
        "curve": {
            "step": [50 * i for i in range(len(accuracy))],
            "eval_accuracy": accuracy,
            "pruned_fraction": [None, 0.02],
            **columns,
        },
    }


def test_collapse_is_a_lasting_fall(modules):
    _, _, summary = modules
    risen = [0.4, 0.5, 0.6, 0.6, 0.6]
    assert summary.row_of(run([*risen, 0.6, 0.58, 0.61])).collapse is None
    assert summary.row_of(run([*risen, 0.35, 0.6, 0.6])).collapse is None  # one bad evaluation
    row = summary.row_of(run([*risen, 0.4, 0.3, 0.2, 0.2, 0.2]))
    assert row.collapse == 300  # (0.6 + 0.4 + 0.3) / 3 is below 0.8 x 0.6
    assert (row.start, row.best, row.final) == (0.4, pytest.approx(0.6), pytest.approx(0.2))
    assert row.kept == pytest.approx(1 / 3)


def test_table_has_a_row_for_each_cell(modules):
    _, _, summary = modules
    runs = [run([0.4, 0.6, 0.6, 0.6]), {**run([0.4, 0.6, 0.1, 0.1, 0.1]), "seed": 1}]
    line = summary.table(summary.by_cell(runs)).splitlines()[-1]
    assert line == "| a | 2 | 0.40 | 0.55 | 0.35 (0.10 - 0.60) | 0.600 (0.200) | 2.0% | 1 of 2 | 100 |"


def test_a_run_as_if_it_had_ended_earlier(modules):
    _, _, summary = modules
    fallen = run([0.4, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1])
    assert summary.row_of(fallen).collapse == 200
    row = summary.row_of(summary.until(fallen, 199))
    assert (row.final, row.collapse) == (pytest.approx(0.6), None)
    assert summary.until(fallen, 300) == fallen


def test_a_column_by_seed(modules):
    _, _, summary = modules
    runs = [run([0.4, 0.6]), {**run([0.4, 0.1]), "seed": 1}, {**run([0.2, 0.3]), "cell": "b", "seed": 1}]
    lines = summary.by_seed(summary.by_cell(runs), "eval_accuracy").splitlines()
    assert lines[0] == "| eval_accuracy | 0 | 1 | mean |"
    assert lines[2:] == ["| a | 0.60 | 0.10 | 0.35 |", "| b |  | 0.30 | 0.30 |"]
    assert summary.by_seed(summary.by_cell(runs), "kept").splitlines()[2] == "| a | 1.000 | 0.625 | 0.812 |"


def test_committed_results_by_seed(modules, monkeypatch, capsys):
    _, _, summary = modules
    files = [str(FOLDER / f"results_zen3{more}.jsonl") for more in ("", "_more")]
    monkeypatch.setattr(
        sys, "argv", ["summary.py", "--results", *files, "--by-seed", "eval_accuracy", "--until", "250"]
    )
    summary.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| eval_accuracy | {' | '.join(map(str, range(2, 12)))} | mean |"
    means = {line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ")[-1] for line in lines[2:]}
    assert (means["lazy: mgrpo"], means["lazy: srt + momentum"]) == ("0.69", "0.61")  # as docs/collapse.md has them


def test_results_beside_others(modules):
    _, _, summary = modules
    theirs = [run([0.4, 0.6, 0.6, 0.6]), {**run([0.4, 0.6, 0.1, 0.1, 0.1]), "seed": 1}]
    for final, within, fallen in ((0.5, "yes", 0), (0.05, "no", 1), (0.7, "no", 0)):
        mine = [run([0.4, 0.5, final, final, final]), {**run([0.5]), "cell": "only here"}]
        lines = summary.comparison(summary.by_cell(mine), summary.by_cell(theirs)).splitlines()[2:]
        assert lines == [f"| a | {final:.2f} | 0.10 - 0.60 | {within} | {fallen} of 1 | 1 of 2 | 0 of 1 |"]
    assert summary.comparison(*[summary.by_cell(theirs)] * 2).endswith("| 2 of 2 |")


def test_every_cell_is_a_command_that_the_trainer_takes(modules):
    from mgrpo_kernels.train.__main__ import read_command_line

    cells, study, _ = modules
    assert set(cells.MAIN) <= set(cells.CELLS)
    for options in cells.CELLS.values():
        given = {name: value for name, value in {**cells.COMMON, **options}.items() if name not in cells.NOT_OPTIONS}
        config = read_command_line(study.arguments_of(given))[0].values()
        assert {name: config[name] for name in given} == given


@pytest.mark.parametrize(("preset", "cell"), [("half", "mgrpo, N = G/2"), ("excess", "excess"), ("steady", "steady")])
def test_the_studys_presets_are_what_it_ran(modules, preset, cell):
    from mgrpo_kernels.train.__main__ import read_command_line

    cells, study, _ = modules
    of_preset, of_cell = (
        read_command_line(arguments)[0] for arguments in (["--config", preset], study.arguments_of(cells.CELLS[cell]))
    )
    assert of_preset == of_cell


def test_a_run_starts_from_the_base_and_gives_its_curve(modules, tmp_path, monkeypatch):
    cells, study, _ = modules
    monkeypatch.setattr(study, "WARM_STEPS", 1)
    base = study.base_of("lazy", 3, tmp_path)
    assert study.base_of("lazy", 3, tmp_path) == base
    short = {**cells.COMMON, "steps": 4, "eval_every": 2, "eval_prompts": 4, "rollouts": 4}
    line = json.loads(
        json.dumps(
            study.take("lazy: mgrpo", 3, {**short, "method": "mgrpo", "base": "lazy"}, "cpu", base, tmp_path / "kept")
        )
    )
    assert line["curve"]["step"] == [0, 2, 4]
    assert all(0 <= value <= 1 for value in line["curve"]["eval_accuracy"])
    assert line["curve"]["entropy"][0] is None  # nothing was sampled before the first step
    assert line["curve"]["entropy"][1] > 0
    assert 0 < line["step_seconds"] < line["seconds"] + 1
    assert line["certificate"].keys() == {"warnings", "fall_step", "lead_steps", "lead_steps_label_free"}
    assert {each.name for each in (tmp_path / "kept" / "lazy: mgrpo, seed 3").iterdir()} == {
        "metrics.jsonl",
        "certificate.json",
    }


def test_results_keep_what_a_certificate_says_of_warnings(modules):
    _, study, _ = modules
    warnings = [{"step": 12, "action": None, "signs": {"top answer": "0.2 -> 0.5"}, "label_free": ["top answer"]}]
    leads = {"fall_step": 50, "lead_steps": 38, "lead_steps_label_free": 38}
    kept = study.of_certificate({"steps": 100, "signs": [], "warnings": warnings, **leads})
    assert kept == {"warnings": [{"step": 12, "signs": ["top answer"], "label_free": ["top answer"]}], **leads}
    lines = [{"time_rollout": 1.0, "time_update": each, "time_sync": None, "step": 1} for each in (1.0, 2.0, 9.0)]
    assert study.step_seconds([{"step": 0, "eval_accuracy": 0.5}, *lines]) == 3.0


@pytest.mark.parametrize(("status", "stopped"), [(0, None), (3, 4)])
def test_a_run_that_the_guard_ends_is_a_result(modules, tmp_path, monkeypatch, status, stopped):
    _, study, _ = modules

    def ended(command, **_):
        output = Path(command[-1])
        lines = [
            {"step": step, "eval_accuracy": 0.5, "eval_greedy": 0.5, "eval_maj_at_k": 0.5, "time_update": 0.1}
            for step in (2, 4)
        ]
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = {"warnings": [], "fall_step": None, "lead_steps": None, "lead_steps_label_free": None}
        (output / study.CERTIFICATE).write_text(json.dumps(found))
        return SimpleNamespace(returncode=status, stderr="")

    monkeypatch.setattr(study.subprocess, "run", ended)
    (tmp_path / "base").mkdir()
    line = study.take("a", 0, {"guard": "rollback"}, "cpu", tmp_path / "base")
    assert line["stopped"] == stopped


def test_a_finished_run_is_not_taken_again(modules, tmp_path, monkeypatch, capsys):
    cells, study, _ = modules
    results = tmp_path / "results.jsonl"
    options = {**cells.COMMON, **cells.CELLS["srt"]}
    results.write_text(json.dumps({"cell": "srt", "seed": 2, "options": options}) + "\n")
    arguments = ["study.py", "--cells", "srt", "--seeds", "1", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    assert capsys.readouterr().out == "1 runs, 0 of them missing\n"
    monkeypatch.setattr(sys, "argv", [*arguments, "--steps", "7"])
    with pytest.raises(SystemExit, match="name another --results"):
        study.main()


def test_what_is_pruned(modules, tmp_path, monkeypatch, capsys):
    """Two groups of four: one loses its only wrong answer, and with it its advantages; the other's label changes."""
    groups = [
        [("3", False), ("3", False), ("3", False), ("5", True)],
        [("3", True), ("3", True), ("5", False), (None, False)],
    ]
    lines = [
        {"step": step, "answer": answer, "gold": "3", "reward": float(answer == "3"), "pruned": pruned}
        for step, group in enumerate(groups, 1)
        for answer, pruned in group
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pruned = importlib.import_module("pruned")
    monkeypatch.setattr(sys, "argv", ["pruned.py", str(tmp_path)])
    pruned.main()
    del sys.modules["pruned"]
    figures = [float(each) for each in capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")[1:]]
    assert figures == [0.375, 0.6, 0.667, 1.0, 0.5, 0.0, 1.0]


def certified(base, accuracy, warnings, fall_step=None, **leads):
    """Return a run with a certificate; `warnings` are steps, and negative ones need a true answer."""
    signs = [{"step": abs(step), "signs": [], "label_free": ["alike"] if step > 0 else []} for step in warnings]
    leads = {name: leads.get(name) for name in ("lead_steps", "lead_steps_label_free")}
    return {
        **run(accuracy),
        "options": {"base": base},
        "certificate": {"warnings": signs, "fall_step": fall_step, **leads},
    }


def test_warnings_are_counted_against_falls_and_healthy_runs(modules):
    warned = importlib.import_module("warned")
    fallen, healthy = [0.5, 0.6, 0.6, 0.1, 0.1, 0.1], [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    runs = [
        certified("lazy", fallen, [90, 150], 150, lead_steps=60, lead_steps_label_free=60),  # in time
        certified("lazy", fallen, [-50, 120], 150, lead_steps=100, lead_steps_label_free=30),  # label-free too late
        certified("lazy", fallen, [-150], 150, lead_steps=0),  # not before the fall
        certified("lazy", fallen, [], 150),  # never
        certified("lazy", healthy, []),
        certified("lazy", healthy, [-100]),
    ]
    assert warned.count(runs, label_free=False) == (4, 2, 2, [60, 100, 0], 2, 1)
    assert warned.count(runs, label_free=True) == (4, 2, 1, [60, 30], 2, 0)
    assert warned.count(runs, label_free=False).met == (False, False)
    assert warned.count(runs[:1] + runs[4:5], label_free=False).met == (True, True)
    assert warned.count([], label_free=False).met == (None, None)
    lines = warned.table(runs).splitlines()
    assert lines[2] == "| own | all | 0 | - | - | - | 0 | - | warnings -, false alarms - |"
    assert (
        lines[5]
        == "| lazy | label-free | 4 | 2 (50%) | 1 (25%) | 45 | 2 | 0 (0%) | warnings missed, false alarms met |"
    )


def test_a_rule_is_chosen_on_even_seeds_and_counted_on_odd_ones(modules):
    """The vote share rises early in the runs that fall; in one healthy run of the odd seeds it does too."""
    rules = importlib.import_module("rules")
    fallen, healthy = [0.5, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1], [0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    early, late, calm = ([None, 0.4, *rest] for rest in ([0.9] * 5, [0.4, 0.4, 0.9, 0.9, 0.9], [0.4] * 5))

    def of(seed, accuracy, share):
        columns = dict.fromkeys(("eval_greedy", "eval_maj_at_k", "pruned_fraction"), accuracy)
        return {**run(accuracy, vote_share=share, **columns), "seed": seed}

    even = [of(0, fallen, early), of(2, fallen, early), of(4, healthy, calm), of(6, healthy, calm)]
    odd = [of(1, fallen, early), of(3, fallen, late), of(5, healthy, calm), of(7, healthy, early)]
    found = rules.gathered(even)
    assert (
        len(found.values) == 2 * 4 + 2 * 7
    )  # the fall is at step 200, so that the last evaluation that counts is at step 150
    lines = rules.table([*even, *odd]).splitlines()
    assert "vote_share > " in lines[0]
    assert lines[-2:] == ["| even | 2 | 2 (100%) | 2 | 0 (0%) |", "| odd | 2 | 1 (50%) | 2 | 1 (50%) |"]


def test_a_rule_with_too_many_false_alarms_is_not_chosen(modules):
    rules = importlib.import_module("rules")
    values = [[0.5, 0.6, 0.6, 0.1, 0.1, 0.1], [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]]
    alike = [run(each, vote_share=[None, 0.4, 0.9, 0.9, 0.9, 0.9], pruned_fraction=[None] * 6) for each in values]
    found = rules.gathered([{**each, "seed": 0} for each in alike])
    first, second = rules.best_rule(found)
    in_time, alarms = rules.warned(found, first.holds(found) & second.holds(found))
    assert (int(in_time), int(alarms)) == (0, 0)  # up to the fall the two runs are the same


def test_quartiles_are_taken_over_what_a_cell_names(modules):
    """Two prompts with four rollouts each, of which the second has low entropies only."""
    import torch

    quartiles = importlib.import_module("quartiles")
    high, low = [0.9, 1.0, 1.1, 1.0], [0.2, 0.22, 0.21, 0.05]
    entropy, lengths = torch.tensor([*high, *low]), torch.tensor([8] * 4 + [2] * 4)

    def pruned(kind, *steps):
        chosen = quartiles.Filter(kind)
        return [(~chosen.keep(each, lengths[: len(each)], 4, 0.0)).nonzero().flatten().tolist() for each in steps][-1]

    assert pruned("batch", entropy) == [4, 7]
    assert pruned("history", entropy) == [4, 7]  # there is no step before the first
    assert pruned("batch", torch.tensor(high), torch.tensor(low)) == [3]
    assert pruned("history", torch.tensor(high), torch.tensor(low)) == [0, 3]
    mixed = torch.tensor([0.2, 1.0, 1.1, 0.9, *low])  # the first is low as short responses are
    lengths[0] = 2
    left = quartiles.residual(mixed, lengths)
    assert left[1:4].mean().abs() < 1e-5
    assert left[[0, 4, 5, 6, 7]].mean().abs() < 1e-5
    assert pruned("length", mixed) == [3, 7]
    assert quartiles.survivors(mixed, 4, k=0.0).tolist() == [False, True, True, True, True, True, True, False]


def test_what_other_quartiles_prune_neither_votes_nor_trains(modules):
    import torch

    from mgrpo_kernels.method import MethodOptions

    _, study, _ = modules
    quartiles = importlib.import_module("quartiles")
    entropy = torch.tensor([1.0, 1.0, 1.1, 0.9, 0.2, 0.22, 0.21, 1.0])[:, None]
    options = MethodOptions(method="srt", iqr_filter=True, iqr_k=0.0, equivalence="exact")
    answers = ["3", "3", "4", "4", "5", "5", "5", "6"]
    found = quartiles.Filter("batch").select(torch.ones(8, 1, dtype=torch.bool), answers, 4, options, entropy=entropy)
    kept = [True, True, True, True, False, True, False, True]
    assert found.survives.tolist() == found.voters.tolist() == found.trains.tolist() == kept
    assert found.metrics()["pruned_fraction"] == 0.25
    assert found.vote.share.tolist() == [0.5, 0.5]
    command = study.command_of({"method": "srt", "quartiles": "history", "base": "lazy", "iqr_filter": True})
    assert command[1:] == [str(FOLDER / "quartiles.py"), "history", "--method", "srt", "--iqr-filter"]
    assert study.command_of({"steps": 3})[1:] == ["-m", "mgrpo_kernels.train", "--steps", "3"]


@pytest.fixture
def figures(modules, monkeypatch):
    """The figures of the study's page, over runs that a test gives."""
    docs = Path(__file__).parent.parent / "docs"
    monkeypatch.syspath_prepend(str(docs))
    found = importlib.import_module("figures_of_study")
    yield found
    for name in ("figures_of_study", "figures"):
        sys.modules.pop(name, None)


def test_what_the_tolerance_leaves_out_is_less_than_its_share_of_the_gradient(modules, tmp_path, monkeypatch, capsys):
    cells, study, _ = modules
    found = importlib.import_module("left_out")
    monkeypatch.setattr(study, "WARM_STEPS", 60)
    monkeypatch.setattr(found, "STARTS", (("own", 0),))
    monkeypatch.setattr(found, "PROMPTS", 4)
    monkeypatch.setattr(sys, "argv", ["left_out.py", "--bases", str(tmp_path)])
    found.main()
    line = json.loads(capsys.readouterr().out)
    assert 0 < line["gradient"] < cells.TOLERANCE < line["entries"] < line["tokens"] <= 1
    sys.modules.pop("left_out", None)


def test_a_tolerance_is_compared_with_the_range_over_the_same_seeds(figures, monkeypatch):
    tolerance = importlib.import_module("figures_of_tolerance")

    def ends(cell, seed, final, entropy):
        return {**run([0.5, final, final, final], entropy=[entropy], vote_share=[0.9]), "cell": cell, "seed": seed}

    runs = [ends("a, 9 steps", seed, final, 0.1) for seed, final in ((0, 0.9), (1, 0.7), (2, 0.1))]
    runs += [ends("a, tolerance, 9 steps", seed, final, 0.2) for seed, final in ((0, 0.85), (1, 0.8))]
    runs += [ends("lazy: a, 9 steps", 0, 0.5, 0.1), ends("lazy: a, tolerance, 9 steps", 0, 0.6, 0.2)]
    monkeypatch.setattr(tolerance.summary, "read", lambda path: runs)
    assert tolerance.tolerance_bands("a, 9 steps", "b, 9 steps").splitlines()[2:] == [
        "| a, 9 steps | 3 | accuracy | 0.700 (0.500 - 0.900) | 0.750 (0.600 - 0.850) | +0.050 ± 0.050 | yes |",
        "| a, 9 steps | 3 | entropy | 0.100 (0.100 - 0.100) | 0.200 (0.200 - 0.200) | +0.100 ± 0.000 | no |",
        "| a, 9 steps | 3 | vote share | 0.900 (0.900 - 0.900) | 0.900 (0.900 - 0.900) | +0.000 ± 0.000 | yes |",
    ]
    assert tolerance.tolerance_bands("b, 9 steps") == tolerance.NO_RUN
    sys.modules.pop("figures_of_tolerance", None)


def test_runs_that_the_guard_turned_back_are_no_evidence_of_its_warnings(modules, tmp_path):
    warned, rules = (importlib.import_module(name) for name in ("warned", "rules"))
    runs = [{**run([0.5]), "certificate": {}, "options": {"guard": guard}} for guard in ("off", "rollback")]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    assert warned.with_certificate([tmp_path / "runs.jsonl"]) == runs[:1]
    assert all(each["options"]["guard"] == "off" for each in rules.all_runs())


def test_a_dip_is_a_late_evaluation_below_the_best_before_it(figures, monkeypatch):
    accuracy = [0.5, 0.1, 0.95, 0.92, 1.0, 0.99]
    late = {**run(accuracy), "cell": "a"}
    late["curve"]["step"] = [0, 1000, 1050, 1100, 1150, 1200]
    monkeypatch.setattr(figures.summary, "read", lambda path: [late])
    assert figures.dips("any", "a") == "25%"  # of the four after step 1000, 0.92 alone is below 0.97 of the best so far


def test_means_of_long_runs_are_over_the_seeds_that_every_cell_has(figures, monkeypatch):
    def ends(cell, seed, final, majority=0.6):
        ended = run([0.5, 1.0, 1.0, final, final, final], eval_maj_at_k=[majority])
        return {**ended, "cell": f"{cell}, 90 steps", "seed": seed, "options": {"steps": 90}}

    runs = [ends("lazy: a", 3, 0.7), ends("lazy: b", 3, 0.6), ends("a", 3, 0.98), ends("b", 3, 0.8), ends("a", 4, 0.1)]
    runs += [ends("srt", 3, 0.1), ends("lazy: a", 4, 0.9, majority=0.4)]
    monkeypatch.setattr(figures.summary, "read", lambda path: runs)
    assert figures.long_runs("90", "a", "b").splitlines()[2:] == [
        "| own | 3 | 0.60 | 200 | 0.980, 0.987 | 0.800, 0.857 |",
        "| own | 4 | 0.60 | - | 0.100, 0.120 |  |",
        "| lazy | 3 | 0.60 | - | 0.700, 0.778 | 0.600, 0.692 |",
        "| lazy | 4 | 0.40 | - | 0.900, 0.931 |  |",
        "| mean of 2 seeds | | | | 0.840, 0.882 | 0.700, 0.775 |",
    ]
    assert figures.long_verdict("90", "a", "b") == (
        "`a` keeps 0.97 of its best on 1 of 3 seeds. `b` keeps 0.97 of its best on 0 of 2 seeds. "
        "`a` minus `b` is +0.140 in the mean of 2 seeds, with a standard error of 0.040."
    )


def test_pairs_share_the_seed_and_the_file(modules):
    paired = importlib.import_module("paired")

    def ends(cell, seed, accuracy, steps=100):
        return {**run([0.5, accuracy]), "cell": cell, "seed": seed, "options": {"steps": steps}}

    first = [ends("a", 0, 0.9), ends("b", 0, 0.7), ends("a", 1, 0.9), ends("a", 2, 0.9), ends("b", 2, 0.9, steps=50)]
    second = [ends("b", 1, 0.1), ends("a", 0, 0.5), ends("b", 0, 0.7)]  # seed 1 of another machine is no pair
    found = paired.pair("a", "b", [first, second])
    assert found.differences == pytest.approx([0.1, -0.1])  # of the means over the evaluations
    assert (found.mean, found.error) == (pytest.approx(0.0), pytest.approx(0.1))
    assert paired.pair("a", "b", [first]).error is None
    line = paired.table([("a", "b"), ("a", "c")], [first, second]).splitlines()[2:]
    assert line == ["| a | b | 2 | +0.00 | 0.10 | 1, 1 |"]


def test_the_table_of_the_filter_is_of_cells_that_differ_in_the_filter_alone(modules):
    paired = importlib.import_module("paired")
    cells, study, _ = modules
    from mgrpo_kernels.train.__main__ import read_command_line

    @functools.cache
    def config(cell):
        return read_command_line(study.arguments_of({**cells.COMMON, **cells.CELLS[cell]}))[0].values()

    for one, other in (*paired.OF_FILTER, *paired.OF_QUARTILES):
        changed = {name for name, value in config(one).items() if value != config(other)[name]}
        assert changed - {"method", "filter_scope"} <= {"iqr_filter"}, (one, other)
        assert cells.CELLS[one].get("base") == cells.CELLS[other].get("base")
