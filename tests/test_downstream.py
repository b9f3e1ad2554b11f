"""experiments/downstream.py: pools, folds, equal arms, intervals over pools."""
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from experiments import small_cnn
from experiments.__main__ import main as experiments
from experiments.downstream import (arms_of, difference, draw_pool, split_pools, summarise,
                                    surest_third)
from experiments.small_cnn import SmallCNN
from support.command import UserError

FLAGS = ["--device", "cpu", "--least", "2", "--sample-steps", "1", "--cnn-steps", "4",
         "--cnn-size", "16"]
GROUPS = [f"p{i // 5}" for i in range(70)]


def test_pools_are_drawn_by_patient():
    """Whole patients but for the last; another seed draws others; small pools are parts."""
    rows = list(range(10, 70))
    pool = draw_pool(rows, GROUPS, 22, seed=0)
    counts = sorted([GROUPS[i] for i in pool].count(g) for g in {GROUPS[i] for i in pool})
    assert counts == [2, 5, 5, 5, 5] and len(set(pool)) == 22 and set(pool) <= set(rows)
    assert draw_pool(rows, GROUPS, 7, seed=0) == pool[:7]
    assert draw_pool(rows, GROUPS, 22, seed=1) != pool


def test_folds_keep_patients_apart():
    """Every row is tested once, never beside its patient; without folds the split stays."""
    rows = list(range(70))
    assert split_pools(GROUPS, 50, 0) == [(rows[:50], rows[50:])]
    folds = split_pools(GROUPS, 50, 5)
    assert sorted(i for _, tested in folds for i in tested) == rows
    for drawn, tested in folds:
        assert sorted(drawn + tested) == rows and tested
        assert not {GROUPS[i] for i in drawn} & {GROUPS[i] for i in tested}


def test_the_surest_third():
    """The third farthest from zero, labelled by its sign."""
    rows, labels = surest_third(np.array([[0.1], [-0.9], [0.5], [-0.2], [0.3], [-0.4]]))
    assert rows.tolist() == [1, 2] and labels.tolist() == [[0.0], [1.0]]


def test_arms_take_equal_steps_and_inherit_labels():
    """Steps add up; labels follow the sources; each arm has the images that it should have."""
    def pair(*values):
        x = np.array(values, np.uint8)
        return x.reshape(-1, 1, 1, 1) * np.ones((1, 3, 8, 8), np.uint8), (x[:, None] % 2) * 1.0

    pool, made, named, made_of_named = pair(0, 1, 2), pair(*range(10, 16)), pair(20, 21), pair(30)
    arms = arms_of(pool, made, named, made_of_named, 10)
    wanted = {"real": [[0, 1, 2]], "augmented": [[0, 1, 2]], "blurred": [[0, 1, 2]],
              "duplicates": [[0, 1, 2, 0, 1, 2, 0, 1, 2]],
              "synthetic": [[0, 1, 2, *range(10, 16)]],
              "synthetic first": [[*range(10, 16)], [0, 1, 2]],
              "pseudo-labels": [[0, 1, 2, 20, 21]],
              "pseudo-labels, synthetic": [[0, 1, 2, 20, 21, 30]]}
    assert list(arms) == list(wanted)
    for arm, stages in arms.items():
        assert sum(steps for *_, steps in stages) == 10
        for (images, labels, _), values in zip(stages, wanted[arm], strict=True):
            assert images[:, 0, 0, 0].tolist() == values
            assert np.array_equal(labels[:, 0], np.array(values) % 2)


def test_interval_is_that_of_the_paired_t_test():
    a, b = [0.8, 0.9, 0.7, 0.85], [0.75, 0.8, 0.72, 0.8]
    gain, half = difference(a, b)
    interval = ttest_rel(a, b).confidence_interval(0.95)
    assert gain - half == pytest.approx(interval.low)
    assert gain + half == pytest.approx(interval.high)
    rows = summarise({"real": b, "duplicates": a, "synthetic": [0.9] * 4})
    assert rows["synthetic"]["vs duplicates"] == pytest.approx(0.9 - np.mean(a))
    assert rows["duplicates"]["vs real"] == pytest.approx(gain)
    assert "vs real" not in rows["real"] and "vs duplicates" not in rows["duplicates"]


def test_command(labelled_run, monkeypatch):
    """A row for each arm, and the figure of every pool."""
    monkeypatch.setattr(small_cnn, "SmallCNN", lambda labels: SmallCNN(labels, width=8))
    experiments(["downstream", "--checkpoint", str(labelled_run), *FLAGS, "--n", "6", "--pools",
                 "2", "--ratio", "2", "--folds", "2"])
    result = json.loads((labelled_run / "downstream.json").read_text())
    assert list(result["arms"])[:3] == ["ridge on tokens", "ridge, all labels", "real"]
    assert len(result["arms"]) == 10
    assert all(len(values) == 2 for values in result["pool by pool"].values())


def test_command_with_the_vit(labelled_run):
    """The run's ViT is fine-tuned instead, and fewer images are reconstructed than there are."""
    experiments(["downstream", "--checkpoint", str(labelled_run), *FLAGS, "--n", "6", "--pools",
                 "2", "--ratio", "0.5", "--classifier", "vit"])
    result = json.loads((labelled_run / "downstream.json").read_text())
    assert result["ratio"] == 0.5 and result["classifier"] == "vit"


def test_a_pool_above_the_training_set_is_refused(labelled_run):
    with pytest.raises(UserError, match="--n 99: there are .* labelled images"):
        experiments(["downstream", "--checkpoint", str(labelled_run), *FLAGS, "--n", "99"])
