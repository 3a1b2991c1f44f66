"""Train with M-GRPO in TRL, without a reward function and without answers: the majority of policy and momentum model is the label.

python examples/trl_mgrpo.py                                # sums modulo 10, with a small model that is right about half of the time
python examples/trl_mgrpo.py --model Qwen/Qwen2.5-0.5B-Instruct --learning-rate 1e-6
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset

from mgrpo_kernels import extract_answer
from mgrpo_kernels.integrations.trl import MGRPOConfig, MGRPOTrainer, patched
from mgrpo_kernels.train.data import demo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", help="directory or Hugging Face Hub name (default: a small model that this script warm-starts)"
)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--warm-steps", type=int, default=600, help="warm-start steps of the small model")
parser.add_argument("--output", help="output directory (default: a temporary one)")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    model = args.model
    if model is None:
        model = str(Path(temporary) / "model")
        demo.make_model(Path(model), seed=0, device=torch.device("cpu"), warm_steps=args.warm_steps)
    trainer = MGRPOTrainer(
        model=model,
        train_dataset=Dataset.from_list([{"prompt": each.prompt} for each in demo.make_task(0).train]),
        extract=extract_answer if args.model else demo.after_hash,
        args=MGRPOConfig(
            output_dir=args.output or temporary,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            momentum_rollouts=4,
            num_generations=16,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=4,
            logging_steps=1,
            report_to=[],
            max_completion_length=12 if args.model is None else 512,
            save_strategy="no",
            lr_scheduler_type="constant",
            equivalence="math" if args.model else "exact",
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
        ),
    )
    with patched(strict=True):
        trainer.train()
