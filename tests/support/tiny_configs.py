"""Configurations of every architecture of transformers, shrunk until a test can hold the model.

Most sizes go by one of a few dozen names. What an architecture needs beside them (sizes that must
divide each other, a list with an entry for each layer, one layer of each kind) stands in `SPECIAL`.
A configuration of several models (text, vision, audio) is shrunk part by part.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

LAYERS = 2
# Every name under which an architecture keeps a size, with a tiny value.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim"), 16),
    **dict.fromkeys(
        ("hidden_size_global", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"), 16
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 24),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("state_size", "time_step_rank", "attention_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "index_head_dim", "head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_dt_rank"), 8),
    # Without it an encoder's head reads both ways.
    "is_decoder": True,
}
LINEAR, FULL, HYBRID = "linear_attention", "full_attention", "hybrid"
MAMBA2: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8}
ROPE = {"rope_theta": 10000.0}
OWN_TOKENS: dict[str, Any] = {"vocab_size_per_layer_input": 25, "hidden_size_per_layer_input": 4}
WINDOW: dict[str, Any] = {"global_head_dim": 8, "layer_types": ["sliding_attention", FULL]}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "blenderbot": {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "blt": {"encoder_hash_byte_group_vocab": 30, "encoder_hash_byte_group_nb_functions": 1},
    "codegen": {"num_attention_heads": 4, "n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {FULL: {"rope_type": "default", **ROPE}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, **ROPE},
        "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 24},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}},
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 32},
    "gemma3n_text": {**OWN_TOKENS, "num_kv_shared_layers": 0},
    "gemma4_text": {**OWN_TOKENS, **WINDOW},
    "gemma4_unified_text": WINDOW,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA2, "layer_types": [LINEAR, FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 2),
        **dict.fromkeys(("indexer_head_dim", "indexer_budget"), 8),
        "indexer_kv_heads": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 25),
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "xlnet": {"max_position_embeddings": None},
    # Its second layer of attention shares the first one's weights; it cannot be without one.
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": None,
        "layers_block_type": [LINEAR, HYBRID] * 2,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": [LINEAR, HYBRID], "n_mamba_heads": 4, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    # The head is that of the rotated part of a key.
    **{name: {"head_dim": 4} for name in ("axk1", "deepseek_v3", "longcat_flash", "youtu")},
}
"""Beside the sizes: what must agree with another size, and one layer of each kind."""


def config(kind: str, rows: int) -> PretrainedConfig:
    """An architecture's configuration with every size that it has made tiny.

    Args:
        kind: its `model_type`.
        rows: tokens of the vocabulary.
    """
    usual = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **_shrunk(usual, rows))


def _shrunk(usual: PretrainedConfig, rows: int) -> dict[str, Any]:
    """Arguments for a tiny configuration of the same class."""
    special = SPECIAL.get(usual.model_type, {})
    sizes = {name: value for name, value in SIZES.items() if _has(usual, name)}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    parts = {
        name: _shrunk(part, rows)
        for name, part in vars(usual).items()
        if isinstance(part, PretrainedConfig) and name not in special
    }
    made = {"vocab_size": rows, **sizes, **_layers(usual), **ends, **parts, **special}
    return {name: value for name, value in made.items() if value is not None}


def _layers(usual: PretrainedConfig) -> dict[str, Any]:
    """Few layers, but one of each kind."""
    kinds = {
        name: list(dict.fromkeys(getattr(usual, name)))
        for name in ("layer_types", "mlp_layer_types")
        if _has(usual, name) and isinstance(getattr(usual, name), list)
    }
    count = max([LAYERS, *map(len, kinds.values())])
    lists = {name: found + found[-1:] * (count - len(found)) for name, found in kinds.items()}
    return {"num_hidden_layers": count, **lists} if lists else {}


def _has(settings: PretrainedConfig, name: str) -> bool:
    """Whether a configuration keeps a size by that name, and does not compute it from others."""
    kept = settings.attribute_map.get(name, name)
    if isinstance(getattr(type(settings), kept, None), property):
        return False
    try:
        return hasattr(settings, name)
    # A size that differs from layer to layer cannot be read, but it is there.
    except Exception:
        return True
