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


def test_a_feature_of_the_held_out_bag_only_does_not_explode():
    """A feature that varies in the held-out bag alone has (almost) no deviation in training: it is
    only centred, and clipped at 10."""
    training = torch.randn(30, 3)
    training[:, 1] = 5.0
    training[:, 2] *= 1e-5
    held_out = torch.tensor([[0.0, 5.5, 0.0], [1e4, 700.0, -3e4]])
    (near, far), = bags.standardise([held_out], [training])
    assert near[1].item() == pytest.approx(0.5) and near[2].abs() < 0.1
    assert far.tolist() == [10, 10, -10]


def test_the_set_kernel_is_the_mean_over_pairs():
    """Bags of one instance: the Gaussian kernel itself, and the closed form of ridge regression."""
    made, labels = torch.randn(6, 1, 2), np.array([0, 1, 0, 1, 0, 1])
    kernel = torch.exp(-torch.cdist(made[:, 0], made[:, 0]).square() / 2)
    weights = torch.linalg.inv(kernel[:4, :4] + 0.1 * torch.eye(4)) @ torch.tensor(
        [-0.5, 0.5, -0.5, 0.5])
    scores = bags.set_kernel(list(made), labels, np.array([4, 5]))
    torch.testing.assert_close(scores, kernel[4:, :4] @ weights, atol=1e-4, rtol=1e-4)
    twice = [bag.repeat(1 + i, 1) for i, bag in enumerate(made)]  # copies change no mean
    torch.testing.assert_close(bags.set_kernel(twice, labels, np.array([4, 5])), scores)


def test_a_witness_is_found(tmp_path, monkeypatch, capsys):
    """The command: one instance far off in each positive bag is learned; no epoch does better than
    the one chosen on the test fold."""
    monkeypatch.chdir(tmp_path)
    path = write_bags(tmp_path / "planted.npz", make_bags(24))
    experiments(["bags", path, "--folds", "2", "--repeats", "2", "--epochs", "9"])
    said = capsys.readouterr().out
    assert "24 bags (12 positive), 5 features" in said
    result = json.loads((tmp_path / "planted_bags.json").read_text())
    accuracy = {name: row["accuracy"] for name, row in result["table"].items()}
    assert accuracy["best epoch on the test fold"] >= accuracy["last epoch"] > 0.9
    assert np.shape(result["logits"]["last epoch"]) == (2, 24)


def test_a_file_without_bags_is_refused(tmp_path):
    path = write_bags(tmp_path / "bad.npz", make_bags(8), x=np.zeros(3))
    with pytest.raises(UserError, match="holds no bags"):
        experiments(["bags", path])
