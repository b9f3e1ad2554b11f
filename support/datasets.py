"""Data sets as people have them: folders, tables, .npz, .h5, phantoms."""
import csv
import io
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from support.command import StatusLine, UserError, one_line, user_errors
from support.images import _below, _why_unreadable, list_images, load_image
from support.phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms, histology_phantoms)

TABLES = ("labels.csv", "train_labels.csv", "samples.csv")  # ours, Kaggle's PCam, sample.py's
TUMOUR = {"0": "healthy", "1": "cancer"}  # PatchCamelyon's labels
CACHE_BYTES = 1 << 30  # of decoded images, per data set and process


@dataclass(eq=False)
class ImageSet:
    """Images by number: `images[i]` is (3, size, size) float32 in [-1, 1], read when asked for."""
    name: str
    note: str  # one line, what and from where
    size: int | None
    files: list  # unique names
    columns: dict  # column of the labels -> list of str, one cell per file
    sources: list | np.ndarray = ()  # what load_image takes, one per file
    masks: dict = field(default_factory=dict)  # kind -> list of mask files, masks or None
    problems: list = field(default_factory=list)  # lines about what was left out
    unreadable: list = field(default_factory=list)  # (path, why) of images that were left out
    official_test: list = field(default_factory=list)  # numbers that MedMNIST keeps for testing
    cache: dict = field(default_factory=dict)  # number -> image
    depth: dict = field(default_factory=lambda: {"black": 0.0, "white": 255.0})  # see images.py

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
        if isinstance(source, Path):
            x = load_image(source, self.size).amax(0, keepdim=True) + 1
            return x >= max(x.max().item() / 2, 1e-6)
        return source


def _place(name_or_path):
    """The path that a --data means, or None for phantoms."""
    name = str(name_or_path)
    if name in ("cxr", "histology") and Path("data", name).is_dir():
        return Path("data", name)
    return None if name in ("cxr", "histology", "phantoms") else Path(name)


def survey(name_or_path, size, count):
    """(how many images open_dataset will find at most, seconds that loading one takes)."""
    path = _place(name_or_path)
    if path is None:
        return count, 0.0
    files = list_images(path) if path.is_dir() else []
    images = ImageSet("", "", size, files, {}, files) if files else open_dataset(path, size)
    images[0]  # Pillow starts here
    some, began = range(len(images) // 2, len(images), -(-len(images) // 16)), time.monotonic()
    for i in some:
        images[i]
    return len(images), (time.monotonic() - began) / len(some)


def open_dataset(name_or_path, size, seed=0, count=2400, whole=False, depth=None,
                 uncertain="ignore"):
    """Open a folder of images, a MedMNIST .npz, PatchCamelyon's .h5 pair, "cxr" or "histology"
    (data/NAME/ if it is there, else `count` phantoms) or "phantoms" (chests); size None keeps the
    side of each file.

    An image of a folder that cannot be read is left out and listed. `whole` reads all of each file,
    not the head alone: PNGs by their checksums, 0.4 ms a megapixel, others by decoding, 5 to 20 ms.
    """
    name, path = str(name_or_path), _place(name_or_path)
    if path is None:
        return _open_phantoms(name, size or 64, seed, count)
    if name and path.is_dir():
        return _open_folder(path, size, whole)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, size)
    if path.suffix == ".h5" and path.is_file():
        return _open_h5(path, size)
    raise UserError(f"there is no data set {name}", "a folder of images, a MedMNIST .npz or "
                    "PatchCamelyon's .h5 is needed", "pass --data cxr, histology, phantoms or PATH")


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
    absent = f"no folder data/{name}/, so " * (name != "phantoms")
    note = f"{absent}{count:,} generated phantoms, not real images ({size} px, seed {seed})"
    return ImageSet(name, note, size, [f"phantom_{i:06d}" for i in range(count)], columns,
                    masks={"masks": masks}, cache=dict(enumerate(images.expand(-1, 3, -1, -1))))


