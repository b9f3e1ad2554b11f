"""Slides: bags of patch features with places and one label, from whatever holds them.

    image, .svs, tiled .tif --tiles of tissue--> embed --> features (N, D), coords (N, 2)  } Slide
    .h5, .npz, .pt of features and coords, as CLAM and TRIDENT write them                  }

    slides = open_slides(folder, tiling)                       # a folder and its labels.csv
    slides = generated_slides(seed=0, count=1500, embed=embed) # mosaics of histology phantoms
    for train, test in split_slides(slides, folds=5, seed=0): ...

Features are (N, D) float, coords (N, 2) x and y in pixels or in steps, grids (N, 2) int64 row and
column. `tiling` says how images become features (support/tiles.py). .h5 needs h5py.
"""
import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

from support.command import UserError
from support.files import read_csv
from support.images import IMAGE_SUFFIXES
from support.phantoms import histology_phantoms, paint_slide, slide_phantoms
from support.tiles import SLIDE_SUFFIXES, THUMB, tile_image

BANK = 2000          # patches that the generated slides of one part are made of
PICTURE_SIDE = 1024  # pixels of a slide in heat maps, at most
FEATURE_SUFFIXES = {".h5", ".npz", ".pt"}


@dataclass(eq=False)
class Slide:
    name: str
    label: int                  # 0 or 1
    group: str                  # slides of one group (a patient) are never parted
    is_test: bool
    grid: torch.Tensor          # (N, 2) int64: row and column of each patch
    rows: torch.Tensor          # (N,) int64: its row in what `read` returns
    read: object                # () -> features (M, D), pictures (M, 3, THUMB, THUMB) or None
    foci: torch.Tensor = None   # (N,) bool, where known
    has_places: bool = True     # False: the grid only numbers the patches

    def take(self, patches):
        """Features (..., D) float32 of patches (...); for -1 those of some patch."""
        return self.read()[0][self.rows[patches]].float()


# ---- places ------------------------------------------------------------------------------------

def grid_step(places):
    """The distance of neighbours among places (N, 2) float64, in their own unit.

    It is the most frequent smallest difference: from a patch to the next one in its row or column.
    A common divisor would not do, for each piece of tissue may have an origin of its own. Rounded
    coordinates (255, 256, 255, ...) are averaged. Places that share no rows have no lattice; then
    it is the median distance to the nearest.
    """
    differences = []
    for across in (0, 1):
        order = np.lexsort((places[:, 1 - across], places[:, across]))
        step = np.diff(places[order], axis=0)
        differences.append(step[step[:, across] == 0, 1 - across])
    differences = np.concatenate(differences)

    if len(differences) > len(places) / 10:
        values, counts = np.unique(differences, return_counts=True)
        most = values[counts.argmax()]
        near = np.abs(differences - most) <= min(1, 0.02 * most)
        return float(differences[near].mean())
    if len(places) < 2:
        return 1.0
    nearest = cKDTree(places).query(places, k=2, p=np.inf)[0][:, 1]
    return float(np.median(nearest))


def part_crowded(cells):
    """Cells (N, 2), each patch in one of its own, and how many moved to the next free cell.

    Patches that do not overlap never share a cell, those of overlapping pieces may.
    """
    cells = cells.copy()
    first = np.unique(cells, axis=0, return_index=True)[1]
    crowded = np.setdiff1d(np.arange(len(cells)), first)
    taken = set(map(tuple, cells[first].tolist())) if len(crowded) else set()

    for i in crowded:
        row, column = cells[i].tolist()
        for reach in itertools.count(1):
            around = range(-reach, reach + 1)
            free = [(a * a + b * b, row + a, column + b) for a in around for b in around
                    if (row + a, column + b) not in taken]
            if free:
                break
        cells[i] = min(free)[1:]
        taken.add(min(free)[1:])
    return cells, len(crowded)


def snap_to_grid(coords, step=None):
    """Coordinates x, y (N, 2) -> grid (N, 2) int64 from 0 on, number of patches that moved.

    step: the distance of neighbours; None measures it (see grid_step).
    Raises ValueError for coordinates that are not finite or repeat.
    """
    places = np.asarray(coords, dtype=np.float64)[:, ::-1]
    if not len(places):
        return torch.zeros(0, 2, dtype=torch.int64), 0
    if not np.isfinite(places).all():
        raise ValueError("values that are not finite")
    if len(np.unique(places, axis=0)) < len(places):
        raise ValueError("coordinates that repeat")

    places = places - places.min(axis=0)
    step = float(step or grid_step(places))
    cells, moved = part_crowded(np.floor(places / step + 0.5).astype(np.int64))
    return torch.from_numpy(cells - cells.min(axis=0)), moved


