"""Tests of dino.py: equality with the official networks, files of weights, self-distillation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dino
from dino import (DINO, DINOConfig, ViTConfig, VISION_TRANSFORMERS, VisionTransformer,
                  conditioning_tokens, sinkhorn)
from experiments.attention import attention_maps
from make_dino import CASES, MEAN, NAMES, STD, fill, fingerprint, picture

REFERENCE = np.load(Path(__file__).parent / "reference" / "dino.npz")
SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)
SMALL_DINO = DINOConfig(head_dim=32, bottleneck=8, prototypes=12)


def reference_config(case):
    """Our config of a network in dino.npz."""
    patch, native, registers, is_v2, _ = CASES[case]
    options = dino.V2_REG if registers else dino.V2 if is_v2 else dino.V1
    return ViTConfig(patch, 48, 3, 3, **{**options, "image_size": native})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, side=16):
    """Smooth random images (n, 3, side, side) in [-1, 1]."""
    noise = torch.rand(n, 3, 4, 4, generator=generator())
    return F.interpolate(noise, side, mode="bilinear") * 2 - 1


# ---- the network ----

@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_official_network(case):
    """Same weights and image give the official tokens, at the native side and three others."""
    vit = fill(VisionTransformer(reference_config(case)))
    for side in CASES[case][4]:
        x = picture(side)
        last, tokens, patches = vit.features(x, last=3)
        got = {"last": last, "global": tokens, "patches": patches}
        if case == "v1":
            got["attention"] = attention_maps(vit, x).flatten(2)
        for name, value in got.items():
            want = REFERENCE[f"{case}/{side[0]}x{side[1]}/{name}"]
            # float32 rounding of another attention kernel; see the next test for what errors give
            assert np.abs(value.numpy() - want).max() < 1e-4, (side, name)


def test_attention_maps():
    """One positive map a head; with CLS and registers they would sum to one. Odd sides: error."""
    vit = VisionTransformer(replace(SMALL, registers=3))
    maps = attention_maps(vit, images(2, 20))
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1
    with pytest.raises(ValueError, match="patch 4 are needed: resize to 16x20"):
        attention_maps(vit, torch.zeros(1, 3, 18, 20))


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    """Names and shapes of all parameters equal those of the official network."""
    with torch.device("meta"):
        state = VisionTransformer(VISION_TRANSFORMERS[name]).state_dict()
    assert fingerprint(state) == str(REFERENCE["keys/" + name])


def test_preprocessing():
    """ImageNet statistics act on [0, 1]; standardising each image takes its brightness away."""
    x = images()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    want = ((x + 1) / 2 - mean) / std
    assert torch.allclose(dino.preprocess(x, "imagenet").double(), want, atol=1e-5)  # rounding
    sd, mean = torch.std_mean((x + 1) / 2, dim=(1, 2, 3), keepdim=True)
    got = dino.preprocess(x, "per_image")
    assert torch.allclose(got, ((x + 1) / 2 - mean) / (sd + 0.1), atol=1e-5)
    assert torch.allclose(got, dino.preprocess(x + 0.3, "per_image"), atol=1e-5)
    got = dino.preprocess(x, "rad_dino")
    assert torch.allclose(got, ((x + 1) / 2 - 0.5307) / 0.2583, atol=1e-5)


def test_sincos_positions_differ_and_repeat_along_axes():
    """No two patches share a position; half of the channels depend on the row only."""
    p = dino.sincos_positions(5, 16)
    assert torch.cdist(p, p).add(torch.eye(25)).min() > 0.1
    assert torch.equal(p[10, :8], p[14, :8]) and torch.equal(p[2, 8:], p[22, 8:])


@pytest.mark.parametrize("global_tokens, side, counts", [
    ("cls4+mean", 32, (5, 1, 5, 17)), ("cls+registers", 224, (3, 1, 5, 17))])
@torch.no_grad()
def test_conditioning_tokens(global_tokens, side, counts):
    """Each kind has its shape, from an image of any side, and means what it says."""
    vit = VisionTransformer(replace(SMALL, depth=5, image_size=32, patch_size=8, registers=2,
                                    global_tokens=global_tokens, input_side=side))
    x = images(2, 40)
    got = {kind: conditioning_tokens(vit, x, kind) for kind in dino.TOKEN_KINDS}
    assert [t.shape for t in got.values()] == [(2, count, 16) for count in counts]
    five, tokens, patches = vit.features(dino.resize(x, side), last=5)
    mean = patches.mean(dim=1)
    assert torch.equal(five[:, -1:], tokens[:, :1]) and torch.equal(got["cls"], tokens[:, :1])
    assert torch.equal(got["cls4+mean"], torch.cat([five[:, 1:], mean[:, None]], dim=1))
    assert torch.equal(got["global"], tokens if side == 224 else got["cls4+mean"])
    # Means of equal windows average to the mean, up to rounding.
    assert torch.allclose(got["patch"][:, 1:].mean(dim=1), mean, atol=1e-5)


# ---- self-distillation ----

def test_crops_are_never_flipped_and_keep_their_share():
    """On a ramp each crop rises, never falls, by the share of the side that it shows."""
    ramp = torch.linspace(-0.8, 0.8, 32)
    for axis, x in ((3, ramp.expand(1, 1, 32, 32)), (2, ramp[:, None].expand(1, 1, 32, 32))):
        crops = dino.random_crops(x, 400, 32, (0.1, 0.5), 0.0, generator())
        profile = crops.mean(dim=(1, 5 - axis))
        rise = (profile[:, -4:].mean(dim=1) - profile[:, :4].mean(dim=1)) / (1.6 * 28 / 31)
        # smallest and largest side by area and aspect; noise of 0.06 over 4 * 32 pixels adds 0.02
        assert rise.min() > math.sqrt(0.1 * 3 / 4) - 0.03
        assert rise.max() < math.sqrt(0.5 * 4 / 3) + 0.03
        assert abs(crops.mean()) < 0.04  # no side preferred: three times 0.24 / sqrt(400)


def test_crops_follow_the_generator():
    """Crops lie in [-1, 1]; equal seeds, equal crops; views differ; grey stays grey."""
    grey = images(3, 24)[:, :1].repeat(1, 3, 1, 1)
    x, same, other = (dino.random_crops(grey, 2, 16, (0.5, 1.0), 0.1, generator(seed))
                      for seed in (0, 0, 1))
    assert x.shape == (6, 3, 16, 16) and x.abs().max() <= 1 and torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(x, same) and not torch.equal(x, other) and not torch.equal(x[:3], x[3:])


def test_sinkhorn_by_hand():
    """It is the plain form: exponentials, scaled in turn to equal columns and to rows of one."""
    logits = torch.randn(24, 6, generator=generator())
    q = (logits / 0.5).double().exp()
    for _ in range(3):
        q = q / q.sum(dim=0) / 6
        q = q / q.sum(dim=1, keepdim=True) / 24
    # float32 logarithms against float64: rounding
    assert torch.allclose(sinkhorn(logits, 0.5).double(), 24 * q, atol=1e-5)


def test_sinkhorn_does_not_overflow():
    """Logits of 10,000 temperatures, and equal ones, whose answer is uniform, give finite targets.
    """
    logits = 500 * torch.randn(64, 12, generator=generator()).clamp(-1, 1)
    for x in (logits, -logits, logits + 500, logits[:1]):
        q = sinkhorn(x, 0.05)
        assert q.isfinite().all() and torch.allclose(q.sum(dim=1), torch.ones(len(x)), atol=1e-4)
    alike = torch.randn(12, generator=generator()).expand(64, 12)
    assert torch.allclose(sinkhorn(alike, 0.05), torch.full((64, 12), 1 / 12), atol=1e-5)


def test_loss_by_hand():
    """Three student and two teacher views: the four cross terms, each view's own left out."""
    student = torch.randn(3, 5, 4, generator=generator())
    p = torch.randn(2, 5, 4, generator=generator(1)).softmax(dim=2)
    log_p = (student / 0.1).log_softmax(dim=2)
    want = sum(-(p[t] * log_p[s]).sum() for t, s in [(0, 1), (0, 2), (1, 0), (1, 2)]) / 5 / 4
    loss = dino.dino_loss(student, p, 0.1)[0]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)  # float32 sums in another order


