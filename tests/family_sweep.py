"""Tries the trainer on every causal architecture of the installed transformers, in small random models.

    python tests/family_sweep.py                write docs/families.json, from which docs/generate.py writes the table of docs/families.md
    python tests/family_sweep.py llama mamba    print the results of some

Each model is saved, loaded by the trainer and trained for a step; then a checkpoint is written and read, and the trained model is exported.
Log-probs of sampling and scoring, by the policy and by the momentum model, are compared with those of transformers, one sequence at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_families
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mgrpo_kernels import fuse_lm_head
from mgrpo_kernels.train import export
from mgrpo_kernels.train.config import build
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.policy import first_line, load_policy
from mgrpo_kernels.train.plan.describe import read_model
from mgrpo_kernels.train.run import checkpoint
from mgrpo_kernels.train.run.learner import make_learner
from mgrpo_kernels.train.score import score
from mgrpo_kernels.train.step import Learner
from mgrpo_kernels.train.update import Batch, take_step

RESULT = Path(__file__).resolve().parents[1] / "docs" / "families.json"
LIMIT = 1e-5  # nats, between two log-probs in float32
PROMPTS, COPIES, TOKENS = [[4, 5, 6, 7, 8, 9, 10], [11, 12], [13, 4, 6, 5]], 2, 6
CPU = torch.device("cpu")
ROUNDING = ", little more than rounding"
CHANGED = "transformers changes the exported weights when it loads them"


def tried(family: str, place: Path) -> dict[str, Any]:
    """Return what comes of an architecture.

    Its ``outcome`` is works, refused, wrong, none (transformers does not build or load such a small model) or partly (it trains, but
    transformers changes the exported weights when it loads them, or log-probs differ by a little more than the limit).
    """
    row: dict[str, Any] = {"family": family}
    base = place / "base"
    try:
        model = tiny_families.tiny_model(family)
        export.write(model, demo.make_tokenizer(), base)
        plain(base)
    except Exception as error:
        return {**row, "outcome": "none", "notes": f"{type(error).__name__}: {first_line(error)}"}
    row["class"] = type(model).__name__
    row["fused_head"] = fused_head(plain(base))
    try:
        read_model(str(base))
        learner = learner_of(base)
    except UsageError as error:
        return {**row, "outcome": "refused", "notes": str(error)}
    except Exception as error:
        return {**row, "outcome": "wrong", "notes": f"not refused: {type(error).__name__}: {first_line(error)}"}
    policy = learner.policy
    row |= {
        "packs": policy.unpackable is None,
        "sampling": learner.engine.cache.__name__,
        "notes": policy.unpackable or "",
    }
    try:
        wrong = faults(learner, base, place)
    except Exception as error:
        wrong = f"{type(error).__name__}: {first_line(error)}"
    if not wrong:
        return {**row, "outcome": "works"}
    return {**row, "outcome": "partly" if wrong == CHANGED or wrong.endswith(ROUNDING) else "wrong", "notes": wrong}


def plain(directory: Path) -> Any:
    """Return a model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


CONFIG = build(
    {
        **demo.OPTIONS,
        "max_response_tokens": TOKENS,
        "rollouts": 4,
        "momentum_rollouts": 2,
        "learning_rate": 1e-2,
        "warmup": 0,
    }
)
TASK = demo.make_task(0)


def learner_of(base: Path) -> Learner:
    """Return everything that a run of the trainer uses."""
    return make_learner(CONFIG, TASK, load_policy(str(base), CPU, torch.float32))


def fused_head(model: Any) -> str:
    """Return "yes" if the fused head gives the model's log-probs, or why it is refused, or by how much it is wrong."""
    ids = torch.tensor(PROMPTS[:1])
    try:
        fuse_lm_head(model)
    except (TypeError, ValueError) as error:
        return f"refused: {first_line(error)}"
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False)
        found = model(input_ids=ids, labels=ids).logprob
    worst = float((found - want.logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)).abs().max())
    return "yes" if worst <= LIMIT * scale(want.logits) else f"wrong by {worst:.2g}"


def scale(logits: Tensor) -> float:
    """Return by how much rounding grows with the logits: 1 for logits of at most 10."""
    return max(1.0, float(logits.abs().max()) / 10)


