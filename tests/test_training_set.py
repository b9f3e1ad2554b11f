"""Which images a run trains on, its labels and examples."""
import argparse
import csv

import pytest
import torch
from PIL import Image

from support import training_set
from support.command import UserError
from support.datasets import open_dataset
from support.pictures import save_png
from support.training_set import (TrainingSet, draw_clusters, labels_for_prompts, open_training_set,
                                  plan_prompts, write_examples, write_prompts)

TEMPLATES = {"labels": "a <label>", "clusters": "type <index>",
             "labels and clusters": "a <label> of type <index>"}


def flags(folder, **more):
    return argparse.Namespace(**{
        "data": str(folder / "in"), "out": str(folder / "run"), "size": 16, "seed": 0, "count": 12,
        "uncertain": "ignore", "resume": False, "holdout": "0.25", "group_column": None,
        "drop_outliers": None, "condition": "prompts", "label_column": None, "clusters": None,
        "template": None, **more})


@pytest.fixture
def folder(tmp_path):
    """Twelve chests of 16 pixels with labels a and b."""
    images = open_dataset("phantoms", 16, count=12)
    for i in range(12):
        save_png(tmp_path / f"in/{i:02d}.png", images[i])
    rows = "".join(f"{i:02d}.png,{'aB'[i % 2]} \n" for i in range(12))
    (tmp_path / "in/labels.csv").write_text("file,label\n" + rows)
    return tmp_path


def test_a_new_run_splits_what_can_be_read(folder):
    """Twelve images on two sides; one that is cut is left out and listed; examples are held out."""
    found = open_training_set(flags(folder))
    assert sorted(torch.cat([found.train, found.test]).tolist()) == list(range(12))
    assert len(found.test) >= 1 and torch.equal(found.examples, found.test[:8])
    content = (folder / "in/03.png").read_bytes()
    (folder / "in/03.png").write_bytes(content[:len(content) // 2])
    found = open_training_set(flags(folder))
    assert len(found.images) == 11 and "03.png" in str(found.images.unreadable[0][0])


def test_each_file_is_opened_once_whatever_its_kind(folder, monkeypatch):
    """A set that fits into memory is read, not checked and read."""
    args = flags(folder, drop_outliers=False)
    monkeypatch.setattr(training_set, "CACHE_BYTES", 1)
    assert not open_training_set(args).images.cache
    monkeypatch.undo()
    assert len(open_training_set(args).images.cache) == 12


def test_labels_are_lower_case_words(folder):
    """Without spaces; none for tokens, or where the user says none."""
    found = open_training_set(flags(folder))
    assert set(labels_for_prompts(flags(folder), found)) == {"a", "b"}
    assert labels_for_prompts(flags(folder, condition="dino"), found) is None
    assert labels_for_prompts(flags(folder, label_column="none"), found) is None
    with pytest.raises(UserError, match="no label column 'none'"):
        labels_for_prompts(flags(folder, label_column="none", condition="labels"), found)


@pytest.mark.parametrize("more,labels,plan", [
    ({}, True, ("a <label> of type <index>", ("a", "b"), 33)),
    ({}, False, ("type <index>", (), 10)),
    ({"condition": "labels"}, True, ("a <label>", ("a", "b"), 0)),
    ({"condition": "dino"}, False, ("", (), 0)),
    ({"clusters": 4, "template": "<label> <index>"}, True, ("<label> <index>", ("a", "b"), 4))])
def test_prompts_are_planned(tmp_path, more, labels, plan):
    """The paper's template for what there is: labels, clusters, both."""
    labels = ["a", "b"] * 50 if labels else None
    assert plan_prompts(flags(tmp_path, **more), labels, range(100), TEMPLATES) == plan


@pytest.mark.parametrize("more,says", [
    ({"clusters": 200}, "no more clusters"), ({"template": "x"}, "lacks <index>"),
    ({"template": "<label> <index>"}, "holds <label>")])
def test_plans_that_cannot_work(tmp_path, more, says):
    """More clusters than images; a template that lacks or holds too much."""
    with pytest.raises(UserError, match=says):
        plan_prompts(flags(tmp_path, **more), None, range(100), TEMPLATES)


def test_what_people_see_of_a_set(folder):
    """prompts.csv, a grid with a row a cluster, examples with the cells of their table."""
    images = open_dataset(folder / "in", 16)
    found = TrainingSet(images, torch.arange(8), torch.arange(8, 12), [])
    cluster = torch.arange(8) % 2
    write_prompts(folder, found, None, cluster.tolist(), ["p"] * 8)
    rows = list(csv.DictReader(open(folder / "prompts.csv")))
    assert rows[3] == {"file": "03.png", "label": "", "cluster": "1", "prompt": "p"}
    draw_clusters(folder / "grid.png", found, cluster, 0)
    assert Image.open(folder / "grid.png").height > 2 * 128
    last = write_examples(folder / "held_out", found)
    table = list(csv.DictReader(open(folder / "held_out/labels.csv")))
    assert [row["file"] for row in table] == ["08.png", "09.png", "10.png", "11.png"]
    assert last.name == "11.png" and last.exists() and table[1]["label"] == "B"
