from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.ingest.merkle import EMPTY_ROOT, MerkleTree, inclusion_proof, is_included, leaf_hash, node_hash, root

# Leaves and roots of the test vectors that Certificate Transparency's implementations share.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
digests = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=70)


def root_by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return sha256(b"\x01" + root_by_definition(leaves[:k]) + root_by_definition(leaves[k:])).digest()


def test_roots_match_the_published_vectors():
    assert [root(LEAVES[: n + 1]).hex() for n in range(len(LEAVES))] == ROOTS
    assert root([]) == EMPTY_ROOT == sha256(b"").digest()


@settings(deadline=None)
@given(leaves=digests, cuts=st.lists(st.integers(0, 70), max_size=6))
def test_root_is_the_definitions_however_the_stream_is_cut(leaves, cuts):
    tree = MerkleTree()
    bounds = [0, *sorted(min(cut, len(leaves)) for cut in cuts), len(leaves)]
    for start, stop in pairwise(bounds):
        tree.extend(leaves[start:stop])

    assert tree.root() == root_by_definition(leaves)
    assert tree.n_leaves == len(leaves)


@settings(deadline=None)
@given(leaves=digests, data=st.data())
def test_proof_shows_each_leaf_and_nothing_else(leaves, data):
    index = data.draw(st.integers(0, len(leaves) - 1))
    n_leaves, top = len(leaves), root(leaves)
    proof = inclusion_proof(leaves, index)

    assert is_included(leaves[index], index=index, n_leaves=n_leaves, proof=proof, root=top)
    assert not is_included(bytes(32), index=index, n_leaves=n_leaves, proof=proof, root=top) or not any(leaves[index])
    assert not is_included(leaves[index], index=index, n_leaves=n_leaves, proof=[*proof, bytes(32)], root=top)
    assert not is_included(leaves[index], index=n_leaves, n_leaves=n_leaves, proof=proof, root=top)
    for at in range(len(proof)):
        wrong = [*proof[:at], bytes(32), *proof[at + 1 :]]
        assert not is_included(leaves[index], index=index, n_leaves=n_leaves, proof=wrong, root=top)


def test_node_does_not_pass_for_a_leaf():
    left, right = LEAVES[1], LEAVES[2]

    assert leaf_hash(leaf_hash(left) + leaf_hash(right)) != node_hash(leaf_hash(left), leaf_hash(right))


def test_proof_of_a_leaf_that_is_not_there_is_refused():
    with pytest.raises(IndexError, match="no leaf 2 among 2"):
        inclusion_proof([bytes(32), bytes(32)], 2)
