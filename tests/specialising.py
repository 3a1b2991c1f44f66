"""Triton's interpreter, made to treat an argument of 1 as the compiler does."""

import functools


def specialise():
    """Pass an integer argument that is 1 to an interpreted kernel as a plain number, unless its kernel says not to specialise it.

    The compiler makes such an argument a constant, which has no method `to` or `dtype`. The interpreter by itself passes a tensor.
    """
    from triton.runtime import interpreter

    function = interpreter.InterpretedFunction
    if getattr(function.run, "specialises", False):
        return

    @functools.wraps(function.run)
    def run(self, *args, grid, warmup, **kwargs):
        if warmup:
            return
        executor = interpreter.GridExecutor(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)
        passed = dict(zip(self.arg_names, args, strict=False)) | kwargs
        ones = {name for name, value in passed.items() if type(value) is int and value == 1}
        executor.constexprs += sorted(ones - set(self.kwargs.get("do_not_specialize") or ()))
        executor(*args, **kwargs)

    run.specialises = True
    function.run = run
