"""tables.py: tables as the public sets ship them, several at once, and those that match nothing."""
import gzip

import pytest

from pictures_on_disk import folder_of
from support.command import UserError
from support.datasets import open_dataset
from support.files import read_csv
from support.splits import image_groups, split_holdout
from support.tables import labels_of


def opened(folder):
    return open_dataset(str(folder), 8)


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\r\n".join(rows) + "\r\n")


def nih(folder):
    names = [f"{i // 2 + 1:08d}_{i % 2:03d}.png" for i in range(8)]
    folder_of(folder, [f"images_00{1 + i // 4}/images/{name}" for i, name in enumerate(names)])
    head = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
            "OriginalImage[Width,Height],")
    finding = ["No Finding", "Cardiomegaly|Effusion", "Nodule", "Effusion"]
    table(folder / "Data_Entry_2017_v2020.csv", head, *(
        f"{name},{finding[i % 4]},{i % 2},{i // 2 + 1},058,M,2682,2749," for i, name in
        enumerate(names)))
    table(folder / "test_list.txt", *names[6:])


def chexpert(folder):
    rows = {"train": [], "valid": []}
    for i in range(8):
        split = "valid" if i > 5 else "train"
        file = f"{split}/patient{i // 2 + 1:05d}/study{i % 2 + 1}/view1_frontal.jpg"
        folder_of(folder, [file])
        edema = ["", "-1.0", "0.0", "1.0"][i % 4]
        rows[split].append(f"CheXpert-v1.0-small/{file},Female,61,Frontal,{edema}")
    for split in rows:
        table(folder / f"{split}.csv", "Path,Sex,Age,Frontal/Lateral,Edema", *rows[split])


