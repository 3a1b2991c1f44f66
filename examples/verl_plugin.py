"""Show what the verl plugin of this library replaces, and compare the fused loss with verl's own.

    python examples/verl_plugin.py

verl loads the plugin automatically. In a training run, set actor_rollout_ref.model.use_fused_kernels=True for the fused head, and
actor_rollout_ref.actor.policy_loss.loss_mode=mgrpo_kernels for the fused loss.
"""

import torch
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import ActorConfig

# verl has already imported the plugin, unless VERL_USE_EXTERNAL_PLUGINS is none
from mgrpo_kernels.integrations import verl_plugin

print(
    f"verl {verl.__version__}: the head of {verl_plugin.patch.library} is now the one of {kernel.linear_cross_entropy.__module__}"
)

torch.manual_seed(0)
tokens, vocabulary, width = 64, 1000, 32
hidden, weight = torch.randn(4, tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
labels = torch.randint(0, vocabulary, (4, tokens))
# (256,) each, as verl's own; the logits are not held
log_prob, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "none")
log_prob = log_prob.view(4, tokens)

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
