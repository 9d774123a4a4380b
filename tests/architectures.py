"""A tiny random model of any architecture that transformers maps to a causal language model."""

from typing import Any

import torch
from tiny import VOCAB_SIZE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_PARAMETERS = 40_000_000
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers", "depth"), 2
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "num_heads",
            "n_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "mlp_dim"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("head_dim", "rotary_dim", "sliding_window", "window_size", "attention_window", "local_window"), 8
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "dim_head": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "index_topk": 6,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "position_embedding_size": 64,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
}
# What the names of sizes do not tell.
SPECIAL: dict[str, dict[str, Any]] = {
    "longcat_flash": {"zero_expert_num": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}, "max_seq_len": 256},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention"] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "blt": {
        "patcher_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": VOCAB_SIZE,
        },
        **{
            part: {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            for part in ("encoder_config", "decoder_config", "global_config")
        },
        "encoder_hash_byte_group_vocab": 64,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "hidden_size": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 8, "state_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_state": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "inkling2_text": {"unpadded_vocab_size": VOCAB_SIZE},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB_SIZE},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "is_decoder": True,
        "feed_forward_size": 64,
    },
}


def tiny_config(name: str, **given: Any) -> PreTrainedConfig:
    """A config of two small layers."""
    known = CONFIG_MAPPING[name]()
    config = _shrunk(known) | SPECIAL.get(name, {}) | given
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "is_decoder": True}
    return CONFIG_MAPPING[name](**config, **{key: special[key] for key in special if key not in config})


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    own = vars(config)  # not its properties, nor other names of the same
    fields: dict[str, Any] = {key: value for key, value in SIZES.items() if isinstance(own.get(key), int)}
    if own.get("head_dim", 0) is None:
        fields["head_dim"] = SIZES["head_dim"]
    if "kv_lora_rank" in own:  # its heads share nothing
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if own.get(key):
            fields[key] = _two_kinds(own[key])
    for key in config.sub_configs:
        if isinstance(own.get(key), PreTrainedConfig):
            has_pad = isinstance(vars(own[key]).get("pad_token_id"), int)
            fields[key] = _shrunk(own[key]) | ({"pad_token_id": 0} if has_pad else {})
    return fields


def _two_kinds(kinds: list[str]) -> list[str]:
    """Two layers, of different kinds where there are any."""
    return (list(dict.fromkeys(kinds)) * 2)[:2]


def build_architecture(name: str, std: float = 0.25, **given: Any) -> PreTrainedModel:
    """A random model whose greedy text is not one token for ever.

    Raises:
        MemoryError: If even this is large.
    """
    config = tiny_config(name, **given)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for weights of one dimension, which stay as a model makes them
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spread(model, std)
    return model


@torch.no_grad()
def spread(model: PreTrainedModel, std: float) -> None:
    """Draws all matrices of a model, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
