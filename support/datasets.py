"""A data set: a folder of images with a table, a MedMNIST .npz, or generated phantoms.

    images = open_dataset("xrays", 64)        # or x.npz, or "cxr", "histology", "phantoms"
    images[i]                                 # (3, 64, 64) float32 in [-1, 1], decoded when needed
    images.files[i], images.groups[i], images.columns["effusion"][i], images.mask(i)
    print(images.note, *images.problems)      # what it is, and what is missing or doubtful

A folder holds images at any depth, or in images/, and beside them, if you like, labels.csv:

    file,patient,split,effusion,finding
    a/001.png,p1,train,1,mass|nodule          # a path below the folder, or a name that is unique

A `patient` stays on one side of a split, `split` (train, val, test) is the official one, all other
columns are labels. Without a table, folders as in train/NORMAL/x.png give the split and a column
`label`. masks/x.png is the mask of x.png. prepare.py writes labels.csv for public sets.
"""
import re
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from support.command import UserError, one_line, user_errors
from support.files import read_csv
from support.images import (DICOM_SUFFIXES, EIGHT_BITS, IMAGE_SUFFIXES, choose_depth, image_root,
                            image_shape, is_dicom, is_inside, load_image, read_header, scan_folder)
from support.phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                              histology_phantoms)

CACHE_BYTES = 1 << 30  # of decoded images, per data set and process
FEW_GROUPS = 10        # with fewer, no share of images can be held out by group
ANSWERS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": np.nan, "-1.0": np.nan}
NO_PATIENTS = "patients are unknown: images are split one by one; a patient may be on both sides"


@dataclass(eq=False)
class ImageSet:
    """Images by index: `images[i]` is (3, size, size) float32 in [-1, 1]."""
    name: str
    note: str  # one line: what it is and where it is
    size: int | None
    files: list  # unique names: paths below the folder
    columns: dict = field(default_factory=dict)  # label -> list of str, one cell per file
    groups: list | None = None    # the patient of each file; None: unknown
    official: list | None = None  # "train", "test" or "" (unknown) per file; None: no such split
    sources: object = ()  # what load_image takes, one per file; () if all are in the cache
    masks: dict = field(default_factory=dict)  # kind -> per file a path, a mask (1, H, W), or None
    depth: dict = field(default_factory=lambda: dict(EIGHT_BITS))  # of deep grey, see images.py
    problems: list = field(default_factory=list)    # lines for the user
    unreadable: dict = field(default_factory=dict)  # file -> why it is not used
    outliers: dict = field(default_factory=dict)    # the same of those that drop_outliers found
    cache: dict = field(default_factory=dict)  # index -> image

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = self.cache.get(int(i))
        if image is None:
            image = load_image(self.sources[int(i)], self.size, self.depth)
            if len(self.cache) * image.nbytes < CACHE_BYTES:
                self.cache[int(i)] = image
        return image.clone()

    @property
    def patients(self):
        """The patient of each file; if they are unknown, each file stands for one."""
        return self.groups or self.files

    def batch(self, indices):
        """(B, 3, size, size) of the images with these indices."""
        return torch.stack([self[i] for i in indices])

    def batches(self, indices, count):
        """Iterator of the images with these indices, `count` at a time."""
        return (self.batch(rows.tolist()) for rows in torch.as_tensor(indices).split(count))

    def mask(self, i, kind="masks"):
        """(1, size, size) bool, or None: at least half of the largest value, so 0/1 works too."""
        source = self.masks[kind][int(i)]
        if not isinstance(source, Path):
            return source
        x = load_image(source, self.size).amax(0, keepdim=True) + 1
        return x >= max(x.max().item() / 2, 1e-6)


