"""Data sets as people have them: folders with tables and masks, .npz, .h5, and phantoms.

    images = open_dataset("xrays", 64)      # or "cxr", "histology", "phantoms", x.npz, x_x.h5
    images[i]                               # (3, 64, 64) float32 in [-1, 1], read when asked for
    images.files[i], images.columns["finding"][i], images.mask(i)
    print(images.note, *images.problems)    # what was found, and what was left out

Public sets are read as they ship, with their own tables and names: NIH, CheXpert, MIMIC-CXR-JPG,
VinDr, RSNA, PadChest, Kermany; MedMNIST (.npz); PatchCamelyon (.h5, or Kaggle's folder).
"""
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from support.arrays import H5Rows, JoinedRows, check_archive, open_member
from support.command import StatusLine, UserError, one_line, user_errors
from support.dicom import is_dicom, patient_of
from support.images import (EIGHT_BITS, MASK_FOLDER, choose_depth, count_pages,
                            describe_depth, list_images, load_image, path_below, scan_folder,
                            why_unreadable)
from support.labels import Table, join_by_study, merge_tables
from support.names import file_columns, match_names
from support.phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                              histology_phantoms)
from support.splits import describe_groups, find_group_column

OUR_TABLES = ("labels.csv", "train_labels.csv", "samples.csv")  # ours, Kaggle's PCam, sample.py's
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz")
MANY = 50  # folders in which no table is looked for
TUMOUR = {"0": "healthy", "1": "cancer"}  # PatchCamelyon's labels
UNSURE_MEANS = {"ignore": "left out of labels (--uncertain zeros or ones takes them for that)",
                "zeros": "taken for 0", "ones": "taken for 1"}
SIDE = re.compile("left|right", re.IGNORECASE)
SIDE_FOLDER = re.compile("(left|right)[ _-]?(masks?|lungs?)?", re.IGNORECASE)
MASK_WORDS = re.compile(r"[ _-](masks?|msk|lungs?|left|right|seg|segmentation)$", re.IGNORECASE)
PLACE = re.compile(  # folders that are no classes
    r"(patients?|subjects?|person|case|stud(y|ies)|series|images?|img|dicom|batch|part|fold|set|p|s|"
    r"train|val|valid|test)?[ _-]?\d*(copy)?", re.IGNORECASE)
CACHE_BYTES = 1 << 30  # of decoded images, per data set and process


@dataclass(eq=False)
class ImageSet:
    """Images by number: `images[i]` is (3, size, size) float32 in [-1, 1], read when asked for."""
    name: str
    note: str  # one line, what and from where
    size: int | None
    files: list  # unique names
    columns: dict  # column of the labels -> list of str, one cell per file
    sources: object = ()  # what load_image takes, one per file
    masks: dict = field(default_factory=dict)  # kind -> for each file a list of masks, a mask, None
    problems: list = field(default_factory=list)  # lines about what was left out
    unreadable: list = field(default_factory=list)  # (path, why) of images that were left out
    official_test: list = field(default_factory=list)  # numbers that MedMNIST keeps for testing
    labelled: list = None  # for each file whether a table has a row for it; None: all
    depth: dict = field(default_factory=lambda: dict(EIGHT_BITS))  # what is white, see images.py
    cache: dict = field(default_factory=dict)  # number -> image

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = self.cache.get(int(i))
        if image is None:
            image = load_image(self.sources[int(i)], self.size, self.depth)
            if len(self.cache) * image.nbytes < CACHE_BYTES:
                self.cache[int(i)] = image
        return image.clone()

    def batch(self, indices):
        """(B, 3, size, size) of the images with these numbers."""
        return torch.stack([self[i] for i in indices])

    def mask(self, i, kind="masks"):
        """(1, size, size) bool, or None; True: at least half of the brightest, so 0/1 works."""
        source = self.masks[kind][int(i)]
        if not isinstance(source, list):
            return source
        joined = None
        for path in source:  # such as the left and the right lung
            x = load_image(path, self.size).amax(0, keepdim=True) + 1
            mask = x >= max(x.max().item() / 2, 1e-6)
            joined = mask if joined is None else joined | mask
        return joined


