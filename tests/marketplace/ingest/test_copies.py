import hmac

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.ingest.copies import keyed_hash, normalised_text, text_fingerprints, vector_fingerprints

KEY = b"a key of the marketplace"


@settings(deadline=None)
@given(key=st.binary(max_size=200), message=st.binary(max_size=300))
def test_keyed_hash_is_hmac(key, message):
    assert keyed_hash(key)(message) == hmac.digest(key, message, "sha256")


def test_text_copies_survive_case_white_space_and_composition():
    same = ["Café  au\tlait", "cafe\u0301 AU lait\n", "  CAFÉ au lait"]

    assert len(set(text_fingerprints(KEY, same))) == 1
    assert text_fingerprints(KEY, ["cafe au lait"]) != text_fingerprints(KEY, same[:1])


@settings(deadline=None)
@given(text=st.text(max_size=50))
def test_normalised_text_is_normal_already(text):
    assert normalised_text(normalised_text(text)) == normalised_text(text)


def test_vector_copies_survive_type_order_of_bytes_and_sign_of_zero():
    vector = [0.0, 1.5, -3.0]
    same = [
        np.array(vector),
        np.array(vector, dtype=">f8"),
        np.array(vector, dtype=np.float32),
        np.array([-0.0, 1.5, -3.0]),
    ]

    assert len(set(vector_fingerprints(KEY, same))) == 1


def test_fingerprints_need_the_key_and_keep_kinds_and_lengths_apart():
    assert vector_fingerprints(KEY, [np.zeros(2)]) != vector_fingerprints(b"another key", [np.zeros(2)])
    assert vector_fingerprints(KEY, [np.zeros(2)]) != vector_fingerprints(KEY, [np.zeros(3)])
    assert vector_fingerprints(KEY, [np.zeros(0)]) != text_fingerprints(KEY, [""])
    assert {len(found) for found in text_fingerprints(KEY, ["a", "b"])} == {16}
