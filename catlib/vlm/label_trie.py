"""Breed names as token sequences, and those sequences as a trie: what two names share is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROOT = -1  # the state after the prompt, before the first token of a label


@dataclass(frozen=True)
class TokenTrie:
    """The labels' tokens, without the end token that closes each, as a tree laid out flat with parents before children.

    `tokens`, `parents`, `depths`: (nodes,) the token of each node, its parent's index (ROOT above the first level) and
    its distance from the root, 1 for first tokens. `ancestors`: (nodes, nodes) bool, row i marks node i and all
    above it, the nodes that node i may attend to. `paths`: for each label, in the caller's order, the nodes it runs
    through.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    ancestors: np.ndarray
    paths: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)


def build_trie(labels: Sequence[Sequence[int]]) -> TokenTrie:
    """The trie of token sequences. A label may be the prefix of another: the end token tells the two apart.

    Raises ValueError on an empty label or on two equal ones, which no score could tell apart.
    """
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    children: dict[tuple[int, int], int] = {}
    paths = []
    for label in labels:
        if not len(label):
            raise ValueError("a label without tokens cannot be scored")
        node = ROOT
        path: list[int] = []
        for token in label:
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(len(path) + 1)
            path.append(child)
            node = child
        paths.append(tuple(path))
    if len(set(paths)) != len(paths):
        raise ValueError("two labels have the same tokens")
    ancestors = np.eye(len(tokens), dtype=bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            ancestors[node] |= ancestors[parent]
    return TokenTrie(np.array(tokens), np.array(parents), np.array(depths), ancestors, tuple(paths))


def split_labels(labels: Sequence[Sequence[int]], max_nodes: int) -> list[list[int]]:
    """Groups of label indices whose tries have at most `max_nodes` nodes each (a longer label stands alone).

    Neighbours in token order go together, so that little of what they share is computed twice.
    """
    groups: list[list[int]] = []
    nodes: set[tuple[int, ...]] = set()
    for i in sorted(range(len(labels)), key=lambda i: tuple(labels[i])):
        own = {tuple(labels[i][:n]) for n in range(1, len(labels[i]) + 1)}
        if not groups or len(nodes | own) > max_nodes:
            groups.append([])
            nodes = set()
        groups[-1].append(i)
        nodes |= own
    return groups