def open_dataset(name_or_path, size, seed=0, count=2400, whole=False, depth=None,
                 uncertain="ignore"):
    """Open a folder of images, a MedMNIST .npz, PatchCamelyon's .h5 pair, "cxr" or "histology"
    (data/NAME/ if it is there, else `count` phantoms) or "phantoms" (chests).

    size: pixels of a side; None keeps the side of each file.
    whole: read all of each file, not its head alone: PNGs by their checksums, 0.4 ms a megapixel,
    others by decoding, 5 to 20 ms. What cannot be read is left out and listed.
    depth: the rule for deep grey, as a run wrote it down; None finds it (see images.py).
    uncertain: "ignore" leaves -1 in columns of answers, "zeros" and "ones" put 0 or 1 there.
    """
    name = str(name_or_path)
    path = Path(name)
    if name in ("cxr", "histology") and Path("data", name).is_dir():
        path = Path("data", name)
    elif name in ("cxr", "histology", "phantoms"):
        return _open_phantoms(name, size or 64, seed, count)

    if name and path.is_dir():
        return _open_folder(path, size, whole, depth, uncertain)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, size, whole)
    if path.suffix == ".h5" and path.is_file():
        return _open_h5(path, size)
    raise UserError(f"there is no data set {name}", "a folder of images, a MedMNIST .npz or "
                    "PatchCamelyon's .h5 is needed", "pass --data cxr, histology, phantoms or PATH")


# ---- phantoms and arrays -----------------------------------------------------------------------

def _open_phantoms(name, size, seed, count):
    """Generated chests, each of their exact labels a column of "0" and "1", or histology patches
    with a label (healthy, cancer) and their true morphology."""
    with user_errors():
        if name == "histology":
            images, masks, labels, kinds = histology_phantoms(count, size, seed)
            columns = {"label": [TUMOUR[str(label)] for label in labels.tolist()],
                       "morphology": [HISTOLOGY_MORPHOLOGIES[kind] for kind in kinds.tolist()]}
        else:
            images, masks, labels = chest_phantoms(count, size, seed)
            columns = {label: [str(cell) for cell in column]
                       for label, column in zip(CHEST_LABELS, labels.T.tolist())}

    note = f"{count:,} generated phantoms, not real images ({size} px, seed {seed})"
    if name != "phantoms":
        note = f"no folder data/{name}/, so {note}"
    return ImageSet(name, note, size, [f"phantom_{i:06d}" for i in range(count)], columns,
                    masks={"masks": masks}, cache=dict(enumerate(images.expand(-1, 3, -1, -1))))


def _open_npz(path, size, whole):
    """A MedMNIST file: SPLIT_images (N, H, W) or (N, H, W, 3) uint8, SPLIT_labels (N, L)."""
    try:
        if whole:
            check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            splits = [s for s in ("train", "val", "test") if f"{s}_images" in archive]
            labels = np.concatenate([archive[f"{split}_labels"] for split in splits])
        arrays = [open_member(path, f"{split}_images") for split in splits]
        for array in arrays:
            is_grey = len(array.shape) == 3
            is_colour = len(array.shape) == 4 and array.shape[3] == 3
            if array.dtype != np.uint8 or not (is_grey or is_colour):
                raise ValueError(f"images of {array.dtype} and shape {array.shape}")
        count = sum(array.shape[0] for array in arrays)
        labels = labels.reshape(count, -1).T.tolist()  # (N, L) -> L lists
        images = JoinedRows(arrays)
        images[0], images[count - 1]  # are they there?
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} cannot be read ({str(error)[:120]})", "MedMNIST's train_images "
                        "(N, H, W) or (N, H, W, 3) of uint8 and train_labels are needed",
                        "take a 2-D set, or download it again") from error

    files = [f"{split}_{i:06d}" for split, array in zip(splits, arrays)
             for i in range(array.shape[0])]
    columns = {f"label_{j}": [str(cell) for cell in row] for j, row in enumerate(labels)}
    test = [i for i, file in enumerate(files) if file.startswith("test")]
    note = f"{count:,} images from {path}, labels {', '.join(columns)}"
    return ImageSet(path.stem, note, size, files, columns, images, official_test=test)


