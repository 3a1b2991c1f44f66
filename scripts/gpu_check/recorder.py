"""A pytest plugin, ``-p gpu_check.recorder``: writes a line for each test or benchmark as soon as it begins and as soon as it finishes.

Rows that an earlier process of the same run began are left out. GPU_CHECK_FIRST is a list, separated by commas, of parts of names: rows
whose name contains the first of them run first, then those with the second, and rows with none of them last.
"""

import os
from pathlib import Path

import pytest

from gpu_check import measure, rows

PATH, NAME = Path(os.environ[rows.LOG]), os.environ[rows.RUN]
FIRST = [part for part in os.environ.get("GPU_CHECK_FIRST", "").split(",") if part]

device_only = []  # names of the tests that mean nothing on a CPU, whether or not they are selected


def write(**line):
    """Append a line of this run."""
    rows.append(PATH, {"run": NAME, **line})


def pytest_itemcollected(item):
    """Remember a test that means nothing on a CPU."""
    if item.get_closest_marker("device_only"):
        device_only.append(item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the rows that were begun, and put the others in order."""
    begun = rows.read(PATH).get(NAME, rows.Run(NAME)).begun
    left_out = [item for item in items if item.nodeid in begun]
    items[:] = [item for item in items if item.nodeid not in begun]
    if FIRST:
        items.sort(key=lambda item: next((i for i, part in enumerate(FIRST) if part in item.nodeid), len(FIRST)))
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session):
    """Write which rows this process is going to run."""
    write(collected=[item.nodeid for item in session.items], device_only=device_only)
    if any("benchmark" in getattr(item, "fixturenames", ()) for item in session.items):
        try:
            write(session=about(session.config))
        except Exception as error:  # a description that cannot be had must not cost the benchmarks
            write(session={"machine_info": {"error": repr(error)}, "commit_info": {}})


def about(config):
    """Return what pytest-benchmark writes beside the benchmarks of a run that ends well."""
    machine = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    if known := measure.commit():  # also where the tree is no checkout
        commit["id"] = known
    return {"machine_info": machine, "commit_info": commit}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Write that a row begins, and that it and its teardown are over."""
    write(begun=item.nodeid, params=plain(getattr(getattr(item, "callspec", None), "params", {})))
    result = yield
    write(over=item.nodeid)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write the outcome of a row; after an error that lost the GPU, leave the remaining rows to another process."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr  # a skip's reason
        text = "" if report.passed else str(why)[-6000:]
        measured = benchmark_of(item) if report.when == "call" and report.passed else None
        write(
            row=item.nodeid,
            outcome=report.outcome,
            when=report.when,
            seconds=round(report.duration, 3),
            text=text,
            figures=dict(item.user_properties),
            **({} if measured is None else {"benchmark": measured}),
        )
        if report.failed and rows.is_sticky(f"{text}\n{call.excinfo.value if call.excinfo else ''}"):
            rows.leave()
    return report


def plain(params):
    """Return parameters as JSON can hold them."""
    return {name: value if isinstance(value, (str, int, float, bool)) else str(value) for name, value in params.items()}


def benchmark_of(item):
    """Return what pytest-benchmark's JSON would hold about a benchmark, without each round's time; None for a test."""
    stats = getattr(getattr(item, "funcargs", {}).get("benchmark"), "stats", None)
    return None if stats is None or stats.has_error else stats.as_dict(include_data=False)
