"""The language model of the trainer: computes hidden states, logits and the head from token ids."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from mgrpo_kernels.lm_head import decoder_of, lm_head
from mgrpo_kernels.ops.linear_token_stats import float32_logits
from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model import attention
from mgrpo_kernels.train.model.lean import LeanDecoder, lean_decoder
from mgrpo_kernels.train.model.location import check_model
from mgrpo_kernels.train.model.lora import Adapter

PROBE = [[1, 2, 3, 0], [2, 1]]
"""Prompts that test whether a model separates the sequences in one row."""
NO_KEYWORDS: Mapping[str, Any] = types.MappingProxyType({})
CHECKED = [5, 7, 1, 2, 3, 9, 0, 4, 11]
"""Tokens whose logits are compared with those of the head."""
CACHE_NAMES = "past_key_values", "cache", "cache_params", "state"
"""Names of the cache among a model's keywords and results; RWKV calls it state, and Mamba cache_params."""
log = logging.getLogger(__name__)


class HeadOptions(NamedTuple):
    """The operations of the head besides the matrix product."""

    logit_scale: float
    softcap: float | None


class Policy:
    """A causal language model with its tokenizer. It is in evaluation mode, because dropout would change the log-probs.

    Args:
        model: transformers causal language model, in float32.
        tokenizer: tokenizer of the model.
        dtype: data type of the matrix products; autocast is used if it is not float32.
        adapter: LoRA adapter of the model, if only that trains.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype = torch.float32,
        adapter: Adapter | None = None,
    ) -> None:
        self.model = model.eval()
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.eos = _eos(model.generation_config, tokenizer)
        try:
            head = lm_head(model)
            self._decoder = decoder_of(model)
        except TypeError as error:
            raise UsageError(str(error)) from error
        self.head_options = HeadOptions(head.logit_scale, head.softcap)
        # Releases of transformers 5 and architectures differ in the name of this keyword.
        parameters = inspect.signature(self._decoder.forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
        # transformers does not change a mask with four dimensions.
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self._lean: LeanDecoder | None = None
        self.check()
        self.unpackable = self._why_unpackable()
        if self.unpackable is not None:
            name = type(model).__name__
            log.warning("%s: sequences are padded, which takes more time and memory: %s", name, self.unpackable)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products use the policy's data type."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the head's weight ``(V, H)`` and bias ``(V,)``."""
        head = lm_head(self.model)
        return head.weight, head.bias

    def hidden(self, ids: Tensor) -> Tensor:
        """Return hidden states ``(B, L, H)`` for right-padded token ids ``(B, L)``. Attention is causal, so tokens do not see padding."""
        states: Tensor = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def packed_hidden(self, ids: Tensor, positions: Tensor, layout: attention.Layout) -> Tensor:
        """Return hidden states ``(T, H)`` of token ids ``(1, T)`` at `positions`; the layout computes the attention."""
        if self._lean is not None and self._lean.applies():
            return self._lean(ids[0], positions, layout)
        if self._no_mask.device != ids.device:
            self._no_mask = self._no_mask.to(ids.device)
        out = self._decoder(
            input_ids=ids, position_ids=positions, attention_mask=self._no_mask, use_cache=False, layout=layout
        )
        states: Tensor = out.last_hidden_state
        return states[0]

    def how(self) -> str:
        """Return a description of how sequences are batched and which attention is used."""
        if self.unpackable is not None:
            return f"padded: {self.unpackable}"
        fast = attention.has_flash_attention() and self.device.type == "cuda" and self.dtype != torch.float32
        kernel = "flash-attn" if fast else "PyTorch (padded within attention only)"
        calls = "; lean decoder" if self._lean is not None and self._lean.applies() else ""
        return f"packed without padding, each prompt once for all its responses; attention: {kernel}{calls}"

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(N, V)`` of hidden states ``(N, H)``, float32 as those of the fused head that scores the tokens."""
        logits = float32_logits(hidden, *self.head())
        scale, cap = self.head_options
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def _why_unpackable(self) -> str | None:
        """Let layouts compute the model's attention and return None; if it does not support that, restore it and return the reason."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            return f"its layers have the unsupported type {', '.join(odd)}"
        apart = torch.cat([self.hidden(torch.tensor([row], device=self.device))[0] for row in PROBE])
        before = config._attn_implementation
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        if config._attn_implementation != attention.NAME:
            return "its attention cannot be replaced"
        layout = attention.Probe(PROBE, torch.zeros(len(PROBE), dtype=torch.int64, device=self.device))
        try:
            together = self.packed_hidden(layout.ids, layout.positions, layout)
        except Exception as error:  # a model may raise any error for a keyword or a mask that it does not know
            why: str | None = f"{type(error).__name__}: {error}"
        else:
            sliding = ["sliding_attention" in kind for kind in kinds] or [bool(getattr(config, "sliding_window", None))]
            why = layout.why_not(apart, together, sliding * (1 if kinds else config.num_hidden_layers))
        if why is not None:
            self.model.set_attn_implementation(before)
            return why
        self._lean = lean_decoder(self._decoder, layout.windows)
        if self._lean is not None:
            differs = layout.difference(apart, self.packed_hidden(layout.ids, layout.positions, layout))
            if differs is not None:
                log.warning(
                    "%s: runs its own modules instead of the lean decoder: %s", type(self.model).__name__, differs
                )
                self._lean = None
        return None

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Extend `cache` by ids ``(B, L)``; return the float32 logits ``(B, V)`` of the next token.

        Args:
            ids: left-padded token ids.
            mask: ``(B, cached + L)`` bool, True for tokens.
            positions: ``(B, L)`` positions of the tokens.
            cache: key-value cache, which is extended in place.
        """
        out = self._decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{self._cache_name: cache}
        )
        return self.logits(out.last_hidden_state[:, -1])

    def step(self, ids: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits ``(B, V)`` of the token after ids ``(B, L)`` and the model's state for the next call, which begins empty.

        The state is whatever cache the model creates itself.
        """
        out = self._decoder(input_ids=ids, use_cache=True, **state)
        found = {name: out[name] for name in CACHE_NAMES if out.get(name) is not None}
        return self.logits(out.last_hidden_state[:, -1]), found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        tokens: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        return tokens

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Return the texts of ``(B, R)`` responses, without special tokens."""
        rows = [tuple(row[:length]) for row, length in zip(tokens.tolist(), mask.sum(-1).tolist(), strict=True)]
        texts = {row: str(self.tokenizer.decode(list(row), skip_special_tokens=True)) for row in set(rows)}
        return [texts[row] for row in rows]

    @torch.no_grad()
    def check(self) -> None:
        """Raise UsageError if the model is not causal, or if its logits are not those that its head computes from its hidden states."""
        name, ids = type(self.model).__name__, torch.tensor([CHECKED], device=self.device)
        ids = ids % self.head()[0].shape[0]
        versions = [weight._version for weight in self.model.parameters()]
        try:
            whole, part = (self.model(input_ids=each, use_cache=False).logits[0].float() for each in (ids, ids[:, :-3]))
            hidden = self.hidden(ids)[0]
        except Exception as error:  # a model may raise any error for what it does not support
            raise UsageError(
                f"model: expected a causal language model that runs on token ids alone, got {name}: {first_line(error)}"
            ) from error
        if versions != [weight._version for weight in self.model.parameters()]:  # RWKV scales them for inference
            raise UsageError(
                f"model: expected one that leaves its weights as they are, got {name}, which changes them when it runs: "
                f"choose a model of another architecture"
            )
        tolerance = 1e-4 * max(1.0, whole.abs().max().item())
        change = (whole[: len(part)] - part).abs().max().item()
        if not change <= tolerance:
            raise UsageError(
                f"model: expected a causal language model, got {name}, whose logits change by {change:.3g} with the tokens that follow: "
                f"choose a model of another architecture"
            )
        weight, bias = self.head()
        worst = float("inf")
        if hidden.shape[-1] == weight.shape[1] and whole.shape == (len(hidden), weight.shape[0]):
            own = torch.nn.functional.linear(hidden, weight, bias).float() * self.head_options.logit_scale
            if (cap := self.head_options.softcap) is not None:
                own = cap * torch.tanh(own / cap)
            worst = (own - whole).abs().max().item()
        if not worst <= tolerance:
            raise UsageError(
                f"model: expected logits that are the product of the head and the last hidden state, got {name}, "
                f"which differs by {worst:.3g}: choose a model of another architecture"
            )


def _eos(generation: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response, from the model's generation configuration and its tokenizer."""
    of_model = getattr(generation, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list) else [of_model]
    found = sorted({each for each in [*ids, tokenizer.eos_token_id] if each is not None})
    if not found:
        raise UsageError(
            "model: expected a tokenizer or a generation configuration with an end-of-sequence token, got none"
        )
    return found


