"""Every exception that safespec-hf raises on purpose.

SafeSpecError                  base of them all, a `ValueError`
├── HeadFileError              no whole head is in that folder or repository; an `OSError` too
├── HeadMismatchError          the head was trained for another target
└── UnsupportedRequestError    this combination of arguments can't be guarded
"""

from __future__ import annotations


class SafeSpecError(ValueError):
    """A request that can't be met safely. Raised before the first forward, never in the middle of an answer."""


class HeadFileError(SafeSpecError, OSError):
    """The files of a head are missing, damaged or not those of a head. An `OSError` too, as in transformers."""


class HeadMismatchError(SafeSpecError):
    """A head was given to a target that it was not trained for.

    Args:
        mismatches (`dict[str, tuple[object, object]]`):
            Field name to (value the head is bound to, value the target has).
        title (`str`, *optional*, defaults to `"safety head"`): What kind of head it is.
    """

    def __init__(self, mismatches: dict[str, tuple[object, object]], title: str = "safety head"):
        self.mismatches = mismatches
        fields = "; ".join(
            f"`{name}`: the head is bound to {bound!r}, the target has {found!r}"
            for name, (bound, found) in mismatches.items()
        )
        super().__init__(
            f"This {title} was trained for another target. {fields}. Its scores mean nothing here: load the head "
            "made for this target, or train one. For a fine-tune whose hidden states you have checked, pass "
            "`ignore_mismatches=(...)` with the names of the fields to excuse."
        )


class UnsupportedRequestError(SafeSpecError):
    """`generate` was given arguments under which safety can't be guaranteed."""
