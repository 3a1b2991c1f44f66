"""Selects the backend that runs an op, and gives the reason why another one cannot.

Every tensor op has up to three: ``reference`` (plain PyTorch, the definition), ``native`` (C++, csrc/) and ``triton``.
A backend is a module with ``unsupported(device, dtype) -> str | None`` and the op's kernels. The choice, in order:
the call's ``backend=``, :func:`use_backend`, the environment variable ``MGRPO_BACKEND``, and then the fastest that can run.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

logger = logging.getLogger("mgrpo_kernels")

NAMES = ("reference", "native", "triton")
VENDORS = ("liger",)
"""Other libraries' kernels, which an op has beside its own. They run where a call names them, and are never picked."""

# Fastest first. On a CPU Triton exists only as an interpreter, which is for tests: never an automatic choice.
_PREFERENCE = {"cpu": ("native", "reference")}
_PREFERENCE_ELSEWHERE = ("native", "triton", "reference")


F = TypeVar("F", bound=Callable[..., Any])


class BackendUnavailable(RuntimeError):  # noqa: N818 - a public name
    """The requested backend cannot run the op; the message gives the reason."""


class Backend(Protocol):
    """The function that every backend module has."""

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None if the backend runs this dtype on this device, else the reason why not."""
        ...


_registry: dict[str, dict[str, Backend]] = {}  # op -> backend name -> module
_logged: set[str] = set()

# The backend of the innermost use_backend block. Two mirrors follow the context variable: torch.compile cannot trace one, but guards on
# attributes of a thread-local; and PyTorch hands its own thread-local objects on to the threads that run a backward pass.
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("mgrpo_kernels.backend", default=None)
_traced = threading.local()
_HANDED_ON = "mgrpo_kernels.backend"


def register(op: str, **modules: Backend) -> None:
    """Register an op's backends: ``register("ema", reference=reference, native=native, triton=triton)``."""
    _registry[op] = modules


def implementation(op: str, backend: str) -> Any:  # each op has its own functions beyond Backend's
    """Return the module that runs `op` on `backend`, as picked before by :func:`choose`."""
    ours = [name for name in _registry[op] if name in NAMES]
    if backend not in ours:
        raise ValueError(f"backend: expected one of {', '.join(ours)}, got {backend!r}")
    return _registry[op][backend]


def _check_name(backend: str, where: str) -> str:
    if backend not in NAMES:
        hint = "; pass it as the argument backend of an op that has it" if backend in VENDORS else ""
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {backend!r}{hint}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op of the block on `backend` (``reference``, ``native`` or ``triton``); a call's own ``backend=`` wins.

    The block applies to its own thread or asyncio task, and to the backward passes that it runs, wherever PyTorch runs them. A thread that
    is started inside the block does not inherit it, as with every context variable: open a block in that thread, or run its function with
    ``contextvars.copy_context().run``. A function from ``torch.compile`` follows the innermost block that was opened in its own thread.

    Raises:
        ValueError: no such backend.
        BackendUnavailable: from the ops inside, where that backend cannot run.
    """
    name, outer = _check_name(backend, "use_backend"), None
    if torch.compiler.is_compiling():
        own, _traced.backend = getattr(_traced, "backend", None), name
    else:
        own, outer = _override.get(), _handed_on()
        _enter(name, None)
    try:
        yield
    finally:
        if torch.compiler.is_compiling():
            _traced.backend = own
        else:
            _enter(own, outer)


def _enter(own: str | None, outer: str | None) -> None:
    """Make `own` this thread's or task's backend; `outer` is what another thread has handed on to it."""
    _override.set(own)
    _traced.backend = own
    owner = threading.get_ident() if outer is None else None
    torch._C._stash_obj_in_tls(_HANDED_ON, (owner, own if outer is None else outer))


def _handed_on() -> str | None:
    """Return the backend of the thread whose backward pass this thread runs, or None."""
    if not torch._C._is_key_in_tls(_HANDED_ON):
        return None
    owner, backend = torch._C._get_obj_in_tls(_HANDED_ON)
    return None if owner == threading.get_ident() else backend


def _current() -> str | None:
    """Return the backend of the innermost block around this call, or None."""
    if torch.compiler.is_compiling():
        return getattr(_traced, "backend", None)
    own = _override.get()
    return _handed_on() if own is None else own


def choose(op: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend that runs `op` on tensors of this device and dtype.

    Raises:
        ValueError: `requested` names no backend.
        BackendUnavailable: the backend asked for (by argument, block or environment) cannot run, with the reason.
    """
    return _choose(op, requested if requested is not None else _current(), device, dtype)


