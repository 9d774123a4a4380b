"""Prompts that are more than tokens: images, embeddings, token types, positions of the caller's own.

The first forward gets what the model's own preparation makes of them, as in plain `generate`. What the forwards after
it get is asked of the same preparation once, for one token and for two: it has to go on from token to token. Nothing
here runs a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..engine.private_names import is_user_cache, next_model_kwargs
from ..engine.prompt import FILLER, Prompt
from ..engine.traits import (
    CACHE_NAME,
    CACHE_NAMES,
    FilledCache,
    goes_back_by_copies,
    has_alibi,
    has_windows,
    input_device,
    min_window,
    prepare_inputs,
    reads_alone,
    takes_positions,
)
from ..errors import UnsupportedRequestError
from .adapters import check_adapters
from .support import (
    KNOWN_INPUTS,
    KNOWN_MODEL_KWARGS,
    changed_inputs,
    check_positions,
    check_prompt,
    expected_positions,
    is_empty,
    refuse_changed,
)

OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""What some releases of transformers leave as long as the whole text, though a forward reads its end only."""
OF_IMAGES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "spatial_shapes", "per_layer_inputs")
"""What models are shown again with every token, though it is about the prompt alone."""
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
"""What configs call the tokens that stand in the place of images and the like."""


class Given(NamedTuple):
    """What `generate` was given, once transformers has prepared it.

    Attributes:
        ids (`torch.LongTensor` of shape `(B, L)` or `(B, 0)`): None with embeddings only.
        kwargs (`Mapping[str, Any]`): All other arguments of the model.
        extras (`set[str]`): The names of those that are more than tokens.
        is_real (`torch.BoolTensor` of shape `(B, L)`): `False` for padding.
    """

    ids: Tensor
    kwargs: Mapping[str, Any]
    extras: set[str]
    is_real: Tensor


def check_prompts(
    model: PreTrainedModel, prompt_ids: Tensor, model_kwargs: Mapping[str, Any]
) -> tuple[Tensor, Prompt | None]:
    """Raises unless prompts can be read and gone on with.

    Returns:
        `tuple`: A `torch.BoolTensor` of the prompts' shape, on the target's device: `False` for padding. And what the
        prompts are besides tokens, if anything.

    Raises:
        UnsupportedRequestError: Names what would be dropped; or if there are no prompts.
    """
    if len(prompt_ids) == 0:
        raise UnsupportedRequestError("The batch has no rows. Give at least one prompt.")
    prompt, device = read_prompt(model, prompt_ids, model_kwargs), input_device(model)
    if prompt is not None:
        if reads_alone(model):
            raise UnsupportedRequestError(
                f"{type(model).__name__} reads the rows of a batch one by one, from tokens padded on the left, and "
                "takes no prompts that are more than that. Remove what else there is, or generate without `safespec`."
            )
        return torch.from_numpy(prompt.is_real_BL).to(device), prompt
    check_prompt(model, prompt_ids, model_kwargs)
    mask: Tensor | None = model_kwargs.get("attention_mask")
    is_real = torch.ones_like(prompt_ids, dtype=torch.bool) if mask is None else mask.bool()
    check_positions(model_kwargs.get("position_ids"), is_real.to(device))
    return is_real.to(device), None


