"""Real words and their raters through the whole product: read, licensed, disclosed, replayed, measured, paid."""

from collections import Counter

import pytest

from attribution.models import PPQ, Verification
from attribution.services.disclosures import disclose_model
from examples.text import corpus
from marketplace.models import License
from marketplace.money import Money
from marketplace.services import versions
from payouts import ledger
from payouts.services.royalties import release_pool
from tests.factories.attribution import text_document
from tests.factories.payouts import PoolFactory
from tests.marketplace.services.ingested import parsed_here, published

MAPPING = {"content": "word", "label": "mood", "rights_holder": "holder", "labeller": "rater", "preview_rows": 20}


def test_real_raters_are_paid_for_what_their_words_did(alice, carol, work, monkeypatch):
    monkeypatch.setattr(versions, "parsed", parsed_here)
    words = corpus.draw_words(0, 120)
    rows = [
        (word, corpus.CLASSES[label], corpus.LEXICON_HOLDER, f"Rater {rater + 1}")
        for word, label, rater in zip(words.words[:120], words.label, words.rater, strict=False)
    ]
    version = published(alice, rows, header=("word", "mood", "holder", "rater"), mapping=MAPPING)
    assert (version.features["content"]["kind"], version.n_records) == ("text", 120)
    pool = PoolFactory(amount=Money(20_000_000, "USD"), buyer=carol, version=version, labellers_bps=5_000)
    license = License.objects.get(order_line=pool.order_line)
    asked = ([*words.words[120:160]], [corpus.CLASSES[label] for label in words.label[120:160]])
    document = text_document(licenses=[license], classes=corpus.CLASSES, queries=asked, epochs=4)

    disclosure = disclose_model(owner=carol, document=document)
    work()

    assert Verification.objects.get(disclosure=disclosure).verdict == "match"
    result = disclosure.results.get()
    assert (result.grade, result.number) == ("replayed", 1)
    shares = {share.party.name: share for share in result.shares.filter(partition="labeller")}
    assert Counter(share.n_records for share in shares.values()) == {12: 10}
    assert sum(share.paid_ppq for share in shares.values()) == PPQ
    assert disclosure.influence_index.status == "done"

    release_pool(pool=pool, result=result)
    owed = {code.split(":")[1]: -micros for code, micros in ledger.balances(prefix="payable").items()}
    holder = result.shares.get(partition="rights_holder").party
    assert owed.pop(str(holder.pk)) == 10_000_000
    expected = {str(share.party_id): share.paid_ppq * 10_000_000 / PPQ for share in shares.values() if share.paid_ppq}
    assert owed == pytest.approx(expected, abs=1) and sum(owed.values()) == 10_000_000
