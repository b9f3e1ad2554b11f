"""Labels out of the cells of tables: answers to yes or no made alike, and matrices of 0 and 1.

    answers_of(["1.0", "False", "", "-1"])            # ["1", "0", "", "-1"]
    names, values = label_matrix(columns, ["Finding Labels"])       # (N, L): 1, 0 or NaN

Answers (1, 1.0, True, yes, positive, their opposites, -1) become "1", "0" and "-1", which is
uncertain; a blank beside them is a no.
"""
import re

import numpy as np

from support.command import UserError

YES = {"1", "true", "yes", "y", "positive", "pos", "present", "+"}
NO = {"0", "false", "no", "n", "negative", "neg", "absent", "-"}
UNSURE = {"-1", "uncertain", "equivocal", "unknown", "unsure", "?"}
BLANK = {"", "nan", "null", "na", "n/a", "none"}


# ---- answers -----------------------------------------------------------------------------------

def answer_of(cell):
    """"1", "0", "-1" (uncertain) or "" for a cell that is an answer, else None."""
    word = cell.strip().lower()
    if re.fullmatch(r"[+-]?[01](\.0*)?", word):
        word = str(int(float(word)))
    for answer, words in (("1", YES), ("0", NO), ("-1", UNSURE), ("", BLANK)):
        if word in words:
            return answer
    return None


def answers_of(cells):
    """The cells as "1", "0", "-1" and "", or None if they are not answers to yes or no."""
    answer = {cell: answer_of(cell) for cell in set(cells)}
    if None in answer.values() or not {"1", "0"} & set(answer.values()):
        return None
    return [answer[cell] for cell in cells]


def values_of(cell):
    """The values in a cell: "a|b" and "['a', 'b']" have two."""
    if cell.startswith("[") and cell.endswith("]"):
        cell = "|".join(part.strip().strip("'\"").strip() for part in cell[1:-1].split(","))
    return [value for value in cell.split("|") if value]


def label_matrix(columns, names, labelled=None):
    """Columns of cells -> (names of labels, (N, L) float64 of 1, 0, and NaN where it is unknown).

    A column of answers is one label; any other is cut into one label a value, which is called
    "column: value" where two have it. Unknown are uncertain answers, and images that the list of
    bool `labelled` says have no row. Raises UserError for a name that is no column.
    """
    found = []  # (column, value or None, (N,) numbers)
    for name in names:
        if name not in columns:
            raise UserError(f"there is no column {name!r}", f"the table has "
                            f"{', '.join(columns) or 'no columns'}", "pass --label-column")
        answers = answers_of(columns[name])
        if answers:
            number = {"1": 1.0, "0": 0.0, "": 0.0, "-1": np.nan}
            found.append((name, None, np.array([number[answer] for answer in answers])))
            continue
        cells = [set(values_of(cell)) for cell in columns[name]]
        for value in sorted(set().union(*cells)):
            found.append((name, value, np.array([float(value in cell) for cell in cells])))

    short = [name if value is None else value for name, value, _ in found]
    shared = {name for text, (name, value, _) in zip(short, found)
              if value is not None and short.count(text) > 1}
    labels = [f"{name}: {value}" if name in shared else text
              for text, (name, value, _) in zip(short, found)]
    length = len(next(iter(columns.values()), ()))
    matrix = np.stack([numbers for *_, numbers in found], 1) if found else np.zeros((length, 0))
    if labelled is not None:
        matrix[~np.asarray(labelled)] = np.nan
    return labels, matrix
