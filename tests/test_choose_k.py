"""experiments/choose_k.py: S_Dbw against its definition, the choice, the command."""
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main
from experiments.choose_k import sdbw
from prompts import kmeans, standardise
from support.command import UserError
from test_prompts import blobs, reference_data


def slow_sdbw(x, centers, assignment):
    """S_Dbw pair by pair and point by point, as its definition reads."""
    x = x.double().numpy()
    centers = centers.double().numpy()
    k = len(centers)
    members = [x[assignment.numpy() == i] for i in range(k)]
    variances = [((m - v) ** 2).mean(0) for m, v in zip(members, centers)]
    scat = np.mean([np.linalg.norm(s) for s in variances]) / np.linalg.norm(x.var(0))
    r = math.sqrt(np.mean(np.sum(variances, 1)))
    total = 0.0
    for i in range(k):
        for j in range(k):
            if i != j:
                both = np.concatenate([members[i], members[j]])
                at, left, right = (sum(np.linalg.norm(p - u) <= r for p in both) for u in
                                   ((centers[i] + centers[j]) / 2, centers[i], centers[j]))
                total += at / max(left, right, 1)
    return scat + total / (k * (k - 1))


def test_sdbw_matches_its_definition():
    """Equal to the slow form to rounding, where the space between clusters is not empty."""
    x = torch.from_numpy(reference_data("noise")[:300, :2]) + 50
    fit = kmeans(x, 5)
    expected = slow_sdbw(x, *fit)
    assert sdbw(x, *fit) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5  # else the density term was not exercised


@pytest.mark.parametrize("dim", [2, 100])
def test_the_least_is_at_the_number_of_blobs(dim):
    """Nine well separated blobs, in many dimensions too."""
    generator = torch.Generator().manual_seed(1)
    if dim == 2:
        x, _ = blobs(9, dim=2)
    else:
        x = 3 * torch.randn(9, dim, generator=generator).repeat(40, 1)
        x += torch.randn(360, dim, generator=generator)
    x = standardise(x)
    scores = {k: sdbw(x, *kmeans(x, k)) for k in range(5, 14)}
    assert min(scores, key=scores.get) == 9


def test_choose_k_on_a_run(tmp_path, capsys):
    """The table names the true K of the cached tokens, and the chart is a PNG."""
    x, _ = blobs(6, dim=2)
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "tokens.npy", x.reshape(240, 2, 1).numpy())
    main(["choose_k", str(tmp_path), "--range", "4:8", "--step", "2"])
    printed = capsys.readouterr().out
    assert "240 images" in printed and "at K = 6" in printed
    rows = [line.split()[1] for line in printed.splitlines() if line.startswith("K ")]
    assert rows == ["8", "6", "4"]
    with Image.open(tmp_path / "choose_k.png") as chart:
        assert chart.format == "PNG" and len(chart.convert("RGB").getcolors(10 ** 6)) > 3


@pytest.mark.parametrize("arguments, words", [
    (["--range", "4:8"], "tokens.npy is missing.*train.py"),
    (["--range", "8:4"], "2 <= FIRST <= LAST"),
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