def _open_npz(path, size):
    """A MedMNIST file: SPLIT_images (N, H, W) or (N, H, W, 3) uint8, SPLIT_labels (N, L)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = [s for s in ("train", "val", "test") if f"{s}_images" in archive]
            parts = [archive[f"{split}_images"] for split in splits]
            labels = np.concatenate([archive[f"{split}_labels"] for split in splits])
        images = np.concatenate(parts)
        labels = labels.reshape(len(images), -1).T.tolist()  # (N, L) -> L lists
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] not in ((), (3,)):
            raise ValueError(f"images of {images.dtype} and shape {images.shape}")
    except Exception as error:  # a damaged file makes NumPy raise nearly any type
        raise UserError(f"{path} cannot be read ({str(error)[:120]})", "MedMNIST's train_images of "
                        "uint8 and train_labels are needed", "download it again") from error
    files = [f"{split}_{i:06d}" for split, part in zip(splits, parts) for i in range(len(part))]
    columns = {f"label_{j}": [str(cell) for cell in row] for j, row in enumerate(labels)}
    test = [i for i, file in enumerate(files) if file.startswith("test")]
    return ImageSet(path.stem, f"{len(files):,} images from {path}", size, files, columns, images,
                    official_test=test)


class _H5Images:
    """Row i of the array `x` in an .h5 file; opened anew in each process that reads it."""

    def __init__(self, path):
        self.path, self.file, self.owner = path, None, None

    def __getitem__(self, i):
        if self.owner != os.getpid():
            import h5py
            self.file, self.owner = h5py.File(self.path, "r"), os.getpid()
        return self.file["x"][i]

    def __getstate__(self):
        return {"path": self.path, "file": None, "owner": None}


def _open_h5(path, size):
    """PatchCamelyon as published: NAME_x.h5 with x (N, H, W, 3) uint8, NAME_y.h5 with y (N, ...) of
    0 and 1. h5py is asked for only here."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} is an .h5 file", "the package h5py is needed to read it",
                        "pip install h5py") from error
    stem = path.stem.removesuffix("_x").removesuffix("_y")
    x_path, y_path = (path.with_name(f"{stem}_{part}.h5") for part in "xy")
    try:
        with h5py.File(x_path, "r") as x, h5py.File(y_path, "r") as y:
            shape, kind, labels = x["x"].shape, x["x"].dtype, np.asarray(y["y"]).reshape(-1)
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
                    {"label": [TUMOUR.get(cell, cell) for cell in cells]}, _H5Images(x_path))


def _open_folder(folder, size, whole):
    """A folder of images with optional labels.csv (or train_labels.csv) and masks*/."""
    root = _below(folder, "images") if (folder / "images").is_dir() else folder
    if (folder / "train_labels.csv").is_file() and (folder / "train").is_dir():
        root = _below(folder, "train")  # Kaggle's test/ has no labels
    found, columns, masks, problems, reasons = list_images(root), {}, {}, [], []

    def note_lost(what, names):
        if names:
            some = ", ".join(map(one_line, names[:3])) + ", ..." * (len(names) > 3)
            problems.append(f"{what}: {len(names):,} ({some})")

    status = StatusLine(len(found), "reading")
    with ThreadPool(4) as pool:  # Pillow lets go of Python's lock; more could fill the memory
        for why in pool.imap(lambda path: _why_unreadable(path, folder, whole), found):
            reasons.append(why)
            if whole:
                status.update(len(reasons))
    if whole:
        status.close()
    paths = [path for path, why in zip(found, reasons) if not why]
    unreadable = [(path, why) for path, why in zip(found, reasons) if why]
    note_lost("unreadable, or links out of the folder", [path for path, _ in unreadable])
    if len(paths) < 0.9 * len(found):
        raise UserError(problems[0], "at least 90 % must be readable", "replace or remove them")
    files = [path.relative_to(root).as_posix() for path in paths]
    note = f"{len(files):,} images from {root}, "
    tables = [(place, name) for place in (root, root.parent) for name in TABLES]
    table = next((_below(*path) for path in tables if Path(*path).is_file()), None)
    if table:
        rows = read_table(table)
        matched, lost = _match(files, [row["file"] for row in rows])
        if lost and table.name == "train_labels.csv":
            raise UserError(f"{table} names {len(lost):,} images that {root} has not (first: "
                            f"{lost[0]})", "each id needs its .tif", "unpack the images again, or "
                            "delete those rows")
        bare = [file for file, row in zip(files, matched) if row is None]
        note_lost(f"rows of {table} without an image", lost)
        note_lost(f"images without a row in {table}", bare)
        if len(bare) < len(files):
            columns = {name: ["" if row is None else rows[row][name] for row in matched]
                       for name in rows[0] if name != "file"}
    for place in sorted((root.parent if root.name == "images" else root).glob("masks*/")):
        names = sorted(path.relative_to(place).as_posix()
                       for path in _below(place.parent, place.name).rglob("*.*"))
        matched, lost = _match(files, names)
        note_lost(f"{place.name}/ without an image", lost)
        masks[place.name] = [None if row is None else _below(place, names[row])
                             for row in matched]
        note += f"{len(names) - len(lost):,} {place.name}, "
    note += f"{table.name} with {', '.join(columns)}" if columns else "no labels.csv"
    return ImageSet(folder.resolve().name, one_line(note), size, files, columns, paths, masks,
                    problems, unreadable)


