"""Drafts of networks that transformers has for one row at a time, made from states that the target computed anyway.

They read no prompt by themselves: a row has to wait until the target has read it.

Shapes: T positions of a block, F features of the target's tapped states, G drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..answer.rows import Row
from ..engine.cache import CachedModel
from ..engine.traits import CACHE_NAME
from .draft_length import DraftLength, confidence_kind
from .drafters import Found, Proposal, worthwhile
from .state_window import StateWindow


class StatesDrafter:
    """Drafts with a network that reads the target's states, row by row.

    Drafts are the network's likeliest guesses also where the target samples: it draws each token as it would anyway,
    and drafts stand where they are that.

    Args:
        network ([`~transformers.PreTrainedModel`]): What drafts.
        num_rows (`int`): Rows of the batch.
        length ([`DraftLength`]): How many drafts pay.
        layers (`list[int]`): The target's hidden states that it reads.
        num_features (`int`): Of all of them together.
    """

    lookback = 0
    """States before those of the last round that it reads again."""

    def __init__(
        self, network: PreTrainedModel, num_rows: int, length: DraftLength, layers: list[int], num_features: int
    ):
        self.network: Any = network
        self.length = length
        self.layers = layers
        self.num_features = num_features
        self.num_forwards = 0
        self._windows = [StateWindow(num_features) for _ in range(num_rows)]
        self._caches = [self._new_cache() for _ in range(num_rows)]

    def _new_cache(self) -> Any:
        """For one row."""
        raise NotImplementedError

    def _guess(self, index: int, row: Row, num: int) -> Tensor:
        """Logits of the drafts after a row's context, of shape `(G, V)`; more than the first `num` are not wanted."""
        raise NotImplementedError

    def attach(self, target: CachedModel) -> None:
        """Takes note of the target with its cache, before it has read anything."""

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        """Takes the target's states of `layers` of a row's context, from position `start` on."""
        self._windows[row].write(start, states_TF)

    def sampler(self, index: int, row: Row, num_tokens: int) -> CachedModel | None:
        """None: without the target it has no states to read."""
        return None

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int], found: Found | None = None) -> Proposal:
        """At most `num_tokens[row]` drafts for each row."""
        drafts: list[list[int]] = []
        kinds: list[list[int]] = []
        for index, (row, num) in enumerate(zip(rows, num_tokens, strict=True)):
            window = self._windows[index]
            is_ready = num > 0 and row.num_context > 1 and window.end >= row.num_context - 1
            probs_GV = self._safe_guess(index, row, num)[:num].float().softmax(-1) if is_ready else torch.empty(0, 1)
            chances_G, tokens_G = probs_GV.max(dim=-1)
            chances = chances_G.tolist()
            # from the first that is no number on, there are none
            num_sound = next((at for at, chance in enumerate(chances) if chance != chance), len(chances))
            drafts.append(tokens_G.tolist()[:num_sound])
            kinds.append([confidence_kind(chance) for chance in chances[:num_sound]])
            # a later rollback goes back to what is final at the furthest
            window.forget_before(min(len(row.prompt) + row.num_final, row.num_context - 1) - 1 - self.lookback)
        for row_kinds in kinds:
            self.length.note(row_kinds)
        return worthwhile(self.length, drafts, kinds)

    def _safe_guess(self, index: int, row: Row, num: int) -> Tensor:
        try:
            return self._guess(index, row, num)
        except BaseException:
            # whatever broke it off, the cache may hold half of a forward
            self._caches[index] = self._new_cache()
            raise

    def _states(self, index: int, row: Row) -> Tensor:
        """The target's states that are not in a row's cache yet, of shape `(1, T, F)`."""
        start, end = self._caches[index].get_seq_length(), row.num_context - 1
        return self._windows[index].read(start, end)[None].to(self.network.device, self.network.dtype)

    def _crop(self, index: int, length: int) -> None:
        cache = self._caches[index]
        cache.crop(min(length - cache.get_seq_length(), 0))

    def reject_after(self, row: int, num_drafts: int) -> None:
        """Nothing to do: caches hold what comes from the target's states only."""

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row, of which the target has states."""
        for index, length in enumerate(lengths):
            self._windows[index].keep(length)
            self._crop(index, max(length - self.lookback, 0))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""
        self._windows = [self._windows[row] for row in rows]
        self._caches = [self._caches[row] for row in rows]


class MtpDrafter(StatesDrafter):
    """Drafts with the multi-token prediction layers that were trained with a model: one token for each layer.

    Args:
        network ([`~transformers.modeling_layers.MtpModel`]): The layers, tied to the target.
        num_rows, length: As for [`StatesDrafter`].
        last_layer (`int`): Which hidden states are the target's last ones.
    """

    def __init__(self, network: Any, num_rows: int, length: DraftLength, last_layer: int):
        # the k-th layer reads the token k positions ahead, which may be a draft: that is read again
        self.lookback = len(network.layers) - 1
        super().__init__(network, num_rows, length, [last_layer], network.config.hidden_size)

    def _new_cache(self) -> Any:
        from transformers.cache_utils import MtpCache

        return MtpCache()  # without a config it keeps everything: masks hide what is outside of a window

    def _guess(self, index: int, row: Row, num: int) -> Tensor:
        self.num_forwards += 1
        cache = self._caches[index]
        start, device = cache.get_seq_length(), self.network.device
        _, logits_1GV, _ = self.network(
            input_ids=torch.tensor([row.context(start + 1)], device=device),
            last_hidden_states=self._states(index, row),
            attention_mask=None,
            position_ids=torch.arange(start + 1, row.num_context, device=device)[None],
            mtp_cache=cache,
        )
        self._crop(index, max(row.num_context - 1 - self.lookback, 0))
        logits: Tensor = logits_1GV[0]
        return logits


class DFlashDrafter(StatesDrafter):
    """Drafts a block at once, by denoising it over the target's states (DFlash).

    Args:
        network ([`~transformers.PreTrainedModel`]): With `block_size`, `mask_token_id` and `target_layer_ids`.
        num_rows, length: As for [`StatesDrafter`].
        target ([`~transformers.PreTrainedModel`]): Whose embeddings and LM head it uses.
    """

    def __init__(self, network: PreTrainedModel, num_rows: int, length: DraftLength, target: Any):
        config: Any = network.config
        layers = [layer + 1 for layer in config.target_layer_ids]
        super().__init__(network, num_rows, length, layers, config.hidden_size * len(layers))
        self.embeddings, self.head = target.get_input_embeddings(), target.get_output_embeddings()
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id

    def _new_cache(self) -> Any:
        from transformers.cache_utils import DFlashCache

        return DFlashCache()

    def _guess(self, index: int, row: Row, num: int) -> Tensor:
        self.num_forwards += 1
        cache, device = self._caches[index], self.network.device
        start, end = cache.get_seq_length(), row.num_context - 1
        cache.set_previous_accepted_tokens(end - start)
        block = torch.tensor([[*row.context(end), *[self.mask_token_id] * (self.block_size - 1)]])
        # as a table, without the norm that some models have behind it
        weight: Tensor = self.embeddings.weight
        embedded_1GD = torch.nn.functional.embedding(block.to(weight.device), weight)
        outputs = self.network(
            noise_embeds=embedded_1GD.to(device, self.network.dtype),
            context_hidden_states=self._states(index, row),
            position_ids=torch.arange(start, end + self.block_size, device=device)[None],
            attention_mask=None,
            **{CACHE_NAME: cache},
        )
        self._crop(index, end)
        cache.set_previous_accepted_tokens(0)
        logits: Tensor = self.head(outputs.last_hidden_state[0, 1:].to(self.head.weight))
        return logits


class SharedKvDrafter(StatesDrafter):
    """Drafts with a network that has no keys and values of its own: it reads those of the target's last layers.

    Args:
        network ([`~transformers.PreTrainedModel`]): An assistant of Gemma 4's kind.
        num_rows, length: As for [`StatesDrafter`].
        target ([`~transformers.PreTrainedModel`]): Whose embeddings it uses.
        layers_of (`dict[str, int]`): For each kind of layers, which of the target's to read.
    """

    lookback = 1  # it begins with the state that the last token came from

    def __init__(
        self, network: PreTrainedModel, num_rows: int, length: DraftLength, target: Any, layers_of: dict[str, int]
    ):
        config: Any = network.config
        text = target.config.get_text_config(decoder=True)
        super().__init__(network, num_rows, length, [text.num_hidden_layers], config.backbone_hidden_size)
        self.embeddings, self.layers_of = target.get_input_embeddings(), layers_of
        self.window: int = config.get_text_config().sliding_window
        self.target: CachedModel | None = None

    def _new_cache(self) -> Any:
        return DynamicCache()  # which stays empty

    def attach(self, target: CachedModel) -> None:
        self.target = target

    def _guess(self, index: int, row: Row, num: int) -> Tensor:
        assert self.target is not None
        end = row.num_context - 1
        # a token sees as many before it as its window holds, itself included
        most = {kind: self.window - 1 if kind == "sliding_attention" else end for kind in self.layers_of}
        shared = {
            kind: tuple(state[:, :, -most[kind] :] for state in self.target.states_of(index, layer))
            for kind, layer in self.layers_of.items()
        }
        state_11F = self._windows[index].read(end - 1, end)[None]
        token_11 = torch.tensor([row.context(end)], device=self.embeddings.weight.device)
        position_ids = torch.tensor([[end]], device=self.network.device)
        logits: list[Tensor] = []
        for _ in range(num):
            self.num_forwards += 1
            embedded_11D = self.embeddings(token_11).to(state_11F)
            outputs = self.network(
                inputs_embeds=torch.cat([embedded_11D, state_11F], dim=-1),
                position_ids=position_ids,
                shared_kv_states=shared,
                use_cache=False,
            )
            logits.append(outputs.logits[0, -1])
            token_11, state_11F = outputs.logits[:, -1:].argmax(dim=-1).to(token_11.device), outputs.last_hidden_state
        return torch.stack(logits)
