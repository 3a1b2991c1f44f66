"""Whether the plan's estimates hold: runs of the trainer, each in processes of its own, beside what the plan said of them.

python benchmarks/plan_check.py [--only NAME ...] [--out benchmarks/results/plan-check.json]

Memory is the most that a rank's process held (VmHWM, as peak_memory_bytes has it), less that of the same run of a model of next to
no size. Time is CPU time (user and system) of the first rank, one thread, the median of all steps but the first: other work on the machine
then counts little, though it fills caches. The device's rates are measured in the same process, right after the run. A model's weights
are random and its words numbers: hardly any response ends before the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "score", "update", "ema")
MEMORY_WITHIN, TIME_WITHIN = 0.25, 1.5


class Case(NamedTuple):
    """A model, and a run of it."""

    layers: int
    width: int
    vocabulary: int
    prompts: int
    group: int
    prompt_tokens: int
    response_tokens: int
    budget: int = 16384
    ranks: int = 1
    options: tuple[tuple[str, Any], ...] = ()


CHECKPOINTING = (("gradient_checkpointing", True),)
CASES = {
    "d64": Case(2, 64, 1024, 8, 16, 16, 32),
    "d256": Case(4, 256, 8192, 4, 16, 32, 64),
    "d256, checkpointing": Case(4, 256, 8192, 4, 16, 32, 64, options=CHECKPOINTING),
    "d256, bfloat16": Case(4, 256, 8192, 4, 16, 32, 64, options=(("dtype", "bfloat16"),)),
    "d256, micro-batches": Case(4, 256, 8192, 4, 16, 32, 64, budget=1024),
    "d256, long": Case(4, 256, 8192, 2, 16, 64, 256, budget=2048),
    "d256, srt, no KL": Case(4, 256, 32000, 4, 16, 32, 32, options=(("method", "srt"), ("kl_coef", 0.0))),
    "d256, 2 ranks": Case(4, 256, 8192, 4, 16, 32, 64, ranks=2),
    "d512, 2 ranks, checkpointing": Case(6, 512, 32000, 4, 8, 32, 32, ranks=2, options=CHECKPOINTING),
    "d512": Case(6, 512, 32000, 4, 8, 32, 32),
    "d768": Case(8, 768, 32000, 2, 8, 32, 32),
}
NOTHING = Case(1, 16, 64, 2, 4, 4, 4)
STEPS = 4


def write_files(case: Case, place: Path) -> dict[str, Any]:
    """Write a model, its tokenizer and prompts; return the options of the run."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    end = case.vocabulary - 1
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.width * 5 // 2,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(place / "model")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(end + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token=str(end)).save_pretrained(place / "model")
    rows = torch.randint(1, end, (8 * case.prompts, case.prompt_tokens)).tolist()
    text = "".join(json.dumps({"question": " ".join(map(str, row))}) + "\n" for row in rows)
    (place / "data.jsonl").write_text(text, encoding="utf-8")
    return {
        "model": str(place / "model"),
        "data": str(place / "data.jsonl"),
        "prompt_template": "{question}",
        "chat_template": "off",
        "prompts_per_step": case.prompts,
        "rollouts": case.group,
        "max_response_tokens": case.response_tokens,
        "tokens_per_microbatch": case.budget,
        "steps": STEPS,
        "eval_every": 0,
        "checkpoint_every": 0,
        "temperature": 1.0,
        "guard": "off",
        **dict(case.options),
    }


