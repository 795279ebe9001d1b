"""Breed names as token sequences, and those sequences as a trie: what two names share is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenTrie:
    """The labels' tokens, without the end token that closes each, as a tree laid out flat with parents before children.

    `tokens`, `depths`: (nodes,) the token of each node and its distance from the root, 1 for first tokens. `ancestors`:
    (nodes, nodes) bool, row i marks node i and all above it, the nodes that node i may attend to. `paths`: for each label, in the
    caller's order, the nodes it runs through.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ancestors: np.ndarray
    paths: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)


def build_trie(labels: Sequence[Sequence[int]]) -> TokenTrie:
    """The trie of token sequences, none of them empty or twice. A label may be the prefix of another: the end token tells them apart."""
    nodes = list(dict.fromkeys(tuple(label[:n]) for label in labels for n in range(1, len(label) + 1)))
    number = {node: i for i, node in enumerate(nodes)}
    paths = tuple(tuple(number[tuple(label[:n])] for n in range(1, len(label) + 1)) for label in labels)
    ancestors = np.zeros((len(nodes), len(nodes)), dtype=bool)
    for node, i in number.items():
        ancestors[i, [number[node[:n]] for n in range(1, len(node) + 1)]] = True
    return TokenTrie(np.array([node[-1] for node in nodes]), np.array(list(map(len, nodes))), ancestors, paths)


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
