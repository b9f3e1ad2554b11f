"""Proofs about phantoms.py: determinism, ranges, exact masks, visible labels, errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import ndimage

import phantoms
from phantoms import CHEST_LABELS, HISTOLOGY_MORPHOLOGIES, chest_phantoms, histology_phantoms


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def flipped(label, value, n=12, size=64):
    """Images and masks of n scenes with one label set to `value` and the others to 0."""
    scene = phantoms.chest_scenes(n, seed=1)
    scene["labels"] = torch.zeros_like(scene["labels"])
    scene["labels"][:, CHEST_LABELS.index(label)] = value
    return phantoms.render_chests(scene, size)


@pytest.mark.parametrize("draw,size", [(chest_phantoms, 64), (chest_phantoms, 33),
                                       (histology_phantoms, 48), (histology_phantoms, 33)])
def test_image_depends_on_seed_and_index_only(draw, size):
    """Any stretch of a set equals that part of the whole, bit for bit, across chunk borders too."""
    whole = draw(11, size, seed=3)
    assert equal([x[2:3] for x in whole], draw(1, size, seed=3, start=2))
    assert equal([x[5:11] for x in whole], draw(6, size, seed=3, start=5))
    assert not torch.equal(whole[0][0], whole[0][1])
    assert not torch.equal(whole[0][:1], draw(1, size, seed=4)[0])


def test_number_of_threads_changes_nothing_and_is_given_back():
    """Other thread counts give the same bits at sides large enough to split, and stay as set."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = chest_phantoms(1, 200), histology_phantoms(1, 97)
        torch.set_num_threads(2)
        assert equal(one[0], chest_phantoms(1, 200)) and equal(one[1], histology_phantoms(1, 97))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_global_random_state_is_untouched():
    """Drawing phantoms neither reads nor moves torch's global generator."""
    state = torch.get_rng_state()
    chest_phantoms(2, 16), histology_phantoms(2, 16)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [16, 31, 64, 97])
