"""Who is compared: ours, plain PyTorch and other libraries, each behind one signature for each op.

A peer's function says what it calls, in the version it was written against, and what that cannot do. It imports inside, so that a
peer that is not installed costs a skipped row and no more. Where a peer computes a part of an op only (`computes`), ours beside it
computes that part, and eager PyTorch is also timed on it.

=====================  ============================================================================================
op                     signature
=====================  ============================================================================================
token_stats            (logits ``(N, V)``, labels ``(N,)``) -> (logprob ``(N,)``, entropy ``(N,)``) or (logprob,)
linear_token_stats     (hidden ``(N, H)``, weight ``(V, H)``, labels ``(N,)``) -> the same, or (sum of logprob,)
linear_policy_loss     (hidden ``(B, L, H)``, weight, labels, old log-probs ``(B, L)``, advantages ``(B,)``) -> (loss,)
logits_policy_loss     (logits ``(B, L + 1, V)``, labels, old ``(B, L)``, advantages ``(B,)``) -> (loss,); the last logits
                       of a row score nothing, as a model returns them
policy_loss            (log-probs, old, reference ``(B, L)``, rewards ``(B,)``, group size) -> (loss,)
ema                    (EMAs, parameters, copies, decay) -> None, in place
iqr_filter             (entropies ``(B,)``, group size) -> keep ``(B,)``
=====================  ============================================================================================

Every loss is the clipped surrogate (0.2 to either side) averaged over tokens ("dapo").
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mgrpo_kernels import (
    backend,
    ema_update_,
    grpo_loss,
    iqr_filter,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    token_stats_from_logits,
)
from mgrpo_kernels.ops.linear_token_stats.op import logits_room
from mgrpo_kernels.ops.linear_token_stats.specs import Head

STATS, PART, LOSS = "logprob, entropy", "logprob", "loss"
RECOMPUTE, HELD, IN_FORWARD = (1, 3, 4), (1, 2, 3), (1, 0, 3)  # matmuls of the head's size: forward, backward, both


class Peer(NamedTuple):
    """A provider of an op."""

    name: str
    function: Callable[..., Any]
    computes: str
    gemms: tuple[float, float, float] | Callable[[Tensor, int], tuple[float, float, float]]
    needs: str  # "module:attribute", or nothing
    gpu_only: bool
    slow_on_cpu: bool
    why_not: Callable[[torch.device], str | None] = lambda device: None

    def unavailable(self, device: torch.device) -> str | None:
        """Return why it cannot run here, or None."""
        try:
            load(self.needs)
        except ModuleNotFoundError as missing:
            package = self.needs.replace(":", ".").partition(".")[0]
            if missing.name == package:
                return f"peer {package} is not installed"
            return f"peer {package} does not import here: {missing}"
        except AttributeError:
            package = importlib.import_module(self.needs.partition(".")[0])
            return f"peer {package.__name__} {package.__version__} has no {self.needs.replace(':', '.')}"
        except Exception as error:
            return f"peer {self.needs.partition('.')[0]} does not import here: {type(error).__name__}: {error}"
        if self.gpu_only and device.type != "cuda":
            return f"peer {self.name} runs on a GPU only"
        return self.why_not(device)

    def matmuls(self, hidden: Tensor, vocab: int, step: str) -> float:
        """Return how many matmuls of the head's size a pass takes."""
        gemms = self.gemms(hidden, vocab) if callable(self.gemms) else self.gemms
        return gemms[("forward", "backward", "both").index(step)]


PEERS: dict[str, dict[str, Peer]] = collections.defaultdict(dict)  # op -> name -> provider


