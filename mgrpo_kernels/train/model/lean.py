"""The decoder of the Llama family in as few calls as it takes.

A small model spends more time between PyTorch's operations than in them, above all while it samples a token at a time. This runs the
layers of a transformers model from its own weights without its modules' calls; the attention is a layout's. Which models it takes is
decided by their class and then by their hidden states (:meth:`mgrpo_kernels.train.model.policy.Policy.packed_hidden`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model

from mgrpo_kernels.train.model.attention import Layout

FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


class Layer(NamedTuple):
    """The modules of a layer, of which only the weights are used."""

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
    """Runs a decoder for a single row of tokens.

    Args:
        decoder: of one of the classes in :data:`FAMILY`.
        windows: of each layer's attention.
    """

    def __init__(self, decoder: Any, windows: Mapping[int, int | None]) -> None:
        self.decoder = decoder
        self.head_dim = decoder.layers[0].self_attn.head_dim
        self.layers = []
        for index, layer in enumerate(decoder.layers):
            a, mlp = layer.self_attn, layer.mlp
            norms = getattr(a, "q_norm", None), getattr(a, "k_norm", None)
            self.layers.append(
                Layer(
                    index, layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj, *norms, a.o_proj,
                    layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, a.scaling, windows[index],
                )
            )  # fmt: skip
        self._kinds = [type(each) for each in self._modules()]

    def _modules(self) -> list[Any]:
        return [self.decoder, *self.decoder.layers]

    def applies(self) -> bool:
        """Return whether the modules are still what they were: not wrapped by FSDP2, and nothing to recompute in backward."""
        plain = all(type(each) is kind for each, kind in zip(self._modules(), self._kinds, strict=True))
        return plain and not self.decoder.layers[0].gradient_checkpointing

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Return hidden states ``(T, H)`` of token ids ``(T,)`` at `positions`, ``(1, T)``."""
        x = self.decoder.embed_tokens(ids)  # (T, H); it gives the padding token no gradient
        cos, sin = self.decoder.rotary_emb(x, positions)
        half = self.head_dim // 2
        cos = cos[0].unsqueeze(1)  # (T, 1, D)
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).unsqueeze(
            1
        )  # its sign is that of the half it meets
        for layer in self.layers:
            y = normalized(x, layer.before)
            q, k, v = (project(y, each).view(len(x), -1, self.head_dim) for each in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None:
                q, k = normalized(q, layer.q_norm), normalized(k, layer.k_norm)
            both = torch.cat([q, k], dim=1)
            turned = torch.cat([both[..., half:], both[..., :half]], dim=-1)
            q, k = torch.addcmul(both * cos, turned, sin).split([q.shape[1], k.shape[1]], dim=1)
            x = x + project(
                layout.attend(layer.number, q, k, v, layer.scale, layer.window).reshape(len(x), -1), layer.o
            )
            y = normalized(x, layer.between)
            x = x + project(layer.act(project(y, layer.gate)) * project(y, layer.up), layer.down)
        return normalized(x, self.decoder.norm)


def lean_decoder(decoder: Any, windows: Mapping[int, int | None]) -> LeanDecoder | None:
    """Return the decoder in few calls, or None where it is of another class or has adapters in its place."""
    if type(decoder) not in FAMILY:
        return None
    lean = LeanDecoder(decoder, windows)
    linears = [
        each for layer in lean.layers for each in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    ]
    return lean if all(type(each) is nn.Linear for each in linears) else None


def normalized(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def project(x: Tensor, module: nn.Linear) -> Tensor:
    return linear(x, module.weight, module.bias)