def open_dataset(data, size, *, table=None, file_column="file", group_column="patient",
                 patient_from=None, seed=0, count=2400, depth=None):
    """Open a folder, a MedMNIST .npz, "cxr" or "histology" (data/NAME/ if it exists, else `count`
    phantoms), or "phantoms" (chests).

    size: pixels of a side; None keeps the side of each file. table: a CSV in place of labels.csv.
    patient_from: a regular expression whose first group is the patient in a file's path.
    depth: of deep grey, as a run recorded it; None chooses it. Raises UserError.
    """
    name = str(data)
    path = Path(name)
    if name in ("cxr", "histology") and Path("data", name).is_dir():
        path = Path("data", name)
    elif name in ("cxr", "histology", "phantoms"):
        return open_phantoms(name, size or 64, seed, count)
    if path.suffix == ".npz" and path.is_file():
        return open_npz(path, size)
    if not name or not path.is_dir():
        raise UserError(f"there is no data set {name}", "a folder of images or a MedMNIST .npz is "
                        "needed", "pass --data cxr, histology, phantoms or PATH")

    # The images, then what the table, their paths and the folders of masks say about them.
    root = image_root(path)
    paths, masks, links = scan_folder(path)
    if not paths:
        raise UserError(f"{path} contains no image, {len(links)} links out of it", "files "
                        f"{' '.join(sorted(IMAGE_SUFFIXES | DICOM_SUFFIXES))} are needed",
                        "pass another folder")
    files = [image.relative_to(root).as_posix() for image in paths]
    images = ImageSet(path.resolve().name, "", size, files, sources=paths)
    check_files(images)
    images.depth = depth or choose_depth(images.sources)
    table_note = read_table(images, path, root, table, file_column, group_column)
    find_patients(images, group_column, patient_from)
    links += find_masks(images, path, root, masks)
    add_names(images.problems, "links out of the folder, left out", [link.name for link in links])

    notes = [f"{len(images):,} images from {root}", table_note]
    if images.groups:
        notes.append(f"{len(set(images.groups)):,} patients")
    if images.official:
        notes.append(f"the official test part has {images.official.count('test'):,}")
    if images.depth["white"] != EIGHT_BITS["white"]:
        notes.append(f"deep grey, {images.depth['white']:g} is white")
    images.note = one_line(", ".join(notes))
    return images


def open_phantoms(name, size, seed, count):
    """`count` chests with a column of "0" and "1" per label, or histology patches."""
    with user_errors():
        if name == "histology":
            images, masks, labels, kinds = histology_phantoms(count, size, seed)
            columns = {"label": [("healthy", "cancer")[label] for label in labels.tolist()],
                       "morphology": [HISTOLOGY_MORPHOLOGIES[kind] for kind in kinds.tolist()]}
        else:
            images, masks, labels = chest_phantoms(count, size, seed)
            columns = {label: [str(cell) for cell in column]
                       for label, column in zip(CHEST_LABELS, labels.T.tolist())}
    missing = "" if name == "phantoms" else f"no folder data/{name}/, so "
    note = f"{missing}{count:,} generated phantoms, not real images ({size} px, seed {seed})"
    files = [f"phantom_{i:06d}" for i in range(count)]
    return ImageSet(name, note, size, files, columns, groups=list(files), masks={"masks": masks},
                    cache=dict(enumerate(images.expand(-1, 3, -1, -1))))


