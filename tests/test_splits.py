"""splits.py: who is held out, patients in every spelling, outliers."""
import pytest
import torch

from pictures_on_disk import folder_of
from support.command import UserError
from support.datasets import open_dataset
from support.splits import (find_group_column, find_outliers, image_groups, is_group_column,
                            patient_in_path, read_split, split_holdout, write_split)


def opened(folder):
    return open_dataset(str(folder), 8)


def patients(tmp_path, count=60):
    """`count` images, three a patient."""
    folder_of(tmp_path, [f"{i:03d}.png" for i in range(count)], side=2)
    rows = [f"{i:03d}.png,p{i // 3},{i % 2},one" for i in range(count)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,Patient ID,sex,same"] + rows))
    return opened(tmp_path)


def test_split_keeps_patients_together(tmp_path):
    """Every image is on one side, no patient on both, near the fraction, the same each time."""
    images = patients(tmp_path)
    train, test = split_holdout(images, 0.3, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(60)) and test.dtype == torch.int64
    assert not {i // 3 for i in train.tolist()} & {i // 3 for i in test.tolist()}
    assert 6 <= len(test) <= 33  # 20 patients at 0.3: two standard deviations are 12 images
    assert torch.equal(test, split_holdout(images, "0.3", seed=1)[1])
    assert not torch.equal(test, split_holdout(images, 0.3, seed=2)[1])
    assert {i % 2 for i in split_holdout(images, 0.45, 3, "sex")[1].tolist()} in ({0}, {1})
    assert len(split_holdout(images, 0, 0)[1]) == 0 and len(split_holdout(images, 1e-9, 0)[1]) == 3
    later = split_holdout(patients(tmp_path, 120), 0.3, seed=1)[1]
    assert later[later < 60].tolist() == test.tolist()  # added images move no other


def test_split_file_comes_back(tmp_path):
    """write_split then read_split is the same split; a name that the set lacks is an error."""
    images = patients(tmp_path / "a", 12)
    train, test = split_holdout(images, 0.3, 0)
    write_split(tmp_path / "split.csv", images, train, test)
    back = read_split(tmp_path / "split.csv", images)
    assert torch.equal(back[0], train) and torch.equal(back[1], test)
    assert (tmp_path / "split.csv").read_text().startswith("file,split,group\n")
    assert torch.equal(split_holdout(images, tmp_path / "split.csv", 9)[1], test)
    with pytest.raises(UserError, match="split.csv"):
        read_split(tmp_path / "split.csv", patients(tmp_path / "b", 3))
    (tmp_path / "names.csv").write_text("file\n004.png\n")  # no split column: all are held out
    assert split_holdout(images, str(tmp_path / "names.csv"), 0)[1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("holdout, column", [
    (0.5, "hospital"), (1.0, None), (-1, None), ("nan", None), (0.2, "same"), ("no/file", None)])
def test_impossible_splits(tmp_path, holdout, column):
    """No such column, no such file, a fraction of 1 or more, and everything held out are errors."""
    with pytest.raises(UserError):
        split_holdout(patients(tmp_path, 12), holdout, 0, column)


def test_outliers():
    """Black, blank and blurred patches are found; sharp tissue, and bright fat with walls, stay."""
    tissue = open_dataset("histology", 96, count=40).batch(range(40))
    assert find_outliers(tissue) == [""] * 40
    fat = torch.full((1, 3, 96, 96), 0.9)
    fat[..., ::12] = 0.1
    odd = torch.cat([torch.full((1, 3, 96, 96), -0.9), torch.full((1, 3, 96, 96), 0.95),
                     torch.nn.functional.avg_pool2d(tissue[:1], 25, 1, 12), fat])
    assert find_outliers(odd) == ["black", "blank", "out of focus", ""]


# ---- patients

@pytest.mark.parametrize("name, is_one", [
    *((name, True) for name in (
        "patient", "Patient ID", "patient_id", "PatientID", "PATIENT-ID", "patientId",
        "Patient No.", "subject_id", "Subject", "SubjectID", "case_id", "CASE ID", "CaseID",
        "participant", "Participant ID", "participant_number", "group", "Group",
        "bcr_patient_barcode")),
    *((name, False) for name in (
        "Patient Age", "Patient Gender", "PatientBirth", "PatientSex_DICOM", "patient_position",
        "label", "study_id", "image_id", "subjective", "lowercase", "grouping"))])
def test_columns_of_patients(name, is_one):
    """Any case and spelling; columns about a patient are no patients."""
    assert is_group_column(name) == is_one


def test_the_patient_comes_before_other_groups():
    assert find_group_column(["group", "case_id", "Patient Age", "Patient ID"]) == "Patient ID"
    assert find_group_column(["label", "file"]) is None


@pytest.mark.parametrize("file, patient", [
    ("train/patient00001/study1/view1_frontal.jpg", "patient00001"),
    ("test/PNEUMONIA/person12_virus_46.jpeg", "person12"), ("sub-03/x.png", "sub-03"),
    ("p10/p10000032/s50414267/x.jpg", "p10000032"), ("NORMAL/IM-0115-0001.jpeg", ""),
    ("inpatient1/x.png", ""), ("person12a.png", ""), ("phantom_000001", "")])
def test_patients_in_paths(file, patient):
    assert patient_in_path(file) == patient


def test_a_split_holds_where_the_folder_moved(tmp_path):
    """split.csv goes by names: the same images in another place, or from one folder higher."""
    images = patients(tmp_path / "a" / "set", 12)
    train, test = split_holdout(images, 0.3, 0)
    write_split(tmp_path / "split.csv", images, train, test)
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_split(tmp_path / "split.csv", opened(tmp_path / "b" / "set"))[1].tolist() == (
        test.tolist())
    higher = opened(tmp_path / "b")
    assert read_split(tmp_path / "split.csv", higher)[1].tolist() == test.tolist()
    assert image_groups(higher)[3] == "p1"
