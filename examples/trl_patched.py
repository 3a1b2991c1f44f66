"""Train with TRL's GRPOTrainer on the ops of this library: two more lines in the script, and the same training.

python examples/trl_patched.py                              # a small random model learns to generate the digit 7
python examples/trl_patched.py --plain                      # TRL without the patch, with the same losses
python examples/trl_patched.py --model Qwen/Qwen2.5-0.5B-Instruct --learning-rate 1e-6
"""

import argparse
import contextlib
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from mgrpo_kernels.integrations.trl import patched  # the first of the two lines
from mgrpo_kernels.train.data import demo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or Hugging Face Hub name (default: a small random model)")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--plain", action="store_true", help="train without the patch")
parser.add_argument("--output", help="output directory (default: a temporary one)")
args = parser.parse_args()


def sevens(completions, **_):
    return [text.count("7") / max(1, len(text)) for text in completions]


set_seed(0)
with tempfile.TemporaryDirectory() as temporary:
    trainer = GRPOTrainer(
        model=args.model or LlamaForCausalLM(demo.model_config()),
        processing_class=None if args.model else demo.make_tokenizer(),
        reward_funcs=sevens,
        train_dataset=Dataset.from_list([{"prompt": each.prompt} for each in demo.make_task(0).train]),
        args=GRPOConfig(
            output_dir=args.output or temporary,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            num_generations=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            max_completion_length=8,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            lr_scheduler_type="constant",
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
        ),
    )
    with contextlib.nullcontext() if args.plain else patched(strict=True):  # the second
        trainer.train()
