"""datasets.py: folders, tables as the public sets ship them, masks, .npz, .h5, phantoms."""
import gzip
import os
import pickle
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pictures_on_disk import folder_of, write
from support import datasets
from support.command import UserError
from support.datasets import labels_of, open_dataset
from support.images import list_images
from support.splits import image_groups, split_holdout

STEP = 1 / 255 + 1e-6  # half a grey level of 8 bits in [-1, 1], and rounding


def opened(folder):
    return open_dataset(str(folder), 8)


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


# ---- folders, labels, masks

def test_folder_order_depth_and_hidden(tmp_path):
    """Images at any depth are sorted; hidden files, masks folders and other files are no images."""
    folder_of(tmp_path, ["b.png", "a/z.JPG", "a/c.png", ".hidden.png", ".cache/x.png",
                         "masks/b.png", "masks_manual/b.png"])
    (tmp_path / "notes.txt").write_text("x")
    images = opened(tmp_path)
    assert images.files == ["a/c.png", "a/z.JPG", "b.png"] and len(list(images)) == 3
    assert images[2].mean() == -1 and images[0].mean() == pytest.approx(20 / 127.5 - 1, abs=STEP)


def test_images_folder_masks_and_labels_beside_it(tmp_path):
    """A folder that holds images/ means that one; masks match by stem and kind, or are None;
    labels_of finds the row of a single file."""
    folder_of(tmp_path, ["images/a.jpg", "images/sub/b.jpg", "other.png"])
    for name in ("masks/a", "masks/lost", "masks_manual/b"):
        write(tmp_path / f"{name}.png", np.full((8, 8), 255, np.uint8))
    (tmp_path / "labels.csv").write_text("file,finding\na.png,x\nsub/b.jpg,y\n")
    for place in (tmp_path, tmp_path / "images"):
        images = opened(place)
        assert images.files == ["a.jpg", "sub/b.jpg"]
        assert images.columns == {"finding": ["x", "y"]}
        assert images.mask(0).all() and images.mask(1) is None
        assert images.mask(0, "masks_manual") is None and images.mask(1, "masks_manual").all()
        assert images.problems == ["masks/ without an image: 1 (lost.png)"]
    assert [labels_of(path) for path in list_images(tmp_path)] == [
        {"finding": "x"}, {"finding": "y"}]
    assert labels_of(tmp_path / "other.png") == {}


@pytest.mark.parametrize("name, scale", [("x.png", 1), ("x.png", 255), ("x.jpg", 255),
                                         ("x.png", 0)])
def test_masks_of_zero_and_one_or_255(tmp_path, name, scale):
    """Masks stored as 0/1, 0/255 or JPEG are alike, cut as the image is; an empty one is empty."""
    shape = np.zeros((16, 24), np.uint8)
    shape[4:12, 8:16] = 1
    write(tmp_path / "x.bmp", shape)
    write(tmp_path / "masks" / name, shape * np.uint8(scale))
    mask = opened(tmp_path).mask(0)
    assert mask.dtype == torch.bool and mask.shape == (1, 8, 8)
    assert mask[0, 2:6, 2:6].all() == (scale > 0) and mask.sum() == (16 if scale else 0)


