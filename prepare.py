"""Write labels.csv for a public set as its owners ship it: `python prepare.py nih FOLDER`.

    nih       ChestX-ray14: Data_Entry_2017*.csv, images_*/images/; test: test_list.txt
    chexpert  CheXpert(-small): train.csv, valid.csv; test: valid (or test.csv)
    mimic     MIMIC-CXR-JPG: *-chexpert.csv(.gz) and *-split.csv(.gz)
    rsna      RSNA pneumonia: stage_2_train_labels.csv, one row per box; one image per patient
    vindr     VinDr-CXR: annotations/image_labels_train.csv, _test.csv, one row per reader
    padchest  PadChest: PADCHEST_*.csv(.gz), Labels as lists
    kermany   chest_xray: train/, val/, test/ with NORMAL, PNEUMONIA; patients by file name
    pcam      Kaggle's train_labels.csv, or PatchCamelyon's *_x.h5, *_y.h5 (unpacked to images/)

labels.csv has the columns file, patient, split (the set's own test part), and one per finding: 1, 0
or empty, which is unknown; uncertain answers (-1) are unknown, or what --uncertain says.
"""
import argparse
import ast
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image

from support.command import UserError, run_script
from support.datasets import match_names
from support.files import read_csv, write_csv
from support.images import image_root, scan_folder
from support.pictures import save_png


def tables(folder, pattern):
    """The rows of all tables of that name below the folder; UserError if there is none."""
    paths = [path for path in sorted(folder.rglob(pattern))
             if path.name.endswith((".csv", ".csv.gz"))]
    if not paths:
        raise UserError(f"{folder} has no {pattern}", "the set as its owners ship it is needed",
                        "unpack its tables there, or name another SET")
    return [row for path in paths for row in read_csv(path)]


def findings(row, first):
    """{column: "1", "0" or "-1"} of the columns from `first` on; an empty cell is a 0."""
    names = list(row)[list(row).index(first):]
    return {name: str(int(float(row[name] or 0))) for name in names}


def one_hot(values):
    """The values that an image has -> {value: "1"}; merge fills the others with 0."""
    return {value.strip(): "1" for value in values if value.strip()}


# Each yields (name of the image, patient, split, {finding: answer}); answers: 1, 0, -1 or empty.

def nih(folder):
    test = {name for path in folder.rglob("test_list.txt") for name in path.read_text().split()}
    for row in tables(folder, "Data_Entry_2017*"):
        values = row["Finding Labels"].split("|")
        split = ("test" if row["Image Index"] in test else "train") if test else ""
        yield row["Image Index"], row["Patient ID"], split, one_hot(values)


def chexpert(folder):
    has_test = any(folder.rglob("test.csv"))
    for part in ("train", "valid", *(["test"] if has_test else [])):
        for row in tables(folder, f"{part}.csv"):
            _, _, path = row["Path"].partition("/")  # behind CheXpert-v1.0-small/
            patient = re.search(r"patient\d+", path)[0]
            split = "test" if part == "test" or (part == "valid" and not has_test) else "train"
            yield path, patient, split, findings(row, "No Finding")


def mimic(folder):
    studies = tables(folder, "*-chexpert.csv*")
    names = [*studies[0]][2:]  # behind subject_id and study_id
    answers = {row["study_id"]: findings(row, names[0]) for row in studies}
    unknown = dict.fromkeys(names, "")  # some studies have no answers
    for row in tables(folder, "*-split.csv*"):
        found = answers.get(row["study_id"], unknown)
        yield row["dicom_id"], row["subject_id"], row["split"], found


def rsna(folder):
    for row in tables(folder, "stage_2_train_labels.csv"):
        yield row["patientId"], row["patientId"], "", {"pneumonia": row["Target"]}


def vindr(folder):
    for part in ("train", "test"):
        for row in tables(folder, f"image_labels_{part}.csv"):
            found = {name: cell for name, cell in row.items()
                     if name.lower() not in ("image_id", "rad_id")}
            yield row["image_id"], "", part, found


