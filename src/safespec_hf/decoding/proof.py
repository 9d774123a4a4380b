"""Shows on a few tokens that a model does what guarded decoding counts on, before it is trusted with an answer.

A model's name says little: some take a cache and leave it empty, others see padding, or return fewer hidden states
than they have layers. So two rows that begin alike are read with a cache: padded, rolled back, and continued. One
plain forward of the longer row says what must come out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine.alone import cached_model
from ..engine.cache import CACHE_NAME, CachedModel
from ..engine.growing import column_states
from ..engine.private_names import attention_name, num_writes
from ..engine.tap import main_stream, read_tap
from ..engine.traits import (
    CACHE_NAMES,
    FAILURES,
    input_device,
    is_offloaded,
    is_plain,
    lacks_weights,
    max_positions,
    read_alone,
    reads_alone,
    resharded,
    takes_positions,
)
from ..errors import UnsupportedRequestError

NUM_TOKENS, NUM_WRONG = 6, 2
EXACT, ROUGH = 0.01, 0.25
"""Largest error, relative to the values: in float32, TF32 included, of every position; in coarser formats, where a
token may be routed to other experts, of the best one of the later half: the first ones have little to read wrongly."""
PICKED = {"index_topk": 3, "keep_window_size": 3, "topk_blocks": 2}
"""What modules call the number of places that their attention picks of all before, and how many they may in the proof:
of thousands a few tokens are all picked, and whether the right ones are would not show."""
BLOCK = 2
"""Places of a block, where whole blocks are picked."""
COARSE = (torch.bfloat16, torch.float16)
MAX_COPY = 2**30
"""Bytes that a copy in float32 may take for the time of the proof."""
_proven: dict[tuple[type, str, bool], bool] = {}
"""What has been proven, and whether only with rows that are read one by one."""
_PROVING = threading.RLock()


def prove(model: PreTrainedModel, has_states: bool = True) -> None:
    """Raises unless a model's cached, padded and rolled back forwards give what a plain one gives.

    What does not with rows that are read together, padded, may with rows that are read one by one: then they are, from
    then on (see [`RowsAlone`]). Costs three forwards of a few tokens, or about ten, once for each class and config in
    a process, and as many again of a copy in float32 where the model is in a coarser format and that takes at most
    1 GiB. The model is left as it was: its modes, buffers and gradients, and the random numbers to come. Offloaded
    weights come for the time of a forward, as always. Those that nobody brings, on the `meta` device, prove nothing:
    they are asked when a call comes (see [`check_weights`]). Nor is a model asked that has positions for fewer tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        has_states (`bool`, defaults to `True`): Whether its hidden states are read as well, as a target's are.

    Raises:
        UnsupportedRequestError: Says what came out wrong, or how the model failed.
    """
    config = model.config.to_json_string(use_diff=False)
    key = _class_of(model), f"{config} {attention_name(model)} {model.dtype}", has_states
    if key not in _proven and lacks_weights(model):
        return
    if (max_positions(model) or NUM_TOKENS + NUM_WRONG) < NUM_TOKENS + NUM_WRONG:
        if reads_alone(model):
            raise UnsupportedRequestError(
                f"{type(model).__name__} has layers whose state can't be rolled back in place, and no room for the "
                f"{NUM_TOKENS + NUM_WRONG} tokens that would show whether it can be rolled back at all."
            )
        return  # it has no room for the proof
    with _PROVING:  # threads that make the first call of a model together wait until it is proven
        if key not in _proven:
            _proven[key] = _prove_either(model, has_states)
        if _proven[key]:
            read_alone(model)


def _prove_either(model: PreTrainedModel, has_states: bool) -> bool:
    """Whether the rows of a model have to be read one by one.

    Raises:
        UnsupportedRequestError: If that does not help, either; what it says is about rows that are read together.
    """
    refused: UnsupportedRequestError | None = None
    for is_alone in [True] if reads_alone(model) else [False, True]:
        try:
            _prove_exactly(model, has_states, is_alone)
            with _untouched(model):
                _compare(model, has_states, is_alone)
        except UnsupportedRequestError as error:
            refused = refused or error
        else:
            return is_alone
    assert refused is not None
    raise refused


def _prove_exactly(model: PreTrainedModel, has_states: bool, is_alone: bool) -> None:
    """Has a copy in float32 show it first, if the model is in a coarser format and small: there rounding hides faults.

    Of what can't be copied, or does not run in float32, only the model itself is asked.
    """
    weights = list(model.parameters())
    is_plain_model = all(map(is_plain, weights)) and not is_offloaded(model)
    num_bytes = 4 * sum(weight.numel() for weight in weights)
    if all(weight.dtype not in COARSE for weight in weights) or not is_plain_model or num_bytes > MAX_COPY:
        return
    try:
        exact = copy.deepcopy(model).float()
        with _untouched(exact):
            _compare(exact, has_states, is_alone)
    except UnsupportedRequestError as error:
        if not isinstance(error.__cause__, FAILURES):
            raise
    except FAILURES:
        return


def check_weights(model: PreTrainedModel) -> None:
    """Raises if a model has weights on the `meta` device that nobody brings: a forward would give nothing.

    Raises:
        UnsupportedRequestError: Says what to do.
    """
    if lacks_weights(model):
        raise UnsupportedRequestError(
            f"Weights of this {type(model).__name__} are on the `meta` device, and nothing brings them for a forward. "
            "Load them, or offload them with accelerate (`device_map`), before you generate."
        )


def _class_of(model: PreTrainedModel) -> type:
    """The class that the model's code is of: one that only adds a method to `generate` is not another model."""
    return next(cls for cls in type(model).__mro__ if not {"__init__", "forward"}.isdisjoint(vars(cls)))


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Runs forwards in evaluation mode, and leaves nothing of them in the model or its random numbers."""
    # hooks, too: transformers puts some on in the first forward, and a mark beside them that says so
    stores = [store for module in model.modules() for store in (vars(module), *vars(module).values())]
    before = [(store, dict(store)) for store in stores if isinstance(store, dict)]
    devices = {weight.device for weight in model.parameters()} | {input_device(model)}
    devices = {device for device in devices if device.type not in ("cpu", "mps", "meta")}
    versions = list(map(num_writes, model.parameters()))
    kind = next((device.type for device in devices), "cuda")
    try:
        with (
            torch.random.fork_rng(list(devices), device_type=kind),
            torch.inference_mode(False),
            torch.no_grad(),
            resharded(model),
        ):
            model.eval()
            _pick_few(model)
            yield
    finally:
        # where the weights were changed for good, as RWKV's are for inference, so is what a module says about it
        is_changed = list(map(num_writes, model.parameters())) != versions
        for now, then in before:
            for name in now.keys() - then.keys():
                del now[name]
            said = {name for name in then if is_changed and isinstance(now[name], bool) and name != "training"}
            now.update({name: value for name, value in then.items() if name not in said})


def _pick_few(model: PreTrainedModel) -> None:
    """Has attention pick a few places only, where it will not have all of a long text."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    for module in model.modules():
        own = vars(module)
        size = own.get("block_size", 1) if "topk_blocks" in own else 1
        for name in PICKED.keys() & own.keys():
            if size * own[name] < most:
                own.update(
                    {name: min(own[name], PICKED[name])} | ({"block_size": min(size, BLOCK)} if size > 1 else {})
                )


