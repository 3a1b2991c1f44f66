"""The fused ops under other libraries' own names: ``trl``, ``verl``, ``openrlhf``, ``nemo_rl``.

Each module has ``patched(strict=False)``, built on :class:`Patch`. Importing an integration patches nothing.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

logger = logging.getLogger("mgrpo_kernels")


class IntegrationError(RuntimeError):
    """Another library is not installed, has moved a name that is patched here, or (strict) cannot take the fused path."""


class _Replacement(NamedTuple):
    name: str  # as the user reads it: "trl.trainer.utils.entropy_from_logits"
    owner: Any  # module or class
    attribute: str
    original: Any  # as the owner's own namespace holds it (a staticmethod stays one); _INHERITED where it is not there
    new: Any


_INHERITED = object()


class Patch:
    """Attributes of another library's modules and classes, replaced together and put back together.

    ::

        patch = Patch("trl", install="pip install 'trl==1.16.*'", strict=strict)
        patch.replace("trl.trainer.utils", "entropy_from_logits", mine)
        patch.replace("trl.trainer.grpo_trainer", "GRPOTrainer._compute_loss", mine, parameters=("self", "model", "inputs"))
        return patch.apply()

    Nothing changes before :meth:`apply`. ``with patch: ...`` and :meth:`undo` restore the very same objects.
    """

    def __init__(self, library: str, *, install: str, strict: bool = False) -> None:
        self.library = library
        self.strict = strict
        self._install = install
        self._replacements: list[_Replacement] = []
        self._applied = False
        self._said: set[tuple[str, str]] = set()

    def original(self, module: str, name: str) -> Any:
        """Return the object that `name` (dots reach into classes) is now in `module`, which is imported.

        Raises:
            IntegrationError: the library is not installed, or the name is not there.
        """
        owner, attribute = self._find(module, name)
        return getattr(owner, attribute)

    def check(self, module: str, name: str, parameters: Sequence[str]) -> None:
        """Check that `name` of `module`, which is called here but stays, takes these parameters, in order.

        Raises:
            IntegrationError: it is not there, or takes others.
        """
        found = tuple(inspect.signature(self.original(module, name)).parameters)
        if found != tuple(parameters):
            raise IntegrationError(
                f"{module}.{name}: expected the parameters ({', '.join(parameters)}), got ({', '.join(found)}): "
                f"this version of {self.library} is not one that this integration knows; {self._install}"
            )

    def replace(self, module: str, name: str, new: Any, *, parameters: Sequence[str] | None = None) -> None:
        """Have :meth:`apply` put `new` in place of `name` (dots reach into classes) of `module`.

        Args:
            parameters: the names that the original's signature must have, in order, where `new` depends on them.

        Raises:
            IntegrationError: the library is not installed, the name is not there, or its parameters are others.
        """
        assert not self._applied
        if parameters is not None:
            self.check(module, name, parameters)
        owner, attribute = self._find(module, name)
        original = vars(owner).get(attribute, _INHERITED)
        self._replacements.append(_Replacement(f"{module}.{name}", owner, attribute, original, new))

    def _find(self, module: str, name: str) -> tuple[Any, str]:
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module + ".").startswith(error.name + "."):
                if error.name == module.partition(".")[0]:
                    raise IntegrationError(f"{self.library} is not installed: {self._install}") from error
                raise IntegrationError(
                    f"{error.name}: this version of {self.library} has no such module; {self._install}"
                ) from error
            raise  # one of its own dependencies is missing: its message says which
        *path, attribute = name.split(".")
        for part in path:
            owner = self._member(owner, part, f"{module}.{name}")
        self._member(owner, attribute, f"{module}.{name}")
        return owner, attribute

    def _member(self, owner: Any, part: str, name: str) -> Any:
        if not hasattr(owner, part):
            raise IntegrationError(f"{name}: this version of {self.library} has no such name; {self._install}")
        return getattr(owner, part)

    def apply(self) -> Patch:
        """Put every replacement in place; return the patch itself."""
        assert not self._applied
        for replacement in self._replacements:
            setattr(replacement.owner, replacement.attribute, replacement.new)
        self._applied = True
        return self

    def undo(self) -> None:
        """Put every original back. A second call does nothing.

        Raises:
            IntegrationError: somebody has replaced one of the names since; nothing is put back then.
        """
        if not self._applied:
            return
        for replacement in self._replacements:
            if vars(replacement.owner).get(replacement.attribute) is not replacement.new:
                raise IntegrationError(
                    f"undo: expected {replacement.name} as this patch left it, got another object: "
                    "undo whatever replaced it first"
                )
        for replacement in reversed(self._replacements):
            if replacement.original is _INHERITED:
                delattr(replacement.owner, replacement.attribute)
            else:
                setattr(replacement.owner, replacement.attribute, replacement.original)
        self._applied = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def fall_back(self, name: str, reason: str) -> None:
        """Say, once for each name and reason, that `name` runs the library's own code because of `reason`.

        Raises:
            IntegrationError: the patch is strict.
        """
        message = f"{name} runs {self.library}'s own code: {reason}"
        if self.strict:
            raise IntegrationError(message)
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            logger.warning("%s", message)


__all__ = ["IntegrationError", "Patch"]