def test_equal_names_are_not_guessed(tmp_path):
    """Images that share a stem get the label and the mask of their own path, or none."""
    folder_of(tmp_path, ["a/x.png", "b/x.png", "y.jpg", "y.png", "masks/a/x.png", "masks/x.png"])
    (tmp_path / "labels.csv").write_text("file,label\nx.png,1\ny.jpg,2\ny.png,4\na/x.png,3\n")
    images = opened(tmp_path)
    assert images.files == ["a/x.png", "b/x.png", "y.jpg", "y.png"]
    assert images.columns["label"] == ["3", "", "2", "4"]
    assert [images.mask(i) is None for i in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("text, columns, problems", [
    ("file,label,age\na.png,x,1\nb.png,y,2\n", [["x", "y"], ["1", "2"]], 0),
    ("\ufefffile;label;age\r\na.png;x;1\r\nb.png;y;2\r\n", [["x", "y"], ["1", "2"]], 0),
    ("label,file,age\nx,a,1\ny,b.dcm,2\n", [["x", "y"], ["1", "2"]], 0),
    ('file,label,age\n"set/a.png", x ,1\n\nb.png,y', [["x", "y"], ["1", ""]], 0),
    ("file,label,age\na.png,x,1\nc.png,y,2\n", [["x", ""], ["1", ""]], 2),
])
def test_labels_in_every_dialect(tmp_path, text, columns, problems):
    """Comma, semicolon, BOM, CRLF, quotes, blank lines, other extensions, in the parent: the same
    cells; rows without an image and images without a row are named."""
    folder_of(tmp_path, ["set/a.png", "set/b.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode())
    images = opened(tmp_path / "set")
    assert images.columns == dict(zip(("label", "age"), columns))
    assert len(images.problems) == problems and all("1 (" in line for line in images.problems)


@pytest.mark.parametrize("text, words", [
    ("file,label\na.png,1\na.png,2\n", "2 rows for a.png"), ("name,label\na.png,1\n", "file"),
    ("", "none"), ("file,label\na.png,\x81\n", "UTF-8")])
def test_bad_labels_are_refused(tmp_path, text, words):
    """Two rows for an image, no file column, an empty file and bytes of no text are errors."""
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        opened(tmp_path)


def test_unreadable_images_and_links_out_are_dropped_and_named(tmp_path):
    """Two bad files in twenty are left out, three stop; links inside the folder work."""
    folder = folder_of(tmp_path / "in", [f"{i:02d}.png" for i in range(18)])
    (folder / "18.png").symlink_to(folder / "01.png")
    (folder / "19.png").symlink_to(write(tmp_path / "secret.png", np.zeros((8, 8), np.uint8)))
    (folder / "00.png").write_text("no image")
    images = opened(folder)
    assert len(images) == 18 and "18.png" in images.files
    assert all(name in images.problems[0] for name in (": 2 (", "00.png", "19.png"))
    (folder / "01.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for place, words in (("in", "01.png"), ("empty", "no image"), ("gone", "gone")):
        with pytest.raises(UserError, match=words):
            opened(tmp_path / place)


def test_cache_and_workers_change_nothing(tmp_path, monkeypatch):
    """From the cache, beyond its room, spoiled by the caller, in two workers: the same pixels."""
    for i in range(4):
        write(tmp_path / f"{i}.png", np.arange(i, i + 192, dtype=np.uint8).reshape(8, 8, 3))
    monkeypatch.setattr(datasets, "CACHE_BYTES", 2 * 3 * 8 * 8 * 4)  # room for two images
    images = opened(tmp_path)
    first = images.batch(range(4))
    images[0].zero_()
    assert len(images.cache) == 2 and torch.equal(images.batch(range(4)), first)
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), first)


# ---- phantoms and .npz

def test_phantoms_stand_in(tmp_path, monkeypatch):
    """--data cxr is phantoms that say so, unless data/cxr/ is there; a tiny side is refused."""
    monkeypatch.chdir(tmp_path)
    images = open_dataset("cxr", 16, seed=1, count=5)
    assert "phantoms, not real" in images.note and images.files[3] == "phantom_000003"
    assert images.batch([0, 4]).shape == (2, 3, 16, 16) and images.mask(0).shape == (1, 16, 16)
    assert set(images.columns) == {"cardiomegaly", "effusion", "opacity", "nodule"}
    with pytest.raises(UserError, match="too coarse"):
        open_dataset("phantoms", 8)
    folder_of(tmp_path, ["data/cxr/images/a.png"])
    assert open_dataset("cxr", 8).files == ["a.png"]
    assert len(open_dataset("phantoms", 16, count=3)) == 3


def npz(path, shape=(28, 28), dtype=np.uint8, labels=1):
    """A file as MedMNIST makes them: 4 training, 2 validation and 3 test images."""
    generator, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = generator.integers(0, 255, (n, *shape)).astype(dtype)
        arrays[f"{split}_labels"] = generator.integers(0, 2, (n, labels))
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("shape, labels", [((28, 28), 1), ((28, 28, 3), 2)])
def test_medmnist(tmp_path, shape, labels):
    """Grey and RGB files open with labels; the official test part is what is held out."""
    arrays = npz(tmp_path / "x.npz", shape, labels=labels)
    images = open_dataset(tmp_path / "x.npz", 28)
    assert images.files[4] == "val_000000" and len(images.columns) == labels
    assert images.columns["label_0"][0] == str(arrays["train_labels"][0, 0])
    last = torch.from_numpy(arrays["test_images"][2].reshape(28, 28, -1)).permute(2, 0, 1)
    assert ((images[8] + 1) * 127.5 - last).abs().max() < 1e-3  # float32 rounding of 255
    assert split_holdout(images, 0.15, 0)[1].tolist() == [6, 7, 8]
    assert len(split_holdout(images, 0, 0)[1]) == 0


def test_bad_npz_is_refused(tmp_path):
    """Volumes, floats, pickled objects and cut files are refused with the file's name."""
    npz(tmp_path / "volume.npz", (8, 8, 8))
    npz(tmp_path / "float.npz", dtype=np.float32)
    payload = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "object.npz", train_images=payload, train_labels=np.zeros(1))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "volume.npz").read_bytes()[:900])
    for path in sorted(tmp_path.glob("*.npz")):
        with pytest.raises(UserError, match=path.name):
            open_dataset(path, 28)
    assert not (tmp_path / "ran").exists()