def _compare(model: PreTrainedModel, has_states: bool, is_alone: bool) -> None:
    name = type(model).__name__
    tokens = _tokens(model)
    text = model.config.get_text_config(decoder=True)
    layers = list(range(text.num_hidden_layers + 1)) if has_states else []
    plain = functools.partial(_read_plain, model, tokens[:NUM_TOKENS], layers)
    with _named(name, "as it is now, it fails even without a cache. If it lacks its device, attach after moving it"):
        logits_TV, states_TF = plain()
    with _named(name, "it fails with a cache, padding and explicit positions"):
        parts = _read_cached(model, tokens, layers, is_alone)
    for what, rows, logits_BTV, states_BTF in parts:
        for row, positions in rows.items():
            pairs = [("logits", logits_BTV, logits_TV), ("hidden states", states_BTF, states_TF)]
            for kind, found_BTX, expected_TX in pairs:
                if found_BTX is None or expected_TX is None:
                    continue
                error, limit = _error(found_BTX[row, -len(positions) :], expected_TX[positions], model)
                if error > limit and error > 3 * _own_noise(plain, kind, positions, model):
                    raise UnsupportedRequestError(
                        f"{name} can't be guarded: its {kind} {what} differ from those of the tokens alone, by "
                        f"{error:.0%} where {limit:.0%} would be rounding. It can't go on from a cache at given "
                        "positions."
                    )


