"""Slides: bags of patch features with grid positions and one label, read or made.

    open_slides(folder, tiling)            # a folder and its labels.csv
    mosaic_slides(bank, seed, count)       # made of patches of either:
    open_patches(folder, embed, ...)       # ... real labelled patches, patients apart
    phantom_patches(embed)                 # ... histology phantoms

A folder holds images, whole slides (tiled by support/tiles.py) or feature files (.h5, .npz) of
features (N, D), coords (N, 2), x and y, and optionally step, the distance between neighbours.
labels.csv has the columns file, a label, and optionally patient and split.
"""
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support.command import UserError
from support.datasets import open_dataset
from support.files import read_csv
from support.images import IMAGE_SUFFIXES, is_inside, is_run
from support.phantoms import histology_phantoms
from support.seeds import step_seed
from support.tiles import SLIDE_SUFFIXES, THUMB, tile_image

PICTURE_SIDE = 1024  # pixels of a slide in heat maps
GRID_SIDE = 4000     # cells of a grid's side, at most
FEATURE_SUFFIXES = {".h5", ".npz"}

MOSAIC_SIDE = 48     # cells of a mosaic's side; at least half of them are tissue
MOSAIC_PATCH = 64    # pixels of a patch's side, as it is embedded
TESTED = 0.3         # share of the patients whose patches make the test mosaics
FIELDS = 5           # patients of a mosaic's healthy tissue, at most
FOCI = (0.03, 0.3)   # least and largest share of a mosaic's tissue in the focus
PHANTOMS = 2000      # patches that mosaics of phantoms are made of


@dataclass(eq=False)
class Slide:
    name: str
    label: int                  # 0 or 1
    patient: str                # slides of a patient stay on one side of a split
    is_test: bool
    grid: torch.Tensor          # (N, 2) int64: row and column of each patch
    rows: torch.Tensor          # (N,) int64: its row in what `read` returns
    read: object                # () -> features (M, D), pictures (M, 3, THUMB, THUMB) or None
    foci: torch.Tensor = None   # (N,) bool, where known

    def take(self, patches):
        """Features (..., D) float32 of patches (...); index -1 returns some patch."""
        return self.read()[0][self.rows[patches]].float()


# ---- folders -----------------------------------------------------------------------------------

def to_grid(coords, step=None):
    """Coordinates x, y (N, 2) -> grid (N, 2) int64 of rows and columns, from 0.

    step: the distance between neighbours; None: the smallest difference, on whose lattice all
    coordinates must lie. Raises ValueError for two patches in one cell, and for huge grids.
    """
    places = np.asarray(coords, dtype=np.float64)[:, ::-1]
    places = places - places.min(axis=0, initial=np.inf)
    if step is None:
        differences = np.concatenate([np.diff(np.unique(column)) for column in places.T])
        step = differences.min(initial=np.inf)
        if len(differences) and (places % step).any():
            raise ValueError(f"coords lie on no lattice of their smallest difference {step:g}: "
                             "store the distance between neighbours as `step`")
    slack = min(1.0, 0.49 * float(step))  # whole pixels, although tiles of a level rarely are
    grid = ((places + slack) // float(step)).astype(np.int64)
    if grid.max(initial=0) >= GRID_SIDE or len(np.unique(grid, axis=0)) < len(grid):
        raise ValueError(f"in steps of {float(step):g} two patches share a cell, or the grid has "
                         f"over {GRID_SIDE} cells a side")
    return torch.from_numpy(grid)


@lru_cache(maxsize=64)
def read_features(path):
    """(features (N, D), pictures or None, grid (N, 2)) of a feature file; UserError if it is
    damaged, or has other shapes or values that are not finite."""
    try:
        if path.suffix == ".h5":
            import h5py
            open_file = h5py.File(path, "r")
        else:
            open_file = np.load(path, allow_pickle=False)
        with open_file as file:
            content = {key: torch.as_tensor(file[key][()])
                       for key in ("features", "coords", "pictures", "step") if key in file}
        features, coords = content["features"], content["coords"]
        if features.ndim != 2 or coords.shape != (len(features), 2):
            raise ValueError(f"shapes {tuple(features.shape)} and {tuple(coords.shape)}")
        if not features.isfinite().all() or not coords.isfinite().all():
            raise ValueError("not finite")
        return features, content.get("pictures"), to_grid(coords, content.get("step"))
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"{path} cannot be used ({error})", "finite features (N, D) and coords "
                        "(N, 2) on a grid are needed, and for .h5 the package h5py",
                        "extract them again") from error