def pick_device(name: str) -> torch.device:
    """Return the device for the value of --device.

    Raises:
        UsageError: the value is cuda, and there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: expected auto or cpu on a machine without a GPU, got 'cuda'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def load_policy(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    lora: LoraConfig | None = None,
    seed: int = 0,
    loading: Mapping[str, Any] = NO_KEYWORDS,
) -> Policy:
    """Load a model and its tokenizer from a directory or a hub name, weights in float32.

    Args:
        name: name of the model.
        device: device to which it is moved.
        dtype: data type of its matrix products.
        lora: LoRA options; if they have a rank, an adapter is added, and only that trains.
        seed: random seed of the adapter.
        loading: more keywords of ``from_pretrained``.

    Raises:
        UsageError: the model cannot be loaded, or the adapter does not fit it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **loading)
    except Exception as error:  # the code of an architecture may raise any error
        raise UsageError(unreadable(name, error)) from error
    check_finite(model, name)
    adapter = None if lora is None or lora.lora_rank is None else Adapter(model, lora, seed)
    policy = Policy(model.to(device), tokenizer, dtype, adapter)
    check_tokenizer(tokenizer, policy.eos, policy.head()[0].shape[0], name)
    return policy


def check_finite(model: nn.Module, name: str) -> None:
    """Raise UsageError for a model with weights that are NaN or infinite."""
    for key, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UsageError(f"model: expected finite weights, got NaN or infinity in {key} of {name}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], vocabulary: int, name: str) -> None:
    """Raise UsageError for a tokenizer of another model, or one that ends every prompt. It needs no padding token."""
    largest = max(tokenizer.vocab_size - 1, *eos)  # added tokens, such as padding, may be larger, and are not used
    if largest >= vocabulary:
        raise UsageError(
            f"model: expected a tokenizer whose ids are below the vocabulary of {vocabulary}, got {largest} in {name}"
        )
    last = tokenizer("1")["input_ids"][-1:]
    if last and last[0] in eos:
        raise UsageError(
            f"model: expected a tokenizer that does not end a prompt, got one that appends the end token {last[0]} in {name}"
        )


def end_tokens(name: str, tokenizer: PreTrainedTokenizerBase, loading: Mapping[str, Any] = NO_KEYWORDS) -> list[int]:
    """Return the tokens that end a response of a model, without loading its weights.

    Raises:
        UsageError: there are no such tokens.
    """
    try:
        return _eos(GenerationConfig.from_pretrained(name, **loading), tokenizer)
    except OSError:  # without that file, the model's configuration names them
        return _eos(AutoConfig.from_pretrained(name, **loading).get_text_config(), tokenizer)


def read_tokenizer(name: str, loading: Mapping[str, Any] = NO_KEYWORDS) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return a model's tokenizer and its context length, if there is one, without loading its weights.

    Raises:
        UsageError: the tokenizer or the configuration cannot be read.
    """
    check_model(name)
    try:
        config = AutoConfig.from_pretrained(name, **loading)
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(unreadable(name, error)) from error
    width = getattr(config.get_text_config(), "hidden_size", 1)
    if width < 1:
        raise UsageError(f"model: expected a hidden size of at least 1, got {width} in the configuration of {name}")
    return tokenizer, context_of(config)


def context_of(config: PretrainedConfig) -> int | None:
    """Return the context length of a model, or None if it has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def unreadable(name: str, error: Exception) -> str:
    """Return the message for a model that cannot be loaded."""
    what = "a directory with a model" if Path(name).exists() else "a directory, or a name on the Hugging Face Hub,"
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it comes with Python code of its own, which --trust-remote-code runs: read it first"
    there = "" if Path(name).exists() else " (there is no such directory)"
    return f"model: expected {what} that transformers can load, got {name}{there}: {reason}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