def mimic(folder):
    ids = [f"{i:08x}-1a2b3c4d-5e6f7081-92a3b4c5-d6e7f809" for i in range(8)]
    folder_of(folder, [f"files/p10/p1000000{i // 2}/s5000000{i}/{name}.jpg"
                       for i, name in enumerate(ids)])
    metadata = [f"{name},1000000{i // 2},5000000{i},PA" for i, name in enumerate(ids)]
    labels = [f"1000000{i // 2},5000000{i},{['', '-1.0', '0.0', '1.0'][i % 4]}" for i in range(8)]
    for name, rows in (("metadata", ["dicom_id,subject_id,study_id,ViewPosition", *metadata]),
                       ("chexpert", ["subject_id,study_id,Edema", *labels])):
        with gzip.open(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt") as file:
            file.write("\n".join(rows))


def vindr(folder):
    folder_of(folder, [f"train/{i:032x}.png" for i in range(8)])
    rows = [f"{i:032x},R{k},{int(i % 4 == 3 and k == 1)}" for i in range(8) for k in range(3)]
    table(folder / "annotations" / "image_labels_train.csv", "image_id,rad_id,Edema", *rows)
    boxes = [f"{i:032x},R{k},{'Edema' if i % 2 else 'No finding'},{10 * k if i % 2 else ''}"
             for i in range(8) for k in range(3)]
    table(folder / "annotations" / "annotations_train.csv", "image_id,rad_id,class_name,x_min",
          *boxes)


def rsna(folder):
    folder_of(folder, [f"stage_2_train_images/{i:08x}-aa.png" for i in range(8)])
    rows = [f"{i:08x}-aa,{100.5 * k if i % 4 == 3 else ''},{int(i % 4 == 3)}"
            for i in range(8) for k in range(1 + i % 4 // 3)]
    table(folder / "stage_2_train_labels.csv", "patientId,x,Target", *rows)


def padchest(folder):
    folder_of(folder, [f"{i % 3}/{i:020d}_abc.png" for i in range(8)])
    rows = [f"{i},{i:020d}_abc.png,{i % 3},{i // 2},\"['normal', 'edema {i % 4}']\""
            for i in range(8)]
    table(folder / "PADCHEST_chest_x_ray_images_labels.csv", ",ImageID,ImageDir,PatientID,Labels",
          *rows)


def kermany(folder):
    folder_of(folder, [f"{split}/PNEUMONIA/person{i // 2}_bacteria_{i}.jpeg"
                       for split in ("train", "test") for i in range(4)])
    folder_of(folder, [f"{split}/NORMAL/IM-0115-{i:04d}.jpeg"
                       for split in ("train", "test") for i in range(2)])


@pytest.mark.parametrize("make, says, column, cells, groups", [
    (nih, "(8 of 8 rows matched)", "Finding Labels",
     ["No Finding", "Cardiomegaly|Effusion", "Nodule", "Effusion"] * 2, 4),
    (chexpert, "4 patients by the files' paths", "Edema", ["", "-1", "0", "1"] * 2, 4),
    (mimic, "4 patients by column subject_id", "Edema", ["", "-1", "0", "1"] * 2, 4),
    (vindr, "no patient column: images count as their own patients", "Edema", list("00010001"), 8),
    (rsna, "8 patients by column patientId", "Target", list("00010001"), 8),
    (padchest, "4 patients by column PatientID", None, None, 4),
    (kermany, "label = folder", "label", None, 6),
])
def test_public_sets_as_they_ship(tmp_path, make, says, column, cells, groups):
    """Their own tables, column names, several rows an image, patients: no renaming."""
    make(tmp_path)
    images = opened(tmp_path)
    assert says in images.note and len(set(image_groups(images))) == groups
    if cells:
        order = sorted(range(len(images)), key=lambda i: images.files[i].split("/")[-1]
                       if make is not chexpert else images.files[i].split("/", 1)[1])
        assert [images.columns[column][i] for i in order] == cells
    if make is kermany:
        assert images.columns["label"] == ["PNEUMONIA" if "person" in file else "NORMAL"
                                           for file in images.files]
    train, test = split_holdout(images, 0.3, 0)
    group = image_groups(images)
    assert not {group[i] for i in train.tolist()} & {group[i] for i in test.tolist()}
    if make in (nih, chexpert, rsna, padchest):
        found = labels_of(images.sources[3])
        assert column is None or found[column] == images.columns[column][3]


def test_official_lists_of_names(tmp_path):
    """A list without a head holds out its images with their patients; of a set that is only partly
    here, names may be missing."""
    nih(tmp_path)
    train, test = split_holdout(opened(tmp_path), str(tmp_path / "test_list.txt"), 0)
    assert test.tolist() == [6, 7] and len(train) == 6
    (tmp_path / "test_list.txt").write_text("00000004_000\n00000099_000.png\n")
    images = opened(tmp_path)
    assert split_holdout(images, tmp_path / "test_list.txt", 0)[1].tolist() == [6, 7]
    assert "without an image here: 1 (00000099_000.png)" in images.problems[-1]
    (tmp_path / "test_list.txt").write_text("00000099_000.png\n")
    with pytest.raises(UserError, match="00000099_000.png"):
        split_holdout(images, tmp_path / "test_list.txt", 0)


def test_uncertain_answers(tmp_path):
    """-1 stays, or becomes 0 or 1; the first lines say how many there were."""
    chexpert(tmp_path)
    for uncertain, cells in (("ignore", ["", "-1", "0", "1"]), ("zeros", ["", "0", "0", "1"]),
                             ("ones", ["", "1", "0", "1"])):
        images = open_dataset(tmp_path, 8, uncertain=uncertain)
        assert images.columns["Edema"][:4] == cells
        assert any("uncertain answers, -1 in tables: 2" in line for line in images.problems)


@pytest.mark.parametrize("place, text, says", [
    ("set", "file,x\nb.png,1\n", "names none of the images"),
    ("set", "Image Index,x\nb.png,1\n", "names none of the images"),
    ("set", "number,x\n1,1\n", "must be called file"),
    (".", "id,text\n1,some other project\n", None), (".", "file,x\nother.png,1\n", None),
    (".", "\x00\x01", None)])
@pytest.mark.parametrize("name", ["labels.csv", "train_labels.csv", "findings.csv"])
def test_tables_that_match_nothing(tmp_path, place, text, says, name):
    """In the folder an error; above it passed over with a note."""
    folder_of(tmp_path / "set", ["a.png", "c.png"])
    (tmp_path / place / name).write_text(text)
    if says:
        with pytest.raises(UserError, match=says):
            opened(tmp_path / "set")
    else:
        images = opened(tmp_path / "set")
        assert images.columns == {} and any(name in line for line in images.problems)


def test_a_table_beside_others(tmp_path):
    """labels.csv is the only one where it is; others of a folder join, strangers are named."""
    folder_of(tmp_path, ["a.png", "b.png"])
    table(tmp_path / "one.csv", "image,finding", "a,x", "b,y")
    table(tmp_path / "two.tsv", "Image_ID\tage", "b.png\t7", "c.png\t8")
    table(tmp_path / "other.csv", "filename,size", "z.png,1")
    images = opened(tmp_path)
    assert images.columns == {"finding": ["x", "y"], "age": ["", "7"]}
    assert any("other.csv" in line and "name none" in line for line in images.problems)
    table(tmp_path / "labels.csv", "file,label", "a.png,1", "b.png,0")
    assert opened(tmp_path).columns == {"label": ["1", "0"]}


def test_two_sets_in_one_folder(tmp_path):
    """Each has its own table and names that the other has as well: none is mixed up."""
    folder_of(tmp_path, ["a/x.png", "a/y.png", "b/x.png", "b/y.png"])
    table(tmp_path / "a/labels.csv", "file,label,patient", "x.png,p,1", "y.png,q,1")
    table(tmp_path / "b/labels.csv", "file,label,patient", "x.png,r,2", "y.png,s,2")
    images = opened(tmp_path)
    assert images.columns["label"] == ["p", "q", "r", "s"] and not images.problems


# ---- dialects

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
