"""prepare.py: a miniature of each public set, as its owners ship it, becomes a labels.csv."""
import gzip
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import prepare
from pictures_on_disk import folder_of
from support.command import UserError
from support.datasets import open_dataset
from support.training_set import split_holdout


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\r\n".join(rows) + "\r\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def nih(folder):
    names = [f"{i // 2 + 1:08d}_{i % 2:03d}.png" for i in range(24)]
    folder_of(folder, [f"images_00{1 + i // 12}/images/{name}" for i, name in enumerate(names)])
    finding = ["No Finding", "Cardiomegaly|Effusion", "Nodule", "Effusion"]
    table(folder / "Data_Entry_2017_v2020.csv", "Image Index,Finding Labels,Follow-up #,Patient ID,"
          "Patient Age,OriginalImage[Width,Height],", *(
              f"{name},{finding[i % 4]},{i % 2},{i // 2 + 1},058,2682,2749,"
              for i, name in enumerate(names)))
    (folder / "test_list.txt").write_text("\n".join(names[20:]))


def chexpert(folder):
    rows = {"train": [], "valid": []}
    for i in range(24):
        part = "valid" if i >= 20 else "train"
        path = f"{part}/patient{i // 2 + 1:05d}/study{i % 2 + 1}/view1_frontal.jpg"
        folder_of(folder, [path])
        edema = ["", "-1.0", "0.0", "1.0"][i % 4]
        rows[part].append(f"CheXpert-v1.0-small/{path},Female,61,Frontal,AP,1.0,{edema}")
    for part in rows:
        table(folder / f"{part}.csv", "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema",
              *rows[part])


def mimic(folder):
    ids = [f"{i:08x}-1a2b3c4d-5e6f7081-92a3b4c5-d6e7f809" for i in range(24)]
    folder_of(folder, [f"files/p10/p100000{i // 2:02d}/s500000{i:02d}/{name}.jpg"
                       for i, name in enumerate(ids)])
    keys = [f"100000{i // 2:02d},500000{i:02d}" for i in range(24)]
    table(folder / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id,ViewPosition",
          *(f"{name},{key},PA" for name, key in zip(ids, keys)))
    table(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", "subject_id,study_id,Edema", *(
        f"{key},{['', '-1.0', '0.0', '1.0'][i % 4]}" for i, key in enumerate(keys)))
    table(folder / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", *(
        f"{name},{key.split(',')[1]},{key.split(',')[0]},{'test' if i >= 20 else 'train'}"
        for i, (name, key) in enumerate(zip(ids, keys))))


