"""The tree whose root names a dataset version: RFC 6962, section 2.1, with SHA-256 over the records' digests.

    leaf(d) = H(0x00 ‖ d)        node(l, r) = H(0x01 ‖ l ‖ r)        the left subtree is the largest full one

The prefixes keep a node from passing for a leaf.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256

EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(digest: bytes) -> bytes:
    return sha256(b"\x00" + digest).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """The root of a stream, in memory that grows with the logarithm of its length."""

    def __init__(self) -> None:
        self.n_leaves = 0
        # pending[k]: the root of a full subtree of 2**k leaves that still waits for its right sibling, or None
        self._pending: list[bytes | None] = []

    def extend(self, digests: Iterable[bytes]) -> None:
        """Add leaves, a level at a time; how a stream is cut into calls changes nothing."""
        level = [sha256(b"\x00" + digest).digest() for digest in digests]
        self.n_leaves += len(level)
        height = 0
        while level:
            if height == len(self._pending):
                self._pending.append(None)
            waiting = self._pending[height]
            if waiting is not None:
                level.insert(0, waiting)
            self._pending[height] = level.pop() if len(level) % 2 else None
            pairs = iter(level)
            level = [sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]
            height += 1

    def root(self) -> bytes:
        right: bytes | None = None
        for left in self._pending:  # the lowest subtrees are the rightmost
            if left is not None:
                right = left if right is None else node_hash(left, right)
        return EMPTY_ROOT if right is None else right


def root(digests: Iterable[bytes]) -> bytes:
    tree = MerkleTree()
    tree.extend(digests)
    return tree.root()


def inclusion_proof(digests: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf `index` up to the root (RFC 6962, section 2.1.1).

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(digests):
        raise IndexError(f"There is no leaf {index} among {len(digests)}")
    level = [leaf_hash(digest) for digest in digests]
    path = []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):  # a last odd subtree has no sibling at this level and moves up unchanged
            path.append(level[sibling])
        above = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = above + level[len(level) - len(level) % 2 :]
        index //= 2
    return path


def is_included(digest: bytes, *, index: int, n_leaves: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that leaf `index` of `n_leaves` is `digest` (RFC 9162, section 2.1.3.2)."""
    if not 0 <= index < n_leaves:
        return False
    here, last, value = index, n_leaves - 1, leaf_hash(digest)
    for sibling in proof:
        if last == 0:
            return False
        if here % 2 or here == last:
            value = node_hash(sibling, value)
            while here % 2 == 0 and here:  # moved up unchanged through levels where it was the last, odd one
                here, last = here // 2, last // 2
        else:
            value = node_hash(value, sibling)
        here, last = here // 2, last // 2
    return last == 0 and value == root