def kaggle_folder(tmp_path, ids, rows):
    for name in ids:
        image = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
        (tmp_path / "train").mkdir(exist_ok=True)
        image.save(tmp_path / "train" / f"{name}.tif")
    (tmp_path / "test").mkdir()
    image.save(tmp_path / "test" / "unseen.tif")
    (tmp_path / "train_labels.csv").write_text("id,label\n" + "".join(
        f"{name},{label}\n" for name, label in rows))
    return tmp_path


def test_patchcamelyon_of_kaggle(tmp_path):
    """train_labels.csv with id,label beside train/*.tif: labels become words, test/ is left out;
    the folder train/ alone reads the same."""
    folder = kaggle_folder(tmp_path, ["aa", "bb", "cc"], [("cc", 1), ("aa", 0), ("bb", 1)])
    for place in (folder, folder / "train"):
        images = open_dataset(place, 8)
        assert images.files == ["aa.tif", "bb.tif", "cc.tif"]
        assert images.columns == {"label": ["healthy", "cancer", "cancer"]}


def test_kaggle_rows_without_images_are_refused(tmp_path):
    """An id without its .tif: one error with the count and the first name."""
    folder = kaggle_folder(tmp_path, ["aa"], [("aa", 0), ("gone", 1), ("lost", 1)])
    with pytest.raises(UserError, match="names 2 images that .*gone.*unpack"):
        open_dataset(folder, 8)


@pytest.fixture
def h5py_of_dicts(monkeypatch):
    """A stand-in for h5py, which reads .npz files: so the pair is tested without the package."""
    def opened(path, mode):
        return np.load(open(path, "rb"), allow_pickle=False)

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))


def write_pair(folder, x, y):
    for part, array in (("x", x), ("y", y)):
        with open(folder / f"camelyon_valid_{part}.h5", "wb") as file:
            np.savez(file, **{part: array})
    return folder / "camelyon_valid_x.h5"


def test_patchcamelyon_as_h5(tmp_path, h5py_of_dicts):
    """The published pair: images by row, y (N, 1, 1, 1) becomes words, either file names both."""
    x = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    path = write_pair(tmp_path, x, np.array([0, 1, 1, 0]).reshape(4, 1, 1, 1))
    for name in (path, tmp_path / "camelyon_valid_y.h5"):
        images = open_dataset(name, None)
        assert images.columns == {"label": ["healthy", "cancer", "cancer", "healthy"]}
        assert torch.equal(images[2], torch.from_numpy(x[2]).permute(2, 0, 1) / 127.5 - 1)
    assert pickle.loads(pickle.dumps(images.sources))[1].shape == (8, 8, 3)  # for workers


@pytest.mark.parametrize("x,y", [
    (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3)),
    (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4)),
    (np.zeros((4, 8, 8), np.uint8), np.zeros(4)), (None, None)])
def test_bad_h5_is_refused(tmp_path, h5py_of_dicts, x, y):
    """Unequal lengths, other types or shapes, a missing half."""
    path = tmp_path / "camelyon_valid_x.h5"
    path.write_bytes(b"no h5") if x is None else write_pair(tmp_path, x, y)
    with pytest.raises(UserError, match="camelyon_valid_x.h5"):
        open_dataset(path, 8)


