"""Compare a TRL run without and with this library: loss, gradient norm, entropy, time of a step and peak memory.

    python examples/trl_before_after.py                         # Qwen2.5-0.5B's head on two random layers; minutes on a CPU
    python examples/trl_before_after.py --vocabulary 2000 --width 64 --pairs 1     # seconds
    python examples/trl_before_after.py --out FILE.json                            # also writes the results for docs/integrations/trl.md

Each run is a separate process, and the two kinds of run alternate. Rollouts are used twice (num_iterations 2). Times are means
over the steps from the third on, and medians over the pairs. Scoring is a step without its generation: forward passes, loss and
backward pass. On a shared machine compare the processor seconds of one thread (OMP_NUM_THREADS=1), because waiting threads use
processor time too. Memory is the peak of the process minus its memory before training. It includes the gradients and AdamW's
state, which are the same in both runs and are printed separately.
"""

import argparse
import contextlib
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from mgrpo_kernels.integrations.trl import patched
from mgrpo_kernels.train.data import demo
from mgrpo_kernels.train.watch.report import environment

SAME = ("loss", "grad_norm", "entropy")


class Timed(GRPOTrainer):
    """Logs the time of generation, which is the same in both runs, and the processor seconds of a step without it."""

    def _generate(self, prompts):
        start = time.perf_counter(), time.process_time()
        output = super()._generate(prompts)
        self._metrics["train"]["generation_time"].append(time.perf_counter() - start[0])
        self.sampled = time.process_time() - start[1]
        return output

    def training_step(self, *arguments):
        self.sampled, start = 0.0, time.process_time()
        loss = super().training_step(*arguments)
        self._metrics["train"]["scoring_cpu"].append(time.process_time() - start - self.sampled)
        return loss


def even_tokens(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def peak():
    """Return the peak memory of this process in MiB; on a GPU, of its allocations there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(args):
    """Print one run's log as a line of JSON."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=2,
        num_attention_heads=args.width // 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as place:
        trainer = Timed(
            model=LlamaForCausalLM(config),
            processing_class=demo.make_tokenizer(),
            reward_funcs=even_tokens,
            train_dataset=Dataset.from_list([{"prompt": each.prompt} for each in demo.make_task(0).train]),
            args=GRPOConfig(
                output_dir=place,
                max_steps=args.steps,
                learning_rate=1e-4,
                num_generations=8,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=1,
                num_iterations=2,
                max_completion_length=args.tokens,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                bf16=torch.cuda.is_available(),
                disable_tqdm=True,
            ),
        )
        before = peak()
        with patched(strict=True) if args.run == "patched" else contextlib.nullcontext():
            trainer.train()
    parameters = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"peak": peak() - before, "shared": 3 * parameters / 2**20, "lines": lines}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=64, help="longest completion; a step has 8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results to this file")
    parser.add_argument("--run", choices=("plain", "patched"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    found = {"plain": [], "patched": []}
    for _ in range(args.pairs):
        for name, runs in found.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--run", name],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for step in range(args.steps):
        for name, runs in found.items():
            line = runs[0]["lines"][step]
            print(f"step {step + 1} {name:8}" + "".join(f"  {key} {line[key]:.6g}" for key in SAME))
    print(f"{'':8}  {'step':>8}  {'scoring':>8}  {'CPU':>8}  {'peak':>9}  of which gradients and optimizer")
    rows, seconds = [], {}
    for name, runs in found.items():
        seconds[name] = {key: [mean(each, key) for each in runs] for key in ("step", "scoring", "scoring_cpu")}
        most = statistics.median(each["peak"] for each in runs)
        times = [f"{statistics.median(each):6.2f} s" for each in seconds[name].values()]
        print(f"{name:8}  {'  '.join(times)}  {most:5.0f} MiB  {runs[0]['shared']:.0f} MiB")
        line = [f"{runs[0]['lines'][1][key]:.6g}" for key in SAME]
        rows.append(
            [name, *line, *(each.strip() for each in times[:2]), f"{most:.0f} MiB", f"{runs[0]['shared']:.0f} MiB"]
        )
    if args.out:
        args.out.write_text(json.dumps(result(rows, seconds), indent=1) + "\n", encoding="utf-8")


def mean(run, key):
    """Return the mean of a metric over the steps from the third on."""
    lines = run["lines"][2:]
    names = {"step": ["step_time"], "scoring": ["step_time", "generation_time"], "scoring_cpu": ["scoring_cpu"]}[key]
    first, *less = (sum(line.get(name, 0) for line in lines) / len(lines) for name in names)
    return first - sum(less)


def result(rows, seconds):
    """Return the results for the documentation: the table, TRL's times relative to the patched run, and the environment."""
    head = [
        "",
        "loss, step 2",
        "gradient norm",
        "entropy",
        "step",
        "scoring",
        "peak memory",
        "of which gradients and optimizer",
    ]
    lines = [head, ["---"] * len(head), *rows]
    times = {
        key: statistics.median(a / b for a, b in zip(seconds["plain"][key], seconds["patched"][key], strict=True))
        for key in ("step", "scoring")
    }
    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here["date"] = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return {"environment": here, "arguments": sys.argv[1:], "times": times, "table": table}


if __name__ == "__main__":
    main()
