"""Every way of drafting that `generate` knows, with a target and a draft that has it right for the most part."""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tiny import VOCAB_SIZE, build_model, build_tokenizer, is_before, perturb
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from safespec_hf import DraftHead, DraftHeadConfig, load_eagle3_draft
from safespec_hf.decoding.companions import mtp_draft


class Case(NamedTuple):
    """A target that is not guarded yet, and the arguments of `generate` that ask for a way of drafting."""

    target: PreTrainedModel
    arguments: dict[str, Any]


# ids of the words of the tiny tokenizer in another one
SHUFFLED = torch.cat([torch.arange(10), 10 + torch.randperm(30, generator=torch.Generator().manual_seed(1))])


def shuffled_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with other ids."""
    vocabulary = {word: int(SHUFFLED[id_]) for word, id_ in build_tokenizer().get_vocab().items()}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return _wrapped(backend)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of which a word is several tokens, and a space is one."""
    words = ["<pad>", "<s>", "</s>", "<unk>", " ", "\n", "w", *"0123456789", "pause", "think", "no", "thanks"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"w|\d| |\n|[a-z]{2,}"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@torch.no_grad()
def shuffled_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same model for the tokens of [`shuffled_tokenizer`]."""
    shuffled: Any = copy.deepcopy(model)
    for weight in (shuffled.get_input_embeddings().weight, shuffled.get_output_embeddings().weight):
        rows = weight.clone()
        rows[SHUFFLED] = weight.clone()
        weight.copy_(rows)
    return shuffled


@torch.no_grad()
def bigram_model(num_hidden_layers: int = 6) -> PreTrainedModel:
    """A model whose next token depends on the last one only."""
    model: Any = build_model(num_hidden_layers=num_hidden_layers)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
def write_eagle3(
    folder: Path, target: Any, *, is_speculators: bool = False, draft_vocab_size: int = 30, **fields: Any
) -> Path:
    """A checkpoint as others publish it, of a head that attends to the token at hand and drafts what follows it."""
    width, generator = target.config.hidden_size, torch.Generator().manual_seed(7)
    eye, nothing = torch.eye(width), torch.zeros(width, width)
    known = torch.arange(VOCAB_SIZE)[-draft_vocab_size:]
    layer = "layers.0." if is_speculators else "midlayer."
    weights = {
        "fc.weight": 0.05 * torch.randn(width, 3 * width, generator=generator),
        f"{layer}self_attn.q_proj.weight": torch.cat([20 * eye, nothing], 1),
        f"{layer}self_attn.k_proj.weight": torch.cat([20 * eye, nothing], 1),
        f"{layer}self_attn.v_proj.weight": torch.cat([20 * eye, nothing], 1),
        f"{layer}self_attn.o_proj.weight": eye,
        f"{layer}input_layernorm.weight": torch.ones(width),
        f"{layer}hidden_norm.weight": torch.ones(width),
        f"{layer}post_attention_layernorm.weight": torch.ones(width),
        f"{layer}mlp.gate_proj.weight": torch.randn(8, width, generator=generator),
        f"{layer}mlp.up_proj.weight": torch.randn(8, width, generator=generator),
        f"{layer}mlp.down_proj.weight": torch.zeros(width, 8),
        "norm.weight": target.model.norm.weight,
        "lm_head.weight": target.lm_head.weight[known],
        "d2t": known - torch.arange(draft_vocab_size),
        "t2d": torch.isin(torch.arange(VOCAB_SIZE), known),
    }
    sizes = {"hidden_size": width, "vocab_size": VOCAB_SIZE, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width, "hidden_act": "silu"}
    sizes |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 64, "model_type": "llama"}
    if is_speculators:
        weights["embed_tokens.weight"] = target.get_input_embeddings().weight
        found = {"speculators_model_type": "eagle3", "transformer_layer_config": sizes, "norm_before_residual": True}
    else:
        found = {"architectures": ["LlamaForCausalLMEagle3"], **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.clone().contiguous() for key, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(found | {"draft_vocab_size": draft_vocab_size, **fields}))
    return folder


def _eagle3(is_speculators: bool) -> Case:
    target = bigram_model()
    with tempfile.TemporaryDirectory() as folder:
        draft = load_eagle3_draft(write_eagle3(Path(folder), target, is_speculators=is_speculators), target)
    return Case(target, {"assistant_model": draft})


def _same_tokenizer() -> Case:
    target = build_model()
    return Case(target, {"assistant_model": perturb(target)})


def _with(case: Case, **arguments: Any) -> Case:
    return Case(case.target, case.arguments | arguments)


def _another_tokenizer(do_sample: bool = False) -> Case:
    target = build_model()
    arguments = {"assistant_model": shuffled_model(perturb(target)), "assistant_tokenizer": shuffled_tokenizer()}
    return Case(target, {**arguments, "do_sample": do_sample})


def _early_exit() -> Case:
    target = build_model(num_hidden_layers=4)
    return Case(target, {"assistant_early_exit": 3})


def _draft_head() -> Case:
    target, arguments = _eagle3(False)
    theirs = arguments["assistant_model"]
    names = DraftHeadConfig().to_dict().keys() - {"model_type"}
    draft = DraftHead(DraftHeadConfig(**{name: getattr(theirs.config, name) for name in names}))
    draft.load_state_dict({name: theirs.state_dict()[name] for name in draft.state_dict()})
    return Case(target, {"assistant_model": draft.eval().bind(target)})


@torch.no_grad()
def write_mtp(folder: Path, target: Any, num_layers: int = 2) -> Path:
    """A checkpoint of the target that has layers behind the last one, which draft what follows the token at hand."""
    from transformers.modeling_layers import MtpModel

    if is_before("5.20"):
        pytest.skip("such layers do not run by themselves there: `use_mtp` is refused")
    target.config.num_mtp_layers = num_layers
    network: Any = MtpModel(target, num_layers)
    eye = torch.eye(target.config.hidden_size)
    for layer in network.layers:
        layer.eh_proj.weight.copy_(torch.cat([eye, 0.01 * eye], 1))
        layer.mtp_block.self_attn.o_proj.weight.zero_()
        layer.mtp_block.mlp.down_proj.weight.zero_()
    first = target.config.num_hidden_layers
    weights = {f"model.{name}": weight for name, weight in target.model.state_dict().items()}
    weights |= {"lm_head.weight": target.lm_head.weight}
    for name, weight in network.state_dict().items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            weights[f"model.layers.{first + int(number)}.{rest.removeprefix('mtp_block.')}"] = weight
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first + index}\..*" for index in range(num_layers)]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    target.config.save_pretrained(folder)
    target.config.name_or_path = str(folder)
    return folder


def _mtp() -> Case:
    target = bigram_model()
    with tempfile.TemporaryDirectory() as folder:
        write_mtp(Path(folder), target)
        mtp_draft(target)  # it is read once
    target.config.name_or_path = ""
    return Case(target, {"use_mtp": True})


@torch.no_grad()
def build_dflash(target: Any, block_size: int = 5, mask_token_id: int = 3) -> PreTrainedModel:
    """A random network that denoises blocks over the states of two layers of the target."""
    torch.manual_seed(4)
    sizes = {"hidden_size": target.config.hidden_size, "num_hidden_layers": 2, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    kinds = ["sliding_attention", "full_attention"]
    own = {"block_size": block_size, "mask_token_id": mask_token_id, "target_layer_ids": [0, 1]}
    config = MuseGlimmerAssistantConfig(**sizes, layer_types=kinds, max_position_embeddings=128, **own)
    draft = MuseGlimmerAssistantModel(config).eval()
    for weight in draft.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return draft


@torch.no_grad()
def _dflash() -> Case:
    target: Any = build_model()
    often = 20  # a token that the target writes often, and the draft whenever it sees a mask
    target.lm_head.weight[often] *= 3
    target.model.embed_tokens.weight[3] = target.lm_head.weight[often]
    draft: Any = build_dflash(target)
    for layer in draft.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.mlp.down_proj.weight.mul_(0.01)
    return Case(target, {"assistant_model": draft, "speculation_type": "dflash"})


@torch.no_grad()
def build_gemma4() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target of Gemma 4's kind, whose next token depends on the last one only, and an assistant that knows it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    sizes |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "max_position_embeddings": 128}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    target: Any = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **special, num_kv_shared_layers=0)).eval()
    text = Gemma4TextConfig(**sizes, **special, num_kv_shared_layers=2)
    assistant: Any = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)
    ).eval()
    for model in (target, assistant):
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
            if "post_" in name and "layernorm" in name:  # what layers add
                weight.mul_(0.01)
    target.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 32))
    assistant.lm_head.weight = target.lm_head.weight
    eye = torch.eye(32)
    assistant.pre_projection.weight.copy_(torch.cat([eye, 0 * eye], 1))
    return target, assistant


def _shared_kv() -> Case:
    target, assistant = build_gemma4()
    return Case(target, {"assistant_model": assistant})


METHODS: dict[str, Callable[[], Case]] = {
    "assistant_model": _same_tokenizer,
    "assistant_model, assistant_tokenizer": _another_tokenizer,
    "assistant_model, assistant_tokenizer, do_sample": lambda: _another_tokenizer(True),
    "assistant_early_exit": _early_exit,
    "assistant_model, num_assistant_tokens_schedule": lambda: _with(
        _same_tokenizer(), num_assistant_tokens=2, num_assistant_tokens_schedule="heuristic"
    ),
    "prompt_lookup_num_tokens": lambda: Case(build_model(), {"prompt_lookup_num_tokens": 4}),
    "prompt_lookup_num_tokens, max_matching_ngram_size": lambda: Case(
        build_model(), {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    ),
    "a DraftHead": _draft_head,
    "use_mtp": _mtp,
    'assistant_model, speculation_type="dflash"': _dflash,
    "assistant_model with shared KV (Gemma 4)": _shared_kv,
    "an EAGLE-3 checkpoint": lambda: _eagle3(False),
    "an EAGLE-3 checkpoint of speculators": lambda: _eagle3(True),
}


def _refused(**arguments: Any) -> Callable[[], Case]:
    return lambda: Case(build_model(), arguments)


def _encoder_decoder() -> Case:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": VOCAB_SIZE}
    return Case(build_model(), {"assistant_model": BartForConditionalGeneration(BartConfig(**sizes))})


REFUSED: dict[str, Callable[[], Case]] = {
    "assistant_ensemble_weight": _refused(assistant_ensemble_weight=0.5),
    "is_assistant": _refused(is_assistant=True),
    "custom_generate, as with a CandidateGenerator of one's own": _refused(custom_generate=lambda *_, **__: None),
    "assistant_model of another vocabulary without assistant_tokenizer": lambda: Case(
        build_model(), {"assistant_model": build_model(vocab_size=30)}
    ),
    "assistant_model that is an encoder-decoder": _encoder_decoder,
    "assistant_early_exit of more layers than there are": _refused(assistant_early_exit=7),
    "use_mtp of a model without such layers": _refused(use_mtp=True),
    'speculation_type="dflash" without such a draft': lambda: Case(
        build_model(), {"assistant_model": build_model(), "speculation_type": "dflash"}
    ),
}
