"""The language model as the trainer sees it: token ids in; hidden states, logits and the head out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
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

from mgrpo_kernels.lm_head import lm_head
from mgrpo_kernels.train.config import LoraConfig
from mgrpo_kernels.train.errors import UsageError
from mgrpo_kernels.train.model import attention
from mgrpo_kernels.train.model.lean import LeanDecoder, lean_decoder
from mgrpo_kernels.train.model.lora import Adapter

PROBE = [[1, 2, 3, 0], [2, 1]]
"""Prompts that show whether a model keeps sequences in one row apart."""
log = logging.getLogger(__name__)


class HeadOptions(NamedTuple):
    """What lies between hidden states and logits besides the weight."""

    logit_scale: float
    softcap: float | None


class Policy:
    """A causal language model with its tokenizer. Always in evaluation mode: dropout would make log-probs disagree with the sampler.

    Args:
        model: a transformers causal language model, in float32.
        tokenizer: its tokenizer.
        dtype: what matrix products run in; other than float32 by autocast.
        adapter: the model's, where that alone trains.
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
        except TypeError as error:
            raise UsageError(str(error)) from error
        self.head_options = HeadOptions(head.logit_scale, head.softcap)
        # transformers 5 renamed the cache's keyword on the way.
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # four dimensions: transformers takes it as it is
        self._lean: LeanDecoder | None = None
        self.unpackable = self._why_unpackable()
        if self.unpackable is not None:
            log.warning(
                "%s: prompts and responses are padded, which takes more time and memory: %s", type(model).__name__, self.unpackable
            )  # fmt: skip

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the head's weight ``(V, H)`` and bias ``(V,)``."""
        head = lm_head(self.model)
        return head.weight, head.bias

    def hidden(self, ids: Tensor) -> Tensor:
        """Return hidden states ``(B, L, H)`` for right-padded token ids ``(B, L)``: causal, so padding reaches nothing before it."""
        states: Tensor = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def packed_hidden(self, ids: Tensor, positions: Tensor, layout: attention.Layout) -> Tensor:
        """Return hidden states ``(T, H)`` of token ids ``(1, T)`` at `positions`, which see each other as the layout says."""
        if self._lean is not None and self._lean.applies():
            return self._lean(ids[0], positions, layout)
        if self._no_mask.device != ids.device:
            self._no_mask = self._no_mask.to(ids.device)
        out = self.model.get_decoder()(
            input_ids=ids, position_ids=positions, attention_mask=self._no_mask, use_cache=False, layout=layout
        )
        states: Tensor = out.last_hidden_state
        return states[0]

    def how(self) -> str:
        """Say how sequences go through the model."""
        if self.unpackable is not None:
            return f"padded: {self.unpackable}"
        fast = attention.has_flash_attention() and self.device.type == "cuda" and self.dtype != torch.float32
        kernel = "flash-attn" if fast else "PyTorch, padded in attention alone"
        calls = "; layers in few calls" if self._lean is not None and self._lean.applies() else ""
        return f"without padding, a prompt once for its responses; attention by {kernel}{calls}"

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(N, V)`` of hidden states ``(N, H)``."""
        weight, bias = self.head()
        logits = torch.nn.functional.linear(hidden, weight, bias)
        scale, cap = self.head_options
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def _why_unpackable(self) -> str | None:
        """Let the model attend by layouts; return None, or why it cannot, and then leave it as it was."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        if odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            return f"it has layers of the kind {', '.join(odd)}"
        apart = torch.cat([self.hidden(torch.tensor([row], device=self.device))[0] for row in PROBE])
        before = config._attn_implementation
        attention.register()
        self.model.set_attn_implementation(attention.NAME)
        if config._attn_implementation != attention.NAME:
            return "its attention is its own, and takes no other"
        layout = attention.Probe(PROBE, torch.zeros(len(PROBE), dtype=torch.int64, device=self.device))
        try:
            together = self.packed_hidden(layout.ids, layout.positions, layout)
        except Exception as error:  # whatever a model does with a keyword and a mask that it does not know
            why: str | None = f"{type(error).__name__}: {error}"
        else:
            sliding = ["sliding_attention" in kind for kind in kinds] or [bool(getattr(config, "sliding_window", None))]
            why = layout.why_not(apart, together, sliding * (1 if kinds else config.num_hidden_layers))
        if why is not None:
            self.model.set_attn_implementation(before)
            return why
        self._lean = lean_decoder(self.model.get_decoder(), layout.windows)
        if self._lean is not None:
            differs = layout.difference(apart, self.packed_hidden(layout.ids, layout.positions, layout))
            if differs is not None:
                log.warning("%s: runs by its own modules, not in few calls: %s", type(self.model).__name__, differs)
                self._lean = None
        return None

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Extend `cache` by ids ``(B, L)``; return the logits ``(B, V)`` of the token after the last.

        Args:
            ids: left-padded.
            mask: ``(B, cached + L)`` bool, True for tokens.
            positions: ``(B, L)``.
            cache: grows in place.
        """
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
        )
        logits: Tensor = out.logits
        return logits[:, -1]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        return tokens

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Return the texts of ``(B, R)`` responses, without special tokens."""
        rows = [tuple(row[:length]) for row, length in zip(tokens.tolist(), mask.sum(-1).tolist(), strict=True)]
        texts = {row: str(self.tokenizer.decode(list(row), skip_special_tokens=True)) for row in set(rows)}
        return [texts[row] for row in rows]

    @torch.no_grad()
    def check(self) -> None:
        """Raise UsageError for a model whose logits are not the ones that its head gives for its hidden states."""
        ids = torch.tensor([[1, 2, 3, 0]], device=self.device)
        weight, bias = self.head()
        own = torch.nn.functional.linear(self.hidden(ids)[0, -1], weight, bias).float() * self.head_options.logit_scale
        if (cap := self.head_options.softcap) is not None:
            own = cap * torch.tanh(own / cap)
        logits = self.model(input_ids=ids).logits[0, -1].float()
        worst = (own - logits).abs().max().item()
        if not worst <= 1e-3 * max(1.0, logits.abs().max().item()):
            raise UsageError(
                f"model: expected logits that are the head's product with the last hidden state, got {type(self.model).__name__}, "
                f"which differs by {worst:.3g}"
            )