def _open_h5(path, size):
    """PatchCamelyon as published: NAME_x.h5 with x (N, H, W, 3) uint8, NAME_y.h5 with y (N, ...) of
    0 and 1. h5py is asked for only here."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} is an .h5 file", "the package h5py is needed to read it",
                        "pip install h5py") from error
    stem = path.stem.removesuffix("_x").removesuffix("_y")
    x_path = path.with_name(f"{stem}_x.h5")
    y_path = path.with_name(f"{stem}_y.h5")
    try:
        with h5py.File(x_path, "r") as x, h5py.File(y_path, "r") as y:
            shape = x["x"].shape
            kind = x["x"].dtype
            labels = np.asarray(y["y"]).reshape(-1)
    except Exception as error:  # h5py raises nearly any type for a damaged file
        raise UserError(f"{x_path} and {y_path} cannot be read ({str(error)[:120]})", "a pair "
                        "NAME_x.h5, NAME_y.h5 is needed", "unpack both into one folder") from error

    if len(labels) != shape[0] or len(shape) != 4 or shape[3] != 3 or kind != np.uint8:
        raise UserError(f"{x_path} holds {kind} of shape {tuple(shape)}, {y_path} {len(labels)} "
                        "labels", "RGB images of uint8 and as many labels are needed",
                        "download the pair again")
    cells = [str(int(label)) for label in labels]
    return ImageSet(stem, f"{len(labels):,} images from {x_path}", size,
                    [f"{stem}_{i:06d}" for i in range(len(labels))],
                    {"label": [TUMOUR.get(cell, cell) for cell in cells]}, H5Rows(x_path))


# ---- folders -----------------------------------------------------------------------------------

def _open_folder(folder, size, whole, depth, uncertain):
    """A folder of images, with the tables and masks that lie in it."""
    root = folder
    if (folder / "images").is_dir():
        root = path_below(folder, "images")
    elif (folder / "train_labels.csv").is_file() and (folder / "train").is_dir():
        root = path_below(folder, "train")  # Kaggle's test/ has no labels
    found, beside, passed_over = scan_folder(root)
    if not found:
        list_images(root)  # says why

    # What cannot be read.
    problems = []
    reasons = _check_files(found, folder, whole)
    paths = [path for path, why in zip(found, reasons) if not why]
    unreadable = [(path, why) for path, why in zip(found, reasons) if why]
    _note(problems, "unreadable, or links out of the folder", [path for path, _ in unreadable])
    if unreadable:
        problems[0] += f", the first: {unreadable[0][1]}"
    if len(paths) < 0.9 * len(found):
        raise UserError(problems[0], "at least 90 % must be readable", "replace or remove them")
    for why, others in passed_over.items():
        _note(problems, f"passed over, {why}", others)
    _note(problems, "TIFF files with several pages, of which the first is read",
          [path for path in paths if count_pages(path) > 1])

    # Depth, labels, masks.
    if depth is None:
        depth, warning = choose_depth(paths)
        problems += [warning] if warning else []
    files = [path.relative_to(root).as_posix() for path in paths]
    columns, labelled, about = _read_tables(folder, root, files, uncertain, problems)
    dicom = [is_dicom(path) for path in paths]
    if any(dicom) and not find_group_column(columns):
        columns.update(_patients_in_dicom(paths, dicom))
    masks = _find_masks(root, files, beside, problems)

    images = ImageSet(folder.resolve().name, "", size, files, columns, paths, masks, problems,
                      unreadable, labelled=labelled, depth=depth)
    counts = [f"{sum(mask is not None for mask in masks[kind]):,} {kind}" for kind in masks]
    about_depth = [] if all(dicom) else [describe_depth(depth)]
    if any(dicom):
        about_depth.append(f"{sum(dicom):,} DICOM files windowed")
    images.note = one_line(", ".join([f"{len(files):,} images from {root}", *counts, about,
                                      describe_groups(images), *about_depth]))
    return images


def _patients_in_dicom(paths, dicom):
    """{"PatientID": a cell for each path} if the heads of DICOM files tell patients apart."""
    cells = [patient_of(path) if is_one else "" for path, is_one in zip(paths, dicom)]
    return {"PatientID": cells} if len(set(cells) - {""}) > 1 else {}


def _note(problems, what, names):
    """Add a line with the count and the first names, if there are any."""
    if names:
        first = ", ".join(one_line(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        problems.append(f"{what}: {len(names):,} ({first}{more})")


def _check_files(paths, folder, whole):
    """For each path why it cannot be read, or ""."""
    def check(path):
        try:
            path_below(folder, path.relative_to(folder))
        except (UserError, OSError, RuntimeError) as error:  # also links that go round
            return one_line(error)
        return why_unreadable(path, whole)

    reasons = []
    status = StatusLine(len(paths), "reading")
    with ThreadPool(4) as pool:  # Pillow lets go of Python's lock; more could fill the memory
        for why in pool.imap(check, paths):
            reasons.append(why)
            if whole:
                status.update(len(reasons))
    if whole:
        status.close()
    return reasons


# ---- tables ------------------------------------------------------------------------------------

def tables_in(place):
    """The tables of labels in a folder: ours alone, if there is one, else all."""
    return _list_tables(Path(place), os.stat(place).st_mtime_ns)


@lru_cache(maxsize=64)
def _list_tables(place, changed):
    """tables_in a folder that was last changed then."""
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


def _read_tables(folder, root, files, uncertain, problems):
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
        _note(problems, f"rows of {path} without an image", lost)
        _note(problems, f"names in {path} that mean several images", ambiguous)
        count = sum(map(len, rows))
        notes.append(f"{path.name} ({count:,} of {len(table.rows):,} rows matched)")

    if not matches and inside:
        _refuse_tables(unused, root)
    if not matches:
        _note(problems, "tables above the folder, which name none of its images",
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
    """What _read_tables returns, of tables that name images, and of others that name studies."""
    columns, left_out, unsure = merge_tables(matches, len(files), uncertain)
    joined = [(table, join_by_study(table, columns)) for table in unused]
    joined = [(table, rows) for table, rows in joined if rows is not None and any(rows)]
    if joined:
        matches = matches + joined
        columns, left_out, unsure = merge_tables(matches, len(files), uncertain)
        notes += [f"{table.path.name} (joined by study)" for table, _ in joined]
    known = [table for table, _ in matches]
    _note(problems, "tables that name none of the images", [table.path for table in unused
                                                            if table not in known])
    _note(problems, "columns left out, for their numbers differ between the rows of an image",
          left_out)
    if unsure:
        problems.append(f"uncertain answers, -1 in tables: {unsure:,}, {UNSURE_MEANS[uncertain]}")
    if any(table.path.name == "train_labels.csv" for table in known) and "label" in columns:
        columns["label"] = [TUMOUR.get(cell, cell) for cell in columns["label"]]

    labelled = [any(rows[i] for _, rows in matches) for i in range(len(files))]
    bare = [file for file, has_row in zip(files, labelled) if not has_row]
    _note(problems, f"images without a row in {' or '.join(t.path.name for t in known)}", bare)
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


@lru_cache(maxsize=16)
def _known_table(path, changed):
    """A table that was read before, and is unchanged."""
    return _open_table(path, True)


def labels_of(path):
    """Cells of the rows that name an image, in a table beside it or up to four above, or {}."""
    path = Path(os.path.abspath(path))
    for place in path.parents[:5]:
        for table_path in tables_in(place):
            table = _known_table(table_path, table_path.stat().st_mtime_ns)
            file = path.relative_to(place).as_posix().removeprefix("images/")
            cells = table.cells_of(file, place)
            if cells:
                return cells
    return {}


# ---- masks -------------------------------------------------------------------------------------

def _find_masks(root, files, beside, problems):
    """{kind: for each file a list of its mask files, or None}, from folders named like masks.

    A kind is the folder's name; mask, ManualMask, leftMask and rightMask, and masks that lie beside
    their images as NAME_mask, are all "masks".
    """
    base = root.parent if root.name == "images" else root
    kinds = defaultdict(list)  # kind -> (path, name to compare with the files, name to show)
    for place in sorted(base.glob("*/")):
        if not MASK_FOLDER.fullmatch(place.name):
            continue
        plain = re.sub("left|right|manual|[^a-z]", "", place.name.lower())
        kind = "masks" if plain == "mask" else place.name
        for path in sorted(path_below(base, place.name).rglob("*.*")):
            if not path.name.startswith("."):
                name = path.relative_to(place)
                shared = [part for part in name.parts if not SIDE_FOLDER.fullmatch(part)]
                path = path_below(base, path.relative_to(base))
                kinds[kind].append((path, "/".join(shared), name.as_posix()))
    for path in beside:
        name = path.relative_to(root).as_posix()
        kinds["masks"].append((path_below(root, name), name, name))

    return {kind: _match_masks(kind, sorted(masks), files, problems)
            for kind, masks in kinds.items()}


def _match_masks(kind, masks, files, problems):
    """For each file a list of its masks, or None; left and right are joined, others not guessed."""
    rows, lost, ambiguous = match_names(files, [name for _, name, _ in masks])

    # Names that mean no file may say what they are: NAME_mask, NAME_lung, NAME_left.
    used = {number for numbers in rows for number in numbers}
    rest = [number for number in range(len(masks)) if number not in used]
    bare = []
    for number in rest:
        path = Path(masks[number][1])
        stem = path.stem
        while MASK_WORDS.search(stem):
            stem = MASK_WORDS.sub("", stem)
        bare.append(path.with_stem(stem or path.stem).as_posix())
    more, _, _ = match_names(files, bare)

    found = []
    unclear = []
    for i, numbers in enumerate(rows):
        numbers = numbers or [rest[k] for k in more[i]]
        sides = [number for number in numbers if SIDE.search(masks[number][2])
                 or SIDE.search(masks[number][0].parent.name)]
        used.update(numbers)
        chosen = sides or numbers
        if len(chosen) > 1 and not sides:
            unclear.append(files[i])
            chosen = []
        found.append([masks[number][0] for number in chosen] or None)
    _note(problems, f"{kind}/ without an image",
          [shown for number, (_, _, shown) in enumerate(masks) if number not in used])
    _note(problems, f"images with several masks in {kind}/, of which none is taken", unclear)
    return found
