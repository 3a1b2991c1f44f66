"""The momentum model and the KL reference in the CPU's memory: on a CPU the same bits as beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train import __main__ as command
from mgrpo_kernels.train.model.policy import load_policy
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run import learner as building
from mgrpo_kernels.train.step import train_step
from mgrpo_kernels.train.watch.metrics import VARYING


@pytest.mark.parametrize("reference", ["base", "momentum"])
def test_the_same_bits(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    lines, states, built = [], [], []
    real = MomentumModel.__init__

    def init(self: MomentumModel, *args: object, **options: object) -> None:
        built.append(options["device"])
        real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(building.MomentumModel, "__init__", init)
    for device in ("auto", "cpu"):
        built.clear()
        learner = tiny.learner(
            load_policy(str(base), torch.device("cpu"), torch.float32), momentum_device=device, kl_reference=reference
        )
        for step in (1, 2):
            values, _ = train_step(learner, learner.task.train[3 * step : 3 * step + 3], step)
            lines.append({key: value for key, value in values.items() if key not in VARYING})
            checkpoint.save(tmp_path / device, learner, step, 0, 0, keep=1)
        assert built == [None if device == "auto" else "cpu"] * (2 if reference == "base" else 1)
        states.append(checkpoint.read(tmp_path / device / "latest", ""))
    assert lines[0]["grad_norm"] > 0
    assert lines[1]["kl"] > 0
    assert lines[:2] == lines[2:]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_refused_where_nothing_is_held(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [*tiny.FLAGS, "--method", "srt", "--momentum-device", "cpu", "--output", str(tmp_path / "run"), "--dry-run"]
    assert command.main([*flags, "--lora-rank", "2"]) == 2  # the reference is the model without its adapter
    assert "error: --momentum-device: expected a momentum model or a copy of the weights" in capsys.readouterr().err
    assert command.main(flags) == 0