def faults(learner: Learner, base: Path, place: Path) -> str | None:
    """Return what is wrong with a run of an architecture, or None."""
    wrong = disagreement(learner, base, momentum=False)
    if wrong is not None:
        return f"before training: {wrong}"
    before = {name: value.clone() for name, value in learner.policy.model.state_dict().items()}
    rollouts = sampled(learner, momentum=False)
    advantages = torch.tensor([1.0, -1.0] * (len(rollouts.tokens) // 2))
    prompts = [prompt for prompt in PROMPTS for _ in range(COPIES)]
    batch = Batch(prompts, rollouts.tokens, rollouts.mask, rollouts.logprobs, rollouts.logprobs, advantages)
    take_step(learner.policy, learner.optimizer, batch, learner.config, 1)
    assert learner.momentum is not None
    learner.momentum.update(0.5)
    after = learner.policy.model.state_dict()
    if not any((before[name] != after[name]).any() for name in before):
        return "a step leaves the weights as they are"
    checkpoint.save(place / "checkpoints", learner, 1, 0, 0, keep=1)
    other = learner_of(base)
    checkpoint.resume(place / "checkpoints", other, lambda _: None)
    restored = other.policy.model.state_dict()
    if any(not torch.equal(restored[name], after[name]) for name in after):
        return "a checkpoint does not restore the weights"
    export.save_final(other.policy, place / "final")
    written = load_file(place / "final" / "model.safetensors")
    loaded = plain(place / "final").state_dict()
    if all(torch.equal(written[name], after[name]) for name in written if name in after) and any(
        not torch.equal(loaded[name], after[name]) for name in after
    ):
        return CHANGED
    wrong = disagreement(other, place / "final", momentum=False)
    if wrong is not None:
        return f"after a checkpoint and an export: {wrong}"
    assert other.momentum is not None
    with other.momentum.swapped_into(other.policy.model):
        export.save_final(other.policy, place / "momentum")
    wrong = disagreement(other, place / "momentum", momentum=True)
    return None if wrong is None else f"momentum model: {wrong}"


def sampled(learner: Learner, *, momentum: bool) -> Any:
    """Return responses to prompts of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    return learner.engine.sample(
        PROMPTS, COPIES, temperature=1.0, generator=generator, momentum=learner.momentum if momentum else None
    )


def disagreement(learner: Learner, directory: Path, *, momentum: bool) -> str | None:
    """Return how sampling or scoring differs from the model that transformers loads from a directory, or None."""
    rollouts, model = sampled(learner, momentum=momentum), plain(directory)
    prompts = [prompt for prompt in PROMPTS for _ in range(COPIES)]
    assert learner.momentum is not None
    with learner.momentum.swapped_into(learner.policy.model) if momentum else contextlib.nullcontext():
        scored = score(learner.policy, prompts, rollouts.tokens, rollouts.mask, temperature=1.0, budget=60).logprob
    assert scored is not None
    for row, prompt in enumerate(prompts):
        response = rollouts.tokens[row][rollouts.mask[row]]
        for what, values in (("sampling", rollouts.logprobs[row]), ("scoring", scored[row])):
            worst = difference(values[: len(response)], model, prompt, response)
            if not worst <= LIMIT:
                worst = min(worst, difference(values[: len(response)], exact(directory), prompt, response))
            if not worst <= LIMIT:
                return f"{what} differs by {worst:.2g}{ROUNDING if worst <= 3 * LIMIT else ''}"
    return None


def exact(directory: Path) -> Any:
    """Return a model in float64: some architectures round by more than the limit in float32, and so does transformers."""
    return plain(directory).double()


def difference(found: Tensor, model: Any, prompt: list[int], response: Tensor) -> float:
    """Return the largest difference between log-probs of a response and the model's, in relation to the size of its logits."""
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response.tolist()]), use_cache=False).logits[0]
    except RuntimeError:
        if model.dtype == torch.float64:  # not every architecture runs in float64
            return float("inf")
        raise
    want = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, response[:, None])[:, 0]
    return float((found - want).abs().max()) / scale(logits)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Hide the warnings of transformers about its own models, and compute with one thread: the number of threads changes rounding.

    With two threads, sampling from the momentum model of Qwen3.5 differs by 4.8e-05 from transformers, whose own error is then 1.6e-05. It
    is rounding: with all computation in float64, that of linear attention included, the two differ by 3e-07.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(logging.NOTSET)


def sweep(names: list[str]) -> Iterator[dict[str, Any]]:
    """Try some architectures, one after another."""
    for name in names:
        with settled(), tempfile.TemporaryDirectory() as place:
            yield tried(name, Path(place))


def main(names: list[str]) -> None:
    """Try all architectures and write the result, or print the results of some."""
    rows = []
    for row in sweep(names or tiny_families.families()):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if not names:
        result = {
            "transformers": transformers.__version__,
            "torch": torch.__version__.partition("+")[0],
            "families": rows,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