def provider(
    op: str,
    name: str,
    computes: str,
    *,
    gemms: Any = (0, 0, 0),
    needs: str = "",
    gpu_only: bool = False,
    slow_on_cpu: bool = False,
    why_not: Callable[[torch.device], str | None] = lambda device: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function under `op`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        PEERS[op][name] = Peer(name, function, computes, gemms, needs, gpu_only, slow_on_cpu, why_not)
        return function

    return enter


def counterpart(op: str, peer: Peer) -> Peer | None:
    """Return ours that computes what `peer` does, to be timed beside it; None where the peer is that itself."""
    ours = next(each for each in PEERS[op].values() if each.name.startswith("ours") and each.computes == peer.computes)
    return None if ours is peer else ours


def load(needs: str) -> Any:
    """Return what "module:attribute" names."""
    if not needs:
        return None
    module, _, attribute = needs.partition(":")
    if module.startswith("verl."):
        _enter_verl()
    return getattr(importlib.import_module(module), attribute)


def _enter_verl() -> None:
    """Make verl's kernel importable where what its trainer needs (ray, tensordict) is not installed.

    ``verl/__init__.py`` imports all of the trainer. The kernel needs two modules of it: the packages above them are entered
    without running their ``__init__``.
    """
    if "verl" in sys.modules:
        return
    found = importlib.util.find_spec("verl")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'verl'", name="verl")
    try:
        importlib.import_module("verl")
    except ModuleNotFoundError:
        root = found.submodule_search_locations[0]
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]
        for name in ("verl", "verl.utils", "verl.utils.kernel"):
            package = types.ModuleType(name)
            package.__path__ = ["/".join([root, *name.split(".")[1:]])]
            sys.modules[name] = package


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


# token_stats


@provider("token_stats", "ours", STATS)
def _(logits, labels):
    """``token_stats_from_logits``."""
    stats = token_stats_from_logits(logits, labels)
    return stats.logprob, stats.entropy


@provider("token_stats", "ours, logprob", PART)
def _(logits, labels):
    """``token_stats_from_logits(stats=("logprob",))``."""
    return (token_stats_from_logits(logits, labels, stats=("logprob",)).logprob,)


@provider("token_stats", "eager", STATS)
def eager_stats(logits, labels):
    """Log-softmax in float32, gather, and -sum p log p: what one writes."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


@provider("token_stats", "eager, logprob", PART)
def eager_logprob(logits, labels):
    """``torch.nn.functional.cross_entropy`` of float32 logits."""
    return (-F.cross_entropy(logits.float(), labels, reduction="none"),)


provider("token_stats", "compile", STATS)(compiled(eager_stats))


@provider("token_stats", "trl", STATS, needs="trl.trainer.utils:selective_log_softmax_and_entropy")
def _(logits, labels):
    """TRL 1.16's ``selective_log_softmax_and_entropy``: one Triton kernel on a GPU, row by row in the logits' dtype elsewhere."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels)


@provider(
    "token_stats", "flash-attn", PART, needs="flash_attn.ops.triton.cross_entropy:cross_entropy_loss", gpu_only=True
)
def _(logits, labels):
    """flash-attn's Triton ``cross_entropy_loss``. No entropy."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return (-cross_entropy_loss(logits, labels)[0],)


@provider("token_stats", "quack", PART, needs="quack.cross_entropy:cross_entropy", gpu_only=True)
def _(logits, labels):
    """QuACK's ``cross_entropy`` (CuTe DSL). No entropy."""
    from quack.cross_entropy import cross_entropy

    return (-cross_entropy(logits, labels, reduction="none"),)


# linear_token_stats


def _stored(hidden: Tensor, vocab: int) -> tuple[float, float, float]:
    """Return the matmuls of a head that stores a share of the logits and computes the others again."""
    name = backend.choose("linear_token_stats", None, hidden.device, hidden.dtype)
    head = Head(hidden.new_empty(vocab, 0), None, 1.0, 1.0, None, 0, None)
    again = 1 - round(logits_room(name, hidden.shape[0], head) / (hidden.shape[0] * vocab), 2)
    return 1, 2 + again, 3 + again


@provider("linear_token_stats", "ours", STATS, gemms=_stored)
def _(hidden, weight, labels):
    """``linear_token_stats``."""
    stats = linear_token_stats(hidden, weight, labels)
    return stats.logprob, stats.entropy


@provider(
    "linear_token_stats",
    "ours, logits stored",
    STATS,
    gemms=HELD,
    why_not=lambda device: None if device.type == "cpu" else "a GPU's default workspace stores logits",
)
def _(hidden, weight, labels):
    """``linear_token_stats`` with room for the logits of all tokens: as many matmuls as those who hold them."""
    room = 4 * hidden.shape[0] * weight.shape[0] + 2**24  # and a tile
    stats = linear_token_stats(hidden, weight, labels, workspace_bytes=room)
    return stats.logprob, stats.entropy


@provider("linear_token_stats", "ours, logprob", PART, gemms=_stored)
def _(hidden, weight, labels):
    """``linear_token_stats(stats=("logprob",))``."""
    return (linear_token_stats(hidden, weight, labels, stats=("logprob",)).logprob,)