def test_h5_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    """h5py is asked for only where such a file is given."""
    (tmp_path / "a_x.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        open_dataset(tmp_path / "a_x.h5", 8)


# ---- tables as the public sets ship them

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


def test_the_first_lines_name_what_is_passed_over(tmp_path, monkeypatch):
    """DICOM without its package, .jp2, .jfif, further pages of a TIFF: counted, with names."""
    folder_of(tmp_path, ["a.png", "b.png"])
    page = Image.new("L", (8, 8))
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page, page])
    for name in ("x.jp2", "y.jfif", "z.dcm"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    said = "\n".join(opened(tmp_path).problems)
    assert all(name in said for name in ("x.jp2", "y.jfif", "z.dcm", "pip install pydicom",
                                         "several pages", "pages.tif"))


def test_depth_of_a_set(tmp_path):
    """Decided once, said in the first line, the same when a run passes it on; offsets are warned
    of."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for i, high in enumerate((4000, 900, 4095)):
        write(tmp_path / f"{i}.png", ramp * np.uint16(high // 63))
    images = opened(tmp_path)
    assert images.depth == {"black": 0.0, "white": 4095.0} and "white 4095" in images.note
    assert images[1].max() == pytest.approx(900 // 63 * 63 / 4095 * 2 - 1, abs=1e-5)
    kept = open_dataset(tmp_path, 8, depth={"black": 0, "white": 8190})
    assert kept.depth["white"] == 8190 and kept[2].max() < 0.01
    for i in range(3):
        write(tmp_path / f"{i}.png", ramp + np.uint16(32768))
    assert any("offset" in line for line in opened(tmp_path).problems)


# ---- masks

@pytest.mark.parametrize("names, count", [
    (["masks/{}_mask.png"], 3), (["masks/{}.gif"], 3), (["mask/{}.png"], 3),
    (["masks/{}_lung.gif"], 3), (["ManualMask/leftMask/{}.png", "ManualMask/rightMask/{}.png"], 3),
    (["leftMask/{}.png", "rightMask/{}.png"], 3), (["masks/{}_left.png", "masks/{}_right.png"], 3),
    (["masks/left lung/{}.gif", "masks/right lung/{}.gif", "masks/heart/{}.gif"], 3),
    (["images/{}_mask.png"], 3), (["masks/one/{}.png", "masks/two/{}.png"], 0)])
def test_masks_by_every_name(tmp_path, names, count):
    """NAME_mask, NAME, NAME_lung; left and right are joined; others are not guessed."""
    folder_of(tmp_path, [f"images/CHN_{i}_0.png" for i in range(3)])
    for k, name in enumerate(names):
        half = np.zeros((8, 8), np.uint8)
        half[:, 4 * k:4 * k + 4] = 255
        for i in range(3):
            write(tmp_path / name.format(f"CHN_{i}_0"), half)
    images = opened(tmp_path)
    assert len(images) == 3 and list(images.masks) == ["masks"]
    masks = [images.mask(i) for i in range(3)]
    assert sum(mask is not None for mask in masks) == count
    if count:
        assert masks[1].float().mean() == (1 if len(names) > 1 else 0.5)
    else:
        assert any("masks/" in line for line in images.problems)


# ---- memory

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_is_read_by_rows(tmp_path, save):
    """Opening one takes a fraction of its pixels, rows come in any order, and workers get none."""
    random = np.random.default_rng(0)
    arrays = {split: random.integers(0, 255, (n, 64, 64)).astype(np.uint8)
              for split, n in (("train", 1500), ("val", 200), ("test", 400))}
    save(tmp_path / "x.npz", **{f"{split}_images": array for split, array in arrays.items()},
         **{f"{split}_labels": np.zeros((len(array), 1)) for split, array in arrays.items()})
    tracemalloc.start()
    images = open_dataset(tmp_path / "x.npz", 64)
    joined = np.concatenate(list(arrays.values()))
    base = joined.nbytes
    order = random.permutation(len(images))[:300].tolist() + list(range(1490, 1520))
    got = [images.sources[i] for i in order]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(np.array_equal(row, joined[i]) for row, i in zip(got, order))
    assert peak < base + 3e6 + 300 * 4096  # what the test itself holds, and a little
    assert len(pickle.dumps(images.sources)) < 5000
    assert np.array_equal(pickle.loads(pickle.dumps(images.sources))[1501], joined[1501])


def test_a_damaged_npz_is_found_when_all_is_read(tmp_path):
    """One flipped bit of the pixels, which opening alone does not see."""
    npz(tmp_path / "x.npz", (128, 128))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[40_000] ^= 4
    (tmp_path / "x.npz").write_bytes(content)
    open_dataset(tmp_path / "x.npz", 28)
    with pytest.raises(UserError, match="x.npz"):
        open_dataset(tmp_path / "x.npz", 28, whole=True)