def test_chest_shapes_types_and_range(size):
    """Any side works; values stay in [-1, 1] and use most of that range."""
    images, masks, labels = chest_phantoms(3, size)
    assert images.shape == masks.shape == (3, 1, size, size) and labels.shape == (3, 4)
    assert (images.dtype, masks.dtype, labels.dtype) == (torch.float32, torch.bool, torch.int64)
    assert images.isfinite().all() and -1 <= images.min() < -0.6 and 0.4 < images.max() <= 1
    assert set(labels.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("draw,parts", [(chest_phantoms, 3), (histology_phantoms, 4)])
def test_none_asked_for_gives_empty_tensors(draw, parts):
    """n = 0 is a count like any other."""
    assert [len(x) for x in draw(0, 16)] == [0] * parts


def test_lungs_are_two_dark_regions():
    """Each mask is two connected lungs of fair size, darker than the rest of the image."""
    images, masks, _ = chest_phantoms(60, 64, seed=2)
    for image, mask in zip(images[:, 0], masks[:, 0]):
        regions, count = ndimage.label(mask.numpy())
        assert count == 2
        assert ndimage.sum(mask.numpy(), regions, (1, 2)).min() > 0.05 * mask.numel()
        body = ~mask & (image > -0.8)  # -0.8: leaves out the air around the patient
        assert image[mask].mean() < image[body].mean() - 0.3  # of 2; healthy lungs: about 0.7


def test_mask_is_the_dark_region_to_the_pixel():
    """Brightness rises across the mask's edge: two pixels in against two pixels out."""
    images, masks, labels = chest_phantoms(40, 128, seed=2)
    steps = []
    healthy = labels.sum(1) == 0
    for image, mask in zip(images[healthy, 0], masks[healthy, 0].numpy()):
        inside = mask & ~ndimage.binary_erosion(mask, iterations=2)
        outside = ndimage.binary_dilation(mask, iterations=2) & ~mask
        steps.append(image.numpy()[outside].mean() - image.numpy()[inside].mean())
    assert len(steps) >= 3 and min(steps) > 0.1  # noise of such a mean is under 0.01


def test_labels_are_independent_and_near_their_prevalence():
    """400 draws: each share within 4 standard deviations (0.024) of 0.35, no two labels coupled."""
    labels = chest_phantoms(400, 32)[2].float()
    assert (labels.mean(0) - phantoms.PREVALENCE).abs().max() < 0.096
    correlation = torch.corrcoef(labels.T) - torch.eye(4)
    assert correlation.abs().max() < 0.2  # 4 standard deviations of 1 / sqrt(400)


def test_cardiomegaly_raises_the_measured_cardiothoracic_ratio():
    """Gap between the lungs at the heart over widest chest: over 0.55 with the label only."""
    ratios = []
    for value in (0, 1):
        scene = phantoms.chest_scenes(12, seed=1)
        scene["labels"] = torch.tensor([value, 0, 0, 0]).expand(12, 4)
        scene["angle"] = torch.zeros_like(scene["angle"])  # upright, so that rows are level
        masks = phantoms.render_chests(scene, 128)[1][:, 0]
        y = (scene["diaphragm"] - 0.13) * scene["scale"] + scene["dy"]  # above both domes
        heart_row = ((y + 1) * 64).long().flatten()
        column = torch.arange(128)
        right, left = torch.where(masks, column, 128).amin(2), torch.where(masks, column, 0).amax(2)
        chest = (left - right).amax(1)
        row = masks[torch.arange(12), heart_row]
        first, last = row.long().argmax(1), 127 - row.flip(1).long().argmax(1)
        gap = last - first + 1 - row.sum(1)  # pixels between the lungs that are not lung
        ratios.append(gap / chest)
    assert (ratios[1] - ratios[0]).min() > 0.05
    assert ratios[0].max() < 0.55 < ratios[1].min()  # drawn: 0.40-0.49 and 0.58-0.70


@pytest.mark.parametrize("label", CHEST_LABELS[1:])
def test_findings_brighten_the_lungs_and_leave_the_mask(label):
    """One scene with and without a finding: same mask, brighter lungs, nothing else changed."""
    (without, mask), (shown, mask_shown) = flipped(label, 0), flipped(label, 1)
    assert torch.equal(mask, mask_shown)
    change = shown - without
    for i in range(len(mask)):
        assert change[i][mask[i]].max() > 0.15  # noise is the same in both, sd 0.03
        assert change[i][mask[i]].mean() > 0.0005
    far = ~(torch.nn.functional.max_pool2d(mask.float(), 5, 1, 2) > 0)
    assert change[far].abs().max() < 0.2 * change.max()  # soft edges reach two pixels out


def test_cardiomegaly_takes_from_the_mask_only_what_the_heart_covers():
    """The heart is never lung, so a larger one shrinks the mask; it never adds to it."""
    (_, small), (_, large) = flipped("cardiomegaly", 0), flipped("cardiomegaly", 1)
    assert not (large & ~small).any()
    lost = small & ~large
    assert (lost.flatten(1).sum(1) > 0).all()
    assert not lost[..., :12, :].any()  # lung tops, 12 of 64 rows, are out of the heart's reach


def test_side_does_not_change_the_anatomy():
    """64 pixels show what 128 show: correlation > 0.95 (the rest is noise), Dice > 0.97."""
    small, large = chest_phantoms(8, 64, seed=5), chest_phantoms(8, 128, seed=5)
    assert torch.equal(small[2], large[2])
    shrunk = torch.nn.functional.avg_pool2d(large[0], 2)
    for a, b in zip(small[0], shrunk):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.95
    mask = torch.nn.functional.avg_pool2d(large[1].float(), 2) > 0.5
    assert 2 * (mask & small[1]).sum() / (mask.sum() + small[1].sum()) > 0.97


def test_chests_are_alike_but_not_the_same():
    """Mean correlation of two chests: posed alike (over 0.45), yet far from copies (under 0.75)."""
    images = chest_phantoms(100, 32, seed=6)[0].flatten(1)
    off_diagonal = ~torch.eye(100, dtype=torch.bool)
    assert 0.45 < torch.corrcoef(images)[off_diagonal].mean() < 0.75


@pytest.mark.parametrize("size", [16, 47, 96])
def test_histology_shapes_types_and_range(size):
    """Any side works; tissue is brighter in red than in green, as H&E is."""
    images, masks, labels, morphology = histology_phantoms(6, size)
    assert images.shape == (6, 3, size, size) and masks.shape == (6, 1, size, size)
    assert (images.dtype, masks.dtype) == (torch.float32, torch.bool)
    assert labels.dtype == morphology.dtype == torch.int64
    assert labels.shape == morphology.shape == (6,)
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert (images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).all()


def test_histology_label_is_tumour_in_the_centre_third():
    """The label follows from the mask, and healthy patches may carry tumour at their rim."""
    _, masks, labels, _ = histology_phantoms(120, 33, seed=1)
    assert torch.equal(masks[:, 0, 11:22, 11:22].flatten(1).any(1).long(), labels)
    healthy = masks[labels == 0].flatten(1).any(1).float().mean()
    assert 0.1 < healthy < 0.9


def test_morphology_is_independent_of_the_label():
    """All types occur with both labels, at shares within 4 standard deviations of even."""
    _, _, labels, morphology = histology_phantoms(240, 16, seed=2)
    assert len(HISTOLOGY_MORPHOLOGIES) >= 6
    table = torch.zeros(2, len(HISTOLOGY_MORPHOLOGIES)).index_put_(
        (labels, morphology), torch.ones(240), accumulate=True)
    assert (table.sum(1) - 120).abs().max() < 31  # sqrt(240 / 4) = 7.7
    assert (table - 20).abs().max() < 18  # sqrt(240 * 11 / 144) = 4.3
    assert table.min() > 0


def test_tumour_has_more_nuclear_stain_than_fat_or_stroma():
    """Red light, which haematoxylin absorbs and eosin spares, is weaker inside the mask."""
    images, masks, labels, morphology = histology_phantoms(48, 64, seed=3)
    names = [HISTOLOGY_MORPHOLOGIES[k] for k in morphology]
    checked = 0
    for image, mask, label, name in zip(images, masks, labels, names):
        if label and name in ("fat", "stroma"):
            assert image[:1][mask].mean() < image[:1][~mask].mean() - 0.1
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("draw", [chest_phantoms, histology_phantoms])
@pytest.mark.parametrize("arguments,got", [({"n": -1}, "n=-1"), ({"n": 1, "size": 15}, "side 15"),
                                           ({"n": 1, "start": -2}, "start=-2")])
def test_errors_say_got_need_do(draw, arguments, got):
    """Bad arguments end in a ValueError that names the value, the rule and the remedy."""
    with pytest.raises(ValueError, match=f"{got}.*: pass") as error:
        draw(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["chest", "histology"])
def test_command_writes_a_sheet(kind, tmp_path):
    """The command line writes four rows of eight and prints the label frequencies."""
    out = tmp_path / "sheet.png"
    command = [sys.executable, "phantoms.py", "--out", str(out), "--size", "24", "--kind", kind]
    root = Path(phantoms.__file__).parent
    text = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert Image.open(out).size == (8 * 24, 4 * 24)
    assert ("cardiomegaly" if kind == "chest" else "mucin") in text and "%" in text