def open_npz(path, size):
    """A MedMNIST file, unpacked into a temporary folder and memory-mapped from there."""
    sources = []
    labels = []
    files = []
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            for side in ("train", "val", "test"):
                if f"{side}_images.npy" not in archive.namelist():
                    continue
                pixels, cells = (np.load(archive.extract(f"{side}_{kind}.npy", folder), "r",
                                         allow_pickle=False) for kind in ("images", "labels"))
                is_flat = pixels.ndim == 3 or pixels.shape[3:] == (3,)
                if pixels.dtype != np.uint8 or not is_flat or len(pixels) != len(cells):
                    raise ValueError(f"images of {pixels.dtype} and shape {pixels.shape}")
                sources += [*pixels]
                labels += np.array(cells).reshape(len(cells), -1).tolist()
                files += [f"{side}_{i:06d}" for i in range(len(cells))]
        if not files:
            raise ValueError("it has no train_images")
    except Exception as error:  # a damaged file makes NumPy raise anything
        raise UserError(f"{path} cannot be read ({one_line(error)[:120]})", "MedMNIST in 2-D is "
                        "needed: train_images (N, H, W[, 3]) of uint8, train_labels (N, L)",
                        "use a 2-D set, or download it again") from error
    columns = {f"label_{j}": [str(cell) for cell in column]
               for j, column in enumerate(zip(*labels))}
    note = f"{len(files):,} images from {path}, labels {', '.join(columns)}"
    return ImageSet(path.stem, note, size, files, columns, sources=tuple(sources),
                    official=official_sides([file.split("_")[0] for file in files]),
                    problems=[NO_PATIENTS])


# ---- folders -----------------------------------------------------------------------------------

def add_names(problems, what, names):
    """Add a line with the number of names and the first three, if there are any."""
    if names:
        first = ", ".join(one_line(name) for name in names[:3])
        problems.append(f"{what}: {len(names):,} ({first}{', ...' * (len(names) > 3)})")


def leave_out(images, reasons):
    """Record {file: why} of unreadable images; UserError if that makes them more than a tenth."""
    if not reasons:
        return
    images.unreadable |= reasons
    add_names(images.problems, f"left out as unreadable (the first: {[*reasons.values()][0]})",
              list(images.unreadable))
    if len(images.unreadable) > 0.1 * len(images):
        raise UserError(images.problems[-1], "at least 90 % of the images must be readable",
                        "replace or remove these files")


def check_files(images):
    """Leave out files with a damaged header; name those that lose much to the centre crop."""
    reasons = {}
    cropped = []

    def check(file, path):
        try:
            shape = image_shape(path)
        except UserError as error:
            reasons[file] = one_line(error)
            return
        if min(shape) < 0.75 * max(shape):
            cropped.append(file)

    with ThreadPool(8) as pool:  # disks are slow
        pool.starmap(check, zip(images.files, images.sources))
    add_names(images.problems, "images that lose more than a quarter to the centre crop",
              sorted(cropped))
    leave_out(images, dict(sorted(reasons.items())))
    images.sources = [path for file, path in zip(images.files, images.sources)
                      if file not in reasons]
    images.files = [file for file in images.files if file not in reasons]


def match_names(names, files, root=""):
    """The index of the file that each name means, None for names of no file or of several.

    A name is a file's path, or else the end of exactly one path, in which the folders of `root`
    count too. So a bare name must be unique, and a name with other folders matches nothing.
    """
    def split_name(name):
        # The folders, and the bare name without an image's suffix.
        name = unicodedata.normalize("NFC", str(name)).replace("\\", "/")
        *folders, last = [part for part in name.split("/") if part not in ("", ".")] or [""]
        is_image = Path(last).suffix.lower() in IMAGE_SUFFIXES | DICOM_SUFFIXES
        return (*folders, Path(last).stem if is_image else last)

    exact = {file: [i] for i, file in enumerate(files)}
    relative = defaultdict(list)
    by_end = defaultdict(list)
    for i, file in enumerate(files):
        relative[split_name(file)].append(i)
        path = split_name(root) + split_name(file)
        for k in range(len(path)):
            by_end[path[k:]].append(i)

    indices = []
    for name in names:
        parts = split_name(name)
        same = exact.get(name) or relative.get(parts) or by_end.get(parts, [])
        indices.append(same[0] if len(same) == 1 else None)
    return indices


