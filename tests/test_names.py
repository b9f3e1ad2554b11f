"""names.py: which name in a table means which file."""
import pytest

from support.names import file_columns, match_names


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
