"""regional.py and mil.py: regions, masks, focus, budgets, learning, whole runs."""
import json
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_slides import slide_of, write_features

import mil
import regional
from dino import ViTConfig, VisionTransformer
from evaluate import bootstrap_interval, roc_auc
from mil import Trial
from regional import MILConfig, RegionalMIL, focus, predict, region_table
from support import phantoms
from support import slides as support_slides
from support.command import UserError
from support.run import Run
from support.slides import Slide

SMALL = dict(in_dim=6, dim=16, num_heads=2)
REGIONS = pytest.mark.parametrize("windows", [(), (2,), (2, 2, 2), (4, 2), (8,)])


def model_of(windows, pool="attention", seed=0):
    """A model with random weights, also where they start at zero."""
    torch.manual_seed(seed)
    model = RegionalMIL(MILConfig(windows=windows, pool=pool, **SMALL))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


# ---- regions ----

@REGIONS
def test_every_patch_has_one_cell_and_each_window_one_stretch(windows):
    """The table is a partition of the slide; w * w cells in a row fill a w x w square."""
    slide, side = slide_of(), int(np.prod(windows))
    table, places = region_table(slide.grid, windows, (1, 2))
    assert torch.equal(table[table >= 0].sort().values, torch.arange(900))
    for row, place in zip(table, places):
        assert ((slide.grid[row[row >= 0]] + torch.tensor([1, 2])) // side == place).all()
    full = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    cells, size = full[region_table(full, windows)[0][0]], 1
    for w in windows:
        size *= w
        for stretch in cells.split(size ** 2):
            assert (stretch // size == stretch[0] // size).all()
            assert len(stretch.unique(dim=0)) == size ** 2


@REGIONS
def test_missing_neighbours_are_masked(windows):
    """What stands in the place of a missing patch changes nothing, and nothing attends to it."""
    model, T = model_of(windows), int(np.prod(windows)) ** 2
    x, present = torch.randn(2, 5, T, 6), torch.rand(2, 5, T) < 0.6
    present[0, 3] = False  # a whole region, as padding of a batch has
    present[:, 0, 0] = True
    other = torch.where(present[..., None], x, 1e3 * torch.randn(2, 5, T, 6))
    assert torch.allclose(model(x, present), model(other, present), atol=1e-5)  # rounding
    tokens, share, _ = model.encode(x[0], present[0])
    assert tokens.isfinite().all() and (share[~present[0]] == 0).all() or not windows
    assert not torch.allclose(model(x, present), model(other, present | True), atol=1e-3)


def test_positions_are_relative_and_matter():
    """Equal offsets share a bias; patches that swap places change the result; without biases
    they do not."""
    block = model_of((3,)).levels[0].blocks[0]
    index = block.index[1:, 1:]
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    delta = (cells[:, None] - cells).flatten(0, 1)
    for i, j in zip(*torch.triu_indices(81, 81, 1)):
        same = torch.equal(delta[i], delta[j])
        assert same == (index.flatten()[i] == index.flatten()[j]).item()
    model, x, present = model_of((3,)), torch.randn(1, 4, 9, 6), torch.ones(1, 4, 9) > 0
    swapped = x[:, :, [1, 0, *range(2, 9)]]
    assert not torch.allclose(model(x, present), model(swapped, present), atol=1e-4)
    for b in model.levels[0].blocks:
        torch.nn.init.zeros_(b.bias)
    assert torch.allclose(model(x, present), model(swapped, present), atol=1e-6)  # rounding


def test_baselines_are_abmil_and_the_mean():
    """Without windows the model is equation 9 of Ilse et al., or the mean of the patches."""
    x, present = torch.randn(1, 30, 1, 6), torch.ones(1, 30, 1) > 0
    for pool in ("attention", "mean"):
        m = model_of((), pool)
        m.shift.fill_(0.3), m.scale.fill_(2.0)
        h = torch.nn.functional.gelu(m.embed((x[0, :, 0] - 0.3) / 2))
        a = (m.score(torch.tanh(m.value(h)) * torch.sigmoid(m.gate(h)))).softmax(0)
        z = (a * h).sum(0) if pool == "attention" else h.mean(0)
        assert torch.allclose(m(x, present), m.head(z), atol=1e-6)  # rounding


@REGIONS
def test_every_parameter_learns(windows):
    """One backward pass reaches every parameter, on a bag with gaps."""
    model, T = model_of(windows).train(), int(np.prod(windows)) ** 2
    present = torch.rand(3, 4, T) < 0.8
    present[:, :, 0] = True
    model.loss(torch.randn(3, 4, T, 6), present, torch.tensor([0.0, 1.0, 1.0])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


# ---- two passes ----

def test_focus_expects_more_between_two_attended_regions():
    """Smoothed attention: between two attended regions more than beside one, and beside a region
    that got none less than far from all."""
    seen = torch.tensor([[0.0, 0], [0, 4], [9, 0], [30, 0]])
    unseen = torch.tensor([[0.0, 2], [0, 6], [9, 1], [60, 60]])
    evidence = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert focus(seen, evidence, unseen, 4, reach=1.5).tolist() == [0, 1, 3, 2]
    assert focus(2 * seen, evidence, 2 * unseen, 4, reach=3.0).tolist() == [0, 1, 3, 2]


def test_the_loss_is_of_every_level_and_both_halves():
    """Cross-entropy of the patches, of the regions, and of their halves, each by the same pool; a
    bag of one patch has one half."""
    model, x = model_of((2,)), torch.randn(2, 2, 4, 6)
    present = torch.ones(2, 2, 4, dtype=torch.bool)
    present[1, 1], present[1, 0, 1:] = False, False
    y = torch.tensor([0.0, 1.0])
    tokens, _, ((patches, _),) = model.encode(x.flatten(0, 1), present.flatten(0, 1))
    patches, tokens = patches.view(2, 8, -1), tokens.view(2, 2, -1)
    bags = [(patches[0], 0), (patches[0, ::2], 0), (patches[0, 1::2], 0), (tokens[0], 0),
            (tokens[0, :1], 0), (tokens[0, 1:], 0)]
    bags += [(patches[1, :1], 1)] * 2 + [(tokens[1, :1], 1)] * 2
    terms = []
    for bag, label in bags:
        logit = model.pool(bag[None], torch.ones(1, len(bag)) > 0)[0]
        terms.append(torch.nn.functional.softplus(-logit if label else logit))
    assert model.loss(x, present, y).item() == pytest.approx(torch.cat(terms).mean().item())


@pytest.mark.parametrize("windows, regions", [((), 256), ((2,), 64)])
def test_budget_of_both_passes_and_seed(windows, regions):
    """256 patches a pass as 256, 64 or 4 regions; pass 1 is the same with and without focus; one
    seed gives one result."""
    model, slide = model_of(windows), slide_of(1500)
    one, two, again = (predict(model, slide, 256, f, seed=3) for f in (False, True, True))
    assert len(one[1]) == one[3] == two[3] == regions and len(two[1]) == 2 * regions
    assert torch.equal(one[1], two[1][:regions])
    assert two[0] == again[0] and torch.equal(two[1], again[1])
    seen = two[1][two[1] >= 0]
    assert len(seen) == len(seen.unique()) and len(seen) <= 512
    assert not torch.equal(one[1], predict(model, slide, 256, False, seed=4)[1])


def test_stacked_windows_scan_before_they_focus():
    """Of 8x8: four random regions without focus; with it 64 windows of 2x2, then four regions, in
    the same table; the logit is that of both passes together."""
    model, slide = model_of((2, 2, 2)), slide_of(1500)
    assert predict(model, slide, 256, False, seed=3)[1].shape == (4, 64)
    logit, seen, attention, first = predict(model, slide, 256, True, seed=3)
    assert first == 64 and seen.shape == attention.shape == (68, 64)
    assert (seen[:64, 4:] == -1).all() and (seen[64:, 4:] >= 0).any()
    assert attention[seen < 0].abs().max() == 0 and attention.sum().item() == pytest.approx(1)

    tokens = torch.cat([model.encode(slide.take(part), part >= 0)[0]
                        for part in (seen[:64, :4], seen[64:])])
    both, _ = model.pool(tokens[None], torch.ones(1, 68) > 0)
    assert logit == pytest.approx(both.item(), abs=1e-5)


@pytest.mark.parametrize("windows", [(), (2, 2, 2)])
def test_whole_bag_in_chunks(windows, monkeypatch):
    """Whole bags are encoded in pieces, which bounds memory and does not change the result."""
    model, slide = model_of(windows), slide_of(1500)
    whole = predict(model, slide, 10 ** 9)
    sizes, encode = [], model.encode
    monkeypatch.setattr(regional, "CHUNK", 100)
    monkeypatch.setattr(model, "encode", lambda x, p: sizes.append(p.numel()) or encode(x, p))
    assert predict(model, slide, 10 ** 9)[0] == pytest.approx(whole[0], abs=1e-5)  # rounding
    assert len(sizes) > 10 and max(sizes) <= 100
    assert torch.equal(whole[1][whole[1] >= 0].sort().values, torch.arange(1500))


# ---- learning ----

@pytest.mark.parametrize("windows", [(), (2,), (2, 2, 2)])
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_order_and_copies_change_nothing(windows, pool):
    """The order of patches is no evidence, nor is a second copy of the whole slide beside it."""
    model, slide = model_of(windows, pool), slide_of(300, 24)
    logit = predict(model, slide, 10 ** 9)[0]
    order = torch.randperm(300)
    shuffled = replace(slide, grid=slide.grid[order], rows=slide.rows[order])
    twice = replace(slide, grid=torch.cat([slide.grid, slide.grid + torch.tensor([0, 64])]),
                    rows=slide.rows.repeat(2))
    for other in (shuffled, twice):
        assert predict(model, other, 10 ** 9)[0] == pytest.approx(logit, abs=1e-5)  # rounding


def bags_of(features, label, name):
    """A Slide of 36 or 72 patches in rows of six."""
    grid = torch.cartesian_prod(torch.arange(len(features) // 6), torch.arange(6))
    return Slide(name, label, name, False, grid, torch.arange(len(grid)), lambda: (features, None))


@pytest.mark.parametrize("name", ["mean", "abmil", "2x2", "8x8"])
def test_what_a_mil_model_should_satisfy(name):
    """After a short training: one positive patch among 36 decides; without it the bag is negative;
    twice as many negatives leave the decision. Mean pooling, by design, cannot satisfy the last:
    its evidence is diluted by half."""
    negatives = torch.randn(180, 36, 6, generator=torch.Generator().manual_seed(0))
    positives = negatives.clone()
    positives[torch.arange(180), torch.arange(180) % 36, 0] += 5
    train = [bags_of((negatives, positives)[i % 2][i], i % 2, str(i)) for i in range(120)]
    args = Namespace(patches=18, steps=120, batch=16, lr=5e-3, starts=1)
    model = mil.train_model(Trial(name, 0, 0, train), args, Run(), torch.device("cpu"))

    def logits(bags):
        return torch.tensor([predict(model, bags_of(features, 0, str(i)), 10 ** 9)[0]
                             for i, features in enumerate(bags)])

    without, decided = logits(negatives[120:150]), logits(positives[120:150])
    diluted = logits(torch.cat([positives[120:150], negatives[150:]], dim=1))
    if name == "mean":
        assert (decided - diluted).mean() > 0.3 * (decided - without).mean()
    else:
        assert (decided > 0).float().mean() > 0.9 and (without < 0).float().mean() > 0.75
        assert (diluted > 0).float().mean() > 0.9


def test_models_of_several_folds_are_not_compared():
    """A model that knows nothing, and says how frequent tumours are in its training part, has an
    AUC of 0.5, not less; with one fold it is the plain AUC; slides of one label have none."""
    labels = np.array([1, 1, 0, 0, 0, 1, 0, 0, 0, 0])
    folds = np.repeat([0, 1], 5)
    prevalence = np.where(folds == 0, 0.2, 0.4)
    assert mil.auc_within_folds(labels, prevalence, folds) == 0.5
    logits = np.array([1.0, 0, 0.5, -1, -1, 3, 4, 0, 0, 0])  # 5 of 6 pairs, and 3 of 4
    assert mil.auc_within_folds(labels, logits, folds) == pytest.approx(8 / 10)
    assert mil.auc_within_folds(labels, logits, 0 * folds) == pytest.approx(roc_auc(labels, logits))
    with pytest.raises(ValueError, match="both labels"):
        mil.auc_within_folds(labels, logits, labels)


# ---- whole runs ----

def test_run_on_phantoms_and_explain(drawn_once, tmp_path, monkeypatch):
    """A run with two steps writes metrics and heat maps; --explain draws one slide by the
    finished run, which is not trained again; a second run in its folder is refused."""
    vit = VisionTransformer(ViTConfig(16, 12, 4, 3, image_size=64)).eval()
    monkeypatch.setattr(support_slides, "PHANTOMS", 200)
    monkeypatch.setattr(phantoms, "_histology", drawn_once["_histology"])
    monkeypatch.setattr(mil, "load_dino", lambda name: vit)
    monkeypatch.setattr(mil, "bootstrap_interval", partial(bootstrap_interval, rounds=20))
    out = ["--device", "cpu", "--out", str(tmp_path / "a")]
    flags = ["--count", "20", "--embedder", "small", "--steps", "2", "--batch", "2", "--models",
             "mean", "2x2"]
    mil.main([*flags, *out])
    result = json.loads((tmp_path / "a/metrics.json").read_text())
    assert len(result["table"]) == 3 + 4 and len(result["scores"]) == 7 * 4
    for name in ("heat_2x2.png", "log.jsonl", "config.json"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "split.csv").touch()  # of a run of train.py
    for folder in "ab":
        with pytest.raises(UserError, match="already contains a finished run.*--explain"):
            mil.main([*flags, "--out", str(tmp_path / folder)])

    monkeypatch.setattr(mil, "fit", None)  # nothing may be trained
    mil.main([*out, "--explain", "test_0003"])
    assert Image.open(tmp_path / "a/test_0003_2x2, seed 0, fold 0.png").width > 256


def test_run_on_features_by_cross_validation(tmp_path):
    """A folder of features: each slide is tested once, by a model that saw none of its patient."""
    folder = write_features(tmp_path / "f", [f"s{i}" for i in range(12)],
                            patient=[i // 2 for i in range(12)])
    mil.main(["--data", str(folder), "--steps", "3", "--batch", "4", "--models", "2x2", "--folds",
              "3", "--device", "cpu", "--starts", "2", "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [*result["table"]] == ["2x2, 256", "2x2, 512",
                                   "2x2, 256 + 256 focused", "2x2, all"]
    assert sorted(s["slide"] for s in result["scores"] if s["patches"] == "all") == sorted(
        f"s{i}" for i in range(12))
