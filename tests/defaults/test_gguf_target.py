"""A GGUF becomes a model with the very weights that were written into it, and a tokenizer that gives text back."""

import gguf
import pytest
import torch
from tiny import build_head
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from safespec_hf import attach_safety_head
from safespec_hf.defaults.gguf_target import convert_once, is_complete

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
PIECES = [
    "\n",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    *"abcdeghlmnoprstuw",
    "▁t",
    "th",
    "▁th",
    "▁the",
    "he",
]
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@pytest.fixture
def gemma():
    """A tiny one of the architecture: six layers, so that both kinds of attention are in it."""
    config = Gemma3TextConfig(
        vocab_size=len(SPECIAL + PIECES),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # zeros would hide a wrong offset
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def file(gemma, tmp_path):
    """It as llama.cpp writes it: norms with one added to them, tokens with their scores."""
    config, path = gemma.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    add_tokenizer(writer)
    for name, weight in gemma.state_dict().items():
        if name != "lm_head.weight":  # tied
            for long, short in NAMES.items():
                name = name.replace(f"{long}.", f"{short}.")
            writer.add_tensor(name, (weight.float() + ("norm" in name)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer):
    types = [CONTROL] * len(SPECIAL) + [USER_DEFINED] + [BYTE] * 256 + [NORMAL] * (len(PIECES) - 257)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPECIAL + PIECES)
    writer.add_token_scores([-float(index) for index in range(len(types))])
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def test_a_converted_model_has_the_weights_of_its_gguf(gemma, file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(convert_once(file, tmp_path / "target"))
    assert is_complete(tmp_path / "target")
    assert model.config.layer_types == gemma.config.layer_types
    assert model.config.rope_parameters == gemma.config.rope_parameters
    tokens = torch.randint(5, gemma.config.vocab_size, (1, 24))  # three windows
    # the same weights to the last bit, or norms would be off by what one added and taken away rounds to
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in gemma.state_dict().items())
    assert torch.equal(model(tokens).logits, gemma(tokens).logits)


@pytest.mark.parametrize("text", ["the  other\n\nmother", " the theatre ", "\n", "é 漢字 🙂", "a<mask>b"])
def test_a_converted_tokenizer_gives_text_back(file, tmp_path, text):
    tokenizer = AutoTokenizer.from_pretrained(convert_once(file, tmp_path / "target"))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id == 2
    assert tokenizer.model_max_length == 512


def test_what_a_gguf_lacks_can_be_added_before_it_is_saved(file, tmp_path):
    folder = convert_once(file, tmp_path / "target", lambda tokenizer: setattr(tokenizer, "chat_template", "garden"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == "garden"


def test_a_model_that_is_loaded_from_a_gguf_is_guarded_as_it_is(file, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    prompt, arguments = torch.tensor([[12, 18, 24, 13]]), {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, **arguments, safespec=True), expected)
