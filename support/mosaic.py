"""Slides that are made of real labelled patches, whose foci are known exactly.

    bank = open_patches(folder, embed, "label", "cancer")      # a folder of patches, labels.csv
    slides = mosaic_slides(bank, seed=0, count=400)

A slide is a blob of tissue in which fields of healthy patches lie side by side, each of one
patient. A tumour slide has one round focus, by default 0.3 to 3 % of its tissue, of the cancer
patches of one patient. A fifth of the slides is for testing; no patient has patches in slides of
both parts. This design is ours. Unlike generated slides, nothing but the focus itself tells where
to look.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from support.command import UserError
from support.datasets import open_dataset
from support.seeds import step_seed
from support.slides import Slide
from support.splits import image_groups
from support.tiles import THUMB

SIDE = 48         # cells of a slide's side; half of them or more are tissue
PATCH = 64        # pixels of a patch's side, as it is embedded
TESTED = 0.3      # share of the patients whose patches make the test slides
FIELDS = 5        # patients of a slide's healthy tissue, at most
FOCI = [0.003, 0.03]  # share of the tissue that a focus takes, from and to; as JSON reads it back


@dataclass
class Patches:
    """A bank: features (N, D), pictures (N, 3, THUMB, THUMB), cancer (N,) bool, patients (N,)."""
    features: torch.Tensor
    pictures: torch.Tensor
    cancer: np.ndarray
    patients: np.ndarray

    def read(self):
        return self.features, self.pictures


def open_patches(folder, embed, label_column, positive=None):
    """The Patches of a labelled folder. positive: the label of a focus, None: the later of the two.

    embed: images (n, 3, 64, 64) in [-1, 1] -> features (n, D).
    """
    images = open_dataset(folder, PATCH)
    print(images.note, *(f"  note: {problem}" for problem in images.problems), sep="\n")
    if label_column not in images.columns:
        raise UserError(f"{folder} has no column {label_column!r}", "a table with the label of "
                        "each patch is needed", "pass --label-column")
    labels = np.array(images.columns[label_column])
    values = sorted(set(labels.tolist()))
    if len(values) != 2 or (positive or values[1]) not in values:
        raise UserError(f"column {label_column!r} holds {values[:5]}, --positive {positive}",
                        "two labels, of which it is one, are needed",
                        "pass --label-column or --positive")

    batches = [images.batch(rows.tolist()) for rows in torch.arange(len(images)).split(64)]
    pictures = torch.cat([F.adaptive_avg_pool2d(x, THUMB).expand(-1, 3, -1, -1) for x in batches])
    return Patches(torch.cat([embed(x) for x in batches]), pictures,
                   labels == (positive or values[1]), np.array(image_groups(images)))


def rows_by_patient(bank, patients, cancer):
    """[rows of one patient's patches with that label] for the patients who have some."""
    rows = [np.flatnonzero((bank.patients == who) & (bank.cancer == cancer)) for who in patients]
    return [mine for mine in rows if len(mine)]


def draw_mosaic(healthy, cancer, label, rng, foci=FOCI):
    """Rows of the bank (SIDE, SIDE), -1 beside the tissue, and the focus (SIDE, SIDE) bool.

    healthy, cancer: rows_by_patient of a part. foci: least and largest share of the tissue; its
    logarithm is uniform.
    """
    # Smooth random fields: the first draws the outline, the largest of the others the patient.
    coarse = torch.from_numpy(rng.standard_normal((1, 1 + FIELDS, 5, 5)))
    outline, *fields = F.interpolate(coarse, SIDE, mode="bicubic", align_corners=True)[0].numpy()
    axis = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1
    tissue = np.hypot(axis, axis[:, None]) < 0.85 + 0.12 * outline.clip(-2, 2)
    field = np.argmax(fields, axis=0)
    tiles = np.full((SIDE, SIDE), -1)
    for number, who in enumerate(rng.choice(len(healthy), FIELDS)):
        cells = tissue & (field == number)
        tiles[cells] = rng.choice(healthy[who], cells.sum())

    # The focus: the cells nearest to one of the tissue's.
    focus = np.zeros_like(tissue)
    if label:
        places = np.argwhere(tissue)
        least, largest = foci
        size = max(1, round(len(places) * least * (largest / least) ** rng.random()))
        away = np.linalg.norm(places - places[rng.integers(len(places))], axis=1)
        focus[tuple(places[np.argsort(away, kind="stable")[:size]].T)] = True
        tiles[focus] = rng.choice(cancer[rng.integers(len(cancer))], size)
    return tiles, focus


def mosaic_slides(bank, seed, count, foci=FOCI):
    """So many Slides, every second with a focus; the seed also draws who is tested."""
    rng = np.random.default_rng(step_seed(seed, "mosaic"))
    patients = rng.permutation(np.unique(bank.patients))
    tested = round(TESTED * len(patients))
    parts = {"test": (patients[:tested], count // 5),
             "train": (patients[tested:], count - count // 5)}

    slides = []
    for part, (who, number) in parts.items():
        healthy, cancer = (rows_by_patient(bank, who, cancer) for cancer in (False, True))
        if not healthy or not cancer:
            raise UserError(f"the {part} part has {len(healthy)} patients with healthy and "
                            f"{len(cancer)} with cancer patches", "one of each is needed",
                            "bring patches of more patients")
        for i in range(number):
            tiles, focus = draw_mosaic(healthy, cancer, i % 2, rng, foci)
            there = tiles >= 0
            name = f"{part}_{i:04d}"
            slides.append(Slide(name, i % 2, name, part == "test",
                                torch.from_numpy(np.argwhere(there)),
                                torch.from_numpy(tiles[there]), bank.read,
                                torch.from_numpy(focus[there])))
    return slides
