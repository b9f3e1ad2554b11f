"""experiments/bags.py: the published ABMIL around the attention of regional.py."""
import json

import numpy as np
import pytest
import torch

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
    """a_k = softmax over k of w^T (tanh(V h_k) * sigmoid(U h_k)), z = sum a_k h_k, logit of z."""
    torch.manual_seed(0)
    model = bags.ClassicABMIL(5).eval()
    x = torch.randn(7, 5)
    h = model.encoder(x)
    mil = model.mil
    a = (torch.tanh(mil.value(h)) * torch.sigmoid(mil.gate(h)) @ mil.score.weight[0]).softmax(0)
    torch.testing.assert_close(model(x), mil.head(a @ h)[0])


def test_a_witness_is_found(tmp_path, monkeypatch):
    """The command: one instance far off in each positive bag is learned; no epoch does better than
    the one chosen on the test fold."""
    monkeypatch.chdir(tmp_path)
    path = write_bags(tmp_path / "planted.npz", make_bags(24))
    experiments(["bags", path, "--folds", "2", "--repeats", "2", "--epochs", "9"])
    result = json.loads((tmp_path / "planted_bags.json").read_text())
    accuracy = {name: row["accuracy"] for name, row in result["table"].items()}
    assert accuracy["best epoch on the test fold"] >= accuracy["last epoch"] > 0.9
    assert np.shape(result["logits"]["last epoch"]) == (2, 24)


def test_a_file_without_bags_is_refused(tmp_path):
    path = write_bags(tmp_path / "bad.npz", make_bags(8), x=np.zeros(3))
    with pytest.raises(UserError, match="holds no bags"):
        experiments(["bags", path])