def rsna(folder):
    folder_of(folder, [f"stage_2_train_images/{i:08x}-aa.png" for i in range(24)])
    table(folder / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *(
        f"{i:08x}-aa,{100.5 * k if i % 4 == 3 else ''},,,,{int(i % 4 == 3)}"
        for i in range(24) for k in range(1 + i % 4 // 3)))


def vindr(folder):
    folder_of(folder, [f"{'test' if i >= 20 else 'train'}/{i:032x}.png" for i in range(24)])
    table(folder / "annotations/image_labels_train.csv", "image_id,rad_id,Edema", *(
        f"{i:032x},R{k},{int(i % 4 == 3 and k == 1)}" for i in range(20) for k in range(3)))
    table(folder / "annotations/image_labels_test.csv", "image_id,Edema", *(
        f"{i:032x},{int(i % 4 == 3)}" for i in range(20, 24)))


def padchest(folder):
    folder_of(folder, [f"{i % 3}/{i:020d}_abc.png" for i in range(24)])
    table(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz",
          ",ImageID,ImageDir,PatientID,Labels", *(
              f"{i},{i:020d}_abc.png,{i % 3},{i // 2},\"['normal', ' edema {i % 4}']\""
              for i in range(24)))


def kermany(folder):
    folder_of(folder, [f"{part}/PNEUMONIA/person{i // 2}_bacteria_{i}.jpeg"
                       for part in ("train", "test") for i in range(12)])
    folder_of(folder, [f"{part}/NORMAL/IM-0115-{i:04d}.jpeg"
                       for part in ("train", "test") for i in range(2)])


def pcam(folder):
    folder_of(folder, [f"{part}/{i:04x}.tif" for part in ("train", "test") for i in range(24)])
    table(folder / "train_labels.csv", "id,label", *(f"{i:04x},{i % 2}" for i in range(24)))


EVERY_FOURTH = ["0", "0", "0", "1"] * 6


@pytest.mark.parametrize("make, column, cells, patients, tests", [
    (nih, "Effusion", ["0", "1", "0", "1"] * 6, 12, 4),
    (chexpert, "Edema", ["0", "", "0", "1"] * 6, 12, 4),
    (mimic, "Edema", ["0", "", "0", "1"] * 6, 12, 4),
    (rsna, "pneumonia", EVERY_FOURTH, 24, 0),
    (vindr, "Edema", EVERY_FOURTH, None, 4),
    (padchest, "edema 3", EVERY_FOURTH, 12, 0),
    (kermany, "pneumonia", None, 14, 14),
    (pcam, "tumour", ["0", "1"] * 12, None, 0)])
def test_public_sets(tmp_path, capsys, make, column, cells, patients, tests):
    """A cell per finding, several rows per image merged, patients apart, their own test part held
    out, and nothing left over but what their owners left without labels."""
    make(tmp_path)
    prepare.main([make.__name__, str(tmp_path)])
    assert "0 rows without an image" in capsys.readouterr().out
    images = open_dataset(tmp_path, 8)
    order = sorted((file for file in images.files if not (make is pcam and "test/" in file)),
                   key=lambda file: file if make is chexpert else file.split("/")[-1])
    if cells:
        assert [images.columns[column][images.files.index(file)] for file in order] == cells
    assert (images.groups and len(set(images.groups))) == patients
    train, test = split_holdout(images, 0.2, 0)
    assert len(train) and len(test) == (tests or len(test)) > 0
    if patients:
        assert not {images.groups[i] for i in train} & {images.groups[i] for i in test}
    else:
        assert "a patient may be on both sides" in " ".join(images.problems)


def test_patchcamelyon_arrays(tmp_path, monkeypatch):
    """The .h5 pairs are unpacked to PNG, their test part is held out."""
    for part, count in (("train", 6), ("test", 2)):
        arrays = {"x": np.full((count, 8, 8, 3), 51, np.uint8), "y": np.arange(count) % 2}
        for name, array in arrays.items():
            with open(tmp_path / f"camelyonpatch_level_2_split_{part}_{name}.h5", "wb") as file:
                np.savez(file, **{name: array.reshape(count, 1, 1, 1) if name == "y" else array})
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(
        File=lambda path: np.load(open(path, "rb"))))
    prepare.main(["pcam", str(tmp_path)])
    images = open_dataset(tmp_path, 8)
    assert len(images) == 8 and images.official.count("test") == 2
    assert images.columns["tumour"] == ["0", "1"] * 4
    assert (images[0] - (51 / 127.5 - 1)).abs().max() < 1e-6


@pytest.mark.parametrize("name, says", [
    ("nih", "no Data_Entry"), ("kermany", "not kermany as its owners"), ("pcam", "names? none")])
def test_what_is_no_such_set(tmp_path, name, says):
    """No table, another layout, a table of other images: one line in three parts, no file."""
    folder_of(tmp_path, ["a.png"])
    table(tmp_path / "train_labels.csv", "id,label", "b,1")
    with pytest.raises(UserError, match=says):
        prepare.main([name, str(tmp_path)])
    assert not (tmp_path / "labels.csv").exists()


@pytest.mark.parametrize("uncertain,answer", [("ignore", ""), ("zeros", "0"), ("ones", "1")])
def test_uncertain_answers(tmp_path, uncertain, answer):
    """-1 becomes what --uncertain says; an empty cell stays a no."""
    chexpert(tmp_path)
    prepare.main(["chexpert", str(tmp_path), "--uncertain", uncertain])
    images = open_dataset(tmp_path, 8)
    edema = dict(zip(images.files, images.columns["Edema"]))
    assert edema["train/patient00001/study2/view1_frontal.jpg"] == answer
    assert edema["train/patient00001/study1/view1_frontal.jpg"] == "0"
