"""verl with this library beside it: what the plugin has put where, and verl's own loss through it.

    python examples/verl_plugin.py

verl loads the plugin by itself. In a run of verl: actor_rollout_ref.model.use_fused_kernels=True, and
actor_rollout_ref.actor.policy_loss.loss_mode=mgrpo_kernels for the fused loss.
"""

import torch
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import ActorConfig

from mgrpo_kernels.integrations import (
    verl_plugin,
)  # verl has imported it already, unless VERL_USE_EXTERNAL_PLUGINS says none

print(
    f"verl {verl.__version__}: the head is {verl_plugin.patch.library}'s no more, but {kernel.linear_cross_entropy.__module__}'s"
)

torch.manual_seed(0)
tokens, vocabulary, width = 64, 1000, 32
hidden, weight = torch.randn(4, tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
labels = torch.randint(0, vocabulary, (4, tokens))
log_prob, entropy = kernel.linear_cross_entropy(
    hidden, weight, labels, 1.0, "none"
)  # (4, 64) each; the logits are never held

config = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, clip_ratio_high=0.28)
batch = {
    "old_log_prob": log_prob.detach() + 0.3 * torch.randn(4, tokens),
    "log_prob": log_prob,
    "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]).unsqueeze(-1).expand(4, tokens),
    "response_mask": torch.ones(4, tokens, dtype=torch.bool),
    "config": config,
}
for name in ("vanilla", "mgrpo_kernels"):
    for mode in ("token-mean", "seq-mean-token-mean"):
        loss, metrics = get_policy_loss_fn(name)(loss_agg_mode=mode, **batch)
        grad = torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()
        print(f"{name:14} {mode:20} loss {loss:.6f}  gradient {grad:.6f}  clipped {metrics['actor/pg_clipfrac']:.4f}")
