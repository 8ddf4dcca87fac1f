"""Many spans of one array are counted and compared as each by itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import repeats, spans

FEW = st.lists(st.integers(0, 2), max_size=30)


@st.composite
def arrays(draw):
    """An array of small numbers, and spans in it: in any order, empty, overlapping."""
    values = np.array(draw(FEW), np.int32)
    places = st.integers(0, len(values))
    bounds = draw(st.lists(st.tuples(places, places).map(sorted), max_size=12))
    starts, ends = np.array(bounds, np.int64).reshape(-1, 2).T
    return values, starts, ends


@given(arrays(), st.integers(1, 20))
def test_sums_and_repeats_are_those_of_each_span(found, at_once):
    values, starts, ends = found
    before, spans.AT_ONCE = spans.AT_ONCE, at_once
    try:
        sums = spans.sums(values == 1, starts, ends)
        repeated = spans.repeated(values, starts, ends)
    finally:
        spans.AT_ONCE = before
    each = [values[start:end].tolist() for start, end in zip(starts, ends)]
    assert sums.tolist() == [span.count(1) for span in each]
    assert repeated.tolist() == [i for i, span in enumerate(each) if each.count(span) > 1]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8))
def test_the_last_answer_of_each_document_is_found(documents):
    ends = np.cumsum([len(each) for each in documents])
    starts = ends - [len(each) for each in documents]
    found = repeats._last_answers(np.concatenate(documents).astype(bool), starts, ends)
    for document, place in zip(documents, (found - starts).tolist()):
        begins = [i for i in range(1, len(document)) if document[i] and not document[i - 1]]
        assert place == (begins[-1] if begins else 0)