def numbered_grid(count):
    """A grid (count, 2) for patches whose places nobody knows: square, in their order."""
    numbers = torch.arange(count)
    side = max(1, math.isqrt(count))
    return torch.stack([numbers // side, numbers % side], dim=1)


# ---- feature files -----------------------------------------------------------------------------

def _read_archive(path):
    """What a feature file holds of features, coords, pictures, step: a dict of tensors."""
    keys = ("features", "coords", "pictures", "step")
    if path.suffix == ".h5":
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"{path} needs the package h5py", "it reads .h5", "pip install h5py"
                            ) from error
        with h5py.File(path, "r") as file:
            return {key: torch.as_tensor(file[key][()]) for key in keys if key in file}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {key: torch.as_tensor(archive[key]) for key in keys if key in archive}

    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, torch.Tensor):
        return {key: content[key] for key in keys if key in content}
    content = {"features": content}  # CLAM's pt_files; the places are in the .h5 of that name
    for place in (path.with_suffix(".h5"), path.parent.parent / "h5_files" / f"{path.stem}.h5"):
        if place.is_file():
            content["coords"] = _read_archive(place)["coords"]
            break
    return content


@lru_cache(maxsize=64)
def read_features(path):
    """A dict of features (N, D) and, where the file has them, coords (N, 2), pictures, step.

    Raises UserError for damaged files, other shapes and values that are not finite.
    """
    try:
        content = _read_archive(path)
        for key in {"features", "coords"} & content.keys():
            if content[key].ndim == 3 and len(content[key]) == 1:
                content[key] = content[key][0]  # some write a batch of one slide
        features = content["features"]
        coords = content.get("coords", features.new_zeros(len(features), 2))
        if features.ndim != 2 or coords.shape != (len(features), 2):
            raise ValueError(f"shapes {tuple(features.shape)} and {tuple(coords.shape)}")
        if not features.isfinite().all():
            raise ValueError("values that are not finite")
        snap_to_grid(coords if "coords" in content else coords[:0])
    except UserError:
        raise
    except Exception as error:  # damaged files make NumPy, h5py and torch raise nearly any type
        raise UserError(f"{path} cannot be used ({error})", "finite features (N, D) and coords "
                        "(N, 2), each place once, are needed", "make it anew") from error
    return content


def _features_and_pictures(path):
    """What Slide.read returns, of a feature file."""
    content = read_features(path)
    return content["features"], content.get("pictures")


# ---- folders -----------------------------------------------------------------------------------

def slide_name(text):
    """The name of a slide without folders (of any system) and without a suffix that is known."""
    name = re.split(r"[\\/]", text.strip())[-1]
    stem, dot, suffix = name.rpartition(".")
    known = FEATURE_SUFFIXES | SLIDE_SUFFIXES | IMAGE_SUFFIXES
    return stem if dot + suffix.lower() in known else name


def read_labels(folder):
    """The table of a folder's slides: ({name: row}, path, name of the patient column or None).

    It is labels.csv in the folder or beside it, or the only .csv in the folder. Names stand in a
    column slide, slide_id, file, filename or image. A name with two different rows is left out.
    """
    folder = Path(folder)
    tables = [folder / "labels.csv", folder.resolve().parent / "labels.csv"]
    others = sorted(folder.glob("*.csv"))
    if len(others) == 1:
        tables.insert(1, others[0])
    path = next((table for table in tables if table.is_file()), tables[0])
    rows = read_csv(path)
    columns = {re.sub("[ _]", "", column.lower()): column for column in (rows[0] if rows else ())}
    column = next((columns[name] for name in ("slide", "slideid", "file", "filename", "image")
                   if name in columns), None)
    if column is None:
        raise UserError(f"{path} cannot be read (columns {', '.join(columns.values()) or 'none'})",
                        "a CSV of slide (or slide_id, file) and label is needed", "write one")

    named = defaultdict(list)
    for row in rows:
        if row not in named[slide_name(row[column])]:
            named[slide_name(row[column])].append(row)
    labels = {name: same[0] for name, same in named.items() if len(same) == 1}
    return labels, path, "patient" if "patient" in columns.values() else None


