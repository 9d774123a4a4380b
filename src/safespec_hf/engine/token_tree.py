"""The drafts of a row as a tree: other guesses for a token can be verified in the same forward. Pure: lists of ints.

A draft's parent is the draft before it in its continuation, or -1 where that is the context itself. Parents come
before their children. A chain is the tree in which every parent is the draft before.
"""

from __future__ import annotations

from collections.abc import Sequence


def chain_parents(num_drafts: int) -> list[int]:
    """Parents of a chain.

    Example:

        >>> chain_parents(3)
        [-1, 0, 1]
    """
    return list(range(-1, num_drafts - 1))


def path_to(draft: int, parents: Sequence[int]) -> list[int]:
    """The drafts from the context to this one, itself included.

    Example:

        >>> path_to(3, [-1, 0, -1, 1])
        [0, 1, 3]
    """
    path: list[int] = []
    while draft >= 0:
        path.append(draft)
        draft = parents[draft]
    return path[::-1]


def depths_of(parents: Sequence[int]) -> list[int]:
    """How many drafts there are on the path to each, itself included.

    Example:

        >>> depths_of([-1, 0, -1, 1])
        [1, 2, 1, 3]
    """
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def is_chain(parents: Sequence[int]) -> bool:
    """Whether every draft continues the one before."""
    return all(parent == index - 1 for index, parent in enumerate(parents))


def accept_matching(choices: Sequence[int], drafts: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    """A draft stands iff its parent stands and it is what the target says after it, greedily or drawn.

    Args:
        choices (`Sequence[int]`): The target's token after the context, and then after each draft.
        drafts, parents (`Sequence[int]`): The tree.

    Returns:
        `tuple[list[int], int]`: The drafts that stand, a path from the context, and the target's own token after it.

    Example:

        >>> accept_matching([7, 8, 5, 9], drafts=[7, 4, 8], parents=[-1, 0, 0])
        ([0, 2], 9)
    """
    path: list[int] = []
    at = -1
    while True:
        choice = choices[at + 1]
        found = [index for index, parent in enumerate(parents) if parent == at and drafts[index] == choice]
        if not found:
            return path, choice
        at = found[0]
        path.append(at)
