"""Texts that lie in one piece are those that were given, whichever are chosen, joined and compared."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.io.packed_texts import AT_ONCE, Texts

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12)


@settings(deadline=None)
@given(texts, texts, st.data())
def test_texts_are_what_a_list_of_them_is(own: list[str], others: list[str], data: st.DataObject) -> None:
    packed, more = Texts(own), Texts(others)
    assert list(packed) == packed.to_list() == own == packed and len(packed) == len(own)
    assert [packed[i] for i in range(-len(own), len(own))] == own * 2 and packed[1:-1] == own[1:-1]
    places = data.draw(st.lists(st.integers(0, len(own) - 1), max_size=20)) if own else []
    some = packed.some(places)
    assert some == tuple(own[i] for i in places) and some.some([0] * bool(places)) == [own[i] for i in places[:1]]
    for a, b in ((packed, more), (some, more), (packed, some)):
        assert Texts.joined([a, b]) == [*a, *b] and Texts.joined([b, a, b]) == [*b, *a, *b]
    assert some.all_differ() == (len(set(some)) == len(places)) and packed.all_differ() == (len(set(own)) == len(own))
    assert packed.longest == max((len(text.encode()) for text in own), default=0)
    assert pickle.loads(pickle.dumps(some)) == some and Texts.of(some) is some


def test_many_are_gone_through_in_order() -> None:
    own = [f"{i:x}" for i in range(2 * AT_ONCE + 3)]
    assert list(Texts(own)) == own and list(Texts(own).some(np.arange(len(own))[::-1])) == own[::-1]
    assert Texts(own) != own[:-1] and Texts(own) != [*own[:-1], ""] and Texts(own[:1]) != own[0]


def test_bad_unicode_and_places_that_are_not_there_are_refused() -> None:
    with pytest.raises(UnicodeError):
        Texts(["a", "\ud800"])
    for place in (2, -3):
        with pytest.raises(IndexError):
            Texts(["a", "b"])[place]


def test_they_take_few_bytes_beside_their_letters() -> None:
    own, count = [f"{i:020}" for i in range(20_000)], 20_000
    tracemalloc.start()
    packed = Texts(own)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) == count and held < count * (20 + 4) + 10_000
