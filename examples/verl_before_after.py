"""Compare verl's actor update without and with this library: loss, gradient norm, entropy, time of a step and peak memory.

    python examples/verl_before_after.py                        # Qwen2.5-0.5B's head on one random layer; minutes on a CPU
    python examples/verl_before_after.py --vocabulary 2000 --width 64 --pairs 1     # seconds

The script runs verl's own model forward (use_fused_kernels, impl_backend torch) and ppo_loss on one batch of random rollouts, for
three steps of gradient descent. "logits" is verl without fused kernels. Each run is a separate process, and the kinds of run
alternate. Times are means over the steps after the first and medians over the pairs: wall-clock seconds, and seconds summed over
the processors. Memory is the peak of the process minus its memory before the first step.
"""

import argparse
import contextlib
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = ("logits", "verl", "patched")
SAME = ("loss", "grad_norm", "entropy")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB


def run(args):
    """Print one run's log as a line of JSON."""
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the plugin would patch "verl" too
    import torch
    import verl.utils.torch_functional as verl_functions
    from tensordict import TensorDict
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.utils import tensordict_utils
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    from mgrpo_kernels.integrations.verl import patched

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        config = Qwen2Config(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=1,
            num_attention_heads=args.width // 64,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(config).to(dtype)
    if args.run != "logits":
        with contextlib.redirect_stdout(sys.stderr):
            patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    vocabulary = model.config.vocab_size

    rows, length = args.rollouts, args.tokens
    tokens = torch.randint(0, vocabulary, (rows, 2 * length))  # half a prompt, half a response
    offsets = torch.arange(rows + 1) * 2 * length

    def nested(values):
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    def scores():
        """Return log-prob and entropy of each token's successor, as verl's engine computes them: ``(B, 2 L)``."""
        labels = tokens.roll(-1, 1)
        if args.run == "logits":
            logits = model(tokens, use_cache=False).logits / args.temperature
            return verl_functions.logprobs_from_logits(logits, labels), verl_functions.entropy_from_logits(logits)
        output = model(input_ids=tokens, use_cache=False, temperature=args.temperature, return_dict=True)
        return output.log_probs, output.entropy

    actor = ActorConfig(strategy="fsdp", rollout_n=rows, ppo_micro_batch_size_per_gpu=rows, entropy_coeff=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    before, lines = peak(), []
    with patched(strict=True) if args.run == "patched" else contextlib.nullcontext():
        with torch.no_grad():
            old = scores()[0][:, length - 1 : -1].float()
        data = TensorDict(
            {
                "prompts": nested(tokens[:, :length]),
                "responses": nested(tokens[:, length:]),
                "attention_mask": nested(torch.ones_like(tokens)),
                "response_mask": nested(torch.ones(rows, length, dtype=torch.int64)),
                "old_log_probs": nested(old),
                "advantages": nested(torch.linspace(-1, 1, rows).unsqueeze(-1).expand(rows, length).contiguous()),
            },
            batch_size=rows,
        )
        tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=rows * length, global_batch_size=rows)
        for _ in range(args.steps):
            start, processor = time.perf_counter(), time.process_time()
            logprob, entropy = (
                torch.nested.nested_tensor_from_jagged(values.flatten().float(), offsets) for values in scores()
            )
            loss, metrics = ppo_loss(actor, {"log_probs": logprob, "entropy": entropy}, data.copy())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            entropy_loss = metrics["actor/entropy_loss"].aggregate()
            line = {"loss": loss.item(), "grad_norm": norm.item(), "entropy": float(entropy_loss)}
            times = {"time": time.perf_counter() - start, "processor": time.process_time() - processor}
            lines.append(line | times)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(json.dumps({"peak": peak() - before, "gradients": gradients, "lines": lines}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hugging Face Hub name (default: a random model)")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="length of a response, and of its prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results to this file, for docs/integrations/verl.md")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    found = {name: [] for name in RUNS}
    for _ in range(args.pairs):
        for name, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
            done = subprocess.run(command, text=True, capture_output=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for step in range(args.steps):
        for name, runs in found.items():
            line = runs[0]["lines"][step]
            print(f"step {step + 1} {name:8}" + "".join(f"  {key} {line[key]:.6g}" for key in SAME))
    print(f"{'':8}  {'step':>8}  {'processors':>10}  {'peak':>9}  of which gradients")
    rows, seconds = [], {}
    for name, runs in found.items():
        seconds[name] = [mean(each, "time") for each in runs]
        step, processors = statistics.median(seconds[name]), statistics.median(mean(each, "processor") for each in runs)
        most = statistics.median(each["peak"] for each in runs)
        print(f"{name:8}  {step:6.2f} s  {processors:8.2f} s  {most:5.0f} MiB  {runs[0]['gradients']:.0f} MiB")
        same = [", ".join(f"{line[key]:.6g}" for line in runs[0]["lines"]) for key in ("loss", "grad_norm")]
        rows.append([name, *same, f"{step:.2f} s", f"{most:.0f} MiB", f"{runs[0]['gradients']:.0f} MiB"])
    if args.out:
        args.out.write_text(json.dumps(result(rows, seconds), indent=1) + "\n", encoding="utf-8")


def mean(run, key):
    """Return the mean of a metric over the steps from the second on."""
    return statistics.mean(line[key] for line in run["lines"][1:])


def result(rows, seconds):
    """Return the results for the documentation: the table, the other runs' times relative to the patched run, and the environment."""
    import torch

    from mgrpo_kernels.train.watch.report import environment

    head = ["", "loss by step", "gradient norm", "step", "peak beyond the model", "of which gradients"]
    lines = [head, ["---"] * len(head), *rows]
    times = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["patched"], strict=True))
        for name in ("logits", "verl")
    }
    here = environment(torch.device("cpu"))
    here["date"] = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return {"environment": here, "arguments": sys.argv[1:], "times": times, "table": table}


if __name__ == "__main__":
    main()
