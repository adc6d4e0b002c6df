import csv
import io

from hypothesis import given, settings
from hypothesis import strategies as st

from marketplace.ingest.readers import row_ends

cells = st.text(alphabet='ab" ,;\t\n', max_size=6)


def written(rows, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(cells, min_size=2, max_size=3), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t"),
    data=st.data(),
)
def test_a_block_is_cut_after_its_last_complete_row(rows, delimiter, data):
    block = written(rows, delimiter)
    size = data.draw(st.integers(0, len(block)))
    ends = [len(written(rows[:n], delimiter)) for n in range(len(rows) + 1)]

    found = row_ends(block[:size], delimiter)

    assert found.last == max(end for end in ends if end <= size)


def test_quotes_inside_a_cell_are_characters():
    assert row_ends(b'5" disk,a\n3" disk,b\nrest', ",").last == len(b'5" disk,a\n3" disk,b\n')
    assert not row_ends(b'5" disk,a\n', ",").is_open


def test_a_quote_that_nobody_closes_is_open():
    found = row_ends(b'a,b\nc,"d\ne,f\n', ",")

    assert (found.last, found.is_open) == (4, True)
    assert not row_ends(b'a,"b ""quoted"""\n', ",").is_open


def test_no_row_is_complete():
    assert row_ends(b"", ",").last == 0
    assert row_ends(b"abc", ",").last == 0
    assert row_ends(b'"a\nb', ",").last == 0