def list_slides(folder):
    """Sorted paths of a folder's feature files, or where there are none, of its images.

    Of several files of one name the one with features is taken, .h5 and .npz before .pt.
    Raises UserError where there is no file, or two of one name and kind.
    """
    kinds = IMAGE_SUFFIXES | SLIDE_SUFFIXES
    paths = sorted(path for path in folder.rglob("*") if path.is_file()
                   and not any(part.startswith((".", "masks"))
                               for part in path.relative_to(folder).parts))
    features = [path for path in paths if path.suffix in FEATURE_SUFFIXES]
    if not features:
        features = [path for path in paths if path.suffix.lower() in kinds]
    if not features:
        raise UserError(f"{folder} holds no slide", "features (.h5, .npz, .pt), images or whole "
                        "slides are needed", "name another folder")

    twice = [name for name, count in Counter((p.stem, p.suffix) for p in features).items()
             if count > 1]
    if twice:
        raise UserError(f"{folder} has several files {''.join(twice[0])}", "names that differ are "
                        "needed", "name the folder of one of them")
    by_name = {}
    for path in sorted(features, key=lambda path: (path.suffix == ".pt", path)):
        by_name.setdefault(path.stem, path)
    return sorted(by_name.values())


def open_slides(folder, tiling, label_column="label"):
    """The slides of a folder and its table; what cannot be used is counted and named.

    Raises UserError where there are not two labels, or features of different widths.
    """
    folder = Path(folder)
    table, table_path, group_column = read_labels(folder)
    slides = []
    widths = {}
    lost = defaultdict(list)   # why -> names of slides
    moved = {}                 # name -> patches that moved to another cell
    blank = 0
    for path in list_slides(folder):
        row = table.get(path.stem, {})
        if not row.get(label_column) or not path.resolve().is_relative_to(folder.resolve()):
            lost["without a label, or links"].append(path.stem)
            continue
        if path.suffix not in FEATURE_SUFFIXES:
            source = path
            path = Path(tiling.folder, f"{source.stem}.npz")
            blank += tile_image(source, path, tiling)

        content = read_features(path)
        count, width = content["features"].shape
        if not count:
            lost["without tissue"].append(path.stem)
            continue
        widths[width] = path.stem
        grid = numbered_grid(count)
        if "coords" in content:
            grid, moved[path.stem] = snap_to_grid(content["coords"], content.get("step"))
        slides.append(Slide(
            path.stem, row[label_column], row.get(group_column) or path.stem,
            row.get("split") == "test", grid, torch.arange(count),
            partial(_features_and_pictures, path), has_places="coords" in content))

    # what was found, and what not
    for why, names in lost.items():
        print(f"left out, {why}: {_some(names)}")
    nowhere = [slide.name for slide in slides if not slide.has_places]
    if nowhere:
        print(f"without coordinates, which models of regions need: {_some(nowhere)}")
    if any(moved.values()):
        print(f"{sum(moved.values()):,} of {sum(len(s.grid) for s in slides):,} patches lie on "
              f"another and moved to the next free cell: {_some([n for n in moved if moved[n]])}")
    labels = sorted({slide.label for slide in slides})
    if len(labels) != 2 or len(widths) > 1:
        raise UserError(f"{len(slides)} slides, labels {labels[:5]}, width of the features "
                        f"{widths}", "two labels and one width are needed",
                        f"correct {table_path} or the features, or pass --label-column")
    for slide in slides:
        slide.label = labels.index(slide.label)

    print(f"{len(slides)} slides, {sum(s.label for s in slides)} {labels[1]}; {blank:,} blank tiles"
          f" left out, {sum(len(s.grid) for s in slides):,} patches kept")
    who = f"patients by column {group_column}: {len({slide.group for slide in slides})}"
    if group_column is None:
        who = "no patient column: slides count as their own patients"
    print(f"labels by column {label_column} of {table_path}; {who}")
    return slides


def _some(names):
    """How many names, and the first three."""
    return f"{len(names)} ({', '.join(names[:3] + ['...'] * (len(names) > 3))})"


