"""Where these tests run, and the comparison that most of them make: on the device, by plain PyTorch there, and the truth."""

import os
from collections.abc import Callable
from typing import Any

import torch
from contract import assert_no_worse_than_plain
from torch import Tensor

ON_CPU = os.environ.get("MGRPO_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
CPU = torch.device("cpu")
ALL = ("logprob", "entropy", "self_certainty")
INF, NAN = torch.inf, torch.nan

Inputs = dict[str, Any]  # CPU tensors, those with requires_grad are leaves; other things as they are


def pick(full: Any, small: Any) -> Any:
    """Return the size for a device, or the one that the interpreter can bear."""
    return small if ON_CPU else full


def run(function: Callable[[Inputs, str], Any], inputs: Inputs, device: torch.device, backend: str, wide: bool = False):
    """Return name -> value, on the CPU, of the outputs of ``function(inputs, backend)`` and of the leaves' gradients.

    Upstream gradients are ``inputs["upstream"]``, one for each output, or random and the same in every call.
    `wide`: floating-point inputs in float64.
    """
    placed, leaves = {}, {}
    for name, value in inputs.items():
        placed[name] = value
        if isinstance(value, Tensor):
            placed[name] = value.detach().to(
                device, torch.float64 if wide and value.is_floating_point() else None, copy=True
            )
            if value.requires_grad:
                leaves[name] = placed[name].requires_grad_()
    outputs = function(placed, backend)
    generator = torch.Generator().manual_seed(1)
    upstream = inputs.get("upstream", [torch.randn(output.shape, generator=generator) for output in outputs])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        pairs = [
            (output, grad.to(output)) for output, grad in zip(outputs, upstream, strict=True) if output.requires_grad
        ]
        grads = torch.autograd.grad([each for each, _ in pairs], list(leaves.values()), [grad for _, grad in pairs])
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.cpu() for name, value in results.items()}


def hold(
    function: Callable[[Inputs, str], Any],
    inputs: Inputs,
    *,
    plain: str = "reference",
    got: dict[str, Tensor] | None = None,
    floor: float = 2e-6,
) -> dict[str, Tensor]:
    """Hold the Triton backend on the device to float64 truth, its error to plain PyTorch's there; return what it gave.

    `plain` is the backend that `function` is asked for in plain PyTorch; `got` what Triton gave, if that is known already. An
    error below `floor` of an output's largest magnitude, or 1e-5 of a gradient's root mean square, is exact for every purpose.
    """
    truth = run(function, inputs, CPU, "reference", wide=True)
    usual = run(function, inputs, DEVICE, plain)
    got = run(function, inputs, DEVICE, "triton") if got is None else got
    for name, true in truth.items():
        least, finite = floor, true[true.isfinite()]
        if name.startswith("gradient") and finite.numel():
            assert got[name].dtype == inputs[name.removeprefix("gradient of ")].dtype
            least = 1e-5 * (finite.square().mean().sqrt() / finite.abs().max().clamp(min=1.0)).item() + 1e-30
        try:
            assert_no_worse_than_plain(got[name], usual[name], true.double(), floor=least)  # metrics are float32
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return got


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Fail unless both hold the same, NaN included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
