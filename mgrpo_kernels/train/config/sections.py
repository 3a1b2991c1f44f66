"""The options of data, method, rollouts, loss and optimizer, one frozen dataclass per section."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from mgrpo_kernels.method import MethodOptions
from mgrpo_kernels.method.fields import option
from mgrpo_kernels.method.options import MOMENTUM_GROUP
from mgrpo_kernels.ops.policy_loss.inputs import check_behaviour_mode
from mgrpo_kernels.ops.policy_loss.options import OFF_POLICY, LossForm, check_bounds
from mgrpo_kernels.train.config.fields import Section
from mgrpo_kernels.train.config.servers import check_urls, split_urls
from mgrpo_kernels.train.rollout.engines import ENGINES, EngineName
from mgrpo_kernels.train.rollout.truncation import MOST_KEPT, Truncation

DEFAULT_TEMPLATE = "{question}\nThink step by step, and end with the final answer inside \\boxed{}.\n"
LEAST_TEMPERATURE = 1e-4  # below it, logits over the temperature are rounded by more than log-probs differ
# A test compares these names with the table of loss types.
LossName = Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo", "dppo_tv", "dppo_kl", "gmpo"]


@dataclass(frozen=True)
class DataConfig(Section):
    """data."""

    data: str | None = option(
        None,
        "training prompts: a file FILE.jsonl, FILE.json (a list of objects), FILE.csv, each also with .gz, or FILE.parquet, or a data set "
        "(a directory or a Hugging Face Hub name) as NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; the split is train unless it is given. "
        "Several are separated by commas, each with @WEIGHT for a mixture in these proportions",
        if_none="the built-in arithmetic problems",
        metavar="FILE_OR_NAME",
    )
    eval_data: str | None = option(
        None,
        "held-out prompts with true answers: a file FILE.jsonl, FILE.json or FILE.parquet, or a data set as NAME, NAME:SPLIT or "
        "NAME:CONFIG:SPLIT; the split is test unless it is given. Several are separated by commas; with names, as in "
        "easy=FILE,hard=FILE, each also has an accuracy of its own",
        if_none="no evaluation",
        metavar="FILE_OR_NAME",
    )
    prompt_field: str | None = option(
        None,
        "field of the data that holds the question, as a text or as a list of messages; a dot leads into an object (extra.question)",
        if_none="question if the data have it, else prompt or problem",
        metavar="NAME",
    )
    answer_field: str | None = option(
        None,
        "field of the data that holds the true answer, a list of answers that are all right, or a solution that ends with the answer; a "
        "dot leads into an object (reward_model.ground_truth); training uses it only for --method gold, "
        "--gold-labels and the metric label_accuracy",
        if_none="answer if the data have it, else solution",
        metavar="NAME",
    )
    paraphrase_field: str | None = option(
        None,
        "field of the data with another wording of the question, which some methods read",
        if_none="paraphrase, where the method reads one",
        metavar="NAME",
    )
    max_examples: int | None = option(
        None, "number of training prompts that are used, from the first on", if_none="all", unit="prompts", at_least=1
    )
    shuffle_data: bool = option(
        False, "shuffle the training prompts by --seed, before --max-examples takes the first of them"
    )
    answer_from: Literal["auto", "boxed", "phrase", "last-number"] = option(
        "auto",
        "part of a response that gives its answer: the last box, <answer> tag, #### or answer phrase, or else the value that ends the "
        "response (auto); only boxes (boxed); auto without a bare value at the end (phrase); or the last number (last-number)",
    )
    answer_pattern: str | None = option(
        None,
        "regular expression whose last match in a response gives its answer: its group, if it has one, else the whole match",
        if_none="--answer-from decides",
        metavar="REGEX",
    )
    answer_extractor: str | None = option(
        None,
        "function of your own, as module:function, that takes a response and returns its answer or None",
        if_none="--answer-from decides",
        metavar="MODULE:FUNCTION",
    )
    answer_kind: Literal["any", "number"] = option(
        "any", "kind of answers that count: any, or only numbers, so that 59+63 is no answer where 122 is asked for"
    )
    prompt_template: str = option(
        DEFAULT_TEMPLATE,
        "template of the prompt, as text or as the name of a text file, in which {question} is replaced by the question",
        metavar="TEXT_OR_FILE",
    )
    chat_template: Literal["auto", "on", "off"] = option(
        "auto",
        "whether the prompt becomes a user message in the tokenizer's chat template; auto decides by whether the model ends a response "
        "with the template's end-of-turn token, which base models do not",
    )
    system_prompt: str | None = option(
        None,
        "system message, as text or as the name of a text file, that precedes the question if the data have none of their own",
        if_none="no system message",
        metavar="TEXT_OR_FILE",
    )
    chat_template_kwargs: str | None = option(
        None,
        'arguments of the chat template, as a JSON object: {"enable_thinking": false}',
        if_none="those of the template",
        metavar="JSON",
    )
    long_prompts: Literal["stop", "skip"] = option(
        "stop",
        "what happens if a prompt plus the longest response exceeds the model's context length: an error before the run starts (stop), "
        "or the prompt is left out (skip)",
    )

    def check(self) -> None:
        _ = self.template_arguments

    @property
    def template_arguments(self) -> dict[str, Any]:
        """The arguments of the chat template, by name."""
        text = "{}" if self.chat_template_kwargs is None else self.chat_template_kwargs
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f'chat_template_kwargs: expected a JSON object like {{"enable_thinking": false}}, got {text}'
            )
        return found


@dataclass(frozen=True)
class MethodConfig(MethodOptions, Section):
    """method."""

    momentum_device: Literal["auto", "cpu"] = option(
        "auto",
        "where the momentum model and the reference model of the KL penalty are kept: on the model's device (auto) or in CPU memory "
        "(cpu)",
        group=MOMENTUM_GROUP,
    )
    reward: str | None = option(
        None,
        "function of your own, as module:function, that rewards the responses; it takes the keywords prompts, responses, answers and "
        "golds, a list each, and returns a list of numbers",
        if_none="--method rewards them",
        metavar="MODULE:FUNCTION",
    )
    reward_share: float = option(
        1.0,
        "share of --reward in the reward of a rollout; the rest is the reward of --method, so that 1 is --reward alone",
        above=0.0,
        at_most=1.0,
    )


@dataclass(frozen=True)
class RolloutConfig(Section):
    """rollouts."""

    engine: EngineName = option("transformers", "rollout engine that generates the responses", table=ENGINES)
    prompts_per_step: int = option(8, "number of prompts sampled in each step", unit="prompts", at_least=1)
    rollouts: int = option(
        32, "number of rollouts per prompt, including those of the momentum model", unit="rollouts", at_least=2
    )
    max_response_tokens: int = option(3072, "maximum length of a response", unit="tokens", at_least=1)
    truncated: Literal["keep", "mask"] = option(
        "keep", "whether a rollout that was cut at --max-response-tokens trains and votes (keep) or only votes (mask)"
    )
    temperature: float = option(
        1.1,
        "sampling temperature of the rollouts; log-probabilities, entropy and loss use the same temperature",
        at_least=LEAST_TEMPERATURE,
    )
    top_p: float = option(
        1.0,
        f"threshold of nucleus sampling: each token is drawn from the likeliest ones (at most {MOST_KEPT}) whose probabilities add up to "
        "this, and scored among these alone; 1 disables it",
        above=0.0,
        at_most=1.0,
    )
    top_k: int = option(
        0,
        "number of likeliest tokens from which top-k sampling draws each token, and among which alone it is scored; 0 disables it",
        at_least=0,
        at_most=MOST_KEPT,
    )
    min_p: float = option(
        0.0,
        f"min-p sampling: each token is drawn from those (at most {MOST_KEPT}) that have at least this share of the largest probability, "
        "and scored among these alone; 0 disables it",
        at_least=0.0,
        at_most=1.0,
    )
    tokens_per_microbatch: int = option(
        16384, "maximum number of tokens in one forward pass, including padding", unit="tokens", at_least=1
    )

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_p, self.top_k, self.min_p)


@dataclass(frozen=True)
class VllmConfig(Section):
    """vLLM (requires --engine vllm)."""

    vllm_memory: float = option(
        0.5,
        "share of the GPU's memory that vLLM may use for weights, activations and key-value cache (its gpu_memory_utilization)",
        above=0.0,
        at_most=1.0,
    )
    vllm_cache_gib: float | None = option(
        None,
        "size of vLLM's key-value cache in GiB",
        unit="GiB",
        if_none="what --vllm-memory leaves on a GPU, 1 GiB on a CPU",
        above=0.0,
    )
    vllm_sleep: bool | None = option(
        None,
        "release vLLM's GPU memory, weights and key-value cache, between the rollouts of one step and the next",
        if_none="on with a GPU, else off",
    )
    vllm_eager: bool | None = option(
        None,
        "run vLLM without compiled graphs, which starts faster but generates more slowly",
        if_none="off with a GPU, else on",
    )
    vllm_timeout: float = option(
        3600.0,
        "time limit of one sampling call to vLLM; a call that takes longer ends the run with an error",
        unit="seconds",
        above=0.0,
    )
    vllm_servers: str | None = option(
        None,
        "URLs of vLLM servers that generate the responses, separated by commas; each server is started with "
        "python -m mgrpo_kernels.train.serve",
        if_none="vLLM runs in the training process",
        metavar="URL[,URL...]",
    )

    @property
    def server_urls(self) -> list[str]:
        """The URLs in `vllm_servers`."""
        return split_urls(self.vllm_servers)

    def check(self) -> None:
        check_urls(self.vllm_servers)
        if self.server_urls:
            for each in dataclasses.fields(self):
                if each.name not in ("vllm_servers", "vllm_timeout") and getattr(self, each.name) != each.default:
                    raise ValueError(
                        f"{each.name}: expected no value together with --vllm-servers, got {getattr(self, each.name)!r}: give vLLM's own "
                        "option to each server instead"
                    )


@dataclass(frozen=True)
class LossConfig(Section, LossForm):
    """loss."""

    # The other options of the loss, with their defaults and help texts, are inherited from the policy loss.
    loss_type: LossName = option(
        "dapo",
        "policy loss: the surrogate objective and how it is averaged; dapo averages over all tokens of the step, as in the paper",
    )
    kl_coef: float = option(
        0.005, "coefficient of the KL penalty; 0 disables the KL penalty, so no reference model is kept", at_least=0.0
    )
    entropy_coef: float = option(0.0, "coefficient of the entropy bonus", at_least=0.0)
    advantage_scale: Literal["std", "batch", "none", "mean"] = option(
        "std",
        "divisor of the advantages: the standard deviation of the rewards of the prompt (std) or of the step (batch), none (Dr. GRPO), or "
        "the absolute value of the prompt's mean reward (mean; MaxRL)",
    )
    top_entropy_share: float = option(
        1.0,
        "share of the step's tokens, those with the highest entropies under the policy that sampled them, that have a policy loss; the "
        "others keep their KL penalty (arXiv 2506.01939)",
        above=0.0,
        at_most=1.0,
    )
    kl_reference: Literal["base", "momentum", "none"] = option(
        "base",
        "reference model of the KL penalty: the model at the start of the run (base), the momentum model (momentum), or none, which "
        "disables the KL penalty",
    )
    behaviour_correction: bool | None = option(
        None,
        "weight each token by the ratio of its probabilities in the trainer and in the rollout engine, which --behaviour-mode and "
        "--behaviour-cap bound",
        if_none="on for vllm, which rounds differently, off for transformers",
        group=OFF_POLICY,
    )

    def check(self) -> None:
        check_behaviour_mode(self)
        check_bounds(self)

    @property
    def behaviour_text(self) -> str:
        """The behaviour correction in words, for the plan."""
        level, _, bound = self.behaviour_mode.partition("_")
        least, most = f"{self.behaviour_floor:g}", f"{self.behaviour_cap:g}"
        if bound == "truncate":
            bounded = f"truncated at {most}" if self.behaviour_floor == 0 else f"truncated to [{least}, {most}]"
        else:
            bounded = f"set to 0 above {most}" if self.behaviour_floor == 0 else f"set to 0 outside [{least}, {most}]"
        weights = "no weights" if level == "none" else f"{level} weights (trainer / rollout engine), {bounded}"
        if self.geometric_cap is None and self.geometric_floor == 0:
            return weights
        most = "inf" if self.geometric_cap is None else f"{self.geometric_cap:g}"
        return f"{weights}; sequences masked where their geometric mean is outside [{self.geometric_floor:g}, {most}]"

    def keywords(self) -> dict[str, Any]:
        """Return the options as keywords of the policy loss."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(LossForm)}