def read_table(images, folder, root, table, file_column, group_column):
    """Set columns, groups and official from a table, else from folders' names; returns a note."""
    beside = [folder / "labels.csv", root / "labels.csv", folder / "samples.csv"]
    path = Path(table) if table else next((path for path in beside if path.is_file()), None)
    if path is None:
        return read_folder_names(images)
    rows = read_csv(path)
    if not rows or file_column not in rows[0]:
        raise UserError(f"{path} has the columns {', '.join(rows[0] if rows else ())[:200]}",
                        f"a column {file_column} of the images' names is needed",
                        "pass --file-column, or make labels.csv with prepare.py")
    names = [row[file_column] for row in rows]
    indices = match_names(names, images.files, root.resolve().as_posix())
    row_of = {i: row for i, row in zip(indices, rows) if i is not None}
    if not row_of:
        raise UserError(f"{path} names none of the images in {root} (its first: "
                        f"{names[0] or 'empty'})", "paths below that folder are needed",
                        "correct them, or pass another --table")
    twice = [images.files[i] for i, n in Counter(indices).items() if n > 1 and i is not None]
    if twice:
        raise UserError(f"{path} has two rows for {twice[0]}", "one row per image is needed; a "
                        "cell may hold several values, as in a|b", "merge them")
    add_names(images.problems, f"rows of {path} that match no image, or several",
              [name or "(empty)" for i, name in zip(indices, names) if i is None])
    add_names(images.problems, f"images without a row in {path}",
              [file for i, file in enumerate(images.files) if i not in row_of])

    for name in rows[0]:
        cells = [row_of[i][name] if i in row_of else "" for i in range(len(images))]
        if name == group_column:
            images.groups = cells
        elif name == "split":
            images.official = official_sides(cells)
        elif name != file_column:
            images.columns[name] = cells
    labels = ", ".join(list(images.columns)[:8]) or "none"
    return f"{path.name} ({len(row_of):,} of {len(rows):,} rows matched), labels {labels}"


def read_folder_names(images):
    """Without a table: train/ or test/ as the top folder, and a folder per class (no digits)."""
    parts = [file.split("/")[:-1] for file in images.files]
    if all(folders and folders[0] in ("train", "val", "test") for folders in parts):
        images.official = official_sides([folders[0] for folders in parts])
        parts = [folders[1:] for folders in parts]
    names = ["/".join(folders) for folders in parts]
    classes = Counter(names)
    are_labels = all(re.fullmatch(r"[^/\d]+", name) for name in classes)
    if not are_labels or not 2 <= len(classes) <= 20 or min(classes.values()) < 2:
        return "no table"
    images.columns["label"] = names
    return "no table, label = folder"


def official_sides(words):
    """Words of a column `split` -> list of "train", "test" or "" (unknown); None if all are "".

    Validation images count as training images, unless the set has no test part.
    """
    words = [word.strip().lower() for word in words]
    sides = {"train": "train", "test": "test"}
    sides["val"] = sides["valid"] = "train" if "test" in words else "test"
    official = [sides.get(word, "") for word in words]
    return official if any(official) else None


def find_patients(images, group_column, patient_from):
    """Set the groups: by patient_from, else the table's column, else DICOM's PatientID."""
    if patient_from:
        try:
            matches = [re.search(patient_from, file) for file in images.files]
            images.groups = [match[1] or "" if match else "" for match in matches]
        except (re.error, IndexError) as error:
            raise UserError(f"--patient-from {patient_from!r} ({error})", "a regular expression "
                            "with one group is needed", "pass e.g. '(patient[0-9]+)'") from error
        if not any(images.groups):
            raise UserError(f"--patient-from {patient_from!r} matches no path (the first: "
                            f"{images.files[0]})", "its group must be the patient", "correct it")
    elif images.groups is None and group_column != "patient":
        raise UserError(f"there is no column {group_column!r}", f"{images.name} has "
                        f"{', '.join(images.columns) or 'no table'}", "pass another --group-column")
    elif images.groups is None:
        images.groups = [str(read_header(path).get("PatientID") or "") if is_dicom(path) else ""
                         for path in images.sources]

    if not any(images.groups):
        images.groups = None
        images.problems.append(NO_PATIENTS)
        return
    add_names(images.problems, "images without a patient, each treated as a patient of its own",
              [file for file, group in zip(images.files, images.groups) if not group])
    images.groups = [group or file for group, file in zip(images.groups, images.files)]
    count = len(set(images.groups))
    if count < FEW_GROUPS:
        images.problems.append(f"only {count} different patients: is that column the patient? "
                               "A small share cannot be held out")
    sides = [*zip(images.groups, images.official or ())]
    tested = {group for group, side in sides if side == "test"}
    others = {group for group, side in sides if side != "test"}
    add_names(images.problems, "patients on both sides of the official split, held out whole",
              sorted(tested & others))


