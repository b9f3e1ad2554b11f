"""labels.py and names.py: answers alike, names of every kind, and files.read_csv's dialects."""
import numpy as np
import pytest

from support.command import UserError
from support.files import read_csv
from support.labels import answers_of, label_matrix
from support.names import file_columns, match_names

ROWS = [["file", "finding", "age"], ["a.png", "Épanchement, droit", "1"], ["b.png", "", "2"]]


def text_of(delimiter, end="\n"):
    return end.join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in row)
                    for row in ROWS) + end


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_of_every_dialect(tmp_path, delimiter, encoding, end):
    """The same rows, whatever program wrote them."""
    (tmp_path / "x.csv").write_bytes(text_of(delimiter, end).encode(encoding))
    assert read_csv(tmp_path / "x.csv") == [dict(zip(ROWS[0], row)) for row in ROWS[1:]]


def test_tables_of_excel_and_lists(tmp_path):
    """A line that names the delimiter, blank lines first, a pandas index, a list without a head."""
    for text in ("sep=;\n" + text_of(";"), "\n\n" + text_of(",")):
        (tmp_path / "x.csv").write_text(text, "utf-8")
        assert [row["age"] for row in read_csv(tmp_path / "x.csv")] == ["1", "2"]
    (tmp_path / "x.csv").write_text(",file,label\n0,a,1\n")
    assert read_csv(tmp_path / "x.csv") == [{"file": "a", "label": "1"}]
    (tmp_path / "x.txt").write_text("a.png\nb.png\n")
    assert [row["file"] for row in read_csv(tmp_path / "x.txt", ["file"])] == ["a.png", "b.png"]


# ---- names

@pytest.mark.parametrize("name", [
    "x1.png", "x1", "x1.dcm", "X/x1.png", "/home/you/set/x1.png", "C:\\data\\x1.png",
    "..\\other\\x1.png", "./batch1/x1.PNG", "batch1/x1"])
def test_a_name_means_its_file(name):
    rows, lost, ambiguous = match_names(["batch1/x0.png", "batch1/x1.png"], [name])
    assert rows == [[], [0]] and not lost and not ambiguous


def test_names_with_dots_letters_and_bytes():
    """UIDs keep their last number; composed and decomposed letters are one; bytes of no UTF-8."""
    uid = "1.2.276.0.7230010.3.1.4.8323329.14500.1517875252.443800"
    files = [f"{uid}.png", f"{uid}1.png", "e\u0301.png", "latin-\udce9.png"]
    assert match_names(files, [uid, uid + "1", "\u00e9.png", "latin-\u00e9"])[0] == [[0], [1], [2],
                                                                                   [3]]


def test_what_cannot_be_told_apart_spoils_no_other():
    """A copied image makes its own name ambiguous, not those of the others."""
    files = ["a/x0.png", "a/x1.png", "b/x2.png", "copy/x0.png"]
    rows, lost, ambiguous = match_names(files, ["x0.png", "x1.png", "x2.png", "x3.png"])
    assert rows == [[], [1], [2], []] and (lost, ambiguous) == (["x3.png"], ["x0.png"])
    assert match_names(files, ["copy/x0.png", "a/x0.png"])[0] == [[1], [], [], [0]]


def test_names_that_are_alike_are_told_apart_by_folders():
    """CheXpert's view1_frontal.jpg of every study, on the whole and on a part of the set."""
    files = [f"train/patient{p}/study{s}/view1.jpg" for p in range(3) for s in range(3)]
    names = [f"CheXpert/{file}" for file in files] + ["CheXpert/train/patient9/study1/view1.jpg"]
    rows, lost, ambiguous = match_names(files, names)
    assert rows == [[i] for i in range(9)] and lost == names[9:] and not ambiguous
    rows, lost, _ = match_names(files[3:6], names)
    assert rows == [[3], [4], [5]] and len(lost) == 7
    rows, lost, _ = match_names(["study1/view1.jpg"], names, "/data/CheXpert/train/patient1")
    assert rows == [[4]] and len(lost) == 9
    assert match_names(["patient7/study1/view1.jpg"], names)[0] == [[]]


def test_columns_that_name_images():
    assert file_columns(["id", "Image Index", "label"]) == ["Image Index", "id"]
    assert file_columns(["patientId", "Target"]) == ["patientId"]
    assert not file_columns(["name", "label"])


# ---- answers

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