def _tokens(model: PreTrainedModel) -> list[int]:
    """Token ids from all over the vocabulary: its ends are where special tokens lie."""
    size, num = model.config.get_text_config(decoder=True).vocab_size, NUM_TOKENS + NUM_WRONG
    return [size * (2 * index + 1) // (2 * num) for index in range(num)]


def _read_plain(model: Any, tokens: Sequence[int], layers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Logits and hidden states of a row that is read in one forward, without a cache."""
    ids = torch.tensor([tokens], device=input_device(model))
    places = torch.arange(len(tokens), device=input_device(model))[
        None
    ]  # `generate` counts from 0, whatever a model does
    arguments = {"position_ids": places} if takes_positions(model) else {}
    outputs = model(input_ids=ids, **arguments, use_cache=False, output_hidden_states=bool(layers), return_dict=True)
    _check_shape("logits", outputs.logits, len(tokens), None)
    if not layers:
        return outputs.logits[0], None
    size = model.config.get_text_config(decoder=True).hidden_size
    if outputs.hidden_states is None or len(outputs.hidden_states) != len(layers):
        num = 0 if outputs.hidden_states is None else len(outputs.hidden_states)
        raise UnsupportedRequestError(
            f"{type(model).__name__} can't be guarded: it returns {num} hidden states, but a head counts on "
            f"{len(layers)}, one before and one after each of `num_hidden_layers={len(layers) - 1}`."
        )
    for states in outputs.hidden_states:
        _check_shape("hidden states", main_stream(model, states), len(tokens), size)
    return outputs.logits[0], read_tap(model, outputs, layers, len(tokens))[0]


def _check_shape(kind: str, values: Tensor, num_tokens: int, size: int | None) -> None:
    shape = tuple(values.shape)
    if len(shape) != 3 or shape[:2] != (1, num_tokens) or size not in (None, shape[-1]):
        raise UnsupportedRequestError(
            f"The model can't be guarded: its {kind} have the shape {shape}, but must be of "
            f"(1, {num_tokens}, {'vocabulary' if size is None else size}) for {num_tokens} tokens."
        )


Part = tuple[str, dict[int, list[int]], Tensor, Tensor | None]


def _read_cached(model: PreTrainedModel, tokens: Sequence[int], layers: Sequence[int], is_alone: bool) -> list[Part]:
    """The same as guarded decoding reads it: what was read, positions of each row, logits and hidden states.

    Both rows take wrong drafts that are rolled back. In the longer row they were the last ones, which crops the cache;
    in the shorter one that leaves a hole.
    """
    right, wrong = list(tokens[:NUM_TOKENS]), list(tokens[NUM_TOKENS:])
    cached = cached_model(model, 2, layers, is_alone=is_alone)
    first = cached.forward([right[:4] + wrong[:1], right[:2] + wrong], 5, num_drafts=[1, 2])
    if not is_alone:
        _check_columns(model, cached)
    cached.keep([4, 2])
    starts = cached.lengths
    second = cached.forward([right[starts[0] : 6], right[starts[1] : 3]], 2)
    # the wrong tokens come last in their row, so what was read before them can be compared from the right end
    prompt = [part[:, :-1] if part is not None else None for part in first]
    padded = [part[:, :-2] if part is not None else None for part in first]
    assert prompt[0] is not None
    assert padded[0] is not None
    parts: list[Part] = [
        ("in a batch", {0: [0, 1, 2, 3]}, prompt[0], prompt[1]),
        ("in a batch with left padding", {1: [0, 1]}, padded[0], padded[1]),
        ("after a rollback", {0: [4, 5], 1: [2]}, second.logits_BTV, second.hidden_BTF),
    ]
    if cached.recurrent is not None or is_alone:
        # again, further back than there is a copy of, and from a copy that lies inside of a block
        cached.keep([5, 3])
        starts = cached.lengths
        cached.forward([right[starts[0] : 5] + wrong, right[starts[1] : 4] + wrong], 1, num_drafts=[2, 2])
        cached.keep([5, 4])
        starts = cached.lengths
        third = cached.forward([right[starts[0] : 6], right[starts[1] : 6]], 1)
        parts.append(("after several rollbacks", {0: [5], 1: [5]}, third.logits_BTV, _last(third.hidden_BTF)))
    return parts


def _last(states_BTF: Tensor | None) -> Tensor | None:
    return None if states_BTF is None else states_BTF[:, -1:]


def _check_columns(model: PreTrainedModel, cached: CachedModel) -> None:
    """Raises unless a forward of 5 tokens has left something of each of them in the cache."""
    nums = {state.shape[2] for layer in cached.cache.layers for state in column_states(layer)}
    if nums <= {5} and (nums or cached.recurrent is not None):
        return
    raise UnsupportedRequestError(
        f"{type(model).__name__} can't be guarded: it was given a cache and 5 tokens, and left "
        f"{max(nums, default=0)} in it."
    )


def _error(found_TX: Tensor, expected_TX: Tensor, model: PreTrainedModel) -> tuple[float, float]:
    """The error of the worst position, or in coarse formats of the best of the later ones, and how large it may be."""
    found_TX, expected_TX = found_TX.float().cpu(), expected_TX.float().cpu()
    spread_T = (expected_TX - expected_TX.mean(dim=-1, keepdim=True)).norm(dim=-1)
    errors_T = ((found_TX - expected_TX).norm(dim=-1) / spread_T.clamp(min=1e-6)).nan_to_num(0.0, posinf=0.0)
    is_exact = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
    return (float(errors_T.max()), EXACT) if is_exact else (float(errors_T[len(errors_T) // 2 :].min()), ROUGH)


def _own_noise(plain: Any, kind: str, positions: list[int], model: PreTrainedModel) -> float:
    """How far two plain forwards differ: some models draw random numbers."""
    first, second = (values[kind == "hidden states"][positions] for values in (plain(), plain()))
    return _error(first, second, model)[0]


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    """Says that it was the model that failed, and at what."""
    try:
        yield
    except (torch.OutOfMemoryError, UnsupportedRequestError):
        raise
    except FAILURES as error:
        raise UnsupportedRequestError(
            f"{name} can't be guarded: {what} ({type(error).__name__}: {str(error)[:200].strip()})."
        ) from error


def check_sizes(model: PreTrainedModel) -> None:
    """Raises unless a model's config says how many hidden states there are, and how large.

    Raises:
        UnsupportedRequestError: Names what is missing.
    """
    texts = model.config.get_text_config(), model.config.get_text_config(decoder=True)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if any(getattr(text, name, None) is None for text in texts):
            raise UnsupportedRequestError(f"{type(model).__name__} can't be guarded: its config has no {name!r}.")


def check_signature(model: PreTrainedModel) -> None:
    """Raises unless a model's forward names a cache.

    Raises:
        UnsupportedRequestError: Names what is missing.
    """
    names = inspect.signature(model.forward).parameters
    if names.keys().isdisjoint(CACHE_NAMES):
        raise UnsupportedRequestError(
            f"{type(model).__name__}.forward takes no `{CACHE_NAME}`, without which nothing can be rolled back."
        )
