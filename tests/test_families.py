"""Causal architectures of transformers: the trainer works on them and agrees with transformers, or refuses them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_sweep
import pytest
import tiny_families

ROOT = Path(__file__).resolve().parents[1]
RECORDED = json.loads(family_sweep.RESULT.read_text(encoding="utf-8"))
ROWS = {row["family"]: row for row in RECORDED["families"]}
FEW = (
    "qwen3",
    "gemma3_text",  # sliding windows
    "deepseek_v3",  # values narrower than keys
    "llama4_text",  # chunked attention
    "diffllama",  # attention twice in a layer
    "qwen3_next",  # linear attention
    "jamba",  # state-space layers
    "mamba2",
    "bart",  # ignores positions
    "recurrent_gemma",  # state outside the cache, and a soft cap
    "xlnet",  # not causal
    "blt",  # sizes under other names, in parts of its configuration
    "bert",  # a head of several layers
)


def check(family: str, place: Path) -> dict[str, Any]:
    """Return what comes of an architecture, which must be right or refused in a line."""
    with family_sweep.settled():
        row = family_sweep.tried(family, place)
    assert row["outcome"] != "wrong", row["notes"]
    assert not row.get("fused_head", "yes").startswith("wrong"), row["fused_head"]
    assert "\n" not in row["notes"]
    assert row["outcome"] != "refused" or row["notes"].startswith("model: expected ")
    return row


@pytest.mark.parametrize("family", FEW)
def test_an_architecture_works_or_is_refused(family: str, tmp_path: Path) -> None:
    """It does what the committed table says, whatever the release of transformers says in its reason."""
    row = check(family, tmp_path)
    compared = ("family", "class", "outcome", "packs", "sampling")
    assert {key: row.get(key) for key in compared} == {key: ROWS[family].get(key) for key in compared}


@pytest.mark.slow
@pytest.mark.parametrize("family", [each for each in tiny_families.families() if each not in FEW])
def test_every_architecture_works_or_is_refused(family: str, tmp_path: Path) -> None:
    row = check(family, tmp_path)
    if family in ROWS and row["outcome"] == "none":
        assert ROWS[family]["outcome"] == "none", row["notes"]


@pytest.mark.parametrize("fault", ["sampling", "scoring", "momentum", "restore"])
def test_the_sweep_sees_a_fault(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that the checks before a run do not look for: they come after it."""
    if fault == "sampling":
        sample = family_sweep.sampled
        monkeypatch.setattr(
            family_sweep, "sampled", lambda *a, **k: (r := sample(*a, **k))._replace(logprobs=r.logprobs + 1e-3)
        )
    elif fault == "scoring":
        score = family_sweep.score
        monkeypatch.setattr(
            family_sweep, "score", lambda *a, **k: (r := score(*a, **k))._replace(logprob=r.logprob + 1e-3)
        )
    elif fault == "momentum":
        sample = family_sweep.sampled
        monkeypatch.setattr(family_sweep, "sampled", lambda learner, momentum: sample(learner, momentum=False))
    else:
        monkeypatch.setattr(family_sweep.checkpoint, "resume", lambda *_: None)
    with family_sweep.settled():
        row = family_sweep.tried("llama", tmp_path)
    assert row["outcome"] == "wrong"
    assert fault in row["notes"]


def test_the_recorded_sweep_has_no_fault() -> None:
    assert len(ROWS) == len(RECORDED["families"]) > 150
    for row in RECORDED["families"]:
        assert row["outcome"] in ("works", "partly", "refused", "none"), row
        assert not row.get("fused_head", "yes").startswith("wrong"), row


def test_the_page_has_the_recorded_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import families_table

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert families_table.families() in page
    assert families_table.family_counts() in page
    for row in RECORDED["families"]:
        assert f"| `{row['family']}` |" in page
