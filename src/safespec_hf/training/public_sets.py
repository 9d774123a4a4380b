"""Well-known public data sets, by short names: what their fields are called, their use and their licences.

What is said of them here is what their pages say. It is tried on rows of their shape, not on the sets themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import SafeSpecError
from .data import Example
from .files import RawRow, read_rows, write_whole

REDACTED = "REDACTED"  # Aegis has this in the place of prompts that it may not pass on


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """One data set.

    Attributes:
        address (`str`): Its id on the Hub with config and split, as [`load_examples`] takes it.
        license (`str`): Of the data, as the Hub abbreviates it.
        use (`str`): `"labelled"` answers of other models, or harmless `"prompts"` for the target to answer.
        label_field (`str`), labels (`Mapping`): Where the label of an answer is, and what its values mean.
        category_field (`str`): Where the category is: a name, names with commas between them, or booleans by name.
        access (`str`): What to do before it can be loaded.
    """

    address: str
    license: str
    use: Literal["labelled", "prompts"]
    label_field: str = ""
    labels: Mapping[Any, int] = field(default_factory=dict)
    category_field: str = "category"
    access: str = ""

    @property
    def is_commercial(self) -> bool:
        """Whether its licence lets a head that was trained on it be used commercially."""
        return "-nc" not in self.license

    @property
    def id(self) -> str:
        """Its id on the Hub."""
        return self.address.partition(":")[0]

    @property
    def fields(self) -> list[str]:
        """Those that a row must have to be of use."""
        return ["prompt"] if self.use == "prompts" else ["prompt", "response", self.label_field]

    def for_card(self) -> dict[str, str]:
        """A row of the table of data in a head's card."""
        return {"name": self.id, "license": self.license, "use": f"training: {self.use}"}


PUBLIC_SETS = {
    "beavertails": PublicSet(
        address="PKU-Alignment/BeaverTails:30k_train",
        license="cc-by-nc-4.0",
        use="labelled",
        label_field="is_safe",
        labels={True: 0, False: 1},
    ),
    "wildguardmix": PublicSet(
        address="allenai/wildguardmix:wildguardtrain:train",
        license="odc-by",
        use="labelled",
        label_field="response_harm_label",
        labels={"unharmful": 0, "harmful": 1},
        category_field="subcategory",
        access="accept its conditions on its page and log in with `hf auth login`",
    ),
    "aegis": PublicSet(
        address="nvidia/Aegis-AI-Content-Safety-Dataset-2.0:train",
        license="cc-by-4.0",
        use="labelled",
        label_field="response_label",
        labels={"safe": 0, "unsafe": 1},
        category_field="violated_categories",
    ),
    "or-bench": PublicSet(address="bench-llm/or-bench:or-bench-80k:train", license="cc-by-4.0", use="prompts"),
}


def describe_set(name: str, num_rows: int) -> str:
    """What will be loaded, and under which licence, in a line.

    Example:

        >>> describe_set("or-bench", 2000)
        'or-bench: bench-llm/or-bench:or-bench-80k:train, licence cc-by-4.0, up to 2,000 prompts'
    """
    found = PUBLIC_SETS[name]
    what = "prompts" if found.use == "prompts" else "labelled answers"
    access = f"; {found.access}" if found.access else ""
    return f"{name}: {found.address}, licence {found.license}, up to {num_rows:,} {what}{access}"


def keep_public_set(name: str, num_rows: int, folder: Path) -> Path:
    """Loads a set from the Hub, draws rows, and keeps them in a file that [`load_examples`] reads.

    Args:
        name (`str`): One of [`PUBLIC_SETS`].
        num_rows (`int`): How many rows at most; see [`draw_balanced`].
        folder (`Path`): Gets the file. If it is there, nothing is loaded.

    Raises:
        SafeSpecError: If it can't be loaded, or has no row with the fields that it should have.
    """
    file = folder / f"{name}-{num_rows}.jsonl"
    if file.exists():
        return file
    found = PUBLIC_SETS[name]
    rows = list(read_rows(found.address))
    examples = [example for row in rows if (example := to_example(name, row))]
    if not examples:
        raise SafeSpecError(
            f"No row of {found.address} has all of {', '.join(found.fields)}: it is not what it was. Fields of the "
            f"first row: {', '.join(rows[0].values) if rows else 'none'}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(example.to_json() + "\n" for example in draw_balanced(examples, num_rows)))
    return file


def to_example(name: str, row: RawRow) -> Example | None:
    """A row of a set as an example, or `None` if it lacks a prompt, or the answer or label that it should have.

    Raises:
        DataError: If its label is none of those that the set has.
    """
    found = PUBLIC_SETS[name]
    texts = [row.values.get(field) for field in found.fields[:2]]
    if not all(isinstance(text, str) and text.strip() for text in texts) or texts[0] == REDACTED:
        return None
    label: int | None = 0
    if found.use == "labelled":
        value = row.values.get(found.label_field)
        if value is None:
            return None
        label = next((label for known, label in found.labels.items() if known == value), None)
        if label is None:
            raise row.error(found.label_field, f"expected {', '.join(map(str, found.labels))}, got {value!r:.40}")
    return Example(
        id=f"{found.id}:{row.number}",
        messages=({"role": "user", "content": str(texts[0])},),
        response=str(texts[1]) if found.use == "labelled" else "",
        label=label,
        group=str(texts[0]),
        category=_name_category(row.values.get(found.category_field)),
        source=name,
    )


def draw_balanced(examples: Sequence[Example], num: int) -> list[Example]:
    """Draws as many of each label, and in a label as many of each category, as there are, and fills up with the rest.

    The draw depends on the texts only: not on their order, nor on a generator of random numbers.

    Args:
        examples (`Sequence[Example]`): All of them.
        num (`int`): How many to draw at most.
    """
    return _draw(examples, num, [lambda example: example.label, lambda example: example.category])


def _draw(examples: Sequence[Example], num: int, keys: Sequence[Callable[[Example], Any]]) -> list[Example]:
    if not keys:
        return sorted(examples, key=_hash_text)[:num]
    cells: dict[Any, list[Example]] = {}
    for example in examples:
        cells.setdefault(keys[0](example), []).append(example)
    drawn: list[Example] = []
    # the small ones first: what they lack is left for the large ones
    for index, cell in enumerate(sorted(cells, key=lambda cell: (len(cells[cell]), str(cell)))):
        drawn += _draw(cells[cell], (num - len(drawn)) // (len(cells) - index), keys[1:])
    return drawn


def _hash_text(example: Example) -> bytes:
    return hashlib.sha256(f"{example.group}\0{example.response}".encode()).digest()


def _name_category(value: object) -> str:
    if isinstance(value, Mapping):
        return next((str(name) for name, holds in value.items() if holds), "")
    return str(value).split(",")[0].strip() if value else ""
