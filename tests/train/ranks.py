"""What each of two ranks does in test_train_parallel.py: ``torchrun --nproc-per-node 2 ranks.py BASE DIR``. Any failure ends it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train import export, parallel
from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.ending import leave
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model.lora import Adapter, merged_weights
from mgrpo_kernels.train.model.policy import Policy, load_policy
from mgrpo_kernels.train.run import checkpoint, fingerprint, start

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 4, 5, 6, 2]])


def fail(error: Exception) -> None:
    with parallel.together():
        if not parallel.is_first():
            raise error


def agreeing() -> None:
    assert [list(parallel.my_share(size)) for size in (1, 4, 5)] == (
        [[], [0, 1], [0, 1]] if parallel.is_first() else [[0], [2, 3], [2, 3, 4]]
    )
    assert parallel.total(1, parallel.rank()) == [2, 1]
    assert parallel.on_any(parallel.rank() == 1)
    assert parallel.from_first(parallel.rank()) == 0
    assert parallel.added({str(parallel.rank()): 1.0, "both": 2.0}) == {"0": 1.0, "1": 1.0, "both": 4.0}
    for error, seen in ((UsageError("wrong"), UsageError), (OSError("gone"), RuntimeError)):
        with pytest.raises(seen if parallel.is_first() else type(error), match=str(error)):
            fail(error)


def wrong_use(place: Path) -> None:
    """An error that all ranks meet is the first one's to tell."""
    import tiny

    with (
        pytest.raises(UsageError, match="prompts_per_step: expected at least 2, one for each rank, got 1") as caught,
        parallel.together(),
    ):
        start.check(tiny.config(prompts_per_step=1), place / "run", False, CPU)
    assert caught.value.shown_elsewhere is not parallel.is_first()
    fingerprint.agree({"data": "the same"})
    with pytest.raises(
        UsageError, match=r"rank 1: expected the training prompts of rank 0 \(0 prompts\), got other ones \(1 prompts\)"
    ):
        fingerprint.agree({"data": f"{parallel.rank()} prompts"})


def tied_policy(dtype: torch.dtype, *, lora: bool = False) -> Policy:
    class Tokenizer:
        eos_token_id = 0

    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(shape)
    adapter = Adapter(model, LoraConfig(lora_rank=3), 0) if lora else None  # no rank has as many rows of A as the other
    return Policy(model, Tokenizer(), dtype, adapter)  # type: ignore[arg-type]


def loss_of(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    with policy.autocast():
        hidden = policy.hidden(ids)
        weight, _ = policy.head()
        return -torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)[..., 3].sum()


