"""downstream.py: pools, sources and their labels, equal arms, tests of differences, bad input."""
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import downstream
import evaluate
import train
from dinodiff import slerp
from downstream import (Settings, arms_of, compare_arms, conditions, draw_pool, strong_augment,
                        train_classifier)
from metrics import auc_influence, delong_test, holm
from support.phantoms import chest_phantoms

FLAGS = ["--device", "cpu", "--least", "2", "--seeds", "0", "1", "--sample-steps", "1",
         "--cnn-steps", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps a stage on 60 chests of 30 patients, with a column of findings."""
    folder = tmp_path_factory.mktemp("down")
    images, _, labels = chest_phantoms(60, 32, 0)
    with open(folder / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "finding", "patientid", "sick"])
        for i, (image, row) in enumerate(zip(images, labels.tolist())):
            data.save_png(folder / "images" / f"{i:02d}.png", image.expand(3, -1, -1))
            names = [name for name, shown in zip(("heart", "fluid"), row) if shown]
            table.writerow([f"{i:02d}.png", "|".join(names) or "clear", f"p{i // 2}", "1"])
    flags = ["--data", str(folder), "--size", "32", "--batch", "4", "--steps", "2", "--grids", "1",
             "--device", "cpu", "--dtype", "float32", "--holdout", "0.4"]
    assert train.main([*flags, "--out", str(folder / "run")]) == 0
    return folder / "run"


def delong_by_hand(labels, a, b):
    """Variance of AUC(a) - AUC(b) by the sums over all pairs of DeLong et al. 1988."""
    shares = []
    for scores in (a, b):
        x, y = scores[labels == 1], scores[labels == 0]
        won = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        shares.append((won.mean(axis=1), won.mean(axis=0)))
    of_positives, of_negatives = (np.cov(*pair) for pair in zip(*shares))
    sides = np.array([1, -1])
    return sides @ (of_positives / (labels == 1).sum()
                    + of_negatives / (labels == 0).sum()) @ sides


def test_delong_equals_its_formula_and_the_bootstrap():
    """Ranks give what all pairs give, ties included; the error is near that of a bootstrap; equal
    scores differ by nothing, and the p value is the normal one."""
    rng = np.random.default_rng(0)
    labels = (np.arange(150) % 3 == 0).astype(int)
    a, b = ((labels + s * rng.standard_normal(150)).round(1) for s in (1.0, 1.5))
    difference, error, p = delong_test(auc_influence(labels, a), auc_influence(labels, b))
    assert error ** 2 == pytest.approx(delong_by_hand(labels, a, b), rel=1e-9)
    draws = []
    for rows in (rng.integers(150, size=150) for _ in range(1000)):
        x, y = (auc_influence(labels[rows], scores[rows])[0] for scores in (a, b))
        draws.append(x - y)
    # a deviation of 1000 draws is known to 2 %; the bootstrap's own bias is of order 1 / 50
    assert np.std(draws) == pytest.approx(error, rel=0.1)
    # 1.96 errors are 5 %
    a, b = (0.7 + 0.0196, np.full(4, 0.01)), (0.7, np.full(4, 0.005))
    assert delong_test(a, b)[1:] == pytest.approx((0.01, 0.05), abs=1e-4)
    assert delong_test(a, a) == (0.0, 0.0, 1.0)


def test_influence_of_a_mean_of_labels():
    """The error of a mean AUC over two labels of the same images is that of a bootstrap of whole
    images: where labels agree, twice the images of one are not twice the evidence."""
    rng = np.random.default_rng(1)
    first = rng.random(120) < 0.4
    both = np.stack([first, first ^ (rng.random(120) < 0.1)], axis=1)
    scores = both + rng.standard_normal((120, 1)) + 0.3 * rng.standard_normal((120, 2))
    parts = [auc_influence(*column) for column in zip(both.T, scores.T)]
    error = np.sqrt(np.square(np.mean([i for _, i in parts], axis=0)).sum())
    draws = [np.mean([auc_influence(*column)[0] for column in zip(both[rows].T, scores[rows].T)])
             for rows in (rng.integers(120, size=120) for _ in range(1000))]
    assert np.std(draws) == pytest.approx(error, rel=0.1)
    apart = np.sqrt(sum(np.square(i).sum() for _, i in parts)) / 2  # as if labels were apart
    assert error > 1.2 * apart


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1 is lifted to its forerunner; at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_pools_are_drawn_by_patient():
    """Whole patients but for the last, another seed others; a small pool is part of a large one."""
    rows, groups = list(range(10, 70)), [f"p{i // 5}" for i in range(70)]
    pool = draw_pool(rows, groups, 22, seed=0)
    counts = sorted([groups[i] for i in pool].count(g) for g in {groups[i] for i in pool})
    assert counts == [2, 5, 5, 5, 5] and len(set(pool)) == 22 and set(pool) <= set(rows)
    assert draw_pool(rows, groups, 7, seed=0) == pool[:7]
    assert draw_pool(rows, groups, 22, seed=1) != pool


def test_sources_and_labels():
    """Labels come from the source, from the nearer of two, or from the pool image nearest to a
    prototype; every pool image is used equally often where it can be."""
    tokens = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    same, own = conditions("reconstruct", tokens, None, 12, 0)
    assert own.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1] and torch.equal(same, tokens[own])
    mixed, own = conditions("interpolate", tokens, None, 200, 0)
    assert own.bincount().tolist() == [40] * 5
    angles = 1 - torch.nn.functional.cosine_similarity(  # lengths change as well: look at angles
        mixed.flatten(1)[:, None], tokens.flatten(1), dim=2)  # (200, 5)
    assert torch.equal(angles.argmin(dim=1), own) and angles.amin(dim=1).max() > 0.1
    half = slerp(tokens[0], tokens[1], 0.5)
    assert not any(torch.allclose(half, x) for x in tokens)
    others = tokens.repeat(4, 1, 1) + 0.01 * torch.randn(20, 2, 8)
    centers, own = conditions("prototypes", tokens, others, 10, 0)
    assert sorted(own[:5].tolist()) == [0, 1, 2, 3, 4] and own[5:].tolist() == own[:5].tolist()
    assert (centers - tokens[own]).abs().max() < 0.05


def test_arms_take_equal_steps(monkeypatch):
    """Mixed, alone and first: the steps asked of fit have one sum; classical has no other forms."""
    real, made = np.zeros((4, 3, 32, 32), np.uint8), np.full((8, 3, 32, 32), 9, np.uint8)
    asked = []
    monkeypatch.setattr(downstream, "fit", lambda *args, steps, **_: asked.append(
        (args[3].images.shape[0], steps)) or iter(()))
    arms = arms_of("1:2 reconstruct", real, np.zeros((4, 1)), made, np.ones((8, 1)), 10)
    assert list(arms) == ["1:2 reconstruct", "1:2 reconstruct alone", "1:2 reconstruct first"]
    for stages in arms.values():
        train_classifier([(x, torch.arange(len(x)), y, n) for x, y, n in stages()], 0, None, "cpu")
    assert asked == [(12, 10), (8, 10), (8, 8), (4, 2)]
    assert list(arms_of("1:2 classical", *[None] * 4, 10)) == ["1:2 classical"]


def test_strong_augmentation():
    """Each image varies in its own way, by seed, in range; the picture stays recognisable; flips
    and any angle only with turns."""
    image = chest_phantoms(1, 64, 0)[0].expand(20, 3, -1, -1)
    x, again = (strong_augment(image, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(x, again) and x.shape == image.shape and x.abs().max() <= 1
    assert not torch.allclose(x[0], x[1], atol=0.1)
    like = [evaluate.correlations(evaluate.pixel_rows(y), evaluate.pixel_rows(image[:1])).min()
            for y in (x, strong_augment(image, torch.Generator().manual_seed(0), turns=True))]
    assert like[0] > 0.25 > like[1]
    half = torch.cat([torch.full((20, 3, 64, 32), -1.0), torch.ones(20, 3, 64, 32)], dim=3)
    right = strong_augment(half, torch.Generator().manual_seed(0))[..., 48:].mean(dim=(1, 2, 3))
    assert (right > 0).all()  # never mirrored


def test_a_useful_synthetic_set_is_found_useful():
    """compare_arms on scores of known quality: gain, sign, order and Holm's family are right."""
    rng, labels = np.random.default_rng(0), np.arange(400) % 2

    def seeds(noise):
        return [[auc_influence(labels, labels + noise * rng.standard_normal(400))
                 for _ in ("a", "b")] for _ in range(2)]

    arms = {"real only": 2.0, "1:1 classical": 1.0, "1:1 img2img": 1.0, "1:1 img2img alone": 9.0}
    rows = compare_arms(["a", "b"], {(50, arm): seeds(noise) for arm, noise in arms.items()})
    good, bad = rows[50, "1:1 img2img"], rows[50, "1:1 img2img alone"]
    assert good["vs real only"] > 0.05 and good["p real only"] < 0.001
    assert abs(good["vs classical"]) < 0.05 and good["p classical"] > 0.05
    assert bad["vs classical"] < -0.1 and bad["p classical"] < 0.001
    assert good["AUC"] == pytest.approx((good["a"] + good["b"]) / 2)
    assert good["vs real only"] == pytest.approx(good["AUC"] - rows[50, "real only"]["AUC"])
    assert "vs real only" not in rows[50, "real only"]
    assert "vs classical" not in rows[50, "1:1 classical"]
    assert good["tests"]["a vs real only"]["p"] >= good["p real only"]  # of a larger family


def test_classify_pools_command(run, capsys, monkeypatch):
    """A table, JSON with all arms and charts; samples are kept and made only once; a damaged file
    of them is named."""
    flags = ["classify", "--checkpoint", str(run), *FLAGS, "--pools", "6", "--ratios", "1", "2",
             "--strategies", *downstream.STRATEGIES]
    evaluate.main(flags)
    out = capsys.readouterr().out
    assert "pool of 6, seed 1: 3 groups" in out and "Holm-adjusted" in out
    result = json.loads((run / "classify_pools.json").read_text())
    assert set(result["arms"]) == {"6"} and {"fluid", "heart"} <= set(result["labels"])
    names = list(result["arms"]["6"])
    assert names[0] == "real only" and len(names) == 1 + 2 * (1 + 4 * 3)
    for row in result["arms"]["6"].values():
        assert 0 <= row["AUC"] <= 1 and row["sd"] >= 0
    assert (run / "classify_6_prototypes.png").stat().st_size > 1000
    assert list(result["survival"]["6"]) == ["held-out images", "the pool", "classical",
                                             *downstream.STRATEGIES]
    kept = sorted((run / "classify").iterdir())
    assert len(kept) == 2 * 4
    monkeypatch.setattr(evaluate.DinoDiffusion, "sample", None)
    short = [*flags[:-4], "reconstruct"]
    evaluate.main([*short, "--augment", "strong"])
    strong = json.loads((run / "classify_pools.json").read_text())["arms"]["6"]
    assert strong["real only"]["AUC"] != result["arms"]["6"]["real only"]["AUC"]
    evaluate.main([*short, "--augment", "none"])
    again = json.loads((run / "classify_pools.json").read_text())["arms"]["6"]
    assert again["1:2 reconstruct"]["AUC"] == result["arms"]["6"]["1:2 reconstruct"]["AUC"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(data.UserError, match="reconstruct_6_0_.*cannot be read.*delete it"):
        evaluate.main(short)


@pytest.mark.parametrize("flags,says", [
    (["--pools", "99"], "--pools 99: the run has"),
    (["--pools", "6", "--label-column", "sick"], "no label of sick is in 2 images"),
    (["--pools", "6", "--label-column", "age"], "no column 'age'"),
    (["--pools", "6", "--group-column", "ward"], "no column 'ward'"),
    (["--train", "SAMPLES", "--label-column", "finding"], "has no column 'finding'"),
])
def test_bad_input_is_one_clear_error(run, tmp_path, flags, says):
    """A pool above the training set, one class, unknown columns, samples without labels."""
    data.save_png(tmp_path / "images" / "x.png", torch.zeros(3, 32, 32))
    flags = [str(tmp_path) if flag == "SAMPLES" else flag for flag in flags]
    with pytest.raises(data.UserError, match=says):
        evaluate.main(["classify", "--checkpoint", str(run), *FLAGS, *flags])


def test_models_without_sources_are_refused():
    """An unconditional model can only start from images; one that follows prompts has no pool."""
    config = type("", (), {"condition": "none"})
    model = type("", (), {"config": config, "prompts": ()})
    for prompts, says in (((), "--strategies img2img"), (("a",), "another --checkpoint")):
        model.prompts = prompts
        with pytest.raises(data.UserError, match=says):
            downstream.downstream(model, *[None] * 7, replace(Settings(), pools=(4,)), None)