def padchest(folder):
    for row in tables(folder, "PADCHEST_*"):
        values = ast.literal_eval(row["Labels"] or "[]")
        yield row["ImageID"], row["PatientID"], "", one_hot(values)


def kermany(folder):
    for path in scan_folder(folder)[0]:
        *_, part, label, name = path.parts
        if part not in ("train", "val", "test") or label not in ("NORMAL", "PNEUMONIA"):
            raise ValueError(path)
        patient = re.match(r"person\d+|(?:NORMAL2-)?IM-\d+", name)
        # Each part counts from 1 again, and the two classes share no patients.
        yield (path.relative_to(folder).as_posix(), f"{part}-{patient[0] if patient else name}",
               "test" if part == "test" else "train", {"pneumonia": str(int(label != "NORMAL"))})


def pcam(folder):
    if not any(folder.rglob("*_x.h5")):
        for row in tables(folder, "train_labels.csv"):
            yield f"train/{row['id']}.tif", "", "", {"tumour": row["label"]}
        return
    import h5py
    for x_path in sorted(folder.glob("*_x.h5")):
        part = re.search("train|valid|test", x_path.name)[0]
        with h5py.File(x_path) as x, h5py.File(str(x_path).replace("_x.h5", "_y.h5")) as y:
            for i, (pixels, label) in enumerate(zip(x["x"], y["y"][:].reshape(-1).tolist())):
                name = f"{part}_{i:06d}.png"
                save_png(folder / "images" / name, Image.fromarray(pixels), sync=False)
                yield name, "", "test" if part == "test" else "train", {"tumour": str(label)}


SETS = {make.__name__: make
        for make in (nih, chexpert, mimic, rsna, vindr, padchest, kermany, pcam)}
UNCERTAIN = {"ignore": "", "zeros": "0", "ones": "1"}


def merge(rows, uncertain):
    """Rows of the makers -> the table of labels.csv; an image has what any of its rows says, and
    `uncertain` where that is -1."""
    images = {}
    answers = defaultdict(set)
    for name, patient, split, found in rows:
        images[name] = [name, patient, split]
        for finding, answer in found.items():
            answers[name, finding].add(answer)
    names = sorted({finding for _, finding in answers})

    table = [["file", "patient", "split", *names]]
    for name, row in images.items():
        for finding in names:
            given = answers[name, finding]
            cell = "" if given == {""} else "0"
            row.append("1" if "1" in given else uncertain if "-1" in given else cell)
        table.append(row)
    return table


def prepare(name, folder, uncertain="ignore"):
    """Write folder/labels.csv for the images that are there; returns (rows written, left out)."""
    try:
        table = merge(SETS[name](folder), UNCERTAIN[uncertain])
    except (LookupError, TypeError, ValueError, SyntaxError, ImportError) as error:
        raise UserError(f"{folder} is not {name} as its owners ship it ({error!r})",
                        "its own tables are needed", "compare the list in prepare.py") from error
    root = image_root(folder)
    files = [path.relative_to(root).as_posix() for path in scan_folder(folder)[0]]
    indices = match_names([row[0] for row in table[1:]], files, root.resolve().as_posix())
    rows = [[files[i], *row[1:]] for i, row in zip(indices, table[1:]) if i is not None]
    if not rows:
        raise UserError(f"the tables in {folder} name none of its {len(files):,} images",
                        f"the images of {name} are needed", "unpack them below that folder")
    write_csv(folder / "labels.csv", [table[0], *rows])
    return len(rows), len(table) - 1 - len(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uncertain", choices=UNCERTAIN, default="ignore",
                        help="what -1 becomes: empty (unknown), 0 or 1")
    args = parser.parse_args(argv)
    count, lost = prepare(args.set, args.folder, args.uncertain)
    print(f"wrote {args.folder / 'labels.csv'}: {count:,} images; {lost:,} rows without an image")


if __name__ == "__main__":
    run_script(main)
