"""Triton's interpreter without most of its overhead.

For every launch, and for every call of a device function within it, the interpreter looks through all members of `triton.language` and replaces
them by its own. That takes more time than what small kernels compute. What it finds is always the same, and within a launch all is
replaced already.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def apply() -> None:
    """Let the interpreter look through the language once in a process, and replace it once in a launch."""
    from triton.runtime import interpreter

    real, members = interpreter._patch_lang, {}
    if real.__module__ == __name__:
        return
    scopes: list[Any] = []  # of the launch that goes on
    replaced: set[int] = set()  # which of the language's modules, in that launch

    def replace_builtins(package: Any, builder: Any, scope: Any) -> None:
        if package not in members:
            found = inspect.getmembers(package)
            members[package] = [(name, member) for name, member in found if interpreter.tl.core.is_builtin(member)]
        for name, member in members[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    def end() -> None:
        while scopes:
            scopes.pop().undo()
        replaced.clear()

    @functools.cache
    def used_by(function: Any) -> set[int]:
        language = interpreter.tl, interpreter.tl.core
        return {id(each) for each in function.__globals__.values() if inspect.ismodule(each) and each in language}

    def replace(function: Any) -> Any:
        used = used_by(function)
        if scopes and used <= replaced:
            return scopes[0]
        scope = real(function)
        scope.undo, scope.restore = scope.restore, end
        scopes.append(scope)
        replaced.update(used)
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = replace_builtins, replace
