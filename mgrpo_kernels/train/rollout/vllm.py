"""Sampling by vLLM, in this process, on the policy's device. The trainer's model is the master: vLLM gets a copy for every rollout."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from mgrpo_kernels import MomentumModel
from mgrpo_kernels.train.config import Config, VllmConfig
from mgrpo_kernels.train.errors import EngineError, UsageError
from mgrpo_kernels.train.model.lora import merged_weights
from mgrpo_kernels.train.model.policy import Policy
from mgrpo_kernels.train.plan.shape import Model, Work, width_of
from mgrpo_kernels.train.rollout import RolloutEngine, Rollouts, seeds_of
from mgrpo_kernels.train.rollout.engines import ENGINES
from mgrpo_kernels.train.rollout.truncation import NO_TRUNCATION, Truncation
from mgrpo_kernels.train.rollout.vllm_start import name_of, start, unties
from mgrpo_kernels.train.score import score

LEAST_TEMPERATURE = ENGINES["vllm"].least_temperature
"""Below it vLLM samples at this temperature."""
GRACE = 60.0
"""Seconds that a call may continue after its time limit, before a timer ends the process."""
PACKAGE_BYTES = 120 * 2**20
"""What importing vLLM adds to a process that has imported transformers."""
PROBE_ROWS, PROBE_TOKENS, PROBE_TEMPERATURE = 4, 8, 0.8
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Mean |trainer - sampler| log-prob that rounding may make, in nats; on small models it was 1e-6 and 2.5e-3."""


NOT_FINITE = "rollout: expected finite log-probs, got NaN or inf: the model's logits are not numbers any more"