def traced_as_constant(function: F) -> F:
    """Mark what torch.compile is to call while it traces, taking the result for a constant of the graph.

    This is the mark that torch.compiler.assume_constant_result sets; calling that would cost every import the second that torch._dynamo
    takes to load. It must stand on a plain function: dynamo looks through a functools.cache, and traces what is inside.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@traced_as_constant  # dynamo guards on what _current() has read
def _choose(op: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    modules = _registry[op]
    where = "backend"
    if requested is None and (requested := os.environ.get("MGRPO_BACKEND") or None) is not None:
        where = "MGRPO_BACKEND"
    if requested is not None:
        if where != "backend" or requested not in VENDORS:
            _check_name(requested, where)
        if requested not in modules:
            raise BackendUnavailable(f"{op} has no {requested} backend; it has {', '.join(modules)}")
        reason = modules[requested].unsupported(device, dtype)
        if reason is not None:
            raise BackendUnavailable(f"the {requested} backend of {op} cannot run: {reason}")
        return requested

    passed_over: list[str] = []
    for name in _PREFERENCE.get(device.type, _PREFERENCE_ELSEWHERE):
        if name not in modules:
            continue
        reason = modules[name].unsupported(device, dtype)
        if reason is None:
            _log_choice(op, name, device, dtype, passed_over)
            return name
        passed_over.append(f"{name}: {reason}")
    raise BackendUnavailable(f"no backend of {op} can run on {device.type}, {dtype}: {'; '.join(passed_over)}")


def _log_choice(op: str, name: str, device: torch.device, dtype: torch.dtype, passed_over: list[str]) -> None:
    if op in _logged:
        return
    _logged.add(op)
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    # The slow backend where a fast one was expected is worth a warning: otherwise only the run time would show it.
    level = logging.WARNING if name == "reference" and dtype != torch.float64 else logging.INFO
    logger.log(level, "%s runs on the %s backend for %s on %s%s", op, name, dtype, device.type, because)


def backends(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """Return op -> backend -> "ok", or the reason why it cannot run `dtype` on `device` (None: the GPU if there is one)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {
        op: {name: module.unsupported(device, dtype) or "ok" for name, module in modules.items()}
        for op, modules in sorted(_registry.items())
    }


def reference_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for every floating dtype, on any device of PyTorch; else the reason."""
    return None if dtype.is_floating_point else f"expected a floating-point dtype, got {dtype}"


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if native kernels can run: the extension is built, the device is a CPU, and the dtype was compiled. Else the reason."""
    from mgrpo_kernels import _native  # not at the top: loading the extension is the first thing that can fail

    if (reason := _native.missing()) is not None:
        return reason
    if device.type != "cpu":
        return f"the native kernels run on cpu, got {device.type}"
    if dtype not in NATIVE_DTYPES:
        return f"expected float32, bfloat16 or float16, got {dtype}"
    return None


def triton_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if Triton kernels can run: triton, a GPU or the interpreter, and a supported dtype. Else the reason."""
    try:
        import triton  # noqa: F401 - optional: there is no triton for macOS or Windows
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a GPU tensor, got cpu (TRITON_INTERPRET=1 runs its interpreter, for tests)"
    if device.type not in ("cpu", "cuda"):
        return f"triton needs a cuda (NVIDIA or AMD) tensor, got {device.type}"
    if dtype not in NATIVE_DTYPES:
        return f"expected float32, bfloat16 or float16, got {dtype}"
    return None
