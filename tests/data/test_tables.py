"""Lists of different lengths as columns and as matrices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.data.tables import list_column, padded


def test_padded_keeps_order_and_fills_what_is_missing():
    assert padded([[3, 1], [], [2]]).tolist() == [[3, 1], [0, 0], [2, 0]]
    assert padded([[0.5], []], -np.inf, width=2, dtype=np.float32).tolist() == [[0.5, -np.inf], [-np.inf, -np.inf]]
    assert padded([]).shape == (0, 0)
    with pytest.raises(ValueError, match="broadcast"):
        padded([[1, 2, 3]], width=2)


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=6))
def test_a_column_of_lists_is_the_matrix_without_its_padding(lists):
    matrix = padded(lists)
    assert list_column(matrix, matrix > 0).to_list() == lists
