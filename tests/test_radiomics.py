"""Radiomic features against closed forms and slow loops; FRD; the ladder of known damage."""
import math

import pytest
import torch

from evaluate import frechet_distance
from experiments.radiomics import (co_occurrence, count_codes, frd, radiomic_features, radiomics,
                                   read_lines, run_lengths, z_score)
from support.phantoms import chest_phantoms


@pytest.fixture(scope="module")
def chests():
    return chest_phantoms(96, size=32, seed=0)[0].expand(-1, 3, -1, -1)


def value(features, name):
    return features[name].item()


def test_flat_image():
    """One level, and one run a line: 32 across, 32 down, 63 along each diagonal."""
    features = radiomics(torch.zeros(1, 3, 32, 32))
    expected = {"mean": 0.5, "variance": 0, "skewness": 0, "kurtosis": 0,
                "entropy": 0, "contrast": 0, "correlation": 1, "energy": 1, "homogeneity": 1,
                "joint entropy": 0, "grey level non-uniformity": 1,
                "run percentage": (2 * 32 + 2 * 63) / (4 * 32 ** 2)}
    for name in expected:
        assert value(features, f"image, {name}") == pytest.approx(expected[name], abs=1e-9), name
    for band in ("HL", "LH", "HH"):
        assert value(features, f"{band}, mean") == pytest.approx(0, abs=1e-9)


def test_stripes():
    """Columns of levels 0 0 1 1 2 2 3 3: four runs of two in a row, eight runs of eight down."""
    stripes = (torch.arange(8) // 2).expand(1, 8, 8)
    across, down, _, _ = read_lines(stripes)
    runs = run_lengths(across, 8)
    expected = {"short run emphasis": 1 / 4, "long run emphasis": 4, "run percentage": 1 / 2,
                "grey level non-uniformity": 1 / 4, "run length non-uniformity": 1,
                "run entropy": 2}
    assert {name: value(runs, name) for name in runs} == pytest.approx(expected)
    assert value(run_lengths(down, 8), "long run emphasis") == 64
    assert value(co_occurrence(across), "contrast") == pytest.approx(3 / 7)  # 3 of 7 neighbours
    assert value(co_occurrence(down), "contrast") == 0


def test_counts_against_a_slow_loop():
    """Neighbours and runs in four directions of two images that are not square."""
    levels = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    steps = [(0, 1), (1, 0), (1, -1), (1, 1)]
    for (down, across), sequence in zip(steps, read_lines(levels)):
        for image, one in zip(levels.tolist(), sequence):
            inside = {(y, x) for y in range(5) for x in range(7)}
            differences = [(image[y][x] - image[y + down][x + across]) ** 2 for y, x in inside
                           if (y + down, x + across) in inside]
            lengths = []
            for y, x in inside:
                before = y - down, x - across
                if before in inside and image[before[0]][before[1]] == image[y][x]:
                    continue  # not the first of its run
                length = 1
                while ((y + length * down, x + length * across) in inside
                       and image[y + length * down][x + length * across] == image[y][x]):
                    length += 1
                lengths.append(length)
            contrast = co_occurrence(one[None])["contrast"].item()
            assert contrast == pytest.approx(sum(differences) / len(differences))
            runs = run_lengths(one[None], 7)
            assert value(runs, "run percentage") == pytest.approx(len(lengths) / 35)
            assert value(runs, "long run emphasis") == pytest.approx(
                sum(n ** 2 for n in lengths) / len(lengths))
    assert count_codes(torch.tensor([0, 3, 3]), 2, 2).tolist() == [[1, 0], [0, 2]]


def test_bands_and_batches(chests):
    """Columns that alternate fill one band; an image's features do not depend on its batch."""
    columns = (torch.arange(32) % 2 * 2 - 1.0).expand(1, 3, 32, 32)
    features = radiomics(columns)
    assert value(features, "HL, mean") == pytest.approx(-0.5)
    assert value(features, "LL, mean") == pytest.approx(0.5)
    for name in ("LL, variance", "LH, mean", "HH, mean"):
        assert value(features, name) == pytest.approx(0, abs=1e-9)

    together = radiomic_features(chests[:3])
    alone = torch.cat([radiomic_features(image[None]) for image in chests[:3]])
    assert together.shape == (3, 95) and together.isfinite().all()
    assert torch.allclose(together, alone, rtol=1e-9)


def test_frd_has_closed_forms():
    """A shift by 3 deviations of one feature: log 3. Units do not matter; a set equals itself."""
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = x.clone()
    shifted[:, 1] += 3 * x[:, 1].std()
    assert frd(x, shifted) == pytest.approx(math.log(3))
    units = torch.tensor([1, 1e-3, 1e3, 7])
    assert frd(5 + x * units, 5 + shifted * units) == pytest.approx(math.log(3))
    assert frechet_distance(z_score(x, x), z_score(x, x)) == pytest.approx(0, abs=1e-9)
    assert frd(x, x) < -8
    assert torch.equal(z_score(x, x[:1]), z_score(x, x)[:1])  # a last batch may hold one image

    constant = torch.cat([x, torch.ones(200, 1)], dim=1)  # a deviation of zero divides nothing
    assert frd(constant, constant + torch.tensor([0, 0, 0, 0, 2])) == pytest.approx(math.log(2))
