"""Radiomic features of grey images, and the Frechet distance between two sets of them (FRD).

    features = radiomic_features(images)    # (B, 3, H, W) in [-1, 1] -> (B, 95), float64
    frd(real, other)                        # log Frechet distance of z-scored features

No network and no download. Sources: FRD, Konz et al. 2024 (arXiv 2412.01496); names and formulas,
the manual of the Image Biomarker Standardisation Initiative (IBSI, Zwanenburg et al. 2016).

Deliberate choice: the authors' package measures more kinds of texture, with other grey levels and
wavelets. So compare a figure with its floor, not with theirs.
"""
import math

import torch
import torch.nn.functional as F

from dinodiff import to_bands
from evaluate import as_features, frechet_distance


LEVELS = 32                          # that textures tell apart
GREY = (0, 1 / LEVELS)               # lowest value and width of the levels of greys in [0, 1]
DETAIL = (-16.5 / 256, 1 / 256)      # of differences: finer, with one level centred on zero


def to_levels(x, low, width):
    """Values -> levels 0 to 31, int64; values beyond the first and last level join them."""
    nudge = 1e-4  # so that rounding errors move no value that lies on a border
    return ((x - low) / width + nudge).floor().clamp(0, LEVELS - 1).long()


def count_codes(code, *shape):
    """How often each number below the product of `shape` occurs, float64 of that shape."""
    return torch.bincount(code, minlength=math.prod(shape)).view(shape).double()


def read_lines(levels):
    """Levels (B, H, W) -> a sequence (B, S) for each of four directions; -1 ends a line."""
    def diagonals(x):
        # Shift row i by i places, so that a diagonal becomes a column.
        B, H, W = x.shape
        return F.pad(x, (0, H), value=-1).flatten(1)[:, :-H].view(B, H, W + H - 1).mT

    lines = [levels, levels.mT, diagonals(levels), diagonals(levels.flip(2))]
    return [F.pad(x, (0, 1), value=-1).flatten(1) for x in lines]


def first_order(x, levels):
    """Statistics of values (B, N); p is the share of each level. IBSI 3.3, 3.4."""
    B, N = x.shape
    mean = x.mean(dim=1)
    centred = x - mean[:, None]
    variance = centred.square().mean(dim=1)
    std = variance.sqrt().clamp(min=1e-6)  # of a flat image
    ranked = x.sort(dim=1).values
    code = torch.arange(B)[:, None] * LEVELS + levels
    p = count_codes(code.flatten(), B, LEVELS) / N
    return {"mean": mean,
            "variance": variance,
            "skewness": (centred ** 3).mean(dim=1) / std ** 3,
            "kurtosis": (centred ** 4).mean(dim=1) / std ** 4,
            "10th percentile": ranked[:, N // 10],
            "90th percentile": ranked[:, N * 9 // 10],
            "entropy": torch.special.entr(p).sum(dim=1) / math.log(2)}


def co_occurrence(sequence):
    """Of p (B, L, L): the shares of neighbours with levels i and j, in either order.

    Energy and homogeneity are IBSI's angular second moment and inverse difference moment.
    Correlation of a flat image: 1. Haralick et al. 1973; IBSI 3.6.
    """
    B = len(sequence)
    first, second = sequence[:, :-1], sequence[:, 1:]
    code = (torch.arange(B)[:, None] * LEVELS + first) * LEVELS + second
    p = count_codes(code[(first >= 0) & (second >= 0)], B, LEVELS, LEVELS)
    p = (p + p.mT) / (2 * p.sum(dim=(1, 2), keepdim=True))

    i = torch.arange(LEVELS).double()[:, None]
    j = i.T
    mean = (i * p).sum(dim=(1, 2), keepdim=True)
    variance = ((i - mean) ** 2 * p).sum(dim=(1, 2))
    covariance = ((i - mean) * (j - mean) * p).sum(dim=(1, 2))
    return {"joint variance": variance,
            "contrast": ((i - j) ** 2 * p).sum(dim=(1, 2)),
            "correlation": torch.where(variance > 1e-9, covariance / variance, 1),
            "energy": p.square().sum(dim=(1, 2)),
            "homogeneity": (p / (1 + (i - j) ** 2)).sum(dim=(1, 2)),
            "joint entropy": torch.special.entr(p).sum(dim=(1, 2)) / math.log(2)}


def run_lengths(sequence, side):
    """Of p (B, L, side): the shares of runs of equal level, by level i and length j.

    Short runs: sum p / j^2; long runs: sum p j^2. Non-uniformity of levels (lengths), normalised:
    sum of the squared share of each. Run percentage: runs / pixels. Galloway 1975; IBSI 3.7.
    """
    B = len(sequence)
    code = torch.arange(B)[:, None] * LEVELS + sequence
    code = code.masked_fill(sequence < 0, -1).flatten()  # -1 parts lines, and so images
    code, length = code.unique_consecutive(return_counts=True)
    runs = count_codes((code * side + length - 1)[code >= 0], B, LEVELS, side)
    number = runs.sum(dim=(1, 2))
    p = runs / number[:, None, None]
    of_length = p.sum(dim=1)
    j = torch.arange(1, side + 1).double()
    return {"short run emphasis": of_length @ j ** -2,
            "long run emphasis": of_length @ j ** 2,
            "grey level non-uniformity": p.sum(dim=2).square().sum(dim=1),
            "run length non-uniformity": of_length.square().sum(dim=1),
            "run percentage": number / (sequence >= 0).sum(dim=1),
            "run entropy": torch.special.entr(p).sum(dim=(1, 2)) / math.log(2)}


def radiomics(images):
    """{name: (B,)} of images (B, 3, H, W) in [-1, 1]; textures are means over four directions.

    Bands: LL is the mean of each 2 x 2 square; differences across are HL, down LH, both HH.
    """
    grey = (images.mean(dim=1, keepdim=True).cpu().double() + 1) / 2
    even = grey[..., :grey.shape[2] // 2 * 2, :grey.shape[3] // 2 * 2]
    bands = [grey[:, 0], *(to_bands(even) / 2).unbind(dim=1)]
    features = {}
    for band, x in zip(("image", "LL", "HL", "LH", "HH"), bands):
        levels = to_levels(x, *(GREY if band in ("image", "LL") else DETAIL))
        values = first_order(x.flatten(1), levels.flatten(1))
        textures = [{**co_occurrence(sequence), **run_lengths(sequence, max(x.shape[1:]))}
                    for sequence in read_lines(levels)]
        for name in textures[0]:
            values[name] = torch.stack([texture[name] for texture in textures]).mean(dim=0)
        features.update({f"{band}, {name}": value for name, value in values.items()})
    return features


def radiomic_features(images):
    """The values of `radiomics`, (B, 95)."""
    return torch.stack(list(radiomics(images).values()), dim=1)


def z_score(real, features):
    """(N, D) with the mean and deviation of the real (M, D); constants are only centred."""
    real, features = as_features(real, features, least=1)
    std = real.std(dim=0)
    return (features - real.mean(dim=0)) / torch.where(std > 1e-8, std, 1)


def frd(real, other):
    """log d, d^2 the Frechet distance of z-scored features; -14 of equal sets. Konz, equation 3."""
    squared = frechet_distance(z_score(real, real), z_score(real, other))
    return 0.5 * math.log(max(squared, 1e-12))
