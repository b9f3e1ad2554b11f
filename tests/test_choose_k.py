"""experiments/choose_k.py: S_Dbw against its definition, the choice, the command."""
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main
from experiments.choose_k import choose_k, sdbw
from prompts import kmeans, standardise
from support.command import UserError
from test_prompts import blobs, reference_data


def slow_sdbw(x, centers, assignment, radius):
    """S_Dbw pair by pair and point by point, as its definition reads."""
    x, centers, k = x.double().numpy(), centers.double().numpy(), len(centers)
    members = [x[assignment.numpy() == i] for i in range(k)]
    spread = [((m - v) ** 2).mean(0) for m, v in zip(members, centers)]
    norms = [np.linalg.norm(s) for s in spread]
    scat = np.mean(norms) / np.linalg.norm(x.var(0))
    r = math.sqrt(sum(norms)) / k if radius == "paper" else math.sqrt(np.mean(np.sum(spread, 1)))
    total = 0.0
    for i in range(k):
        for j in range(k):
            if i != j:
                both = np.concatenate([members[i], members[j]])
                at, left, right = (sum(np.linalg.norm(p - u) <= r for p in both) for u in
                                   ((centers[i] + centers[j]) / 2, centers[i], centers[j]))
                total += at / max(left, right, 1)
    return scat + total / (k * (k - 1))


@pytest.mark.parametrize("radius", ["paper", "rms"])
def test_sdbw_matches_its_definition(radius):
    """Equal to the slow form to float64 rounding, where the space between clusters is not empty."""
    x = torch.from_numpy(reference_data("noise")[:300, :2]) + 50
    fit = kmeans(x, 5, n_init=1)
    expected = slow_sdbw(x, *fit, radius)
    # float32 mean taken off at 50
    assert sdbw(x, *fit, radius) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5  # else the density term was not exercised


@pytest.mark.parametrize("dim, radius", [(2, "paper"), (2, "rms"), (100, "rms")])
def test_choose_k_finds_the_number_of_blobs(dim, radius):
    """Nine well separated blobs: the least S_Dbw is at 9, in many dimensions too with "rms"."""
    generator = torch.Generator().manual_seed(1)
    if dim == 2:
        x, _ = blobs(9, dim=2)
    else:
        x = 3 * torch.randn(9, dim, generator=generator).repeat(40, 1)
        x += torch.randn(360, dim, generator=generator)
    table, best = choose_k(x, range(5, 14), seed=0, n_init=5, radius=radius)
    assert best == 9 and [k for k, _ in table] == list(range(5, 14))
    assert dict(table)[9] == min(score for _, score in table)


def test_choose_k_uses_the_standardised_features_of_the_final_fit():
    """Its score is S_Dbw of kmeans(standardise(x)), whatever the units of the columns."""
    x, _ = blobs(4)
    z = standardise(x)
    (row,), best = choose_k(x, [4], seed=2, n_init=3)
    assert best == 4 and row == (4, sdbw(z, *kmeans(z, 4, seed=2, n_init=3), "rms"))
    scaled = choose_k(x * torch.tensor([1.0, 1e3, 1.0, 1e-3]), [4], seed=2, n_init=3)[0][0][1]
    assert scaled == pytest.approx(row[1], rel=1e-4)  # float32 rounding of the columns


def test_choose_k_and_sdbw_refuse():
    """One cluster, an unknown radius, an empty range, a k above the number of points."""
    x, _ = blobs(2)
    with pytest.raises(ValueError, match="1 clusters.*at least 2.*pass"):
        sdbw(x, *kmeans(x, 1))
    with pytest.raises(ValueError, match='radius "wide"'):
        sdbw(x, *kmeans(x, 2), radius="wide")
    with pytest.raises(ValueError, match="no k to choose from"):
        choose_k(x, [])
    with pytest.raises(ValueError, match="80 distinct points for k = 81"):
        choose_k(x, [2, 81])


def test_choose_k_on_a_run(tmp_path, capsys):
    """The table names the true K of the cached tokens, and the chart is a PNG."""
    x, _ = blobs(6, dim=2)
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "tokens.npy", x.reshape(240, 2, 1).numpy())
    main(["choose_k", str(tmp_path), "--range", "4:8", "--step", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "240 images" in printed and "at K = 6" in printed
    rows = [line.split()[1] for line in printed.splitlines() if line.startswith("K ")]
    assert rows == ["4", "6", "8"]
    with Image.open(tmp_path / "choose_k.png") as chart:
        assert chart.format == "PNG" and len(chart.convert("RGB").getcolors(10 ** 6)) > 3


@pytest.mark.parametrize("arguments, words", [
    (["--range", "4:8"], "tokens.npy is missing.*train.py"),
    (["--range", "4-8"], "got --range 4-8"),
    (["--range", "5"], "try --range 5:60"),
    (["--range", "8:4"], "2 <= FIRST <= LAST"),
    (["--range", "4:500"], "240 distinct points for k = 500"),
])
def test_command_line_errors(tmp_path, arguments, words):
    """One line that says what to do, nothing written."""
    (tmp_path / "cache").mkdir()
    if "missing" not in words:
        np.save(tmp_path / "cache" / "tokens.npy", blobs(6)[0].numpy()[:, None])
    with pytest.raises(UserError) as stopped:
        main(["choose_k", str(tmp_path), *arguments])
    assert re.search(words, str(stopped.value)) and "\n" not in str(stopped.value)
    assert not (tmp_path / "choose_k.png").exists()


@pytest.mark.parametrize("flags", [["--step", "0"], ["--seed", "x"]])
def test_numbers_that_are_none(tmp_path, flags):
    with pytest.raises(SystemExit) as stopped:
        main(["choose_k", str(tmp_path), *flags])
    assert stopped.value.code == 2