@dataclass(frozen=True)
class OptimConfig(Section):
    """optimizer (AdamW)."""

    steps: int = option(500, "number of steps, each on one batch of new rollouts", unit="steps", at_least=1)
    updates_per_batch: int = option(
        1,
        "number of optimizer steps on each batch of rollouts; from the second one on, the importance ratios differ from 1 and the clip "
        "range takes effect",
        unit="updates",
        at_least=1,
    )
    learning_rate: float = option(1e-6, "peak learning rate, reached after the warm-up", above=0.0)
    lr_schedule: Literal["cosine", "constant"] = option(
        "cosine",
        "learning rate after the warm-up: it falls to zero along a cosine (cosine) or stays at its peak (constant)",
    )
    warmup: float = option(
        0.1, "share of the steps in which the learning rate rises linearly to its peak", at_least=0.0, below=1.0
    )
    adam_betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of AdamW's averages of the gradient and of its square", at_least=0.0, below=1.0
    )
    weight_decay: float = option(0.0, "coefficient of AdamW's weight decay", at_least=0.0)
    max_grad_norm: float = option(
        1.0, "largest L2 norm of the gradient; a larger gradient is scaled down to it", above=0.0
    )
    gradient_tolerance: float = option(
        0.0,
        "share of each token's absolute logit gradient that the head's backward pass may leave out, which saves most of its time; "
        "0 leaves nothing out",
        at_least=0.0,
        below=1.0,
    )

    @property
    def warmup_steps(self) -> int:
        """The number of steps of the warm-up, rounded up."""
        return -int(-self.warmup * self.steps // 1)