def read_prompt(model: Any, prompt_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Prompt | None:
    """What a prompt is besides tokens; `None` where it is nothing else.

    Raises:
        UnsupportedRequestError: Names what can't go on after the prompt.
    """
    embedded = model_kwargs.get("inputs_embeds")
    extras = {name for name, value in model_kwargs.items() if name not in KNOWN_MODEL_KWARGS and not is_empty(value)}
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    shape = prompt_ids.shape if embedded is None else embedded.shape[:2]
    is_real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    # then the first token is what the model says at a place of padding, so the prompt is more than its tokens
    is_padded_right = is_real.shape == shape and not bool(is_real[:, -1].all())
    if not extras and is_real.shape == shape and _is_counted(positions, is_real) and not is_padded_right:
        if is_user_cache(model_kwargs.get(CACHE_NAME)):
            return None
        changed = changed_inputs(model, prompt_ids, model_kwargs)
        if changed - {"position_ids"} or not changed:
            return None  # and what else is changed is refused as it is for tokens
    elif not extras and (is_real.shape != shape or positions is None or positions.shape[-1] != shape[1]):
        return None
    given = Given(prompt_ids, model_kwargs, extras, is_real)
    _check_given(model, given, embedded)
    num_cached = _num_cached(model_kwargs)
    cut = {"next_sequence_length": shape[1] - num_cached} if num_cached else {}
    inputs = prepare_inputs(model, prompt_ids, is_first_iteration=True, **cut, **model_kwargs)
    _check_first(model, given, inputs)
    nums = is_real.sum(dim=1).tolist() if prompt_ids.shape[1] else [0] * len(prompt_ids)
    inputs = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    return Prompt(
        inputs=inputs,
        is_real_BL=is_real.numpy(),
        num_tokens=nums,
        placeholders=placeholders(model.config),
        **_continue(model, given),
    )


def placeholders(config: PreTrainedConfig) -> frozenset[int]:
    """Tokens that stand for images and the like."""
    return frozenset(token for name in PLACEHOLDERS if isinstance(token := getattr(config, name, None), int))


def _num_cached(kwargs: Mapping[str, Any]) -> int:
    """Columns that a cache of the caller's holds."""
    cache: Any = kwargs.get(CACHE_NAME)
    return int(cache.get_seq_length()) if is_user_cache(cache) else 0


def check_padding(model: PreTrainedModel, is_real: Tensor, num_new: float) -> None:
    """Raises if padding between a prompt and its answer, or in the midst of it, would not stay what it is when plain.

    There its places count, in the state of a recurrent layer and in the distance that a sliding window reaches; and
    where a model counts positions itself, by the mask (ALiBi), a last column has one that no token here can have.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        is_real (`torch.BoolTensor` of shape `(B, L)`): `False` for padding.
        num_new (`float`): Tokens that an answer may have.

    Raises:
        UnsupportedRequestError: For recurrent layers, rows that are read one by one, and sliding windows that the text
            outgrows; and, if the padding is on the right, for models that count positions themselves.
    """
    is_gap = ~is_real & (is_real.cumsum(dim=1) > 0)
    if not bool(is_gap.any()):
        return
    reach = min_window(model) if has_windows(model) else None
    is_long = reach is not None and is_real.shape[1] + num_new > reach
    is_refused = goes_back_by_copies(model) or is_long
    if bool(is_gap[:, -1].any()):
        if is_refused or has_alibi(model) or not takes_positions(model):
            raise UnsupportedRequestError(
                "Right padding was found: the last column of `attention_mask` has a 0. With recurrent layers, beyond "
                "a sliding window, or where a model counts positions itself, guarded decoding needs left padding; set "
                "`tokenizer.padding_side = 'left'`."
            )
    elif is_refused:
        raise UnsupportedRequestError(
            "Padding inside of a prompt was found: `attention_mask` has a 0 between tokens. With recurrent layers, "
            "rows that are read one by one, or beyond a sliding window, its places count in plain decoding, and can't "
            "be kept here. Take them out, and pad on the left."
        )


def _is_counted(positions: Tensor | None, is_real: Tensor) -> bool:
    """Whether positions are those that are counted from each row's first token."""
    if positions is None:
        return True
    expected = expected_positions(is_real)
    is_long = positions.shape[-1] == is_real.shape[-1]
    return is_long and bool(((positions.cpu() == expected) | ~is_real).all())


def _check_given(model: PreTrainedModel, given: Given, embedded: Tensor | None) -> None:
    shape = given.ids.shape if embedded is None else embedded.shape[:2]
    if given.ids.shape[1] not in (0, shape[1]) or given.ids.shape[0] != shape[0]:
        raise UnsupportedRequestError(
            f"`input_ids` of shape {tuple(given.ids.shape)} and `inputs_embeds` of {tuple(shape)} are not the same "
            "tokens. Pass ids for all places, or none."
        )
    if given.is_real.shape != shape:
        raise UnsupportedRequestError(
            f"`attention_mask` must have the shape of the prompt, {tuple(shape)}, but has "
            f"{tuple(given.is_real.shape)}."
        )
    positions = given.kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] != shape[1]:
        raise UnsupportedRequestError(
            f"`position_ids` must be as long as the prompt, {shape[1]} places, but cover {positions.shape[-1]}."
        )
    beside = [name for name in given.extras if "pixel" in name or "cross_attention" in name]
    if beside and getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None):
        raise UnsupportedRequestError(
            f"{type(model).__name__} keeps images in layers of their own, for cross-attention, which can't be rolled "
            f"back with the tokens. Leave out {sorted(beside)}, or generate without `safespec`."
        )
    check_adapters(model)


