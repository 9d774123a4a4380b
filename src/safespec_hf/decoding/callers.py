"""The cache of one call, as its caller sees it: what is passed in, and what comes back."""

from __future__ import annotations

import copy
import time
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from ..answer.rows import pad_rows
from ..engine.callers_cache import check_user_cache, fill_cache, is_plain, open_cache, used_columns
from ..engine.evaluating import evaluating
from ..engine.growing import column_states, has_columns, model_layers
from ..engine.mixers import mixers_of
from ..engine.private_names import is_user_cache, mark_user_cache
from ..engine.traits import CACHE_NAME, goes_back_by_copies, has_windows, reads_alone
from ..errors import UnsupportedRequestError
from .loop import Decoder
from .step_outputs import read_into, wanted_outputs


class CallersCache:
    """What `generate` prepared as a cache, for guarded decoding to begin and to end with.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        config ([`~transformers.GenerationConfig`]): Of the call.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`): The prompts, of which a cache may hold the beginning.
        model_kwargs (`dict[str, Any]`): What `generate` prepared.

    Attributes:
        num_cached (`int`): Columns that a cache of the caller holds.
        before ([`~transformers.Cache`], *optional*): A copy of what is given, for outputs of steps.
        model_kwargs (`dict[str, Any]`): The same, with a dynamic cache in the place of any other.

    Raises:
        UnsupportedRequestError: If a cache of the caller's can't be continued.
    """

    def __init__(
        self, model: PreTrainedModel, config: GenerationConfig, prompt_ids: Tensor, model_kwargs: dict[str, Any]
    ):
        self.model = model
        self.is_wanted = bool(config.return_dict_in_generate and config.use_cache)
        given: Any = model_kwargs.get(CACHE_NAME)
        mask: Tensor | None = model_kwargs.get("attention_mask")
        embedded = model_kwargs.get("inputs_embeds")
        shape = prompt_ids.shape if embedded is None else embedded.shape[:2]
        self._is_real = prompt_ids.new_ones(shape) if mask is None else mask
        self.is_users = is_user_cache(given)
        if self.is_users:
            num_unknown = shape[1] - prompt_ids.shape[1]  # places that are embeddings only, and not in `max_length`
            check_user_cache(model, given, shape, config.max_length + num_unknown)
        if self.is_users and has_windows(model) and bool((self._is_real.long().diff(dim=1) < 0).any()):
            raise UnsupportedRequestError(
                f"`{CACHE_NAME}` of a model with sliding windows can't be continued after padding between tokens: "
                "what the windows have forgotten would be in reach. Pass the whole text, and no cache."
            )
        self.num_cached = int(given.get_seq_length()) if self.is_users else 0
        self.before = copy.deepcopy(given) if wanted_outputs(config) else None
        self._is_used_as_it_is = self.is_users and is_plain(given, shape[0], mask)
        # one that the caller will see filled
        self._given = given if self.is_users or isinstance(given, StaticCache) else None
        opened = None
        if self._given is not None and not self._is_used_as_it_is:
            opened = open_cache(given) if self.is_users else DynamicCache(config=model.config)
        self._opened, self._made, self._prepared = opened, given, model_kwargs
        self.model_kwargs = model_kwargs if opened is None else {**model_kwargs, CACHE_NAME: opened}
        if self.is_users:
            mark_user_cache(self.model_kwargs)

    def give_to(self, decoder: Decoder) -> None:
        """Has a decoder begin with what the cache holds."""
        if self._is_used_as_it_is:
            decoder.target.take_cache(cast("DynamicCache", self._given))
        elif self._opened is not None and self.num_cached:
            states = [column_states(layer) for layer in self._opened.layers]
            decoder.target.begin_with(states, used_columns(self._is_real[:, : self.num_cached]))
        if self._is_laid_out(decoder):
            decoder.finished = {}
            decoder.target.keep_all()  # rows are cut back to where the first of them ends

    def take_back(self, decoder: Decoder, prompt_ids: Tensor) -> Any:
        """What the caller gets after the call; a cache of the caller's is filled in any case."""
        cache = None
        if self._is_laid_out(decoder):
            cache = fill_cache(self.model, decoder.whole_cache(used_columns(self._is_real)), self._given)
        elif self.is_wanted and self._is_single(decoder) and self._is_as_good(decoder):
            cache = decoder.target.give_cache()
        elif self.is_wanted:
            cache = self._read_again(decoder, prompt_ids)
        return cache if self.is_wanted else None

    def _read_again(self, decoder: Decoder, prompt_ids: Tensor) -> Any:
        """The cache that `generate` made, filled by reading what the caller gets, up to where the first row ends.

        There are copies of recurrent states, but none of where rows end, and those of padding are nowhere.
        """
        start, num_new = time.perf_counter(), min(row.num_visible for row in decoder.rows)
        sees_padding = reads_alone(self.model) and not bool(self._is_real.all())
        if self._made is None or sees_padding or num_new == 0:
            return None
        answers, _, _ = pad_rows(decoder.rows, 0, prompt_ids.device)
        ids = torch.cat([prompt_ids, answers[:, : num_new - 1]], dim=1)
        with evaluating([self.model]):
            num_forwards = read_into(self.model, self._made, ids, num_new, self._prepared)
        decoder.statistics.num_target_forwards += num_forwards
        decoder.statistics.target_seconds += time.perf_counter() - start
        return self._made

    def _is_as_good(self, decoder: Decoder) -> bool:
        """Whether a row's own cache can be gone on with as that of a plain call, though it may end earlier.

        A rollback to a copy may have gone back further. Then it can't if it does not say where it ends, or if a plain
        forward over several tokens does not go on from it.
        """
        if not goes_back_by_copies(self.model):
            return True
        if self._given is not None:
            return False
        row = decoder.rows[0]
        if decoder.target.lengths[0] == row.num_continuable == len(row.prompt) + row.num_visible - 1:
            return True
        mixers = None if reads_alone(self.model) else mixers_of(self.model)
        return mixers is not None and mixers.reads_blocks and has_columns(self.model)

    def _is_single(self, decoder: Decoder) -> bool:
        return len(decoder.rows) == 1 and bool(self._is_real.all())

    def _is_laid_out(self, decoder: Decoder) -> bool:
        """Whether what was read has to be laid out anew, because it lies otherwise in a cache of a plain call."""
        if (
            self._is_used_as_it_is
            or goes_back_by_copies(self.model)
            or not (self.is_wanted or self._given is not None)
        ):
            return False
        has_windows = any(getattr(layer, "is_sliding", False) for layer in model_layers(self.model))
        return self._given is not None or has_windows or not self._is_single(decoder)