def find_masks(images, folder, root, beside):
    """Set the masks: files in masks/ and masks_*/, and those `beside` the images.

    Each is called like its image, with or without _mask at the end. Returns links that leave the
    folder.
    """
    found = [("masks", path, path.relative_to(root)) for path in beside]
    links = []
    for place in sorted(folder.glob("masks*/")):
        paths, _, outside = scan_folder(place) if is_inside(place, folder) else ([], [], [place])
        found += [(place.name, path, path.relative_to(place)) for path in paths]
        links += outside

    stems = [name.with_suffix("").as_posix().removesuffix("_mask") for *_, name in found]
    indices = match_names(stems, images.files)
    with ThreadPool(8) as pool:
        fits = pool.starmap(is_mask_of, [(path, None if i is None else images.sources[i])
                                         for (_, path, _), i in zip(found, indices)])
    left_out = []
    for (kind, path, _), i, fit in zip(found, indices, fits):
        masks = images.masks.setdefault(kind, [None] * len(images))
        if fit:
            masks[i] = path
        else:
            left_out.append(path.name)
    add_names(images.problems, "masks left out (unreadable, without an image, of other proportions "
              "than theirs, or not of two values)", left_out)
    return links


def is_mask_of(path, image_path):
    """Whether a file has two values and the proportions of the image (None: there is none)."""
    if image_path is None:
        return False
    try:
        height, width = image_shape(path)
        image_height, image_width = image_shape(image_path)
        values, counts = load_image(path, None)[0].unique(return_counts=True)
    except UserError:
        return False
    # Frequent values in between belong to a label map, rare ones to a JPEG's soft edges.
    place = (values - values[0]) / (values[-1] - values[0]).clamp_min(1e-6)  # in [0, 1]
    between = (place > 0.1) & (place < 0.9) & (counts > 0.005 * counts.sum())
    is_alike = 0.95 < height * image_width / (width * image_height) < 1.05
    return is_alike and not between.any()


# ---- labels ------------------------------------------------------------------------------------

def label_matrix(columns, names):
    """Columns of cells -> (names of labels, (N, L) float64 of 1, 0, and NaN where unknown).

    A column of 0, 1 and -1 (unknown) is one label. Any other is cut at "|" into one label per
    value, called "column: value" if two columns have that value; empty cells are unknown. Raises
    UserError for a name that is no column.
    """
    parts = []  # (column, value or None, values (N,))
    for name in names:
        if name not in columns:
            raise UserError(f"there is no column {name!r}", f"the table has "
                            f"{', '.join(columns) or 'no columns'}", "pass another --label-column")
        cells = columns[name]
        if {""} != {*cells} <= {"", *ANSWERS}:
            parts.append((name, None, [ANSWERS.get(cell, np.nan) for cell in cells]))
            continue
        rows = [set(filter(None, cell.split("|"))) for cell in cells]
        for value in sorted(set().union(*rows)):
            parts.append((name, value, [float(value in row) if row else np.nan for row in rows]))

    count = Counter(value for _, value, _ in parts)
    labels = [name if value is None else value if count[value] == 1 else f"{name}: {value}"
              for name, value, _ in parts]
    length = len(next(iter(columns.values()), ()))
    return labels, np.array([row for *_, row in parts]).reshape(len(parts), length).T