def _match(files, names):
    """(for each file the number of the name that means it, or None; names that mean no file): by
    stem or, where two files or two names share a stem, by the whole relative path."""
    stems = [[Path(name).stem for name in group] for group in (files, names)]
    is_unique = all(len(set(group)) == len(group) for group in stems)
    file_keys, name_keys = stems if is_unique else (files, names)
    rows = {key: row for row, key in enumerate(name_keys)}
    matched = [rows.get(key) for key in file_keys]
    used = set(matched)
    return matched, [name for row, name in enumerate(names) if row not in used]


def read_table(path, errors="strict"):
    """Rows of a CSV with a column `file`, as dicts; comma or semicolon, BOM and CRLF are fine.
    Kaggle's PatchCamelyon has `id` in its place, and labels 0 and 1 that become words."""
    rows = []
    try:
        text = Path(path).read_text("utf-8-sig", errors)
        table = csv.DictReader(io.StringIO(text), restval="", strict=True, skipinitialspace=True,
                               delimiter=";" if ";" in text.partition("\n")[0] else ",")
        table.fieldnames = [name.strip() for name in table.fieldnames or []]
        names = [name for name in table.fieldnames if name]  # a comma at a line's end names none
        for row in table:
            if any(map(str.strip, row.pop(None, []))):
                raise ValueError(f"line {table.line_num} has more cells than the first line")
            rows.append({name: row[name].strip() for name in names})
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error})", "a CSV file in UTF-8 is needed",
                        "save it as CSV UTF-8") from error
    if Path(path).name == "train_labels.csv" and "file" not in names and "id" in names:
        names = ["file"]
        for row in rows:
            row["file"] = row.pop("id")
            row["label"] = TUMOUR.get(row.get("label"), row.get("label", ""))
    if "file" not in names or len(set(names)) < len(names):
        raise UserError(f"{path} has the columns {', '.join(names)[:200] or 'none'}",
                        "one must be called file, no two alike", "correct its first line")
    for file, count in Counter(row["file"] for row in rows).items():
        if count > 1:
            raise UserError(f"{path} has {count} rows for {file or 'no name'}", "one is needed",
                            "delete one")
    return rows


def labels_of(path):
    """Cells of the row that names an image, in a labels.csv beside it or up to two above, or {}."""
    path = Path(path).absolute()
    for table in (place / "labels.csv" for place in path.parents[:3]):
        if table.is_file():
            rows, file = read_table(table), path.relative_to(table.parent).as_posix()
            row = _match([file.removeprefix("images/")], [row["file"] for row in rows])[0][0]
            if row is not None:
                return {name: cell for name, cell in rows[row].items() if name != "file"}
    return {}
