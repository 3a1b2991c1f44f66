"""Time and memory over the number of tokens, forward and backward: what a fused head is for. Formulas: as in the heads' own files."""

import bench_linear_policy_loss
import bench_linear_token_stats
import pytest
from timing import GPU, SMALL

SIZES = [32, 64] if SMALL else [512, 1024, 2048, 4096, 8192, 16384, 32768] if GPU else [128, 256, 512]
SHAPE = "qwen2.5-7b" if GPU else "qwen2.5-0.5b"
PROVIDERS = ["ours", "eager", "trl", "liger"]
OPS = {"linear_token_stats": bench_linear_token_stats, "linear_policy_loss": bench_linear_policy_loss}


@pytest.mark.parametrize("provider", PROVIDERS)  # varies fastest: inputs and truth are kept from row to row
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", SIZES)
def bench_scaling(benchmark, op, tokens, provider):
    # A CPU makes one round: the tables have more of the same.
    OPS[op].time_it(benchmark, SHAPE, "bfloat16", provider, "both", tokens, patient=not GPU)
    benchmark.extra_info["op"] = op
