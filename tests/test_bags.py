"""experiments/bags.py: the published ABMIL around mil.py's attention, trained side by side."""
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from experiments import bags
from experiments.__main__ import main as experiments
from support.command import UserError


def make_bags(count, seed=0):
    """Bags of 2 to 6 instances of 5 numbers; a positive one holds one instance far off."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        x = torch.randn(2 + i % 5, 5, generator=generator)
        if i % 2:
            x[0] += 4
        made.append((x, i % 2))
    return made


def write_bags(path, made, **changed):
    arrays = {"x": np.concatenate([x for x, _ in made]),
              "bag": np.concatenate([[f"b{i}"] * len(x) for i, (x, _) in enumerate(made)]),
              "bag_label": np.concatenate([[label] * len(x) for x, label in made])}
    np.savez(path, **{**arrays, **changed})
    return str(path)


@torch.no_grad()
def test_attention_is_equation_9():
    """a_k = softmax over k of w^T (tanh(V h_k) * sigmoid(U h_k)), z = sum a_k h_k, logit of z;
    what is padded does not count."""
    torch.manual_seed(0)
    model = bags.ClassicABMIL(torch.randn(20, 5)).eval()
    x = torch.randn(7, 5)
    h = model.encoder((x - model.shift) / model.scale)
    mil = model.mil
    a = (torch.tanh(mil.value(h)) * torch.sigmoid(mil.gate(h)) @ mil.score.weight[0]).softmax(0)
    present = torch.ones(7, dtype=torch.bool)
    torch.testing.assert_close(model(x, present), mil.head(a @ h)[0])

    padded = torch.cat([x, torch.full((3, 5), 9.0)])
    present = torch.cat([present, torch.zeros(3, dtype=torch.bool)])
    torch.testing.assert_close(model(padded, present), mil.head(a @ h)[0])


def test_side_by_side_is_as_alone():
    """Two networks together end where each ends alone, by Adam with L2 on the same bags."""
    made = make_bags(4)
    torch.manual_seed(0)
    models = [bags.ClassicABMIL(torch.cat([x for x, _ in made])) for _ in range(2)]
    for model in models:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    alone = copy.deepcopy(models)
    rows = [[0], [1]]  # one bag each, so that the order of an epoch is known
    bags.train_together(models, made, rows, rows, epochs=5, lr=1e-2, weight_decay=0.005, seed=0)
    for model, together, (row,) in zip(alone, models, rows):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.005)
        x, label = made[row]
        for _ in range(5):
            optimizer.zero_grad()
            logit = model(x, torch.ones(len(x), dtype=torch.bool))
            nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor(float(label))
                                                           ).backward()
            optimizer.step()
        for (name, ours), theirs in zip(model.named_parameters(), together.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_the_best_epoch_on_the_checks_counts():
    """Checks with the labels exchanged get worse with every epoch: the first one counts."""
    made = make_bags(8)
    lied = [(x, 1 - label) for x, label in made]
    torch.manual_seed(0)
    model = bags.ClassicABMIL(torch.cat([x for x, _ in made]))
    ends = []
    for epochs in (1, 4):
        end = copy.deepcopy(model)
        bags.train_together([end], made + lied, [list(range(8))], [list(range(8, 16))],
                            epochs=epochs, lr=1e-2, weight_decay=0.005, seed=0)
        ends.append(end.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])


def test_folds_share_labels():
    labels = [0] * 13 + [1] * 7
    fold = bags.draw_folds(labels, 5, 0)
    for label in (0, 1):
        counts = np.bincount(fold[np.array(labels) == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (fold != bags.draw_folds(labels, 5, 1)).any()


def test_a_witness_is_found(tmp_path, monkeypatch, capsys):
    """The command: one instance far off in each positive bag is learned; figures are written."""
    monkeypatch.chdir(tmp_path)
    path = write_bags(tmp_path / "planted.npz", make_bags(24))
    experiments(["bags", path, "--folds", "3", "--repeats", "2", "--epochs", "12"])
    said = capsys.readouterr().out
    assert "24 bags (12 positive) of 2 to 6 instances, 5 numbers each" in said
    result = json.loads((tmp_path / "planted_bags.json").read_text())
    assert result["table"]["accuracy"]["mean"] > 0.9 and np.shape(result["logits"]) == (2, 24)


@pytest.mark.parametrize("changed,says", [
    ({"x": np.zeros(3)}, "holds no bags"), ({"bag": np.zeros(3)}, "holds no bags"),
    ({"bag_label": np.array([0, 2] * 22)[:43]}, "holds no bags")])
def test_bad_files_are_one_line(tmp_path, changed, says):
    path = write_bags(tmp_path / "bad.npz", make_bags(12), **changed)
    with pytest.raises(UserError, match=says):
        experiments(["bags", path])


def test_bad_settings(tmp_path):
    path = write_bags(tmp_path / "few.npz", make_bags(8))
    with pytest.raises(UserError, match="--folds 10, and 4 bags of one label"):
        experiments(["bags", path])
    with pytest.raises(UserError, match="holds no bags"):
        experiments(["bags", str(tmp_path / "none.npz")])