def training(
    dtype: torch.dtype,
    tolerance: float,
    *,
    activations: bool = False,
    lora: bool = False,
    momentum_device: torch.device | None = None,
) -> tuple[Policy, Policy]:
    """Compare two steps, in which the second rank has one pass less, with those of a model in one piece that sees all; return both."""
    one, policy = tied_policy(torch.float32, lora=lora), tied_policy(dtype, lora=lora)
    start = [each.detach().clone() for each in one.model.parameters()]
    if activations:
        parallel.checkpoint_activations(policy.model)
    parallel.shard(policy)
    assert all(isinstance(each, DTensor) and each.dtype == torch.float32 for each in policy.model.parameters())
    momentum, plain = (
        MomentumModel(policy.model, 0.5, device=momentum_device, frozen=not lora),
        MomentumModel(one.model, 0.5, frozen=not lora),
    )
    optimizers = [torch.optim.AdamW(each.model.parameters(), lr=1e-3, fused=True) for each in (one, policy)]
    for step in range(2):
        batches = [IDS, IDS + 1 + step, IDS + 9]
        for ids in batches[::2] if parallel.is_first() else batches[1::2]:
            loss_of(policy, ids).backward()
        if not parallel.is_first():
            parallel.idle_pass(policy)
        for ids in batches:
            loss_of(one, ids).backward()
        norms = [parallel.whole(torch.nn.utils.clip_grad_norm_(each.model.parameters(), 1.0)) for each in (one, policy)]
        torch.testing.assert_close(norms[1], norms[0], rtol=tolerance, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with CommDebugMode() as communication:
            momentum.update()
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
        plain.update()
    pairs = zip(one.model.parameters(), policy.model.parameters(), start, strict=True)
    apart, moved = torch.zeros(()), torch.zeros(())
    for a, b, before in pairs:
        apart += (parallel.whole(b.detach()) - a.detach()).square().sum()
        moved += (a.detach() - before).square().sum()
    # Adam amplifies rounding of small gradients.
    assert (apart / moved).sqrt() < 30 * tolerance, (apart, moved)
    assert 0 < float(momentum.distance(policy.model)) < 1
    torch.testing.assert_close(momentum.distance(policy.model), plain.distance(one.model), rtol=100 * tolerance, atol=0)
    with torch.no_grad():
        with parallel.gathered(policy.model):
            assert policy.head()[0].dtype == dtype
            own = policy.hidden(IDS)
            with momentum.swapped_into(policy.model):
                assert not torch.equal(policy.hidden(IDS), own)
            assert torch.equal(policy.hidden(IDS), own)
            if policy.adapter is not None:
                with policy.adapter.swapped_into(policy.model):
                    base = policy.hidden(IDS)
                assert torch.equal(policy.hidden(IDS), own)
                assert not torch.equal(base, own)
                want = tied_policy(torch.float32).hidden(IDS).to(dtype)
                torch.testing.assert_close(base, want, rtol=tolerance, atol=tolerance)
        with pytest.raises(RuntimeError, match="expected a model whose weights are gathered"):
            momentum.swapped_into(policy.model).__enter__()
    return policy, one


def adapters(place: Path) -> None:
    """LoRA: the frozen weights keep their bits on all ranks, and what the first writes is what one process would."""
    policy, one = training(torch.float32, 1e-5, lora=True)
    training(torch.float32, 1e-5, lora=True, activations=True)
    training(torch.bfloat16, 0.01, lora=True)
    start = tied_policy(torch.float32, lora=True).model.state_dict()
    for name, value in policy.model.state_dict().items():
        assert ".lora_" in name or torch.equal(parallel.whole(value), start[name]), name

    class Tokenizer:
        def save_pretrained(self, place: Path) -> None:
            pass

    policy.tokenizer = Tokenizer()  # type: ignore[assignment]
    export.save_final(policy, place / "final")
    found = Qwen2ForCausalLM.from_pretrained(place / "final").state_dict()
    for name, value in merged_weights(one.model).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def failing_save(base: str, place: Path) -> None:
    """A disk that is full for one rank alone: all ranks learn of it, and the checkpoint before stands."""
    import tiny

    policy = load_policy(base, CPU, torch.float32)
    learner = tiny.learner(policy)
    said: list[str] = []
    writer = checkpoint.Writer(place, 3, background=True, write_line=said.append)
    writer.save(learner, 1, 0, 0, wait=True)
    real = torch.save
    if not parallel.is_first():

        def full(*_: object, **__: object) -> None:
            raise OSError("no space left")

        torch.save = full  # type: ignore[assignment]
    writer.save(learner, 2, 0, 0)
    writer.settle()
    torch.save = real
    dist.barrier()
    assert sorted(each.name for each in place.iterdir()) == ["latest", "step_1"]
    if parallel.is_first():
        assert len(said) == 1
        assert "rank 1: OSError: no space left; step_1 is complete" in said[0]
    writer.save(learner, 2, 0, 0, wait=True)
    assert checkpoint.load(place / "latest")["ranks"] == 2


def main() -> None:
    torch.set_num_threads(1)
    with parallel.processes(CPU, 60.0):
        agreeing()
        wrong_use(Path(sys.argv[2]))
        training(torch.float32, 1e-5)
        training(torch.float32, 1e-5, activations=True, momentum_device=CPU)
        training(torch.bfloat16, 0.01)
        adapters(Path(sys.argv[2]) / "adapters")
        failing_save(sys.argv[1], Path(sys.argv[2]) / "saves")
        print("rank done", flush=True)


if __name__ == "__main__":
    main()
    leave(0)