def test_entropies_show_collapse():
    """Uniform targets: log K; one prototype for all: 0; one each: healthy. Sinkhorn makes the first
    of the second."""
    one = torch.eye(8)[0].expand(2, 8, 8)
    each = torch.eye(8).expand(2, 8, 8)
    log_k = math.log(8)
    balanced = sinkhorn(9 * one.flatten(0, 1), 0.02).unflatten(0, (2, 8))
    for targets, want in ((0 * one + 1 / 8, [log_k, log_k]), (one, [0, 0]), (each, [0, log_k]),
                          (balanced, [log_k, log_k])):
        logs = dino.dino_loss(one, targets, 0.1)[1]
        assert [logs["teacher_entropy"], logs["batch_entropy"]] == pytest.approx(want, abs=1e-5)


def test_momentum():
    """Half a cosine from the first share to the last; the teacher starts as the student, frozen."""
    model = DINO(SMALL, SMALL_DINO)
    assert [model.momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.98, 0.99, 1.0])
    pairs = list(zip(model.teacher.parameters(), model.student.parameters(), strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert not any(mine.requires_grad for mine, _ in pairs)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_student_only(autocast):
    """Each parameter of the student gets a gradient, also in bfloat16; the teacher gets none."""
    model = DINO(SMALL, SMALL_DINO)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(images(), generator())[0]
    loss.backward()
    for name, p in model.student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())


def test_it_learns():
    """Thirty steps lower the loss without collapse."""
    torch.manual_seed(0)
    model = DINO(SMALL, replace(SMALL_DINO, prototypes=32))
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    losses = []
    for i in range(30):
        loss, logs = model.loss(images(8), generator(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(model.teacher.parameters(), model.student.parameters()):
                mine.lerp_(theirs, 1 - model.momentum(i / 30))
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert logs["teacher_entropy"] < 0.7 * math.log(32) and logs["batch_entropy"] > 1.0
