"""A pytest plugin for the tests of another library: patches that library, counts the calls of our ops, and serves stand-ins for the hub.

The environment says what to do: ``PEER_PATCH`` names the integration to apply (empty: the library as it is), ``PEER_STAND_INS`` the
directory of :mod:`stand_ins` (empty: the hub itself), and ``PEER_OUTCOMES`` the file for the outcomes of the tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

OPS = {
    "trl": (("trl.head", "linear_token_stats"), ("trl.loss", "policy_loss")),
    "verl": (("verl", "linear_token_stats"), ("verl", "policy_loss")),
}
"""Where each integration calls an op: module in ``mgrpo_kernels.integrations``, name."""

calls: Counter[str] = Counter()
warnings: list[str] = []
outcomes: dict[str, dict[str, Any]] = {}


class Warned(logging.Handler):
    """Keeps the warnings with which an integration says that the library's own code runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        warnings.append(record.getMessage())


def counted(name: str, op: Any) -> Any:
    """Return the op, counting its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return op(*args, **kwargs)

    return call


def pytest_configure(config: pytest.Config) -> None:
    """Patch the library before its tests are imported, because they bind names of it."""
    stand_ins, peer = os.environ.get("PEER_STAND_INS"), os.environ.get("PEER_PATCH")
    if stand_ins:
        serve(Path(stand_ins))
    if importlib.util.find_spec("trl"):
        importlib.import_module("trl.import_utils").__getattr__ = absent
    if peer:
        integration = importlib.import_module(f"mgrpo_kernels.integrations.{peer}")
        for module, name in OPS[peer]:
            owner = importlib.import_module(f"mgrpo_kernels.integrations.{module}")
            setattr(owner, name, counted(name, getattr(owner, name)))
        integration.patched(**({"vanilla": True} if peer == "verl" else {}))
        logging.getLogger("mgrpo_kernels").addHandler(Warned(logging.WARNING))


def absent(name: str) -> Any:
    """Answer for a module of TRL without `name`: tests of another version ask whether packages are there that this one never uses."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda *_, **__: False
    raise AttributeError(name)


def serve(place: Path) -> None:
    """Load what has a stand-in from its directory, under the name that it has on the hub."""
    import datasets
    import transformers

    def local(name: Any) -> Any:
        found = place / str(name).rpartition("/")[2]
        return str(found) if str(name).startswith("trl-internal-testing/") and found.exists() else name

    own_load = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        found = place / path.rpartition("/")[2] / str(name)
        if not found.exists():
            return own_load(path, name, *args, split=split, **kwargs)
        data = datasets.load_from_disk(str(found))
        if kwargs.get("streaming"):
            data = datasets.IterableDatasetDict({key: part.to_iterable_dataset() for key, part in data.items()})
        return data[split] if split else data

    datasets.load_dataset = load_dataset
    redirected = [transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoProcessor]
    redirected += [transformers.PreTrainedModel, transformers.GenerationConfig, transformers.PreTrainedTokenizerBase]
    redirected += [
        getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    ]
    for kind in redirected:
        own = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            return own(cls, local(name), *args, **kwargs)

        kind.from_pretrained = classmethod(from_pretrained)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Count the calls of a test."""
    calls.clear()
    warnings.clear()
    outcomes[item.nodeid] = {"outcome": "passed"}
    result = yield
    outcomes[item.nodeid] |= {"calls": dict(calls), "own_code": sorted(set(warnings))}
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of a test that did not pass, with the last line of its reason."""
    if report.outcome != "passed":
        lines = str(report.longrepr).strip().splitlines()
        outcomes[report.nodeid] |= {"outcome": report.outcome, "reason": lines[-1][:300] if lines else ""}


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep a file that cannot be imported: the tests of another version may ask for names that the installed one does not have."""
    if report.failed:
        outcomes[report.nodeid] = {
            "outcome": "not collected",
            "reason": str(report.longrepr).strip().splitlines()[-1][:300],
        }


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    if path := os.environ.get("PEER_OUTCOMES"):
        Path(path).write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
