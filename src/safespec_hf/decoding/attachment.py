"""What a guarded model carries besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.pooling import find_newline_ids
from ..errors import UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_binding, target_binding


@dataclass(slots=True)
class Attachment:
    """What a guarded model carries besides its weights. Not a module, so that it is not saved with them."""

    head: SafetyHead
    always: bool
    ignore_mismatches: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    newline_ids: frozenset[int] = field(default_factory=frozenset)

    def use_tokenizer(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Takes a tokenizer if it is another one than before, and checks that it is the head's."""
        if tokenizer is not None and tokenizer is not self.tokenizer:
            check_binding(self.head, target_binding(model, tokenizer), self.ignore_mismatches)
            self.tokenizer, self.newline_ids = tokenizer, frozenset()
        if self.tokenizer is None:
            raise UnsupportedRequestError(
                f"No tokenizer was found at {model.config.name_or_path!r}, and guarded decoding needs one for "
                "segments and for the policy's texts. Pass `tokenizer=` to `attach_safety_head` or to `generate`."
            )
        if not self.newline_ids:
            self.newline_ids = find_newline_ids(self.tokenizer)