def open_slides(folder, tiling, label_column="label"):
    """The slides of a folder with a label in its labels.csv; others are counted and named.

    Raises UserError unless there are two labels and one feature width.
    """
    # Feature files, or if there are none, images.
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no data set {folder}", "a folder of slides is needed",
                        "pass --data mosaic or FOLDER")
    ours = {path.with_name("features").resolve() for path in folder.rglob("config.json")
            if is_run(os.listdir(path.parent))}
    ours.add(Path(tiling.folder).resolve())  # features that runs have made are no data
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and is_inside(path, folder) and path.parent.resolve() not in ours]
    paths = ([path for path in files if path.suffix in FEATURE_SUFFIXES]
             or [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES | SLIDE_SUFFIXES])
    table = folder / "labels.csv"
    if not table.is_file():
        table = folder.resolve().parent / "labels.csv"
    rows = read_csv(table)
    row_of = {Path(row.get("file", "")).stem: row for row in rows}
    if len(row_of) < len(rows):
        raise UserError(f"{table} names a slide twice, or has no column file",
                        "one row per slide is needed", "merge them")
    if not paths or len({path.stem for path in paths}) < len(paths):
        raise UserError(f"{folder} has {len(paths)} slides", "slides, images or feature files with "
                        "different names are needed", "pass --data mosaic or FOLDER")

    slides = []
    left_out = []
    for path in paths:
        name = path.stem
        row = row_of.get(name, {})
        if not row.get(label_column):
            left_out.append(name)
            continue
        if path.suffix not in FEATURE_SUFFIXES:
            target = Path(tiling.folder, f"{name}.npz")
            tile_image(path, target, tiling)
            path = target
        grid = read_features(path)[2]
        if not len(grid):
            left_out.append(name)
            continue
        slides.append(Slide(name, row[label_column], row.get("patient") or name,
                            row.get("split", "").lower() == "test", grid, torch.arange(len(grid)),
                            lambda path=path: read_features(path)[:2]))

    if left_out:
        print(f"left out, without a label or tissue: {len(left_out)} ({', '.join(left_out[:3])})")
    labels = sorted({slide.label for slide in slides})
    widths = sorted({slide.read()[0].shape[1] for slide in slides})
    if len(labels) != 2 or len(widths) != 1:
        raise UserError(f"{len(slides)} slides have the labels {labels[:5]} in column "
                        f"{label_column!r} and features of width {widths}",
                        "two labels and one width are needed",
                        f"correct {table}, or pass --label-column")
    for slide in slides:
        slide.label = labels.index(slide.label)
    patients = len({slide.patient for slide in slides})
    print(f"{len(slides)} slides, {sum(slide.label for slide in slides)} of them {labels[1]}; "
          f"{sum(len(slide.grid) for slide in slides):,} patches; {patients} patients")
    if not any(row.get("patient") for row in row_of.values()):
        print("no column patient: slides are split one by one")
    return slides