@provider("linear_token_stats", "eager", STATS, gemms=HELD)
def eager_head_stats(hidden, weight, labels):
    """Logits by a matmul, held for backward, and their statistics in float32."""
    return eager_stats(hidden @ weight.t(), labels)


@provider("linear_token_stats", "eager, logprob", PART, gemms=HELD)
def _(hidden, weight, labels):
    """Logits by a matmul, held for backward, and ``cross_entropy`` of them in float32."""
    return eager_logprob(hidden @ weight.t(), labels)


provider("linear_token_stats", "compile", STATS, gemms=HELD)(compiled(eager_head_stats))


def _trl_head(hidden, weight, labels, outputs):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )[: len(outputs)]


@provider("linear_token_stats", "trl", STATS, gemms=RECOMPUTE, needs="trl.kernels:ChunkedLogProbFunction")
def _(hidden, weight, labels):
    """TRL 1.16's ``ChunkedLogProbFunction``, the head of ``fused_lm_head=True``, with the outputs that GRPOTrainer asks for.

    Matmul and a Triton kernel tile by tile on a GPU, PyTorch's own operations on the tiles elsewhere.
    """
    return _trl_head(hidden, weight, labels, ("log_probs", "entropy"))


@provider("linear_token_stats", "trl, logprob", PART, gemms=RECOMPUTE, needs="trl.kernels:ChunkedLogProbFunction")
def _(hidden, weight, labels):
    """The same with ``outputs=("log_probs",)``, as it scores a reference model."""
    return _trl_head(hidden, weight, labels, ("log_probs",))


LIGER_HEAD = "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction"


@provider("linear_token_stats", "liger", STATS, gemms=RECOMPUTE, needs=LIGER_HEAD)
def _(hidden, weight, labels):
    """Liger 0.8's fused linear scaled cross-entropy with entropy: CuTe kernels on Hopper, chunks of plain PyTorch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, -100, 1, True)
    return -nll, entropy


@provider(
    "linear_token_stats",
    "ours, liger",
    STATS,
    gemms=RECOMPUTE,
    needs=LIGER_HEAD,
    gpu_only=True,
    why_not=lambda device: (
        backend.backends(device, torch.bfloat16)["linear_token_stats"]["liger"].removeprefix("ok") or None
    ),
)
def _(hidden, weight, labels):
    """``linear_token_stats(backend="liger")``: Liger's kernel behind our arguments."""
    stats = linear_token_stats(hidden, weight, labels, backend="liger")
    return stats.logprob, stats.entropy


@provider("linear_token_stats", "liger, logprob", PART, gemms=RECOMPUTE, needs=LIGER_HEAD)
def _(hidden, weight, labels):
    """The same without entropy."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return (-LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, -100, 1, False),)


@provider(
    "linear_token_stats",
    "liger, cross-entropy",
    PART,
    gemms=IN_FORWARD,
    needs="liger_kernel.ops:LigerFusedLinearCrossEntropyFunction",
    gpu_only=True,
)
def _(hidden, weight, labels):
    """Liger 0.8's fused linear cross-entropy, summed: the gradient is formed in the forward pass. One number, no log-probs.

    The weight's gradient is summed in float32 (``accum_dtype``), as ours is.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    nll, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return (-nll,)


@provider(
    "linear_token_stats",
    "torch",
    PART,
    gemms=RECOMPUTE,
    needs="torch.nn.functional:linear_cross_entropy",
    slow_on_cpu=True,
)
def _(hidden, weight, labels):
    """torch 2.13's ``linear_cross_entropy``, chunked with its own options. No entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return (-F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options),)


@provider(
    "linear_token_stats", "cce", PART, gemms=RECOMPUTE, needs="cut_cross_entropy:linear_cross_entropy", gpu_only=True
)
def _(hidden, weight, labels):
    """CCE 25.1's ``linear_cross_entropy`` with its defaults: gradients below a threshold are left out. No entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(hidden, weight, labels, reduction="none"),)


@provider(
    "linear_token_stats",
    "verl",
    STATS,
    gemms=RECOMPUTE,
    needs="verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
    gpu_only=True,
)
def _(hidden, weight, labels):
    """verl 0.9's ``linear_cross_entropy``: the matmul is a Triton kernel of its own."""
    return tuple(
        load("verl.utils.kernel.linear_cross_entropy:linear_cross_entropy")(hidden, weight, labels, 1.0, "none")
    )


