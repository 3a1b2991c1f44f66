"""The decoder of the Llama family with few PyTorch calls.

A small model spends more time between PyTorch's operations than in them, especially when it generates one token at a time. This decoder
uses the weights of a transformers model without calling its modules; a layout computes the attention. It is used for models of certain
classes whose hidden states it reproduces (:meth:`mgrpo_kernels.train.model.policy.Policy.packed_hidden`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.activations import ACT2FN

from mgrpo_kernels.ops.linear_token_stats.layers import linear, rms_norm, rotate, swiglu
from mgrpo_kernels.train.model.attention import Layout

SILU = nn.SiLU, type(ACT2FN["silu"])
FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class Layer(NamedTuple):
    """The modules of a layer. Only their weights are used."""

    number: int
    before: Any  # RMSNorm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    q_norm: Any  # RMSNorm of each head, or None
    k_norm: Any
    o: nn.Linear
    between: Any  # RMSNorm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    act: Any
    scale: float
    window: int | None


class LeanDecoder:
    """Runs a decoder on a single row of tokens.

    Args:
        decoder: model of one of the classes in :data:`FAMILY`.
        windows: attention window of each layer; None for full attention.
    """

    def __init__(self, decoder: Any, windows: Mapping[int, int | None]) -> None:
        self.decoder = decoder
        self.head_dim = decoder.layers[0].self_attn.head_dim
        self.layers = []
        for index, layer in enumerate(decoder.layers):
            a, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                Layer(
                    number=index,
                    before=layer.input_layernorm,
                    q=a.q_proj,
                    k=a.k_proj,
                    v=a.v_proj,
                    q_norm=getattr(a, "q_norm", None),
                    k_norm=getattr(a, "k_norm", None),
                    o=a.o_proj,
                    between=layer.post_attention_layernorm,
                    gate=mlp.gate_proj,
                    up=mlp.up_proj,
                    down=mlp.down_proj,
                    act=mlp.act_fn,
                    scale=a.scaling,
                    window=windows[index],
                )
            )
        self._kinds = [type(each) for each in self._modules()]

    def _modules(self) -> list[Any]:
        return [self.decoder, *self.decoder.layers]

    def applies(self) -> bool:
        """Return whether the modules are unchanged: not wrapped by FSDP2, and without gradient checkpointing."""
        plain = all(type(each) is kind for each, kind in zip(self._modules(), self._kinds, strict=True))
        return plain and not self.decoder.layers[0].gradient_checkpointing

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Return hidden states ``(T, H)`` of token ids ``(T,)`` at `positions`, ``(1, T)``."""
        x = self.decoder.embed_tokens(ids)  # (T, H); without a gradient for the padding token
        cos, sin = self.decoder.rotary_emb(x, positions)
        half = self.head_dim // 2
        cos, sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)  # (T, D)
        for layer in self.layers:
            y = normalized(x, layer.before)
            q, k, v = (project(y, each).view(len(x), -1, self.head_dim) for each in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None:
                q, k = normalized(q, layer.q_norm), normalized(k, layer.k_norm)
            q, k = rotate(q, k, cos, sin)
            x = x + project(
                layout.attend(layer.number, q, k, v, layer.scale, layer.window).reshape(len(x), -1), layer.o
            )
            y = normalized(x, layer.between)
            x = x + project(activated(project(y, layer.gate), project(y, layer.up), layer.act), layer.down)
        return normalized(x, self.decoder.norm)


def lean_decoder(decoder: Any, windows: Mapping[int, int | None]) -> LeanDecoder | None:
    """Return the lean decoder, or None if the model has another class or layers that are not plain linear ones."""
    if type(decoder) not in FAMILY:
        return None
    lean = LeanDecoder(decoder, windows)
    linears = [
        each for layer in lean.layers for each in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    ]
    return lean if all(type(each) is nn.Linear for each in linears) else None


def normalized(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def activated(gate: Tensor, up: Tensor, act: Any) -> Tensor:
    return swiglu(gate, up) if isinstance(act, SILU) else act(gate) * up


def project(x: Tensor, module: nn.Linear) -> Tensor:
    return linear(x, module.weight, module.bias)
