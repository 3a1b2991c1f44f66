"""A small random model of every causal architecture that the installed transformers has.

A configuration is the architecture's default one with every size in :data:`SIZES` lowered; :data:`EXCEPTIONS` holds what that rule does
not get right. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 40
WIDTH, HEADS, HEAD, LAYERS, EXPERTS = 32, 4, 8, 4, 4

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "type_vocab_size", "audio_vocab_size"),
        VOCABULARY,
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "router_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "dim_head", "kv_channels", "d_head"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), HEAD),
    "index_n_heads": 16,  # with few of them, ties of scores that are 0 are broken at random
    "v_head_dim": 4,  # narrower than the keys
    "qk_head_dim": 2 * HEAD,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "adapter_rank", "laurel_rank"), 16),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    "moe_shared_expert_intermediate_size": 48,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    "n_shared_experts": 1,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("window_size", "local_attention", "index_topk"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("model_max_length", "max_target_positions", "max_source_positions", "relative_max_distance"), 128),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), HEADS),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_d_ssm", "mamba_dt_rank", "time_step_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 4),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers"), 1),
    "hidden_size_per_layer_input": HEAD,
    "num_kv_shared_layers": 2,
}
"""The largest value of each size. A default that is smaller stays."""

SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)
ASSISTANT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "head_dim": HEAD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": LAYERS,
}
QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]} for kind in SLIDING
        },
    },
    "cwm": {"bos_token_id": 2},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"bos_token_id": 2, "text_config": {"bos_token_id": 2}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **ASSISTANT}},
    "gemma3": {"text_config": {"layer_types": SLIDING}},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {"layer_types": SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * (LAYERS // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": HEADS, "head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2),
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": HEAD},
    "mllama": {"text_config": {"bos_token_id": 2}},
    "modernbert-decoder": {"bos_token_id": 2},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {
        "is_decoder": True,
        "hidden_size": WIDTH,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "rwkv": {"rescale_every": 2},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": HEADS,
        "num_key_value_heads": HEADS,
    },
}
"""Further keywords of a configuration, by model type; of a nested configuration, a dictionary."""

SPECIAL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def families() -> list[str]:
    """Return the model types of transformers' mapping of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk(default: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a small configuration of the class of `default`; `more` has precedence."""
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if hasattr(value, "to_dict"):
            found[name] = shrunk(value, more.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool) and name in SIZES and value > SIZES[name]:
            found[name] = SIZES[name]
    if "kv_lora_rank" in found:  # multi-head latent attention: every head has keys and values of its own
        found |= {"num_key_value_heads": HEADS}
    if hasattr(default, "is_decoder"):
        found["is_decoder"] = True
    nested = {name for name, value in found.items() if isinstance(value, dict)}
    special = {name: value for name, value in SPECIAL.items() if hasattr(default, name)}
    return special | found | {name: value for name, value in more.items() if name not in nested}


def tiny_config(family: str) -> Any:
    """Return a small configuration of a model type."""
    kind = CONFIG_MAPPING[family]
    more = EXCEPTIONS.get(family, {})
    return kind(**shrunk(kind(), more))


def tiny_model(family: str) -> Any:
    """Return a random model of a model type, whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
