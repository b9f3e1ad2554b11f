"""experiments/downstream.py: pools, sources and their labels, equal arms, tests of differences."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinodiff import DinoDiffusion, slerp
from experiments import small_cnn
from experiments.__main__ import main as experiments
from experiments.downstream import (STRATEGIES, Settings, arms_of, compare_arms, conditions,
                                    downstream, draw_pool, train_arm)
from experiments.small_cnn import SmallCNN
from experiments.statistics import auc_influence
from support.command import UserError

FLAGS = ["--device", "cpu", "--least", "2", "--seeds", "0", "1", "--sample-steps", "1",
         "--cnn-steps", "4"]


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
    pool = (np.zeros((4, 3, 32, 32), np.uint8), np.zeros((4, 1)))
    synthetic = (np.full((8, 3, 32, 32), 9, np.uint8), np.ones((8, 1)))
    asked = []

    def count_steps(stage, model, loss_fn, dataset, *, steps, **settings):
        asked.append((len(dataset), steps))

    monkeypatch.setattr(small_cnn, "fit", count_steps)
    arms = arms_of("1:2 reconstruct", pool, synthetic, 10)
    assert list(arms) == ["1:2 reconstruct", "1:2 reconstruct alone", "1:2 reconstruct first"]
    for stages in arms.values():
        train_arm(stages, 0, None, "cpu")
    assert asked == [(12, 10), (8, 10), (8, 8), (4, 2)]
    assert list(arms_of("1:2 classical", pool, synthetic, 10)) == ["1:2 classical"]


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


def test_command(labelled_run, capsys, monkeypatch):
    """A table, JSON with all arms and charts; samples are kept and made only once; a damaged file
    of them is named."""
    monkeypatch.setattr(small_cnn, "SmallCNN", lambda labels: SmallCNN(labels, width=8))
    run = labelled_run
    flags = ["downstream", "--checkpoint", str(run), *FLAGS, "--pools", "6", "--ratios", "1", "2",
             "--strategies", *STRATEGIES]
    experiments(flags)
    out = capsys.readouterr().out
    assert "pool of 6, seed 1: 3 groups" in out and "Holm-adjusted" in out
    result = json.loads((run / "downstream.json").read_text())
    assert set(result["arms"]) == {"6"} and {"fluid", "heart"} <= set(result["labels"])
    names = list(result["arms"]["6"])
    assert names[0] == "real only" and len(names) == 1 + 2 * (1 + 4 * 3) + 1
    ridge = result["arms"]["6"]["ridge on tokens"]
    assert "vs real only" in ridge and "vs classical" not in ridge
    for row in result["arms"]["6"].values():
        assert 0 <= row["AUC"] <= 1 and row["sd"] >= 0
    assert (run / "downstream_6_prototypes.png").stat().st_size > 1000
    assert list(result["survival"]["6"]) == ["held-out images", "the pool", "classical",
                                             *STRATEGIES]
    kept = sorted((run / "downstream").iterdir())
    assert len(kept) == 2 * 4

    monkeypatch.setattr(DinoDiffusion, "sample", None)
    short = [*flags[:-4], "reconstruct"]
    experiments([*short, "--augment", "strong"])
    strong = json.loads((run / "downstream.json").read_text())["arms"]["6"]
    assert strong["real only"]["AUC"] != result["arms"]["6"]["real only"]["AUC"]
    experiments([*short, "--augment", "none"])
    again = json.loads((run / "downstream.json").read_text())["arms"]["6"]
    assert again["1:2 reconstruct"]["AUC"] == result["arms"]["6"]["1:2 reconstruct"]["AUC"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="reconstruct_6_0_.*cannot be read.*delete it"):
        experiments(short)


@pytest.mark.parametrize("flags,says", [
    (["--pools", "99"], "--pools 99: the run has"),
    (["--pools", "6", "--label-column", "sick"], "no label of sick is in 2 images"),
    (["--pools", "6", "--label-column", "age"], "no column 'age'"),
    (["--pools", "6", "--group-column", "ward"], "no column 'ward'"),
])
def test_bad_input_is_one_clear_error(labelled_run, flags, says):
    """A pool above the training set, one class, unknown columns."""
    with pytest.raises(UserError, match=says):
        experiments(["downstream", "--checkpoint", str(labelled_run), *FLAGS, *flags])


def test_models_without_sources_are_refused():
    """An unconditional model can only start from images; one that follows prompts has no pool."""
    config = type("", (), {"condition": "none"})
    model = type("", (), {"config": config, "prompts": ()})
    for prompts, says in (((), "--strategies img2img"), (("a",), "another --checkpoint")):
        model.prompts = prompts
        with pytest.raises(UserError, match=says):
            downstream(model, None, replace(Settings(), pools=(4,)), None)