def _eos(generation: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response, by the model's generation configuration and its tokenizer."""
    of_model = getattr(generation, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list) else [of_model]
    found = sorted({each for each in [*ids, tokenizer.eos_token_id] if each is not None})
    if not found:
        raise UsageError(
            "model: expected a tokenizer or a generation configuration with an end-of-sequence token, got none"
        )
    return found


def pick_device(name: str) -> torch.device:
    """Return the device that the option names.

    Raises:
        UsageError: cuda asked for, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: expected auto or cpu on a machine without a GPU, got 'cuda'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def load_policy(
    name: str, device: torch.device, dtype: torch.dtype, lora: LoraConfig | None = None, seed: int = 0
) -> Policy:
    """Load a model and its tokenizer from a directory or a hub name, weights in float32.

    Args:
        name: of the model.
        device: where it goes.
        dtype: of its matrix products.
        lora: with a rank: an adapter is put in, which alone trains.
        seed: of the adapter.

    Raises:
        UsageError: it cannot be loaded, or does not take the adapter.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(unreadable(name, error)) from error
    check_finite(model, name)
    adapter = None if lora is None or lora.lora_rank is None else Adapter(model, lora, seed)
    policy = Policy(model.to(device), tokenizer, dtype, adapter)
    check_tokenizer(tokenizer, policy.eos, policy.head()[0].shape[0], name)
    policy.check()
    return policy


def check_finite(model: nn.Module, name: str) -> None:
    """Raise UsageError for a model with weights that are NaN or infinite."""
    for key, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UsageError(f"model: expected finite weights, got NaN or infinity in {key} of {name}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], vocabulary: int, name: str) -> None:
    """Raise UsageError for a tokenizer that is another model's, or that ends every prompt. It needs no token for padding."""
    largest = max(
        tokenizer.vocab_size - 1, *eos
    )  # tokens added for padding and the like may lie beyond, and are not used
    if largest >= vocabulary:
        raise UsageError(
            f"model: expected a tokenizer whose ids are below the vocabulary of {vocabulary}, got {largest} in {name}"
        )
    last = tokenizer("1")["input_ids"][-1:]
    if last and last[0] in eos:
        raise UsageError(
            f"model: expected a tokenizer that leaves a prompt open, got one that ends it with token {last[0]} in {name}"
        )


def end_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response of a model, without its weights.

    Raises:
        UsageError: there are none.
    """
    try:
        return _eos(GenerationConfig.from_pretrained(name), tokenizer)
    except OSError:  # the model comes without that file, and goes by its configuration
        return _eos(AutoConfig.from_pretrained(name).get_text_config(), tokenizer)


def read_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return a model's tokenizer and the length of its context, where it has one, without its weights.

    Raises:
        UsageError: they cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(unreadable(name, error)) from error
    width = getattr(config.get_text_config(), "hidden_size", 1)
    if width < 1:
        raise UsageError(f"model: expected a hidden size of at least 1, got {width} in the configuration of {name}")
    return tokenizer, context_of(config)


def context_of(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def unreadable(name: str, error: Exception) -> str:
    what = "a directory with a model" if Path(name).exists() else "an existing directory or a hub name"
    reason = str(error).split("\n")[0] if str(error) else type(error).__name__
    return f"model: expected {what} that transformers can load, got {name}: {reason}"
