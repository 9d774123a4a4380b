"""A draft head: one decoder layer that reads the target's own hidden states and drafts the tokens that come next.

The idea is EAGLE's (https://arxiv.org/abs/2401.15077) and EAGLE-3's (https://arxiv.org/abs/2503.01840): a draft that
sees what the target thought a token ago learns more from little data than a small language model of its own.

Shapes: B rows, T positions of the block, L positions in the cache and the block, D hidden size, F features of the
tapped states (D times the number of layers), H query heads, K key heads, C channels of a head, V draft vocabulary,
P positions of the rotary table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..checks import check_value
from ..engine.private_names import num_writes
from ..engine.traits import is_plain
from ..errors import UnsupportedRequestError
from .loading import StrictConfig, StrictModel
from .safety_head import check_binding, target_binding


class DraftHeadConfig(StrictConfig):
    """Architecture and target binding of a [`DraftHead`].

    Args:
        hidden_size (`int`): That of the target.
        hidden_layers (`list[int]`): Which of the target's hidden states are read, as in [`SafetyHeadConfig`]; >= 2.
        vocab_size (`int`): The target's.
        draft_vocab_size (`int`): Tokens that can be drafted, <= `vocab_size`.
        intermediate_size (`int`, defaults to 1536): Width of the MLP, > 0.
        num_attention_heads (`int`, defaults to 9): Query heads, a multiple of `num_key_value_heads`.
        num_key_value_heads (`int`, defaults to 3): Key and value heads, > 0.
        head_dim (`int`, defaults to 64): Channels of a head, even.
        rms_norm_eps (`float`, defaults to 1e-5): Of every norm, > 0.
        rope_theta (`float`, defaults to 100000.0): Base of the rotary embedding, > 0.
        max_position_embeddings (`int`, defaults to 8192): Positions that the rotary table covers, > 0.
        target (`dict`, *optional*): [`target_binding`] of the target it was distilled from.

    Raises:
        TypeError: If there is no such field.
        ValueError: If a value is outside of its range.

    Example:

        >>> from safespec_hf import DraftHeadConfig
        >>> sizes = {"hidden_size": 576, "vocab_size": 49152, "draft_vocab_size": 8192}
        >>> DraftHeadConfig(**sizes, hidden_layers=[2, 15, 27]).num_features
        1728
    """

    model_type = "safespec_draft"

    hidden_size: int = 0
    hidden_layers: list[int] | None = None
    vocab_size: int = 0
    draft_vocab_size: int = 0
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    max_position_embeddings: int = 8192
    num_hidden_layers: int = 1
    tie_word_embeddings: bool = False
    target: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        layers, sizes = self.hidden_layers, ("intermediate_size", "num_key_value_heads", "max_position_embeddings")
        is_layers = layers is None or (len(layers) >= 2 and min(layers) >= 0)
        # with one layer a tapped state could not be told from the head's own by its size
        check_value("hidden_layers", layers, is_layers, "at least two indices >= 0")
        check_value("hidden_size", self.hidden_size, self.hidden_size >= 0, "an integer >= 0")
        for name in sizes:
            check_value(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        heads, legal = self.num_attention_heads, f"a multiple of {self.num_key_value_heads} key heads"
        check_value("num_attention_heads", heads, heads > 0 and heads % self.num_key_value_heads == 0, legal)
        check_value("head_dim", self.head_dim, self.head_dim > 0 and self.head_dim % 2 == 0, "even and > 0")
        check_value("rms_norm_eps", self.rms_norm_eps, self.rms_norm_eps > 0, "> 0")
        check_value("rope_theta", self.rope_theta, self.rope_theta > 0, "> 0")
        check_value("num_hidden_layers", self.num_hidden_layers, self.num_hidden_layers == 1, "1")
        size = self.draft_vocab_size
        check_value(
            "draft_vocab_size", size, 0 <= size <= self.vocab_size, f"at most the vocabulary's {self.vocab_size}"
        )

    @property
    def num_features(self) -> int:
        """Inputs of `fuse`: hidden size times the number of layers that are read."""
        return self.hidden_size * len(self.hidden_layers or [])


@dataclass
class DraftHeadOutput(ModelOutput):
    """What a forward gives.

    Attributes:
        logits (`torch.Tensor` of shape `(B, T or logits_to_keep, V)`): Over the draft vocabulary, `token_ids`.
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): The `states` of the next draft step.
        cache ([`~transformers.Cache`], *optional*): The cache, grown by the block.
    """

    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    cache: Cache | None = None


class DraftHead(StrictModel):
    """One decoder layer over the target's hidden states. Embeddings and LM head are the target's own: see `bind`.

    At context position t it reads the token at t and the state of position t - 1, and predicts the token at t + 1.
    The state is the target's where the target has been, and the head's own from the draft step before elsewhere.

    Args:
        config ([`DraftHeadConfig`]): With sizes and `hidden_layers` set.

    Raises:
        ValueError: If the config does not say what to read or to draft.

    Example:

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from safespec_hf import DraftHead, DraftHeadConfig, target_binding
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> target = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
        >>> reading = {"hidden_layers": [1, 3], "draft_vocab_size": 8, "num_key_value_heads": 1}
        >>> config = DraftHeadConfig(**sizes, **reading, target=target_binding(target))
        >>> draft = DraftHead(config).bind(target)
        >>> draft(torch.tensor([[5, 6, 7]]), torch.zeros(1, 3, 32)).logits.shape
        torch.Size([1, 3, 8])
    """

    title = "draft head"
    config_class = DraftHeadConfig
    config: DraftHeadConfig
    main_input_name = "input_ids"
    token_ids: Tensor
    rope_P2C: Tensor
    output_VD: Tensor
    output_bias_V: Tensor | None

    def __init__(self, config: DraftHeadConfig):
        super().__init__(config)
        if config.num_features == 0 or config.draft_vocab_size == 0:
            raise ValueError(
                "A `DraftHead` needs `hidden_size`, `draft_vocab_size` and `hidden_layers`, but its config has "
                f"hidden_size={config.hidden_size}, draft_vocab_size={config.draft_vocab_size} and "
                f"hidden_layers={config.hidden_layers}."
            )
        width, inner = config.hidden_size, config.intermediate_size
        # plain numbers, as reading a config costs more than a small product
        self.width, self.eps, self.head_dim = width, config.rms_norm_eps, config.head_dim
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        num_channels = (self.num_heads + 2 * self.num_key_heads) * self.head_dim
        self.fuse = nn.Linear(config.num_features, width, bias=False)
        self.input_norms = nn.Parameter(torch.ones(2, width))
        self.qkv_proj = nn.Linear(2 * width, num_channels, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norm = nn.Parameter(torch.ones(width))
        self.register_buffer("token_ids", torch.arange(config.draft_vocab_size))
        self.register_buffer("rope_P2C", None, persistent=False)
        self.output = _TargetRows()
        self._embedding: tuple[Tensor, ...] = ()
        self._source: list[tuple[int, int]] = []
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not isinstance(module, _TargetRows):
            nn.init.normal_(module.weight, std=0.02)

    def _supports_logits_to_keep(self) -> bool:
        return True  # asked by whoever runs it with a cache; only models that generate by themselves inherit it

    def _bad_values(self) -> dict[str, list[str]]:
        ids = self.token_ids
        is_ok = ids.dtype == torch.long and int(ids[0]) >= 0 and int(ids[-1]) < self.config.vocab_size
        is_ok = is_ok and bool((ids.diff() > 0).all())
        return super()._bad_values() | {"not ascending ids of the target's tokens": [] if is_ok else ["token_ids"]}

    @torch.no_grad()
    def bind(self, target: PreTrainedModel, ignore_mismatches: tuple[str, ...] = ()) -> DraftHead:
        """Takes the target's embeddings, and a copy of those rows of its LM head that can be drafted.

        Called again, it takes them anew where the LM head was written or replaced since, as by `load_state_dict`.

        Args:
            target ([`~transformers.PreTrainedModel`]): The model that it was distilled from.
            ignore_mismatches (`tuple[str, ...]`): Fields of the binding to excuse, as for a safety head.

        Returns:
            [`DraftHead`]: Itself.

        Raises:
            HeadMismatchError: If it was distilled from another target.
            UnsupportedRequestError: If the target's embeddings or LM head are not plain matrices of its hidden size.
        """
        inputs, outputs = target.get_input_embeddings(), target.get_output_embeddings()
        is_bound = bool(self._embedding) and self._embedding[0] is getattr(inputs, "weight", None)
        source = [_state_of(getattr(outputs, name, None)) for name in ("weight", "bias")]
        is_cast = is_bound and (self.output.weight.dtype, self.output.weight.device) != (self.dtype, self.device)
        if is_bound and not is_cast and self._source == source:
            return self
        if not is_bound:  # or else it was checked, with what is to be excused
            check_binding(self, target_binding(target), ignore_mismatches)
        matrices = [module.weight for module in (inputs, outputs) if isinstance(module, (nn.Embedding, nn.Linear))]
        if [matrix.shape[-1] for matrix in matrices] != [self.width, self.width]:
            raise UnsupportedRequestError(
                f"A draft head shares its target's embeddings and LM head, which must be matrices of {self.width} "
                f"columns, but {type(target).__name__} has {inputs} and {outputs}."
            )
        if any(matrix.device.type == "meta" for matrix in matrices):
            raise UnsupportedRequestError(
                f"A draft head shares its target's embeddings and LM head, but those of this {type(target).__name__} "
                "are offloaded. Give both a device in `device_map`, or draft with a model or by prompt lookup."
            )
        # in a tuple, or it would count as a weight of this model and be moved and saved with it
        self._embedding, self._source = (matrices[0],), source
        own, rows = self.fuse.weight, self.token_ids.to(matrices[1].device)
        self.output.weight = matrices[1][rows].to(own)
        bias = getattr(outputs, "bias", None)
        self.output.bias = None if bias is None else bias[rows].to(own)
        self.rope_P2C = rope_table(self.config).to(own)
        return self

    def forward(
        self,
        input_ids: Tensor,
        states: Tensor,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        num_fused: int | None = None,
    ) -> DraftHeadOutput:
        """Drafts after every position of a block.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): The tokens of the block.
            states (`torch.Tensor` of shape `(B, T, F)` or `(B, T, D)`):
                The state of the position before each token: tapped from the target and concatenated, or this head's
                own `hidden_states`. Zeros for a context's first token.
            cache ([`~transformers.Cache`], *optional*): Of the context before the block. Default: a new one.
            position_ids (`torch.LongTensor` of shape `(B or 1, T)`, *optional*): Default: go on after the cache.
            attention_mask (`torch.Tensor` of shape `(B, L)` or `(B, 1, T, L)`, *optional*):
                0 where a column holds no token of a row; or which columns each token of the block sees.
            use_cache (`bool`, defaults to `True`): `False` reads the cache, but does not add the block to it.
            logits_to_keep (`int`, defaults to 0): Logits of this many of the last positions; 0 is all.
            return_dict (`bool`, defaults to `True`): There is no other form.
            num_fused (`int`, *optional*):
                For a block of both kinds, with `states` of size F: positions from this one on hold the head's own
                states in their first D features.

        Raises:
            UnsupportedRequestError: If it was not bound to a target.
        """
        state_BTD = self._fuse(states, num_fused)
        num_new = input_ids.shape[1]
        num_past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=input_ids.device)[None]
        query_BTHC, key_BKTC, value_BKTC = self.project(self.embed(input_ids), state_BTD, position_ids)
        if use_cache:
            cache = DynamicCache() if cache is None else cache
            key_BKTC, value_BKTC = cache.update(key_BKTC, value_BKTC, 0)
        elif num_past:
            layer: Any = cache.layers[0]  # type: ignore[union-attr]
            key_BKTC = torch.cat([layer.keys, key_BKTC], dim=2)
            value_BKTC = torch.cat([layer.values, value_BKTC], dim=2)
        mixed_BTX = _attend(query_BTHC, key_BKTC, value_BKTC, attention_mask)
        hidden_BTD = self.finish(mixed_BTX, state_BTD)
        logits = self.logits(hidden_BTD[:, -logits_to_keep:])
        return DraftHeadOutput(logits=logits, hidden_states=hidden_BTD, cache=cache)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The target's embeddings of tokens, in this head's precision, of shape `(B, T, D)`."""
        if not self._embedding:
            raise UnsupportedRequestError(
                "This draft head has no embeddings of its own: call `draft.bind(target)` before it is used."
            )
        embedding, weight = self._embedding[0], self.fuse.weight
        return F.embedding(input_ids.to(embedding.device), embedding).to(weight.device, weight.dtype)

    def project(self, embedded_BTD: Tensor, state_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of shape `(B, T, H, C)`, keys and values of shape `(B, K, T, C)`; the first two are rotated."""
        inputs_BT2D = torch.stack([embedded_BTD, state_BTD], dim=2)
        inputs_BTX = (F.rms_norm(inputs_BT2D, (self.width,), eps=self.eps) * self.input_norms).flatten(2)
        heads_BTHC = self.qkv_proj(inputs_BTX).unflatten(2, (-1, self.head_dim))
        rotated_BTHC = self.rotate(heads_BTHC[:, :, : -self.num_key_heads], position_ids)
        query_BTHC, key_BTKC = rotated_BTHC.split([self.num_heads, self.num_key_heads], dim=2)
        return query_BTHC, key_BTKC.transpose(1, 2), heads_BTHC[:, :, -self.num_key_heads :].transpose(1, 2)

    def rotate(self, heads_BTHC: Tensor, position_ids: Tensor) -> Tensor:
        """Rotary position embedding: the sine half of the table holds the sign."""
        cos_BT1C, sin_BT1C = self.rope_P2C[position_ids].unsqueeze(3).unbind(2)
        return torch.addcmul(heads_BTHC * cos_BT1C, heads_BTHC.roll(self.head_dim // 2, -1), sin_BT1C)

    def finish(self, mixed_BTX: Tensor, state_BTD: Tensor) -> Tensor:
        """The layer from the attention's output on, of shape `(B, T, D)`."""
        hidden_BTD = state_BTD + self.o_proj(mixed_BTX)
        normed_BTD = self._norm(hidden_BTD, self.mlp_norm)
        gate_BTI, up_BTI = self.gate_up_proj(normed_BTD).chunk(2, dim=-1)
        return hidden_BTD + self.down_proj(F.silu(gate_BTI) * up_BTI)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits over the draft vocabulary, of shape `(B, T, V)`."""
        return self.output(self._norm(hidden_BTD, self.norm))

    def _norm(self, hidden_BTD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(hidden_BTD, (self.width,), weight_D.to(hidden_BTD.dtype), self.eps)

    def _fuse(self, states: Tensor, num_fused: int | None) -> Tensor:
        states = states.to(self.fuse.weight.device, self.fuse.weight.dtype)
        if states.shape[-1] == self.width:
            return states
        if num_fused is None:
            return self.fuse(states)
        return torch.cat([self.fuse(states[:, :num_fused]), states[:, num_fused:, : self.width]], dim=1)


class _TargetRows(nn.Linear):
    """A linear layer of another model's weights, which are neither trained nor saved here."""

    weight: Any  # a buffer of shape `(V, D)` in place of a parameter
    bias: Any  # of shape `(V,)`, or none

    def __init__(self) -> None:
        nn.Module.__init__(self)
        for name in ("weight", "bias"):
            self.register_buffer(name, None, persistent=False)


def _state_of(weight: Any) -> tuple[int, int]:
    """Where a weight is and how often it was written there, as far as it is counted: in inference mode it is not."""
    if weight is None or not is_plain(weight):
        return 0, 0  # what is quantized or distributed may have no place of its own
    return weight.data_ptr(), 0 if weight.is_inference() else num_writes(weight)


def _attend(query_BTHC: Tensor, key_BKLC: Tensor, value_BKLC: Tensor, attention_mask: Tensor | None) -> Tensor:
    num_rows, num_new, num_heads, head_dim = query_BTHC.shape
    num_key_heads, length = key_BKLC.shape[1:3]
    mask = _build_mask(attention_mask, num_new, length, query_BTHC.device)
    if num_new == 1:
        # heads that share a key are queries of one head: much faster than `enable_gqa` in bfloat16 on a CPU
        query = query_BTHC.reshape(num_rows, num_key_heads, num_heads // num_key_heads, head_dim)
        return F.scaled_dot_product_attention(query, key_BKLC, value_BKLC, mask).reshape(num_rows, 1, -1)
    mixed_BHTC = F.scaled_dot_product_attention(
        query_BTHC.transpose(1, 2), key_BKLC, value_BKLC, mask, is_causal=mask is None, enable_gqa=True
    )
    return mixed_BHTC.transpose(1, 2).flatten(2)


def _build_mask(attention_mask: Tensor | None, num_new: int, length: int, device: torch.device) -> Tensor | None:
    if attention_mask is None and num_new in (1, length):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    past = length - num_new
    causal_TL = torch.ones(num_new, length, dtype=torch.bool, device=device).tril(past)
    if attention_mask is None:
        return causal_TL
    # padding sees itself: with nothing to see it would become nan, and spread
    return ((causal_TL & attention_mask.bool()[:, None]) | causal_TL.triu(past))[:, None]


def rope_table(config: DraftHeadConfig, frequencies: list[float] | None = None, scale: float = 1.0) -> Tensor:
    """Cosines and sines of every position, of shape `(P, 2, C)`."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    speeds = config.rope_theta**-half if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
    angles_PC = torch.arange(config.max_position_embeddings)[:, None] * speeds
    cos_PC, sin_PC = scale * angles_PC.cos(), scale * angles_PC.sin()
    return torch.stack([torch.cat([cos_PC, cos_PC], 1), torch.cat([-sin_PC, sin_PC], 1)], dim=1)


AutoConfig.register("safespec_draft", DraftHeadConfig, exist_ok=True)
AutoModel.register(DraftHeadConfig, DraftHead, exist_ok=True)
