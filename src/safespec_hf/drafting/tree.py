"""A tree of drafts that grows where it promises most. Pure: no model, no cache.

A draft is a node. How likely it is to be reached is the product of the chances on its path, so the best nodes are
always a tree themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .draft_length import DraftLength, confidence_kind, other_kind

BEAM = 4
"""Drafts that are continued at a time."""


class Node(NamedTuple):
    """A draft.

    Attributes:
        token (`int`): The token.
        parent (`int`): The draft before it, or -1.
        depth (`int`): Drafts before it.
        kind (`int`): The evidence for it.
        reach (`float`): How likely it and all before it are accepted.
    """

    token: int
    parent: int
    depth: int
    kind: int
    reach: float


class DraftTree:
    """The drafts of a row in one round.

    Args:
        length ([`DraftLength`]): Knows chances and costs.
        max_depth (`int`): Drafts after one another at most, >= 1.
        max_size (`int`): Drafts at most.

    Example:

        >>> from safespec_hf.drafting.draft_length import DraftCosts
        >>> tree = DraftTree(DraftLength(DraftCosts(draft=0.05, verify=0.05)), max_depth=3, max_size=8)
        >>> tree.add(-1, tokens=[7, 8], probabilities=[0.6, 0.05])
        >>> tree.to_continue()
        [0]
        >>> tree.add(0, tokens=[9, 4], probabilities=[0.9, 0.05])
        >>> tree.best()
        ([7, 9, 8], [6, 9, 19], [-1, 0, -1])
    """

    def __init__(self, length: DraftLength, max_depth: int, max_size: int):
        self.length = length
        self.max_depth = max_depth
        self.max_size = max_size
        self.nodes: list[Node] = []
        self._is_continued: set[int] = set()

    def add(self, parent: int, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Adds the guesses that may follow a draft, the likeliest first; parent -1 is the context."""
        before = None if parent < 0 else self.nodes[parent]
        depth, reach = (0, 1.0) if before is None else (before.depth + 1, before.reach)
        for rank, (token, probability) in enumerate(zip(tokens, probabilities, strict=True)):
            kind = other_kind(probability) if rank else confidence_kind(probability)
            self._put(Node(token, parent, depth, kind, reach * self.length.chance(kind)))
            if rank == 0:
                self.length.note([kind], is_first=before is None)

    def add_found(self, tokens: Sequence[int], kinds: Sequence[int], length: DraftLength) -> None:
        """Adds drafts of somebody else, that follow one another from the context on; `length` knows their chances."""
        parent, reach = -1, 1.0
        for depth, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            reach *= length.chance(kind)
            parent = self._put(Node(token, parent, depth, kind, reach))

    def _put(self, node: Node) -> int:
        """The place of a guess; where there is one like it, the better evidence counts."""
        for index, known in enumerate(self.nodes):
            if (known.token, known.parent) == (node.token, node.parent):
                self.nodes[index] = max(known, node, key=lambda one: one.reach)
                return index
        self.nodes.append(node)
        return len(self.nodes) - 1

    def to_continue(self) -> list[int]:
        """The drafts to continue next, which then count as continued; none if that does not pay."""
        size = len(self.best()[0])
        gains = {
            index: self.length.gain_of_one(node.reach, size)
            for index, node in enumerate(self.nodes)
            if index not in self._is_continued
            and node.depth + 1 < self.max_depth
            # to continue a draft, the one before it must have been read
            and (node.parent < 0 or node.parent in self._is_continued)
        }
        best = sorted((index for index, gain in gains.items() if gain > 0), key=lambda index: -gains[index])[:BEAM]
        if sum(gains[index] for index in best) <= self.length.pace.costs.draft:
            return []
        self._is_continued.update(best)
        return sorted(best)

    def best(self) -> tuple[list[int], list[int], list[int]]:
        """The tree that is worth verifying: tokens, kinds of evidence, and parents, which come before children."""
        order = sorted(range(len(self.nodes)), key=lambda index: (-self.nodes[index].reach, index))[: self.max_size]
        num = self.length.best_size([self.nodes[index].reach for index in order])
        place = {-1: -1} | {index: at for at, index in enumerate(order[:num])}
        chosen = [self.nodes[index] for index in order[:num]]
        return [n.token for n in chosen], [n.kind for n in chosen], [place[n.parent] for n in chosen]