def split_slides(slides, folds, seed):
    """(train, test) lists: as the column split gives them, or cross-validated.

    Slides of one group are never parted. Raises UserError where a group is in both, or where a
    training part has one label only.
    """
    tested = {slide.group for slide in slides if slide.is_test}
    in_both = tested & {slide.group for slide in slides if not slide.is_test}
    held_out = [tested]
    if not tested:
        groups = sorted({slide.group for slide in slides})
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = [{groups[i] for i in order[fold::folds]}
                    for fold in range(min(folds, len(groups)))]

    splits = []
    for held in held_out:
        train = [slide for slide in slides if slide.group not in held]
        splits.append((train, [slide for slide in slides if slide.group in held]))
    label_counts = [len({slide.label for slide in train}) for train, _ in splits]
    if in_both or set(label_counts) != {2}:
        raise UserError(f"in two splits: {', '.join(sorted(in_both)[:3]) or 'nobody'}; labels in "
                        f"each training part: {label_counts}", "nobody and 2 are needed",
                        "correct labels.csv, or add slides")
    return splits


def generated_slides(seed, count, embed):
    """Mosaics of histology phantoms. A fifth is for testing, made of patches of its own bank.

    embed: images (n, 3, 64, 64) in [-1, 1] -> features (n, D).
    """
    test_count = count // 5
    return (_generated_part("train", count - test_count, 2 * seed, embed)
            + _generated_part("test", test_count, 2 * seed + 1, embed))


def _generated_part(part, count, seed, embed):
    """So many slides, made of the patches of one bank."""
    bank = histology_phantoms(BANK, 64, seed)
    features = torch.cat([embed(images) for images in bank[0].split(64)])
    pictures = F.adaptive_avg_pool2d(bank[0], THUMB)

    slides = []
    for i, (tiles, foci, label) in enumerate(zip(*slide_phantoms(count, bank, seed=seed))):
        name = f"{part}_{i:04d}"
        tissue = tiles >= 0
        slides.append(Slide(name, int(label), name, part == "test", torch.nonzero(tissue),
                            tiles[tissue], lambda: (features, pictures), foci[tissue]))
    return slides


# ---- pictures ----------------------------------------------------------------------------------

def paint_patches(slide, shape, heat, passes):
    """Three pictures (3, h, w) of a slide: tissue, heat in red, passes in blue and orange.

    shape: rows and columns of the grid that is shown. heat (N,) in [0, 1]; passes: two (N,) in
    [0, 1]. True foci get a green outline. A picture is at most PICTURE_SIDE pixels high and wide:
    where several patches share a pixel, the hottest is shown.
    """
    colours = torch.tensor([[1, -1, -1], [-1, 0, 1], [1, 0.4, -1], [-1, 0.6, -1]])
    red, blue, orange, green = colours.view(4, 3, 1, 1)
    count = len(slide.grid)

    # patches on a grid that fits
    shrink = math.ceil(max(shape) / PICTURE_SIDE)
    height, width = (math.ceil(side / shrink) for side in shape)
    pixels = max(1, min(THUMB, PICTURE_SIDE // max(height, width)))
    order = heat.argsort()
    cells = (slide.grid // shrink)[order] @ torch.tensor([width, 1])
    top = torch.full((height * width,), -1).scatter_reduce(0, cells, torch.arange(count), "amax")
    tiles = torch.where(top < 0, -1, order[top.clamp(min=0)]).view(height, width)

    def paint(images):
        return paint_slide(tiles, images.expand(-1, 3, THUMB, THUMB), pixels)

    def each(values):
        return values.float().view(-1, 1, 1, 1)

    # the true foci as an outline
    foci = torch.zeros(count) if slide.foci is None else slide.foci
    inside = paint(0.9 - 2 * each(foci)) < 0
    edge = F.max_pool2d(inside.float(), 5, 1, 2) > inside.float()

    picture = slide.read()[1]
    picture = torch.zeros(count, 3, THUMB, THUMB) if picture is None else picture[slide.rows]
    grey = 0.6 * picture.mean(dim=1, keepdim=True) + 0.4
    shown = (picture, grey.lerp(red, each(heat)),
             grey.lerp(blue, each(passes[0])).lerp(orange, each(passes[1])))
    return [torch.where(edge, green, paint(images)) for images in shown]
