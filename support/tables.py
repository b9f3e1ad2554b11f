"""Tables of labels as the public sets ship them: found, and matched to image files.

    columns, labelled, note = read_tables(folder, root, files, "ignore", problems)
    labels_of("xrays/a.png")                          # {column: cell} of one file

An image may have several rows, in several tables: it has what any of them says. A table in the
folder must name images of it; one above the folder, which may be another project's, need not.
"""
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from support.command import UserError
from support.files import read_csv
from support.images import path_below
from support.labels import answers_of
from support.names import clean_name, file_columns, match_names, note_names, split_name
from support.splits import is_group_column

OUR_TABLES = ("labels.csv", "train_labels.csv", "samples.csv")  # ours, Kaggle's PCam, sample.py's
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz")
TUMOUR = {"0": "healthy", "1": "cancer"}  # PatchCamelyon's labels
MANY = 50  # folders in which no table is looked for
PLACE = re.compile(  # folders that are no classes
    r"(patients?|subjects?|person|case|stud(y|ies)|series|images?|img|dicom|batch|part|fold|set|"
    r"p|s|train|val|valid|test)?[ _-]?\d*(copy)?", re.IGNORECASE)
UNCERTAIN = {"ignore": "-1", "zeros": "0", "ones": "1"}  # --uncertain -> what such a cell becomes
UNSURE_MEANS = {"ignore": "left out of labels (--uncertain zeros or ones takes them for that)",
                "zeros": "taken for 0", "ones": "taken for 1"}


# ---- one table ---------------------------------------------------------------------------------

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


# ---- the tables of a folder --------------------------------------------------------------------

def tables_in(place):
    """The tables of labels in a folder: ours alone, if there is one, else all."""
    place = Path(place)
    for name in OUR_TABLES:
        if (place / name).is_file():
            return [path_below(place, name)]
    names = sorted(name for name in os.listdir(place) if not name.startswith(".")
                   and name.lower().endswith(TABLE_SUFFIXES))
    return [path_below(place, name) for name in names if (place / name).is_file()]


def _tables_one_below(folder):
    """The tables in the folders of a folder, if these are not very many."""
    with os.scandir(folder) as entries:
        places = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False)
                        and not entry.name.startswith("."))
    if len(places) > MANY:
        return []
    return [table for place in places for table in tables_in(place)]


def read_tables(folder, root, files, uncertain, problems):
    """(columns, for each file whether it has a row, a note) from the tables of a folder.

    A table in the folder, or in a folder in it, must name images; one above need not.
    """
    inside = tables_in(root)
    if not inside and root != folder:
        inside = tables_in(folder)
    inside = inside or _tables_one_below(folder)
    above = [] if inside else tables_in(folder.resolve().parent)

    matches = []
    unused = []
    notes = []
    for path in inside + above:
        table = _open_table(path, path in above)
        rows, lost, ambiguous = table.match(files, root.resolve(), _prefix(path, root, files))
        if not any(rows):
            unused.append(table)
            continue
        matches.append((table, rows))
        if lost and path.name == "train_labels.csv":
            raise UserError(f"{path} names {len(lost):,} images that {root} has not (first: "
                            f"{lost[0]})", "each id needs its .tif", "unpack the images again, or "
                            "delete those rows")
        note_names(problems, f"rows of {path} without an image", lost)
        note_names(problems, f"names in {path} that mean several images", ambiguous)
        count = sum(map(len, rows))
        notes.append(f"{path.name} ({count:,} of {len(table.rows):,} rows matched)")

    if not matches and inside:
        _refuse_tables(unused, root)
    if not matches:
        note_names(problems, "tables above the folder, which name none of its images",
                   [table.path for table in unused])
        columns = _folder_labels(files)
        return columns, None, "no table, label = folder" if columns else "no labels.csv"
    return _merge(matches, unused, files, uncertain, problems, notes)


