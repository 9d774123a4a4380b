"""What the commands load: the target with its tokenizer, and labelled answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SafeSpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..training.data import Example


def load_labelled(data: list[str], benign: list[str] | None) -> list[Example]:
    """Labelled answers, and those that are safe unless they say otherwise."""
    from ..training.data import load_examples

    return [*load_examples(data), *(load_examples(benign, label=0) if benign else [])]


def load_target(
    target: str | None, dtype: str, chat_template: str | None = None, *, needs_chat: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target, on the GPU if there is one, and its tokenizer, with this chat template if it has none.

    Args:
        target (`str`, *optional*): Its Hub id or folder. Default: the default target.
        dtype (`str`): Of its weights; `"auto"` is as they are stored.
        chat_template (`str`, *optional*): For a tokenizer that has none.
        needs_chat (`bool`, defaults to `True`): Whether the tokenizer must have one.

    Raises:
        SafeSpecError: If there is no whole model of that name, with every weight that its config asks for, or if its
            tokenizer does not say how to ask; says why.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..defaults.default_target import load_default_target
    from ..heads.loading import explain_hub_error, hub_arguments

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if target is None:
        stored = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        model, tokenizer = load_default_target(dtype=stored, device=device)
        _prepare(tokenizer, chat_template, needs_chat)
        return model, tokenizer
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "device_map": device}
    # transformers only warns of weights that don't fit, or raises without saying which: they are looked at below
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        where = hub_arguments(target, {}, "target")
        tokenizer = AutoTokenizer.from_pretrained(target, **where)
        _prepare(tokenizer, chat_template, needs_chat)
        loaded: Any = AutoModelForCausalLM.from_pretrained(target, **where, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, StrictDataclassError) as error:
        why = explain_hub_error(target, error, {}) or error
        raise SafeSpecError(f"No target could be loaded from {target!r}: {why}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise SafeSpecError(
            f"{len(missing)} weights that the config of {target!r} asks for are missing or of another shape, such as "
            f"`{missing[0]}`: they would be random. Give a model that was trained to generate text."
        )
    return model.eval(), tokenizer


def _prepare(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, needs_chat: bool) -> None:
    from ..training.chat_template import check_chat_template, set_chat_template

    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    if needs_chat:
        check_chat_template(tokenizer)


def load_draft(name: str | None, target: PreTrainedModel, *, is_default_target: bool) -> Any:
    """What drafts for a target: a draft head or model, or `None` for nothing.

    Args:
        name (`str`, *optional*): Its Hub id or folder, or `"none"`. Default: the default target's own, else none.
        target ([`~transformers.PreTrainedModel`]): The target.
        is_default_target (`bool`): Whether it is the default one.

    Raises:
        SafeSpecError: If there is no such draft; says why.
    """
    from ..defaults.default_target import load_default_draft
    from ..heads.draft_head import DraftHead

    if name is None or name == "none":
        return load_default_draft(target) if name is None and is_default_target else None
    draft = open_draft(name, dtype=target.dtype).to(target.device).eval()
    return draft.bind(target) if isinstance(draft, DraftHead) else draft


def open_draft(name: str, **kwargs: Any) -> Any:
    """A draft head or model as it is stored, not on a target yet.

    Args:
        name (`str`): Its Hub id or folder.
        kwargs: As for `from_pretrained`: `dtype`.

    Raises:
        SafeSpecError: If there is no such draft; says why.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..heads.draft_head import DraftHead, DraftHeadConfig
    from ..heads.loading import explain_hub_error, hub_arguments

    try:
        where = hub_arguments(name, {}, "draft")
        is_head = isinstance(AutoConfig.from_pretrained(name, **where), DraftHeadConfig)
        loader: Any = DraftHead if is_head else AutoModelForCausalLM
        return loader.from_pretrained(name, **where, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, StrictDataclassError) as error:
        why = explain_hub_error(name, error, {}) or error
        raise SafeSpecError(f"No draft could be loaded from {name!r}: {why}") from error
