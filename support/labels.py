"""Tables of labels as the public sets ship them, matched to image files, their cells made alike.

    table = Table("Data_Entry_2017.csv")
    rows, lost, ambiguous = table.match(files, root)                # rows of each file
    columns, *_ = merge_tables([(table, rows)], len(files))         # column -> a cell for each file
    names, values = label_matrix(columns, ["Finding Labels"])       # (N, L): 1, 0 or NaN

An image may have several rows: it has what any of them says. Answers (1, 1.0, True, yes, positive,
their opposites, -1) become "1", "0" and "-1", which is uncertain; a blank beside them is a no.
"""
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from support.command import UserError
from support.files import read_csv
from support.names import clean_name, file_columns, match_names, split_name
from support.splits import is_group_column

YES = {"1", "true", "yes", "y", "positive", "pos", "present", "+"}
NO = {"0", "false", "no", "n", "negative", "neg", "absent", "-"}
UNSURE = {"-1", "uncertain", "equivocal", "unknown", "unsure", "?"}
BLANK = {"", "nan", "null", "na", "n/a", "none"}
UNCERTAIN = {"ignore": "-1", "zeros": "0", "ones": "1"}  # --uncertain -> what such a cell becomes


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


# ---- tables ------------------------------------------------------------------------------------

class Table:
    """A file of labels: .rows, a list of dicts, and .columns; .file_column once it was matched."""

    def __init__(self, path, rows=None):
        self.path = Path(path)
        self.rows = read_csv(path) if rows is None else rows
        self.columns = list(self.rows[0]) if self.rows else []
        self.file_column = None
        self._answers = {}
        self._numbers = {}

    def match(self, files, root, prefix=""):
        """(numbers of each file's rows, lost names, ambiguous names); see match_names.

        prefix: the folder, with its slash, in which the names are to be looked for.
        Raises UserError for a table of ours, with a column `file`, that has a name twice.
        """
        best = ([[] for _ in files], [], [])
        for column in file_columns(self.columns):
            names = [row[column] for row in self.rows]
            if column.lower() == "file":
                self._refuse_repeats(names)
            if prefix:
                names = [name and prefix + name for name in names]
            result = match_names(files, names, root)
            if self.file_column is None or any(result[0]):
                self.file_column = column
                best = result
            if any(result[0]):
                break
        return best

    def _refuse_repeats(self, names):
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"{self.path} has {count} rows for {name or 'no name'}", "one is "
                                "needed; a cell may hold several values, as in a|b", "delete one")

    def cells_of(self, file, root):
        """{column: cell} for one file below the folder root, {} if no row names it."""
        parts = split_name(clean_name(f"{root}/{file}"))
        for column in file_columns(self.columns):
            same = self._alike(column, parts)
            found, _, _ = match_names([file], [self.rows[number][column] for number in same], root)
            if found[0]:
                self.file_column = column
                numbers = [same[number] for number in found[0]]
                columns, _, _ = merge_tables([(self, [numbers])], 1)
                return {name: cells[0] for name, cells in columns.items()}
        return {}

    def _alike(self, column, parts, few=50):
        """Numbers of rows whose names end as the parts of a file do, in so much that few are left.
        """
        same = []
        for depth in range(1, len(parts) + 1):
            if (column, depth) not in self._numbers:  # last parts of names -> numbers of rows
                numbers = self._numbers[column, depth] = defaultdict(list)
                for number, row in enumerate(self.rows):
                    numbers[split_name(clean_name(row[column]))[-depth:]].append(number)
            nearer = self._numbers[column, depth].get(parts[-depth:], [])
            same = nearer or same
            if len(nearer) <= few:
                return same
        return same

    def answers(self, column):
        """{cell: "1", "0", "-1" or ""} if the column holds answers to yes or no, else None."""
        if column not in self._answers:
            values = sorted({row[column] for row in self.rows})
            answers = None if is_group_column(column) else answers_of(values)
            self._answers[column] = dict(zip(values, answers)) if answers else None
        return self._answers[column]


def merge_tables(matches, count, uncertain="ignore"):
    """Columns of all tables, a cell for each of `count` files, from [(table, rows of each file)].

    An image has what any of its rows says; the first table that names it and has a column wins.
    Returns (columns, names of columns left out, which are numbers that differ between the rows of
    an image, number of uncertain cells).
    """
    cells = {}  # column -> for each file the different cells of its rows
    answers = {}  # column -> {cell: answer}, or None
    for table, rows in matches:
        for column in table.columns:
            if column == table.file_column and not is_group_column(column):
                continue
            found = cells.setdefault(column, [()] * count)
            for i, numbers in enumerate(rows):
                if numbers and not found[i]:
                    found[i] = tuple(dict.fromkeys(table.rows[n][column] for n in numbers))
            known = answers.setdefault(column, {})
            new = table.answers(column)
            answers[column] = None if known is None or new is None else {**known, **new}

    columns = {}
    left_out = []
    unsure = 0
    for column, found in cells.items():
        if answers[column]:
            merged = [_merge_answers({answers[column][cell] for cell in several})
                      for several in found]
            unsure += merged.count("-1")
            columns[column] = [UNCERTAIN[uncertain] if answer == "-1" else answer
                               for answer in merged]
        elif max(map(len, found), default=0) > 1 and all(
                _is_number(cell) for several in found for cell in several):
            left_out.append(column)
        else:
            columns[column] = ["|".join(filter(None, several)) for several in found]
    return columns, left_out, unsure


def _merge_answers(answers):
    """The answer of an image whose rows give these: what one of them affirms holds."""
    return next((answer for answer in ("1", "-1", "0") if answer in answers), "")


def _is_number(cell):
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|", cell, re.IGNORECASE) is not None


def join_by_study(table, columns):
    """Rows of each file of a table that names no file, but the study it belongs to (MIMIC-CXR).

    columns: those of the files so far. Returns None if neither has such a column.
    """
    key = next((name for name in table.columns if name in columns
                and re.sub("[^a-z]", "", name.lower()) in ("studyid", "studyinstanceuid")), None)
    if key is None:
        return None
    by_study = defaultdict(list)
    for number, row in enumerate(table.rows):
        by_study[row[key]].append(number)
    return [by_study.get(cell, []) if cell else [] for cell in columns[key]]