def _check_first(model: Any, given: Given, inputs: Mapping[str, Any]) -> None:
    """Raises unless the first forward reads what was given, and nothing else."""
    changed = [name for name in inputs if name not in {*KNOWN_INPUTS, *given.extras} and _says(inputs[name])]
    embedded = given.kwargs.get("inputs_embeds")
    num_cached = _num_cached(given.kwargs)
    if embedded is not None:
        embedded = embedded[:, num_cached:]
    expected = {"attention_mask": given.kwargs.get("attention_mask"), "inputs_embeds": embedded}
    expected["input_ids"] = given.ids[:, num_cached:] if embedded is None else None
    for name, value in expected.items():
        found = inputs.get(name)
        is_same = found is None if value is None else _is_equal(found, value)
        if not is_same and not (name == "attention_mask" and found is None):
            changed.append(name)
    refuse_changed(model, changed)


def _says(value: object) -> bool:
    return value is not False and not is_empty(value)


def _continue(model: Any, given: Given) -> dict[str, Any]:
    """How the arguments go on after the prompt: the fields of [`Prompt`] that say so.

    Raises:
        UnsupportedRequestError: Names those that change from token to token.
    """
    one, two = (_after(model, given, num) for num in (1, 2))
    num_rows, unknown = len(given.ids), list[str]()
    per_token, per_row, fixed = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    for name in one.keys() | two.keys():
        first, second = one.get(name), two.get(name)
        if name in KNOWN_INPUTS or name in OF_IMAGES or not (_says(first) or _says(second)):
            continue
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            if isinstance(first, (bool, int, float, str)) and first == second:
                fixed[name] = first
            else:
                unknown.append(name)
        elif first.dim() > 1 and first.shape[:2] == (num_rows, 1) and _is_equal(second, torch.cat([first] * 2, dim=1)):
            per_token[name] = first
        elif first.shape[:1] == (num_rows,) and _is_equal(second, first):
            per_row[name] = first
        else:
            unknown.append(name)
    positions = _next_positions(one.get("position_ids"), two.get("position_ids"), num_rows)
    if positions is None and takes_positions(model) and "position_ids" in one:
        unknown.append("position_ids")
    if unknown:
        raise UnsupportedRequestError(
            f"Guarded decoding can't go on with {sorted(unknown)} after the prompt: several tokens are read at once, "
            f"and {type(model).__name__} says of one and of two tokens things that do not fit together. Remove them, "
            "or generate without `safespec`."
        )
    return {"per_token": per_token, "per_row": per_row, "fixed": fixed, "next_positions": positions}


def _after(model: Any, given: Given, num_new: int) -> dict[str, Any]:
    """What a forward over so many tokens after the prompt is given."""
    # without a cache transformers shows images at every step; here there is one in any case
    kwargs = {**given.kwargs, "use_cache": True}
    for _ in range(num_new):  # of several at once transformers says other things
        kwargs = next_model_kwargs(model, kwargs)
    kwargs[CACHE_NAME] = FilledCache(given.is_real.shape[1])
    ids = torch.cat([given.ids, given.ids.new_full((len(given.ids), num_new), FILLER)], dim=1)
    inputs = prepare_inputs(model, ids, next_sequence_length=num_new, **kwargs)
    mask, caches = kwargs.get("attention_mask"), [inputs.get(name) for name in CACHE_NAMES]
    changed = [] if _is_equal(inputs.get("input_ids"), ids[:, -num_new:]) else ["input_ids"]
    changed += [] if mask is None or _is_equal(inputs.get("attention_mask"), mask) else ["attention_mask"]
    changed += [] if any(cache is kwargs[CACHE_NAME] for cache in caches) else [CACHE_NAME]
    refuse_changed(model, changed)
    cut = {name: inputs[name][..., -num_new:] for name in OF_TOKENS if isinstance(inputs.get(name), Tensor)}
    return inputs | cut


def _next_positions(one: Tensor | None, two: Tensor | None, num_rows: int) -> Tensor | None:
    """The position of the first token, if those after it follow."""
    if one is None or two is None or not _is_equal(two, torch.cat([one, one + 1], dim=-1)):
        return None
    return one[..., 0].expand(*one.shape[:-2], num_rows).clone()


def _is_equal(found: Any, expected: Tensor) -> bool:
    is_alike = isinstance(found, Tensor) and found.shape == expected.shape
    return is_alike and bool((found == expected.to(found.device)).all())
