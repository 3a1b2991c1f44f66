"""The machinery that puts our functions under other libraries' names, and takes them out again."""

import sys
import types

import pytest

from mgrpo_kernels.integrations import IntegrationError, Patch


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("a_library")

    class Base:
        def inherited(self):
            return "base"

    class Trainer(Base):
        @staticmethod
        def loss(x, y):
            return x + y

    module.Trainer = Trainer
    module.plain = lambda x: x
    monkeypatch.setitem(sys.modules, "a_library", module)
    return module


def patch_of(strict=False):
    return Patch("a_library", install="pip install a_library", strict=strict)


def test_undo_restores_the_very_same_objects(library):
    before = (vars(library)["plain"], vars(library.Trainer)["loss"])
    patch = patch_of()
    patch.replace("a_library", "plain", lambda x: -x, parameters=("x",))
    patch.replace("a_library", "Trainer.loss", staticmethod(lambda x, y: x * y), parameters=("x", "y"))
    patch.replace("a_library", "Trainer.inherited", lambda self: "ours")
    assert library.plain(2) == 2  # nothing yet
    assert patch.apply() is patch
    assert (library.plain(2), library.Trainer.loss(3, 4), library.Trainer().inherited()) == (-2, 12, "ours")
    patch.undo()
    patch.undo()
    assert (vars(library)["plain"], vars(library.Trainer)["loss"]) == before
    assert "inherited" not in vars(library.Trainer)
    assert library.Trainer().inherited() == "base"


def test_the_block_undoes_when_it_raises(library):
    before = library.plain
    patch = patch_of()
    patch.replace("a_library", "plain", abs)
    with pytest.raises(TypeError, match="bad operand"), patch.apply():
        library.plain("abs refuses a string")
    assert library.plain is before


def test_patches_nest_and_refuse_another_order(library):
    before = library.plain
    outer, inner = patch_of(), patch_of()
    outer.replace("a_library", "plain", abs)
    outer.apply()
    inner.replace("a_library", "plain", len)
    inner.apply()
    with pytest.raises(IntegrationError, match=r"undo: expected a_library.plain as this patch left it"):
        outer.undo()
    inner.undo()
    outer.undo()
    assert library.plain is before


@pytest.mark.parametrize(
    "module, name, parameters, message",
    [
        ("a_library", "Trainer.reward", None, r"a_library.Trainer.reward: this version of a_library has no such name"),
        ("a_library", "Gone.loss", None, r"a_library.Gone.loss: this version of a_library has no such name"),
        ("a_library", "plain", ("x", "y"), r"a_library.plain: expected the parameters \(x, y\), got \(x\)"),
        ("a_library", "plain", ("y",), r"a_library.plain: expected the parameters \(y\), got \(x\)"),
        ("not_installed_at_all", "f", None, "a_library is not installed: pip install a_library"),
        ("json.gone", "f", None, "json.gone: this version of a_library has no such module"),
    ],
)
def test_what_moved_is_named(library, module, name, parameters, message):
    with pytest.raises(IntegrationError, match=message):
        patch_of().replace(module, name, abs, parameters=parameters)


def test_a_fall_back_is_said_once_by_name_or_raised(library, caplog):
    patch = patch_of()
    for _ in range(3):
        patch.fall_back("Trainer.loss", "no such loss")
    assert [r.getMessage() for r in caplog.records] == ["Trainer.loss runs a_library's own code: no such loss"]
    with pytest.raises(IntegrationError, match="Trainer.loss runs a_library's own code: no such loss"):
        patch_of(strict=True).fall_back("Trainer.loss", "no such loss")