@provider(
    "linear_token_stats",
    "quack",
    PART,
    gemms=IN_FORWARD,
    needs="quack.linear_cross_entropy:chunked_linear_cross_entropy",
    gpu_only=True,
)
def _(hidden, weight, labels):
    """QuACK 0.6's ``chunked_linear_cross_entropy``, summed: the gradient is formed in the forward pass. One number, no log-probs."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return (-chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum"),)


# linear_policy_loss


def _ours_gemms(hidden: Tensor, vocab: int) -> tuple[float, float, float]:
    name = backend.choose("linear_policy_loss", None, hidden.device, hidden.dtype)
    fused, _ = backend.implementation("linear_policy_loss", name).fusion(hidden.device, hidden.dtype)
    return IN_FORWARD if fused else _stored(hidden, vocab)


@provider("linear_policy_loss", "ours", LOSS, gemms=_ours_gemms)
def _(hidden, weight, labels, old, advantages):
    """``linear_policy_loss``: the gradient is formed in the forward pass where that pays."""
    return (linear_policy_loss(hidden, weight, labels, old, advantages, loss_type="dapo").loss,)


@provider("linear_policy_loss", "ours, composed", LOSS, gemms=RECOMPUTE)
def _(hidden, weight, labels, old, advantages):
    """``linear_token_stats``, then ``policy_loss``."""
    stats = linear_token_stats(hidden, weight, labels)
    return (policy_loss(stats.logprob, old, advantages, entropy=stats.entropy.detach(), loss_type="dapo").loss,)


def clipped_loss(logp, old, advantages):
    """The clipped surrogate in plain PyTorch, averaged over tokens; a sequence's advantage stands for its tokens'."""
    ratio, advantages = (logp - old).exp(), advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


@provider("linear_policy_loss", "eager", LOSS, gemms=HELD)
def eager_head_loss(hidden, weight, labels, old, advantages):
    """Logits by a matmul, held for backward; log-softmax in float32; the loss. No entropy."""
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (clipped_loss(logp, old, advantages),)


provider("linear_policy_loss", "compile", LOSS, gemms=HELD)(compiled(eager_head_loss))


def trl_loss(logprobs, entropies, old, advantages, ref=None, kl_coef=0.0):
    """TRL 1.16's ``GRPOTrainer._compute_loss`` on a stand-in for the trainer: its loss and its metrics, which wait for the device."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_coef,
        loss_type="dapo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    ones = torch.ones_like(logprobs, dtype=torch.int64)
    inputs = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ones,
        "completion_mask": ones,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": ones.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@provider("linear_policy_loss", "trl", LOSS, gemms=RECOMPUTE, needs="trl.kernels:ChunkedLogProbFunction")
def _(hidden, weight, labels, old, advantages):
    """TRL 1.16: its chunked head, then `trl_loss`."""
    logprob, entropy = _trl_head(hidden.flatten(0, 1), weight, labels.flatten(), ("log_probs", "entropy"))
    return (trl_loss(logprob.view_as(labels), entropy.view_as(labels), old, advantages),)


@provider(
    "linear_policy_loss", "liger", LOSS, gemms=(3, 0, 4), needs="liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss"
)
def _(hidden, weight, labels, old, advantages):
    """Liger 0.8's ``LigerFusedLinearGRPOLoss``, a sequence at a time: gradients are formed in forward, also where none is asked for.

    Its compiled part is the arithmetic on ``(1, L)`` log-probs; on a CPU it is left uncompiled. No entropy.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=hidden.is_cuda,
        use_ref_model=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
        temperature=1.0,
    )
    mask = torch.ones_like(old)
    return (loss(hidden, weight, labels, mask, advantages, old_per_token_logps=old)[0],)


# logits_policy_loss


@provider("logits_policy_loss", "ours", LOSS)
def _(logits, labels, old, advantages):
    """``token_stats_from_logits``, which a mask tells to skip the last logits of a row, then ``policy_loss``."""
    scored = torch.arange(logits.shape[1], device=logits.device) < labels.shape[1]
    stats = token_stats_from_logits(logits, F.pad(labels, (0, 1)), mask=scored.expand(logits.shape[:-1]))
    logprob, entropy = stats.logprob[:, :-1], stats.entropy.detach()[:, :-1]
    return (policy_loss(logprob, old, advantages, entropy=entropy, loss_type="dapo").loss,)


@provider("logits_policy_loss", "eager", LOSS)
def eager_logits_loss(logits, labels, old, advantages):
    """Log-softmax in float32, the loss. No entropy."""
    logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (clipped_loss(logp, old, advantages),)


provider("logits_policy_loss", "compile", LOSS)(compiled(eager_logits_loss))


@provider("logits_policy_loss", "trl", LOSS, needs="trl.trainer.utils:selective_log_softmax_and_entropy")
def _(logits, labels, old, advantages):
    """TRL 1.16: ``selective_log_softmax_and_entropy`` with the entropy for metrics alone, then `trl_loss`."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprob, entropy = selective_log_softmax_and_entropy(logits[:, :-1], labels, entropy_requires_grad=False)
    return (trl_loss(logprob, entropy, old, advantages),)


