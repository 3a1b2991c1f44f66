"""The sizes that depend on the device: the file that holds them, and the sweep that writes it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from mgrpo_kernels.ops._triton import tuning

REPOSITORY = Path(__file__).resolve().parents[1]


def test_every_committed_choice_can_be_read():
    for path in tuning.FOLDER.glob("*.json"):
        assert isinstance(tuning.read(path), tuning.Tuning)
        assert path.stem == tuning.slug(json.loads(path.read_text())["device"])


def test_a_device_gets_its_own_choice_and_any_other_the_defaults(tmp_path):
    mine = dataclasses.replace(tuning.Tuning(), stats_forward=(512, 2), matmul="fused")
    (tmp_path / "some-gpu-80gb.json").write_text(json.dumps({"tuning": dataclasses.asdict(mine)}))
    device = torch.device("cuda", 0)
    for name, want in (("Some GPU (80GB)", mine), ("Another", tuning.Tuning())):
        tuning.of.cache_clear()
        with (
            mock.patch.object(tuning, "FOLDER", tmp_path),
            mock.patch.object(torch.cuda, "get_device_name", return_value=name),
        ):
            assert tuning.of(device) == want
    tuning.of.cache_clear()
    assert tuning.of(torch.device("cpu")) == tuning.Tuning()


def test_an_unknown_size_is_an_error(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"tuning": {"lanes": 3}}))
    with pytest.raises(TypeError, match="lanes"):
        tuning.read(path)


def test_the_sweep_runs_and_the_library_reads_what_it_writes(tmp_path):
    out = tmp_path / "tuning.json"
    subprocess.run(
        [sys.executable, "benchmarks/tune.py", "--dry-run", "--out", out],
        check=True, cwd=REPOSITORY, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}, timeout=300,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    result = json.loads(out.read_text())
    fields = {field.name for field in dataclasses.fields(tuning.Tuning)}
    assert set(result["measured"]) == fields  # no size is left to a guess
    assert set(dataclasses.asdict(tuning.read(out))) == fields
    assert all(entry.get("ms", 0) > 0 for entries in result["measured"].values() for entry in entries)