class Completion(NamedTuple):
    """A response as vLLM gives it."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    kept: Sequence[Sequence[int]] | None = None  # for each token the entries that truncated sampling kept


class VllmEngine(RolloutEngine):
    """One vLLM engine for policy and momentum model. Before it samples, the weights of the one that is asked for are copied into it.

    They are copied every time: a copy costs little beside a rollout, and a stale one would not show. The prefix cache is emptied with
    them. Requests have seeds of their own, drawn from the caller's generator, so that a run is repeated, and resumed, to the same
    tokens. When built it samples a few tokens, and the trainer scores them: a model that vLLM reads differently is refused.

    Args:
        policy: the model.
        max_tokens: longest response.
        max_prompt: longest prompt, in tokens.
        options: vLLM's share of the configuration.

    Raises:
        UsageError: vLLM is not installed, cannot run this model or does not get its memory, or gives other log-probs than the trainer.
    """

    samples_in_place = False

    @classmethod
    def build(cls, config: Config, policy: Policy, longest_prompt: int) -> VllmEngine:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`. With --vllm-servers the engine is a client of these."""
        from mgrpo_kernels.train.rollout.vllm_server import VllmServers  # needs httpx

        kind = VllmServers if config.vllm.server_urls else VllmEngine
        return kind(policy, config.rollout.max_response_tokens, longest_prompt, config.vllm)

    @classmethod
    def memory(cls, config: Config, model: Model, work: Work, device: str) -> tuple[dict[str, int], dict[str, int]]:
        """Return vLLM's share on a CPU. On a GPU it is vllm_memory of the device, which :meth:`plan_lines` names."""
        if device != "cpu":
            return {}, {}
        cache = config.vllm.vllm_cache_gib or 1.0
        return {
            "vLLM": PACKAGE_BYTES,
            "vLLM's weights": 2
            * width_of(config.model)
            * model.parameters,  # as they are, and rearranged for its matmuls
            "vLLM's cache": round(cache * 2**30),
        }, {}

    @classmethod
    def plan_lines(cls, config: Config, device: str) -> list[str]:
        """See :class:`mgrpo_kernels.train.rollout.RolloutEngine`."""
        if device != "cuda":
            return []
        sleeps = "kept all along" if config.vllm.vllm_sleep is False else "given back between rollouts"
        return [f"  vLLM: {config.vllm.vllm_memory:.0%} of the device's memory beside that, {sleeps}"]

    def __init__(self, policy: Policy, max_tokens: int, max_prompt: int, options: VllmConfig) -> None:
        self._remember(policy, max_tokens, max_prompt, options)
        self.sleeps = policy.device.type == "cuda" if options.vllm_sleep is None else options.vllm_sleep
        if self.sleeps and policy.device.type != "cuda":
            raise UsageError("vllm_sleep: expected a GPU, whose memory is then given back, got the device cpu")
        self._llm = start(policy, self.max_prompt + max_tokens, self.sleeps, options)
        self._asleep = False
        self._untie = unties(policy)
        self._check()

    def _remember(self, policy: Policy, max_tokens: int, max_prompt: int, options: VllmConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "engine: expected transformers under torchrun, since vllm here is one engine of one process, got vllm"
            )
        self.policy = policy
        self.max_tokens = max_tokens
        self.max_prompt = max(max_prompt, PROBE_TOKENS)
        self.timeout = options.vllm_timeout
        self.sync_seconds: float = 0.0
        self._whole = True  # no exchange of weights has been broken off

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        *,
        temperature: float,
        generator: torch.Generator,
        momentum: MomentumModel | None = None,
        first: int = 0,
        truncation: Truncation = NO_TRUNCATION,
    ) -> Rollouts:
        """Sample `copies` responses to each prompt; see :class:`mgrpo_kernels.train.rollout.RolloutEngine`.

        Raises:
            ValueError: a prompt that is empty or longer than the engine was built for; a temperature that vLLM would change.
            EngineError: vLLM failed, or took longer than its time limit. After a failure among the weights it is of no more use.
            FloatingPointError: a log-prob is not finite.
        """
        for prompt in prompts:
            if not 0 < len(prompt) <= self.max_prompt:
                raise ValueError(f"prompts: expected 1 to {self.max_prompt} tokens, got {len(prompt)}")
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: expected 0 or >= {LEAST_TEMPERATURE} with vllm, got {temperature}")
        if not self._whole:
            raise EngineError("vllm: expected a new engine after an exchange of weights that failed, got the old one")
        seeds = seeds_of(prompts, first, generator)
        what = f"vllm: expected {len(prompts) * copies} responses within {self.timeout:g} s (vllm_timeout)"
        deadline = time.monotonic() + self.timeout
        try:
            with ended_after(self.timeout + GRACE, f"{what}, got a call that does not return"):
                self._synchronize(momentum)
                outputs = self._generate(prompts, copies, seeds, temperature, deadline, truncation)
        except TimeoutError as error:
            raise EngineError(f"{what}, got {error}") from None
        except FloatingPointError:
            raise
        except Exception as error:
            raise EngineError(f"{what}, got {type(error).__name__}: {error}") from error
        return self._rollouts(outputs)

    def _synchronize(self, momentum: MomentumModel | None) -> None:
        """Copy the weights of the policy, or of the momentum model, into vLLM, and empty its prefix cache."""
        start = time.perf_counter()
        self._whole = False
        weights = momentum.swapped_into(self.policy.model) if momentum else contextlib.nullcontext()
        with weights:
            self._send(checkpoint_weights(self.policy.model, untie=self._untie))
        self._forget()
        self._whole = True
        self.sync_seconds += time.perf_counter() - start

    def _send(self, weights: dict[str, Tensor]) -> None:
        """Put weights in the place of vLLM's, and wake it for that."""
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer has freed, vLLM may take
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    def _forget(self) -> None:
        """Empty the prefix cache: what is in it is of the weights before."""
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was in use and kept")
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        seeds: Sequence[int],
        temperature: float,
        deadline: float,
        truncation: Truncation,
    ) -> list[Completion]:
        """Return `copies` completions for each prompt; the seed of each is its prompt's and its number."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        truncates = truncation.active and temperature > 0
        # Of truncated sampling vLLM returns the log-probs that it sampled from: those of the entries that it did not keep are -inf.
        most = min(truncation.most, self.policy.head()[0].shape[0]) if truncates else 0
        rows = [(prompt, seed + copy) for prompt, seed in zip(prompts, seeds, strict=True) for copy in range(copies)]
        done: dict[int, Any] = {}
        try:
            for row, (prompt, seed) in enumerate(rows):
                parameters = SamplingParams(
                    temperature=temperature,
                    seed=None if temperature == 0 else seed,
                    max_tokens=self.max_tokens,
                    stop_token_ids=self.policy.eos,
                    ignore_eos=True,  # the trainer's list of ends is the only one
                    logprobs=most,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    top_k=most,
                    top_p=truncation.top_p if truncates else 1.0,
                    min_p=truncation.min_p if truncates else 0.0,
                )
                engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, parameters)
            while engine.has_unfinished_requests():
                self.check()
                for output in engine.step():
                    done[int(output.request_id)] = output.outputs[0]
                self.progress(len(done) / len(rows))
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(done)}")
        except BaseException:
            engine.abort_request([str(row) for row in range(len(rows))])
            raise
        if self.sleeps:
            self._llm.sleep(level=2)  # weights too: they come anew before the next rollout
            self._asleep = True
        return [completion_of(done[row], truncates) for row in range(len(rows))]

    def _rollouts(self, outputs: Sequence[Completion]) -> Rollouts:
        lengths = torch.tensor([len(each.tokens) for each in outputs])
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]  # (B, R)
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        logprobs = torch.zeros(mask.shape, dtype=torch.float32)
        tokens[mask] = torch.tensor([token for each in outputs for token in each.tokens])
        logprobs[mask] = torch.tensor([value for each in outputs for value in each.logprobs], dtype=torch.float32)
        if not bool(torch.isfinite(logprobs).all()):
            raise FloatingPointError(NOT_FINITE)
        last = tokens.gather(1, lengths[:, None] - 1).squeeze(1)
        finished = torch.isin(last, torch.tensor(self.policy.eos))
        device = self.policy.device
        kept = kept_sets(outputs, width)
        rollouts = Rollouts(*(values.to(device) for values in (tokens, mask, logprobs, finished)))
        return rollouts if kept is None else rollouts._replace(kept=kept.to(device))

    def _check(self) -> None:
        """Raise UsageError where vLLM's log-probs are not the trainer's."""
        policy, seed = self.policy, torch.Generator().manual_seed(0)
        vocabulary = policy.head()[0].shape[0]
        prompts = torch.randint(vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=seed).tolist()
        try:
            seen = self.sample(prompts, 1, temperature=PROBE_TEMPERATURE, generator=seed)
        except EngineError as error:
            raise UsageError(
                f"engine: expected a model that vLLM runs, with weights that it takes, got {name_of(policy)}: {error}"
            ) from error
        own = score(
            policy, prompts, seen.tokens, seen.mask, temperature=PROBE_TEMPERATURE, budget=1, stats=("logprob",)
        )
        assert own.logprob is not None
        worst = float((own.logprob - seen.logprobs)[seen.mask].abs().mean())
        if not worst <= PROBE_TOLERANCE[policy.dtype]:
            raise UsageError(
                f"engine: expected a model that vLLM and transformers read alike (mean difference of log-probs at most "
                f"{PROBE_TOLERANCE[policy.dtype]:g} in {policy.dtype}), got {name_of(policy)}, which differs by {worst:.3g}"
            )


def completion_of(output: Any, truncated: bool) -> Completion:
    """Return one of vLLM's outputs as a completion, with the kept sets if sampling was truncated."""
    flat = output.logprobs  # of each token the sampled entry first, then the likeliest ones
    if not truncated:
        return Completion(output.token_ids, flat.logprobs)
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))
    kept = [[flat.token_ids[i] for i in range(*span) if flat.logprobs[i] > -math.inf] for span in spans]
    return Completion(output.token_ids, [flat.logprobs[first] for first, _ in spans], kept)


