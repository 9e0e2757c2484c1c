"""Text of a report: nothing unseen stays unseen, nothing ends the element it stands in, and numbers survive the packing."""

from __future__ import annotations

import base64
import html
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emformer.report.packing import packed, spread
from emformer.report.text import UNSEEN, escaped, script_data, visible

TEXTS = st.text(st.characters(), max_size=40)  # surrogates too


@given(TEXTS)
def test_no_character_is_unseen(text: str):
    told = visible(text)
    assert not [c for c in told if unicodedata.category(c) in UNSEEN]
    assert visible(told) == told
    told.encode()  # as UTF-8, which has no surrogates


def test_unseen_characters_are_told_by_name():
    assert visible("a\x00b\nc\td\u202ee\u200f") == "a␀b↵c⇥d⟨U+202E⟩e⟨U+200F⟩"
    assert visible("Grüße, λόγος, שלום <b>") == "Grüße, λόγος, שלום <b>"


@given(TEXTS)
def test_escaped_text_comes_back_and_holds_no_markup(text: str):
    told = escaped(text)
    assert not set(told) & set("<>\"'")
    assert html.unescape(told) == visible(text)


@given(
    st.recursive(TEXTS | st.integers() | st.booleans() | st.none(), lambda x: st.lists(x, max_size=4) | st.dictionaries(TEXTS, x))
)
def test_data_stays_inside_its_element(value):
    told = script_data(value)
    assert told.isascii() and not set(told) & set("<>&\n\r\x00")

    def seen(one):
        if isinstance(one, dict):
            return {visible(key): seen(item) for key, item in one.items()}
        return visible(one) if isinstance(one, str) else [seen(item) for item in one] if isinstance(one, list) else one

    assert json.loads(told) == seen(value)


def test_numbers_that_are_none_become_null():
    assert script_data({"a": [1.0, float("nan"), float("inf"), 0.123456789, np.float32(2), np.int64(3), 1e300]}) == (
        '{"a":[1,null,null,0.12346,2,3,1e+300]}'
    )
    with pytest.raises(TypeError):
        script_data({"a": object()})


@pytest.mark.parametrize("bits", [8, 16])
def test_packed_arrays_come_back_to_half_a_step(bits: int):
    values = np.random.default_rng(0).normal(size=(5, 7, 3)) * 100
    values[1, 2], values[4, 6, 2] = np.nan, np.inf
    told = packed(values, bits)
    codes = np.frombuffer(base64.b64decode(told["codes"]), f"<u{bits // 8}").reshape(told["shape"]).astype(float)
    low, high = float(told["low"]), float(told["high"])
    step = (high - low) / (2**bits - 2)
    known = np.isfinite(values)
    assert np.array_equal(codes > 0, known)
    assert np.abs((low + (codes - 1) * step - values)[known]).max() <= step / 2 * (1 + 1e-9)
    assert (low, high) == (values[known].min(), values[known].max())


def test_constant_and_empty_arrays_are_packed():
    assert np.frombuffer(base64.b64decode(packed(np.full(3, 7.0), 8)["codes"]), np.uint8).tolist() == [1, 1, 1]
    assert packed(np.full(2, np.nan))["codes"] == base64.b64encode(b"\0" * 4).decode()
    assert packed(np.empty((0, 2)))["shape"] == [0, 2]


def test_spread_keeps_both_ends():
    assert spread(4, 9) == [0, 1, 2, 3] and spread(100, 3) == [0, 50, 99] and spread(5, 1) == [0]
    for count in range(1, 40):
        for most in range(2, 12):
            kept = spread(count, most)
            assert kept[0] == 0 and kept[-1] == count - 1 and len(kept) == min(count, most)