def split_slides(slides, folds, seed):
    """(train, test) lists: by the column split if it is used, else cross-validated by patient.

    Raises UserError for a patient on both sides, for a training part with one label only, and if
    no test part has both.
    """
    held_out = [{slide.patient for slide in slides if slide.is_test}]  # of each fold
    both = sorted(held_out[0] & {slide.patient for slide in slides if not slide.is_test})
    if not held_out[0]:
        patients = sorted({slide.patient for slide in slides})
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(patients), generator=generator).tolist()
        held_out = [{patients[i] for i in order[fold::folds]}
                    for fold in range(min(folds, len(patients)))]

    splits = [([slide for slide in slides if slide.patient not in patients],
               [slide for slide in slides if slide.patient in patients]) for patients in held_out]
    trainable, testable = zip(*[[len({slide.label for slide in side}) == 2 for side in split]
                                for split in splits])
    if both or not all(trainable) or not any(testable):
        raise UserError(f"patients on both sides: {', '.join(both[:3]) or 'none'}; both labels to "
                        f"train on in {sum(trainable)} of {len(splits)} folds, to test on in "
                        f"{sum(testable)}", "none, all, and one or more are needed",
                        "correct labels.csv, add slides, or pass fewer --folds")
    return splits


# ---- mosaics -----------------------------------------------------------------------------------

@dataclass
class Patches:
    """A bank: features (N, D), pictures (N, 3, THUMB, THUMB), cancer (N,) bool, patients (N,), and
    those of the official test part, if there is one."""
    features: torch.Tensor
    pictures: torch.Tensor
    cancer: np.ndarray
    patients: np.ndarray
    test_patients: tuple = ()


def embed_patches(images, embed, **known):
    """The Patches of batches of images (n, 3, MOSAIC_PATCH, MOSAIC_PATCH)."""
    parts = [(embed(batch), F.adaptive_avg_pool2d(batch, THUMB)) for batch in images]
    return Patches(*map(torch.cat, zip(*parts)), **known)