def _prefix(path, root, files):
    """What a table's names are to begin with: its own folder, if that has images."""
    place = path.parent
    if place == root or not place.is_relative_to(root):
        return ""
    prefix = f"{place.relative_to(root).as_posix()}/"
    return prefix if any(file.startswith(prefix) for file in files) else ""


def _open_table(path, may_fail):
    """The Table of a file; an empty one for a file above the folder that is no table."""
    try:
        return Table(path)
    except UserError:
        if not may_fail:
            raise
    return Table(path, [])


def _refuse_tables(tables, root):
    """Raise the UserError of a folder whose tables name none of its images."""
    table = tables[0]
    if not file_columns(table.columns):
        raise UserError(f"{table.path} has the columns {', '.join(table.columns)[:200] or 'none'}",
                        "one must be called file, or as in a public set: Image Index, Path, "
                        "image_id, ImageID, dicom_id", "correct its first line, or move it away")
    name = table.rows[0][table.file_column] if table.rows else "no name"
    raise UserError(f"{table.path} names none of the images in {root} (first: {name})",
                    "their names are needed", "correct them, or move the table out of the folder")


def _merge(matches, unused, files, uncertain, problems, notes):
    """What read_tables returns, of tables that name images, and of others that name studies."""
    columns, left_out, unsure = merge_tables(matches, len(files), uncertain)
    joined = [(table, join_by_study(table, columns)) for table in unused]
    joined = [(table, rows) for table, rows in joined if rows is not None and any(rows)]
    if joined:
        matches = matches + joined
        columns, left_out, unsure = merge_tables(matches, len(files), uncertain)
        notes += [f"{table.path.name} (joined by study)" for table, _ in joined]
    known = [table for table, _ in matches]
    note_names(problems, "tables that name none of the images",
               [table.path for table in unused if table not in known])
    note_names(problems, "columns left out, for their numbers differ between the rows of an image",
               left_out)
    if unsure:
        problems.append(f"uncertain answers, -1 in tables: {unsure:,}, {UNSURE_MEANS[uncertain]}")
    if any(table.path.name == "train_labels.csv" for table in known) and "label" in columns:
        columns["label"] = [TUMOUR.get(cell, cell) for cell in columns["label"]]

    labelled = [any(rows[i] for _, rows in matches) for i in range(len(files))]
    bare = [file for file, has_row in zip(files, labelled) if not has_row]
    note_names(problems, f"images without a row in {' or '.join(t.path.name for t in known)}", bare)
    shown = ", ".join(list(columns)[:8])
    if len(columns) > 8:
        shown += f" and {len(columns) - 8} more"
    return columns, labelled, f"{', '.join(notes)} with {shown or 'no column but the names'}"


def _folder_labels(files):
    """{"label": folder of each image} if the folders are classes, as Kermany's are, else {}."""
    folders = [file.split("/")[-2] if "/" in file else "" for file in files]
    count = Counter(folders)
    depths = {file.count("/") for file in files}
    is_class = not any(map(PLACE.fullmatch, folders)) and min(count.values()) > 1
    return {"label": folders} if is_class and 2 <= len(count) <= 20 and len(depths) == 1 else {}


# ---- one file ----------------------------------------------------------------------------------

@lru_cache(maxsize=64)
def _known_tables(place, changed):
    """The tables in a folder that was last changed then; none in one that may not be read."""
    with suppress(OSError, UserError):
        return tables_in(place)
    return []


@lru_cache(maxsize=16)
def _known_table(path, changed):
    """A table that was last changed then, read once for all files that it names."""
    return _open_table(path, True)


def labels_of(path):
    """Cells of the rows that name an image, in a table beside it or up to four above, or {}."""
    path = Path(os.path.abspath(path))
    for place in path.parents[:5]:
        for table_path in _known_tables(place, place.stat().st_mtime_ns):
            table = _known_table(table_path, table_path.stat().st_mtime_ns)
            file = path.relative_to(place).as_posix().removeprefix("images/")
            cells = table.cells_of(file, place)
            if cells:
                return cells
    return {}
