"""labels.py: answers alike, and matrices of labels."""
import numpy as np
import pytest

from support.command import UserError
from support.labels import answers_of, label_matrix


@pytest.mark.parametrize("cells", [
    ["1", "0", "", "-1"], ["1.0", "0.0", "", "-1.0"], ["True", "False", "nan", "uncertain"],
    ["YES", "no", "", "-1"], ["Positive", "negative", "N/A", "?"], ["1.00", "0.", "none", "-1.0"]])
def test_answers_alike(cells):
    assert answers_of(cells) == ["1", "0", "", "-1"]
    names, values = label_matrix({"x": cells}, ["x"])
    assert names == ["x"] and values[:3, 0].tolist() == [1, 0, 0] and np.isnan(values[3, 0])


@pytest.mark.parametrize("cells", [["1", "2"], ["M", "F"], ["", ""], ["-1"], ["mild", "none"]])
def test_what_is_no_answer(cells):
    assert answers_of(cells) is None


def test_columns_that_share_values_stay_two():
    """Two columns of the same words are four labels, whose names say the column."""
    columns = {"left": ["mild", "severe"], "right": ["mild", "mild"], "finding": ["a|b", "b"],
               "padchest": ["['c', 'a d']", "[]"], "answer": ["1.0", ""]}
    names, values = label_matrix(columns, list(columns), labelled=[True, False])
    assert names == ["left: mild", "left: severe", "right: mild", "a", "b", "a d", "c", "answer"]
    assert values[0].tolist() == [1, 0, 1, 1, 1, 1, 1, 1] and np.isnan(values[1]).all()
    with pytest.raises(UserError, match="no column 'x'"):
        label_matrix(columns, ["x"])