def phantom_patches(embed):
    """The Patches of histology phantoms; every 40 stand for a patient."""
    images, _, labels, _ = histology_phantoms(PHANTOMS, MOSAIC_PATCH)
    return embed_patches(images.split(64), embed, cancer=labels.numpy() == 1,
                         patients=np.arange(PHANTOMS) // 40)


def open_patches(folder, embed, label_column, positive=None):
    """The Patches of a labelled folder. positive: the label of a focus (default: the second value
    in sorted order). embed: images (n, 3, 64, 64) in [-1, 1] -> features (n, D)."""
    images = open_dataset(folder, MOSAIC_PATCH)
    print(images.note, *images.problems, sep="\n")
    labels = np.array(images.columns.get(label_column, []))
    values = sorted(set(labels.tolist()))
    positive = positive or values[-1:] and values[-1]
    if len(values) != 2 or positive not in values or images.groups is None:
        raise UserError(f"column {label_column!r} has the values {values[:5]}, --positive "
                        f"{positive}, patients {'un' * (images.groups is None)}known",
                        "two labels, one of them positive, and a patient per patch are needed",
                        "complete labels.csv, or pass --label-column or --positive")
    tested = {group for group, side in zip(images.groups, images.official or ()) if side == "test"}
    return embed_patches(images.batches(range(len(images)), 64), embed, cancer=labels == positive,
                         patients=np.array(images.groups), test_patients=tuple(sorted(tested)))


def draw_mosaic(healthy, cancer, label, rng):
    """Rows of the bank (side, side), -1 outside the tissue, and the focus (side, side) bool.

    healthy, cancer: for each patient the rows of their patches. Each field of healthy tissue is of
    one patient, and so is the round focus: nothing but the focus shows where to look (our design).
    """
    # Smooth random fields: the first shapes the outline, the largest of the others the patient.
    coarse = torch.from_numpy(rng.standard_normal((1, 1 + FIELDS, 5, 5)))
    outline, *fields = F.interpolate(coarse, MOSAIC_SIDE, mode="bicubic",
                                     align_corners=True)[0].numpy()
    axis = (np.arange(MOSAIC_SIDE) + 0.5) * 2 / MOSAIC_SIDE - 1
    tissue = np.hypot(axis, axis[:, None]) < 0.85 + 0.12 * outline.clip(-2, 2)
    field = np.argmax(fields, axis=0)
    tiles = np.full(tissue.shape, -1)
    for index, patient in enumerate(rng.choice(len(healthy), FIELDS)):
        cells = tissue & (field == index)
        tiles[cells] = rng.choice(healthy[patient], cells.sum())

    # The focus: the cells nearest to a random one.
    focus = np.zeros_like(tissue)
    if label:
        places = np.argwhere(tissue)
        least, largest = FOCI
        size = max(1, round(len(places) * least * (largest / least) ** rng.random()))
        away = np.linalg.norm(places - places[rng.integers(len(places))], axis=1)
        focus[tuple(places[np.argsort(away, kind="stable")[:size]].T)] = True
        tiles[focus] = rng.choice(cancer[rng.integers(len(cancer))], size)
    return tiles, focus


def mosaic_slides(bank, seed, count):
    """`count` Slides, every second one with a focus; a fifth, of other patients, is for testing:
    of the bank's test patients, or else of TESTED of all."""
    rng = np.random.default_rng(step_seed(seed, "mosaic"))
    patients = rng.permutation(np.unique(bank.patients))
    is_test = np.arange(len(patients)) < round(TESTED * len(patients))
    if bank.test_patients:
        is_test = np.isin(patients, bank.test_patients)
    slides = []
    for part, chosen, number in (("test", patients[is_test], count // 5),
                                 ("train", patients[~is_test], count - count // 5)):
        healthy, cancer = ([rows for rows in (np.flatnonzero((bank.patients == patient)
                                                             & (bank.cancer == is_cancer))
                                              for patient in chosen) if len(rows)]
                           for is_cancer in (False, True))
        if not healthy or not cancer:
            raise UserError(f"the {part} part has {len(healthy)} patients with healthy and "
                            f"{len(cancer)} with cancer patches", "one of each is needed",
                            "bring patches of more patients")
        for i in range(number):
            tiles, focus = map(torch.from_numpy, draw_mosaic(healthy, cancer, i % 2, rng))
            tissue = tiles >= 0
            name = f"{part}_{i:04d}"
            slides.append(Slide(name, i % 2, name, part == "test", torch.nonzero(tissue),
                                tiles[tissue], lambda: (bank.features, bank.pictures),
                                focus[tissue]))
    return slides


# ---- pictures ----------------------------------------------------------------------------------

def paint_patches(slide, shape, heat, passes):
    """Three pictures (3, h, w) of a slide: tissue, heat in red, passes in blue and orange.

    shape: rows and columns of the grid to show. heat (N,) in [0, 1]; passes: two (N,) in [0, 1].
    True foci get a green outline.
    """
    picture = slide.read()[1]
    picture = torch.zeros(len(heat), 3, THUMB, THUMB) if picture is None else picture[slide.rows]
    grey = 0.6 * picture.mean(dim=1, keepdim=True) + 0.4
    red, blue, orange, green = torch.tensor(
        [[1, -1, -1], [-1, 0, 1], [1, 0.4, -1], [-1, 0.6, -1]]).view(4, 3, 1, 1)
    heat_, first, second = (values.view(-1, 1, 1, 1) for values in (heat, *passes))
    pictures = [picture, grey.lerp(red, heat_), grey.lerp(blue, first).lerp(orange, second)]

    height, width = shape
    pixels = max(1, min(THUMB, PICTURE_SIDE // max(shape)))

    def paint(patches):
        canvas = torch.full((height, width, 3, pixels, pixels), 0.9)
        canvas[tuple(slide.grid.T)] = F.adaptive_avg_pool2d(patches.expand(-1, 3, -1, -1), pixels)
        return canvas.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)

    foci = torch.zeros(len(heat)) if slide.foci is None else slide.foci.float()
    inside = paint(0.9 - 2 * foci.view(-1, 1, 1, 1).expand(-1, 1, THUMB, THUMB)) < 0
    edge = F.max_pool2d(inside.float(), 5, 1, 2) > inside.float()
    return [torch.where(edge, green, paint(image)) for image in pictures]