def child(place: Path) -> None:
    """Run, with phases timed in CPU time; and estimate, after it, as measuring rates takes memory."""
    import torch

    from mgrpo_kernels.train.config import build
    from mgrpo_kernels.train.plan.describe import read_model
    from mgrpo_kernels.train.plan.devices import measure
    from mgrpo_kernels.train.plan.memory import PROCESS_BYTES, memory_of
    from mgrpo_kernels.train.plan.shape import work_of
    from mgrpo_kernels.train.plan.time import seconds
    from mgrpo_kernels.train.run.start import run as train
    from mgrpo_kernels.train.watch import metrics

    torch.set_num_threads(1)
    said = json.loads((place / "run.json").read_text(encoding="utf-8"))
    case, config = Case(**said["case"]), build(said["options"])
    metrics.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    status = train(config, place / "output")
    model = read_model(config.model.model or "")
    rates = measure(torch.device("cpu"), config.model.dtype, model, time.process_time)
    if os.environ.get("RANK", "0") == "0":
        work = work_of(config, case.prompt_tokens, 0, case.ranks)
        memory = memory_of(config, model, work, case.ranks, "cpu")
        (place / "estimate.json").write_text(
            json.dumps(
                {
                    "parameters": model.parameters,
                    "memory": memory.total - PROCESS_BYTES,  # as measured: beyond that of a tiny model's run
                    "moment": memory.moment,
                    "rates": rates._asdict(),
                    "parts": {"held": memory.held, **memory.moments},
                    **seconds(config, model, work, case.ranks, rates),
                }
            )
        )
    sys.exit(status)


def run(case: Case, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the plan said of a run, and its metrics."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        place = Path(name)
        said = {"case": case._asdict(), "options": write_files(case, place)}
        (place / "run.json").write_text(json.dumps(said), encoding="utf-8")
        ranks = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
            if case.ranks > 1
            else []
        )
        command = [sys.executable, *ranks, str(Path(__file__)), "--child", str(place)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        lines = (place / "output" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return json.loads((place / "estimate.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def check(case: Case, least: int, scratch: Path) -> dict[str, Any]:
    """Return a row of the table."""
    load = os.getloadavg()[0]
    said, lines = run(case, scratch)
    took = {phase: statistics.median(line[f"time_{phase}"] or 0.0 for line in lines[1:]) for phase in PHASES}
    measured = {"memory": lines[-1]["peak_memory_bytes"] - least, "step": sum(took.values()), **took}
    said["step"] = sum(said[phase] for phase in PHASES)
    ratio = {name: round(said[name] / value, 3) for name, value in measured.items() if value}
    tokens = statistics.mean(line["response_tokens"] for line in lines)
    return {
        "case": case._asdict(),
        "load_average": round(load, 1),
        "response_tokens": round(tokens, 1),
        "estimate": said,
        "measured": measured,
        "estimate over measured": ratio,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(CASES), help="some of the cases")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
    rows: dict[str, Any] = {}
    least: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only or CASES:
            case = CASES[name]
            nothing = NOTHING._replace(ranks=case.ranks, options=case.options)
            key = f"{case.ranks} ranks, {dict(case.options).get('dtype', 'float32')}"
            if key not in least:
                least[key] = run(nothing, Path(scratch))[1][-1]["peak_memory_bytes"]
            rows[name] = row = check(case, least[key], Path(scratch))
            said, found, ratio = (row[key] for key in ("estimate", "measured", "estimate over measured"))
            print(
                f"{name:<30} memory {said['memory'] / 2**20:7.0f} MiB / {found['memory'] / 2**20:7.0f} = {ratio['memory']:.2f}   "
                f"step {said['step']:6.2f} s / {found['step']:6.2f} = {ratio['step']:.2f}   "
                + " ".join(f"{phase} {ratio[phase]:.2f}" for phase in PHASES if phase in ratio),
                flush=True,
            )
    off = [n for n, row in rows.items() if abs(row["estimate over measured"]["memory"] - 1) > MEMORY_WITHIN]
    slow = [n for n, row in rows.items() if not 1 / TIME_WITHIN <= row["estimate over measured"]["step"] <= TIME_WITHIN]
    print(f"memory off by more than {MEMORY_WITHIN:.0%}: {', '.join(off) or 'none'}")
    print(f"time off by more than {TIME_WITHIN} x: {', '.join(slow) or 'none'}")
    if arguments.out is not None:
        import machine  # here, since it takes torch into this process

        text = {"environment": machine.stamp(), "least": least, "rows": rows}
        arguments.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
