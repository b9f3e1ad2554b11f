"""support/phantoms.py: determinism, ranges, exact masks, visible labels, errors."""
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import max_pool2d

from support import phantoms
from support.phantoms import (CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms,
                              histology_phantoms)

BOTH = pytest.mark.parametrize("draw", [chest_phantoms, histology_phantoms])


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def chests_with(monkeypatch, *labels):
    """Images and masks of the same 12 chests with these labels shown and no other."""
    shown = [float(label in labels) for label in CHEST_LABELS]
    monkeypatch.setattr(phantoms, "PREVALENCE", torch.tensor(shown))
    return chest_phantoms(12, 64, seed=1)[:2]


@BOTH
@pytest.mark.parametrize("size", [33, 64])
def test_image_depends_on_seed_and_index_only(draw, size):
    """The start of a set equals that part of the whole, bit for bit; the seed changes it."""
    whole = draw(5, size, seed=3)
    assert equal([x[:3] for x in whole], draw(3, size, seed=3))
    assert not torch.equal(whole[0][0], whole[0][1])
    assert not torch.equal(whole[0][:1], draw(1, size, seed=4)[0])


@BOTH
@pytest.mark.parametrize("size", [16, 47, 96])
def test_shapes_types_and_range(draw, size):
    """Any side works; values stay in [-1, 1]; tissue is redder than green, as H&E is."""
    images, masks, *labels = draw(6, size)
    assert masks.shape == (6, 1, size, size) and masks.dtype == torch.bool
    assert images.dtype == torch.float32 and images.isfinite().all()
    assert -1 <= images.min() and images.max() <= 1
    assert all(x.dtype == torch.int64 for x in labels)
    if draw is chest_phantoms:
        assert images.shape == masks.shape and labels[0].shape == (6, 4)
        assert images.min() < -0.6 and images.max() > 0.4
    else:
        assert images.shape == (6, 3, size, size) and [x.shape for x in labels] == [(6,), (6,)]
        assert (images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).all()


def test_lungs_are_two_dark_regions():
    """Each mask is two lungs of fair size, dark inside."""
    images, masks, _ = chest_phantoms(40, 128, seed=2)
    for image, mask in zip(images[:, 0], masks[:, 0]):
        regions, count = ndimage.label(mask.numpy())
        assert count == 2
        assert ndimage.sum(mask.numpy(), regions, (1, 2)).min() > 0.05 * mask.numel()
        body = ~mask & (image > -0.8)  # -0.8: leaves out the air around the patient
        assert image[mask].mean() < image[body].mean() - 0.3  # of 2; healthy lungs: about 0.7


@pytest.mark.parametrize("label", CHEST_LABELS[1:])
def test_findings_brighten_the_lungs_and_leave_the_mask(label, monkeypatch):
    """One chest with and without a finding: same mask, brighter lungs, nothing else changed."""
    (without, mask), (shown, again) = chests_with(monkeypatch), chests_with(monkeypatch, label)
    assert torch.equal(mask, again)
    change = shown - without
    for i in range(len(mask)):
        assert change[i][mask[i]].max() > 0.15  # noise is the same in both, sd 0.03
        assert change[i][mask[i]].mean() > 0.0005
    far = max_pool2d(mask.float(), 5, 1, 2) == 0
    assert change[far].abs().max() < 0.2 * change.max()  # soft edges reach two pixels out


def test_histology_labels():
    """The label is tumour in the centre third; healthy rims occur; morphology tells nothing."""
    _, masks, labels, morphology = histology_phantoms(240, 33, seed=2)
    assert torch.equal(masks[:, 0, 11:22, 11:22].flatten(1).any(1).long(), labels)
    assert 0.1 < masks[labels == 0].flatten(1).any(1).float().mean() < 0.9
    table = torch.zeros(2, len(HISTOLOGY_MORPHOLOGIES)).index_put_(
        (labels, morphology), torch.ones(240), accumulate=True)
    assert (table.sum(1) - 120).abs().max() < 31  # 4 standard deviations of sqrt(240 / 4) = 7.7
    assert (table - 20).abs().max() < 18 and table.min() > 0  # sqrt(240 * 11 / 144) = 4.3
