"""Triton's interpreter without most of its overhead.

For every launch, and for every call of a device function within it, the interpreter looks through all members of `triton.language` and replaces
them by its own. That takes more time than what small kernels compute. What it finds is always the same, and within a launch all is
replaced already.

For every operation it makes the types of the operands and of the result anew, and computes whether integers overflow, which only its debug mode
reports. Both take longer than NumPy takes for the operation.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from typing import Any

import specialising

PLAIN = ("fp32", "fp64", "int32", "int64")
CONSTANTS = 256  # that are kept


def prepare() -> None:
    """Have the interpreter as the tests need it, if it is on: as the compiler treats arguments, and fast.

    Processes that tests start import no conftest: tests/contract.py and tests/fuzz_ops.py call this for them.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        specialising.specialise()
        apply()


def apply() -> None:
    """Let the interpreter do once in a process, or once in a launch, what it otherwise repeats for every operation."""
    from triton.runtime import interpreter

    if interpreter._patch_lang.__module__ == __name__:
        return
    replace_language_once(interpreter)
    make_types_once(interpreter)
    without_unused_checks(interpreter.TritonSemantic)


def replace_language_once(interpreter: Any) -> None:
    """Let the interpreter look through the language once in a process, and replace it once in a launch."""
    real, members = interpreter._patch_lang, {}
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


def make_types_once(interpreter: Any) -> None:
    """Let types of the same name share their parts, and tensors of one type their shape: nothing changes either after it is made."""
    core = interpreter.tl.core
    new_block, new_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    numpy_types: dict[str, Any] = {}
    numpy_type = interpreter._get_np_dtype

    @functools.wraps(new_block)
    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = (element_ty.name, getattr(element_ty, "address_space", ""), *((type(size), size) for size in sizes))
        if key in blocks:
            self.__dict__.update(blocks[key], element_ty=element_ty)
        else:
            new_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    @functools.wraps(new_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[type.name]
        else:
            new_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel

    def dtype_of(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    core.dtype.__eq__ = functools.wraps(equal)(lambda self, other: self is other or equal(self, other))
    interpreter._get_np_dtype = dtype_of


def without_unused_checks(semantic: Any) -> None:
    """Leave out the check for overflow where its result is not used, and the type rules where both operands are of one plain type.

    A number becomes a tensor of the other operand's shape, which is kept: no operation changes its operands.
    """
    check, common = semantic.binary_op_sanitize_overflow_impl, semantic.binary_op_type_checking_impl
    constants: dict[Any, Any] = {}

    @functools.wraps(check)
    def overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    @functools.wraps(common)
    def operands(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = isinstance(lhs, self.tensor) and isinstance(rhs, self.tensor)
        if tensors and lhs.dtype.name in PLAIN and lhs.type.name == rhs.type.name:
            return lhs, rhs
        first = isinstance(lhs, self.tensor)
        one, number = (lhs, rhs) if first else (rhs, lhs)
        if type(number) in (int, float) and isinstance(one, self.tensor) and one.dtype.name in PLAIN:
            key = (one.type.name, type(number), repr(number), args, *sorted(kwargs.items()))
            if key not in constants:
                found = common(self, lhs, rhs, *args, **kwargs)
                if found[not first] is not one:  # it has another type now
                    return found
                if len(constants) == CONSTANTS:
                    constants.clear()
                constants[key] = found[first]
            return (one, constants[key]) if first else (constants[key], one)
        return common(self, lhs, rhs, *args, **kwargs)

    semantic.binary_op_sanitize_overflow_impl, semantic.binary_op_type_checking_impl = overflow, operands
