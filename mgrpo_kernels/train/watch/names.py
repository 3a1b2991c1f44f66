"""Short names of the metrics, for the screen, the legends of curves and the report."""

from __future__ import annotations

NAMES = {
    "step": "step",
    "loss": "loss",
    "gradient_share": "rollouts with a gradient",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "skipped_steps": "skipped steps",
    "reward_mean": "reward",
    "training_fraction": "rollouts that train",
    "groups_with_signal": "prompts with a signal",
    "unparsed_fraction": "no answer found",
    "truncated_fraction": "cut at the limit",
    "distinct_answers": "answers per prompt",
    "vote_share": "vote share",
    "vote_share_of_all": "vote share of all voters",
    "labelled_fraction": "prompts with a label",
    "gold_fraction": "prompts rewarded by true answers",
    "token_weight": "token weight",
    "label_accuracy": "label accuracy",
    "distinct_labels": "distinct labels",
    "top_answer_share": "top answer's share",
    "pruned_fraction": "pruned",
    "entropy": "entropy, nats",
    "kl": "KL, nats",
    "kl_answer": "KL of the answer, nats",
    "kl_reasoning": "KL of the reasoning, nats",
    "clip_fraction": "clipped tokens",
    "masked_fraction": "masked tokens",
    "behaviour_mismatch": "trainer - sampler, nats",
    "momentum_distance": "momentum distance",
    "teacher_agreement": "agreement with the teacher",
    "teacher_vote_share": "teacher's share of the votes",
    "teacher_refreshes": "copies into the teacher",
    "teacher_age": "age of the teacher, steps",
    "teacher_gate": "signs that hold the teacher",
    "response_tokens": "length, tokens",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "peak memory, bytes",
    "time_rollout": "sampling",
    "time_score": "scoring",
    "time_vote": "filter, vote, advantages",
    "time_update": "policy update",
    "time_ema": "momentum update",
    "time_sync": "weights to the sampler",
    "guard": "collapse guard",
    "guard_signs": "signs of collapse",
    "eval_accuracy": "held-out accuracy",
    "eval_greedy": "held-out, greedy",
    "eval_pass_at_k": "held-out, any of k",
    "eval_maj_at_k": "held-out, majority",
    "eval_best_step": "step of the best evaluation",
}
"""By key in metrics.jsonl. Those of errors and changes follow from the accuracy that they belong to."""


def name_of(key: str) -> str:
    """Return the short name of a metric; of a held-out set with a name, that name stands behind it."""
    key, slash, source = key.partition("/")
    if slash:
        return f"{name_of(key)}, {source}"
    for ending, text in (("_change_error", "error of the change"), ("_change", "change"), ("_error", "error")):
        if key not in NAMES and key.endswith(ending):
            return f"{NAMES[key.removesuffix(ending)]}, {text}"
    return NAMES[key]