@provider(
    "logits_policy_loss", "liger", LOSS, needs="liger_kernel.transformers.grpo_loss:triton_grpo_loss", gpu_only=True
)
def _(logits, labels, old, advantages):
    """Liger 0.8's ``triton_grpo_loss``, its gradient not in place, so that a pass can be repeated. No entropy."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        logits,
        old,
        None,
        labels,
        advantages,
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        inplace=False,
        loss_type="dapo",
        reduce=True,
    )
    return (loss,)


# policy_loss

KL_COEF = 0.005


@provider("policy_loss", "ours", LOSS)
def _(logprobs, old, ref, rewards, group):
    """``grpo_loss``: group advantages and the loss in one op."""
    return (grpo_loss(logprobs, old, rewards, group, ref_logprobs=ref, kl_coef=KL_COEF, loss_type="dapo").loss,)


def eager_advantages(rewards, group):
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


@provider("policy_loss", "eager", LOSS)
def eager_loss(logprobs, old, ref, rewards, group):
    """Advantages, clipped surrogate and KL in plain PyTorch."""
    difference = ref - logprobs
    kl = (difference.exp() - difference - 1).mean()
    return (clipped_loss(logprobs, old, eager_advantages(rewards, group)) + KL_COEF * kl,)


provider("policy_loss", "compile", LOSS)(compiled(eager_loss))


@provider("policy_loss", "trl", LOSS, needs="trl.trainer.grpo_trainer:GRPOTrainer")
def _(logprobs, old, ref, rewards, group):
    """TRL 1.16: `trl_loss`, with advantages in plain PyTorch, as its trainer has them."""
    return (trl_loss(logprobs, torch.zeros_like(old), old, eager_advantages(rewards, group), ref, KL_COEF),)


# ema


@provider("ema", "ours", "ema, copy")
def _(ema, params, emit, decay):
    """``ema_update_``: one launch."""
    ema_update_(ema, params, decay, emit=emit)


@provider("ema", "foreach_lerp", "ema, copy")
def foreach_lerp(ema, params, emit, decay):
    """``torch._foreach_lerp_`` with the casts that mixed dtypes need, 32 tensors at a time to bound the float32 copies."""
    for i in range(0, len(ema), 32):
        some = slice(i, i + 32)
        torch._foreach_lerp_(ema[some], [param.to(ema[i].dtype) for param in params[some]], 1 - decay)
        torch._foreach_copy_(emit[some], ema[some])


@provider("ema", "eager", "ema, copy")
def _(ema, params, emit, decay):
    """``mul_().add_()`` tensor by tensor, as TRL 1.16's SyncRefModelCallback has it, then the copy."""
    for average, param, copy in zip(ema, params, emit, strict=True):
        average.mul_(decay).add_(param, alpha=1 - decay)
        copy.copy_(average)


# iqr_filter


@provider("iqr_filter", "ours", "keep")
def _(entropy, group):
    """``iqr_filter``: one launch."""
    return iqr_filter(entropy, group).keep


@provider("iqr_filter", "eager", "keep")
def eager_filter(entropy, group):
    """What one writes with ``torch.quantile``."""
    groups = entropy.view(-1, group)
    q1, q3 = torch.quantile(groups, torch.tensor([0.25, 0.75], device=entropy.device), dim=1)
    return (groups >= (q1 - 0.75 * (q3 - q1)).unsqueeze(1)).view(-1)


provider("iqr_filter", "compile", "keep")(compiled(eager_filter))
