"""Data sets as people have them: folders with tables and masks, .npz, .h5, and phantoms.

    images = open_dataset("xrays", 64)      # or "cxr", "histology", "phantoms", x.npz, x_x.h5
    images[i]                               # (3, 64, 64) float32 in [-1, 1], read when asked for
    images.files[i], images.columns["finding"][i], images.mask(i)
    print(images.note, *images.problems)    # what was found, and what was left out

Public sets are read as they ship, with their own tables and names: NIH, CheXpert, MIMIC-CXR-JPG,
VinDr, RSNA, PadChest, Kermany; MedMNIST (.npz); PatchCamelyon (.h5, or Kaggle's folder).
"""
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from support.arrays import H5Rows, JoinedRows, check_archive, open_member
from support.command import StatusLine, UserError, one_line, user_errors
from support.dicom import is_dicom, patient_of
from support.images import (EIGHT_BITS, choose_depth, count_pages, describe_depth, list_images,
                            load_image, path_below, scan_folder, why_unreadable)
from support.masks import find_masks
from support.names import note_names
from support.phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                              histology_phantoms)
from support.splits import describe_groups, find_group_column
from support.tables import TUMOUR, read_tables

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
        images[count - 1]  # raises if the pixels are not there
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
    files = [f"{stem}_{i:06d}" for i in range(len(labels))]
    columns = {"label": [TUMOUR.get(cell, cell) for cell in cells]}
    return ImageSet(stem, f"{len(labels):,} images from {x_path}", size, files, columns,
                    H5Rows(x_path, len(labels)))


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
    note_names(problems, "unreadable, or links out of the folder", [path for path, _ in unreadable])
    if unreadable:
        problems[0] += f", the first: {unreadable[0][1]}"
    if len(paths) < 0.9 * len(found):
        raise UserError(problems[0], "at least 90 % must be readable", "replace or remove them")
    for why, others in passed_over.items():
        note_names(problems, f"passed over, {why}", others)
    pages = {path: count_pages(path) for path in paths}
    note_names(problems, "TIFF files with several pages, of which the first is read",
               [f"{path.name}: {count} pages" for path, count in pages.items() if count > 1])

    # Depth, labels, masks.
    if depth is None:
        depth, warning = choose_depth(paths)
        problems += [warning] if warning else []
    files = [path.relative_to(root).as_posix() for path in paths]
    columns, labelled, about = read_tables(folder, root, files, uncertain, problems)
    dicom = [is_dicom(path) for path in paths]
    if any(dicom) and not find_group_column(columns):
        columns.update(_patients_in_dicom(paths, dicom))
    masks = find_masks(root, files, beside, problems)

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
