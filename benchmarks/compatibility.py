"""Runs guarded decoding on tiny random models of many architectures and compares with plain `generate`.

    .venv/bin/python benchmarks/compatibility.py              # all, about five minutes on 2 cores
    .venv/bin/python benchmarks/compatibility.py llama gpt2   # some

For each: a batch of three prompts of different lengths, greedy, float32, with a draft model in chains and in trees
(where the model takes them), with prompt lookup and without drafts; every row must equal what the model alone says to
that prompt. Then forced flags must be survived.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from safespec_hf import SafeSpecConfig, SafeSpecError, attach_safety_head
from safespec_hf.engine.cache import takes_trees

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny

SUPPORTED = """
apertus biogpt codegen cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm4 gpt2
gpt_bigcode gpt_neox gpt_oss gptj granite hunyuan_v1_dense llama mistral mixtral nemotron olmo2
persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 xglm
"""
REFUSED = ("bloom", "mamba", "minimax", "mpt", "rwkv")
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("head_dim", "rotary_dim", "sliding_window"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": tiny.VOCAB_SIZE,
}
PROMPT_LENGTHS, NUM_TOKENS = (10, 7, 4), 30


def build(name: str) -> PreTrainedModel:
    """A random model whose greedy text is not one token for ever."""
    known = CONFIG_MAPPING[name]()
    sizes = {key: value for key, value in SIZES.items() if hasattr(known, key)}
    config = CONFIG_MAPPING[name](**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, tiny.VOCAB_SIZE, (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)))
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - length for length in PROMPT_LENGTHS]).long()
    return ids * mask, mask


def check(name: str) -> str:
    """`ok`, or what went wrong."""
    model, (ids, mask) = build(name), batch()
    draft = tiny.perturb(model)
    arguments: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    alone = []
    for row, length in zip(ids, PROMPT_LENGTHS, strict=True):
        prompt = row[-length:][None]
        alone.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)[0, length:])
    try:
        attach_safety_head(model, tiny.build_head(model), tokenizer=tiny.build_tokenizer())
    except SafeSpecError as error:
        return f"refused: {error}"
    constant = SafeSpecConfig(adaptive_drafts=False)
    for label, extra in {
        "plain": {"safespec": True},
        "draft": {"assistant_model": draft, "safespec": constant},
        "trees": {"assistant_model": tiny.perturb(model, 0.03), "safespec": SafeSpecConfig(lookup_drafts=False)},
        "lookup": {"prompt_lookup_num_tokens": 3, "safespec": constant},
    }.items():
        # or else adaptive decoding finds that a draft as large as its target does not pay
        with tiny.cheap_drafts():
            ours = model.generate(ids, attention_mask=mask, **arguments, **extra)[:, ids.shape[1] :]
        if not all(torch.equal(*pair) for pair in zip(ours, alone, strict=True)):
            return f"DIFFERS ({label})"
    attach_safety_head(model, tiny.build_coin_head(model, 0.08, seed=0), tokenizer=tiny.build_tokenizer())
    policy = SafeSpecConfig(max_segment_tokens=5, num_candidates=2, reflection=tiny.REFLECTION, refusal=tiny.REFUSAL)
    model.generate(ids, attention_mask=mask, safespec=policy, assistant_model=draft, **arguments)
    return "ok, with trees" if takes_trees(model) else "ok"


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    for name in sys.argv[1:] or [*SUPPORTED.split(), *REFUSED]:
        torch.manual_seed(0)
        outcome = check(name)
        failed += not (outcome.startswith("refused") if name in REFUSED else outcome.startswith("ok"))
        print(f"{name:18} {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
