"""Weights as transformers reads them: what a run leaves in final/, and any checkpoint's by command.

``python -m mgrpo_kernels.train.export --run runs/mine --step 50 --weights momentum --to DIR``

Of a run with LoRA the model has the adapter added to its weights; the adapter by itself, as peft reads it, is in adapter/ beside them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mgrpo_kernels.train import parallel
from mgrpo_kernels.train.config import build, read_yaml
from mgrpo_kernels.train.errors import CheckpointError, OutputError, UsageError
from mgrpo_kernels.train.model.location import check_model
from mgrpo_kernels.train.model.lora import Adapter, merged_weights
from mgrpo_kernels.train.model.policy import Policy, unreadable
from mgrpo_kernels.train.parser import Parser, Spelling
from mgrpo_kernels.train.run import checkpoint, files
from mgrpo_kernels.train.text import print_line

WEIGHTS = {"policy": "model.", "momentum": "momentum."}


def save_final(policy: Policy, directory: Path) -> None:
    """Write the trained model and its tokenizer, whole or not at all. Every rank must call; the first gathers and writes.

    Raises:
        OutputError: it could not be written; what was there before is as it was.
    """
    state: dict[str, Tensor] | None = None
    if parallel.world() > 1:
        state = {}
        for name, tensor in policy.model.state_dict().items():
            all_of_it = parallel.whole(tensor)
            if parallel.is_first():
                state[name] = all_of_it.cpu()
    with parallel.together():
        if parallel.is_first():
            write(policy.model, policy.tokenizer, directory, state, policy.adapter)


def write(
    model: Any, tokenizer: Any, directory: Path, state: dict[str, Tensor] | None = None, adapter: Adapter | None = None
) -> None:
    """Write a model, with the weights `state` in place of its own, and a tokenizer to a directory.

    A directory that is there is replaced when the new one is complete and on the disk. With an adapter the model is written as one
    without, and the adapter beside it.

    Raises:
        OutputError: it could not be written; what was there before is as it was.
    """
    new = directory.with_name(directory.name + ".new")
    try:
        files.discard(new)
        if adapter is not None:
            state = model.state_dict() if state is None else state
            adapter.save(new / "adapter", state)
            state = merged_weights(model, state)
        model.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        files.replace_directory(new, directory)
    except (OSError, SafetensorError) as error:
        files.discard(new)
        raise OutputError(
            f"{directory.name}: expected to write the model to {directory}, got {files.reason(error)}; the last checkpoint contains it, "
            "and python -m mgrpo_kernels.train.export writes it"
        ) from error


def export(run: Path, step: int | None, weights: str, to: Path) -> Path:
    """Write the policy or the momentum model of a checkpoint as transformers reads it; return the checkpoint's path.

    Args:
        run: a run's output directory.
        step: of the checkpoint; None: the latest.
        weights: policy or momentum.
        to: a directory that is not there yet.

    Raises:
        UsageError: no such run, checkpoint or weights; `to` exists.
        CheckpointError: the checkpoint is damaged.
        OutputError: the model could not be written.
    """
    if not (run / "config.yaml").exists():
        raise UsageError(f"run: expected a directory with a run (config.yaml), got {run}")
    if to.exists():
        raise UsageError(f"to: expected a directory that is not there yet, got {to}")
    directory = run / "checkpoints"
    newest, there = checkpoint.latest(directory), checkpoint.saved_steps(directory)
    found = newest if step is None else directory / f"step_{step}"
    if found is None or not found.exists():
        raise UsageError(f"step: expected one of {', '.join(map(str, there)) or '(none)'} in {directory}, got {step}")
    facts = checkpoint.load(found)
    if weights == "momentum" and facts["momentum_updates"] is None:
        raise UsageError(f"weights: expected policy, since the run has no momentum model, got {weights!r}")
    config = build(read_yaml(run / "config.yaml"))
    name = config.model.model or str(run / "base")
    lora = config.lora.lora_rank is not None
    loading = config.model.loading
    model = read_model(name, empty=not lora, loading=loading)  # of LoRA a checkpoint has the adapter alone
    adapter = Adapter(model, config.lora, config.run.seed) if lora else None
    tensors = checkpoint.read(found, WEIGHTS[weights])
    missing, odd = model.load_state_dict(tensors, strict=False)
    own = {name for name, each in model.named_parameters() if adapter is None or each.requires_grad}
    if odd or set(missing) & own:
        raise UsageError(
            f"run: expected a checkpoint of {name}, got one that differs in {', '.join([*missing, *odd][:5])}"
        )
    write(model, AutoTokenizer.from_pretrained(name, **loading), to, adapter=adapter)
    return found


def read_model(name: str, *, empty: bool, loading: Mapping[str, Any]) -> Any:
    """Return a model, or with `empty` one whose weights are still to come.

    Raises:
        UsageError: it cannot be loaded.
    """
    check_model(name)
    try:
        if not empty:
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **loading)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name, **loading), trust_remote_code=loading["trust_remote_code"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(unreadable(name, error)) from error
    with contextlib.suppress(OSError):  # a model may come without
        model.generation_config = GenerationConfig.from_pretrained(name, **loading)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; return the exit status: 0, 1 a damaged checkpoint, 2 wrong usage."""
    parser = Parser(
        prog="python -m mgrpo_kernels.train.export",
        description="Write a checkpoint's policy or momentum model as safetensors, which AutoModelForCausalLM.from_pretrained loads.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the --output of a training run")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the latest)")
    parser.add_argument("--weights", choices=tuple(WEIGHTS), default="policy", help="which model (default: policy)")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="where it goes")
    given = parser.parse_args(arguments)
    spelling = Spelling()
    spelling.read(parser, (), ())
    try:
        found = export(given.run, given.step, given.weights, given.to)
    except UsageError as error:
        print_line(f"error: {spelling(str(error))}", error=True)
        return 2
    except (CheckpointError, OutputError) as error:
        print_line(f"error: {error}", error=True)
        return 1
    print_line(f"written: {given.to}, the {given.weights} of {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