def kept_sets(outputs: Sequence[Completion], width: int) -> Tensor | None:
    """Return the kept sets of completions as ``(B, R, K)`` int32, padded with -1; None if there are none."""
    sets = [each.kept for each in outputs if each.kept is not None]
    if not sets:
        return None
    most = max(len(ids) for each in sets for ids in each)
    rows = [[[*ids, *[-1] * (most - len(ids))] for ids in each] + [[-1] * most] * (width - len(each)) for each in sets]
    return torch.tensor(rows, dtype=torch.int32)


def checkpoint_weights(model: Any, *, untie: bool) -> dict[str, Tensor]:
    """Return a model's weights under the names that a checkpoint has, which vLLM reads; tied ones once, or under each of their names.

    In memory transformers keeps some weights merged and renamed, experts above all.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=not untie)}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    untied = {name: weight for name, weight in merged_weights(model).items() if name not in tied}
    reverted: dict[str, Tensor] = revert_weight_conversion(model, untied)
    return reverted


@contextlib.contextmanager
def ended_after(seconds: float, reason: str) -> Iterator[None]:
    """End the process, with the reason and every thread's stack, where the block takes longer.

    Python cannot interrupt a call that hangs in compiled code. The last checkpoint remains.
    """

    def end() -> None:
        os.write(2, f"error: {reason}; --resume continues from the last checkpoint\n".encode())
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
