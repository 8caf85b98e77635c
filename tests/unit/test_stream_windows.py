"""Windows do not depend on how their samples were divided into messages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_node.mqtt.streams.windows import cut, first_rest


@given(st.data())
def test_windows_are_those_of_the_whole_signal(data):
    window = data.draw(st.integers(1, 20))
    hop = data.draw(st.integers(1, window))
    parts = data.draw(st.lists(st.integers(0, 45), max_size=6))
    signal = np.arange(1, sum(parts) + 1, dtype=np.int16)

    rest, found, at = first_rest(window, hop, signal.dtype), [], 0
    for length in parts:
        result = cut(rest, signal[at : at + length], window=window, hop=hop)
        found += result.windows.tolist()
        rest, at = result.rest, at + length
        assert len(rest) < window

    whole = [0] * (window - hop) + signal.tolist()
    expected = [whole[i : i + window] for i in range(0, len(whole) - window + 1, hop)]
    assert found == expected
    assert rest.tolist() == whole[len(expected) * hop :]


def test_the_first_window_of_overlapping_ones_begins_with_zeros():
    result = cut(first_rest(6, 4, np.dtype(np.float32)), np.ones(4, np.float32), window=6, hop=4)
    assert result.windows.tolist() == [[0, 0, 1, 1, 1, 1]]
    assert result.rest.tolist() == [1, 1]
