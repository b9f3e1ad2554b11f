"""Tests of dino.py: equality with the official networks, files of weights, self-distillation."""

import copy
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "reference"))

import dino  # noqa: E402
from dino import (DINO, DINOConfig, ViTConfig, VISION_TRANSFORMERS, VisionTransformer,  # noqa: E402
                  attention_maps, build_vit, conditioning_tokens, load_dino)
from make_dino import CASES, MEAN, NAMES, STD, fill, fingerprint, picture  # noqa: E402

REFERENCE = np.load(Path(__file__).parent / "reference" / "dino.npz")
SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)
SMALL_DINO = DINOConfig(head_dim=32, bottleneck=8, prototypes=12)


def reference_config(case):
    """Our config of a network in dino.npz."""
    patch, native, registers, is_v2, _ = CASES[case]
    options = dino.V2_REG if registers else dino.V2 if is_v2 else dino.V1
    return ViTConfig(patch, 48, 3, 3, **{**options, "image_size": native})


def test_build_vit_draws_its_weights_from_the_seed():
    """Same seed, same weights; other seed, other weights; the global generator is left alone."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = build_vit("tiny", 1), build_vit("random", 1), build_vit("tiny", 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.cls_token, same.cls_token)
    assert not torch.equal(one.cls_token, other.cls_token)
    with pytest.raises(ValueError, match="'resnet' is unknown.*dino_vits16"):
        build_vit("resnet")


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


@pytest.mark.parametrize("change", [{"interpolate_offset": 0.0}, {"antialias": True}])
@torch.no_grad()
def test_interpolation_details_matter(change):
    """The parity test can fail: another way to resize positions shows at a side not native."""
    vit = fill(VisionTransformer(replace(reference_config("v2"), **change)))
    error = [np.abs(vit(picture(side)).numpy() - REFERENCE[f"v2/{side[0]}x{side[1]}/global"]).max()
             for side in ((56, 56), (28, 84))]
    assert error[0] < 1e-4 and error[1] > 1e-3


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


@torch.no_grad()
def test_bfloat16_is_close():
    """The path that CPUs take in bfloat16 gives the tokens of float32, to its precision."""
    vit, x = VisionTransformer(ViTConfig()), images(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = vit(x)
    assert 0 < (got - vit(x)).abs().max() < 0.1  # tokens reach 3; 8 bits through 4 blocks


def test_sincos_positions_differ_and_repeat_along_axes():
    """No two patches share a position; half of the channels depend on the row only."""
    p = dino.sincos_positions(5, 16)
    assert torch.cdist(p, p).add(torch.eye(25)).min() > 0.1
    assert torch.equal(p[10, :8], p[14, :8]) and torch.equal(p[2, 8:], p[22, 8:])


@pytest.mark.parametrize("normalise, side, counts", [("per_image", 32, (5, 1, 5, 5, 17)),
                                                     ("imagenet", 224, (3, 1, 5, 5, 17))])
@torch.no_grad()
def test_conditioning_tokens(normalise, side, counts):
    """Each kind has its shape, from an image of any side, and means what it says."""
    vit = VisionTransformer(replace(SMALL, depth=5, image_size=32, patch_size=8, registers=2,
                                    normalise=normalise))
    x = images(2, 40)
    got = {kind: conditioning_tokens(vit, x, kind) for kind in dino.TOKEN_KINDS}
    assert [t.shape for t in got.values()] == [(2, count, 16) for count in counts]
    five, tokens, patches = vit.features(dino.resize(x, side), last=5)
    mean = patches.mean(dim=1)
    assert torch.equal(five[:, -1:], tokens[:, :1]) and torch.equal(got["cls"], tokens[:, :1])
    assert torch.equal(got["cls4+mean"], torch.cat([five[:, 1:], mean[:, None]], dim=1))
    assert torch.equal(got["global"], tokens if normalise == "imagenet" else got["cls4+mean"])
    for kind in ("patch", "patch2"):  # means of equal windows average to the mean: rounding only
        assert torch.allclose(got[kind][:, 1:].mean(dim=1), mean, atol=1e-5)


@torch.no_grad()
def test_attention_maps():
    """One positive map a head; with CLS and registers they would sum to one. Odd sides: error."""
    vit = VisionTransformer(replace(SMALL, registers=3))
    maps = attention_maps(vit, images(2, 20))
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1
    with pytest.raises(ValueError, match="patch 4 are needed: resize to 16x20"):
        attention_maps(vit, torch.zeros(1, 3, 18, 20))


# ---- weights ----

@pytest.mark.parametrize("case", CASES)
def test_files(case, tmp_path):
    """A bare state dict, or ours with its config, gives back the network, frozen."""
    config = replace(reference_config(case), embed_dim=64, num_heads=1, depth=2)
    vit = fill(VisionTransformer(config))
    ours = {"embedder": {"config": asdict(config), "model": vit.state_dict()}, "unet": {}}
    for content in (vit.state_dict(), ours, ours["embedder"]):
        torch.save(content, tmp_path / "weights.pth")
        loaded = load_dino(tmp_path / "weights.pth")
        x = images(1, config.image_size).requires_grad_()
        got = loaded(x)
        assert loaded.config == config and not loaded.training and torch.equal(got, vit(x))
        assert not any(p.requires_grad for p in loaded.parameters())
        got[:, 0].square().sum().backward()
        assert x.grad.abs().max() > 0  # usable as a perceptual loss


def test_weights_by_name(monkeypatch, tmp_path):
    """A file in torch.hub's cache is used; without it and without network the error says where."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(VISION_TRANSFORMERS, "dino_vits16", replace(SMALL, **dino.V1))
    asked = []

    def no_network(url, *_, **__):
        asked.append(url.removeprefix("https://dl.fbaipublicfiles.com/"))
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for name in ("dino_vitb8", "dinov2_vitl14_reg", "dino_vits16"):
        with pytest.raises(FileNotFoundError, match=f"no route.*file into {tmp_path}/check"):
            load_dino(name)
    assert asked == ["dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
                     "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
                     "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"]
    place = tmp_path / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    vit = VisionTransformer(VISION_TRANSFORMERS["dino_vits16"])
    torch.save(vit.state_dict(), place)
    assert torch.equal(load_dino("dino_vits16").cls_token, vit.cls_token)
    torch.save(VisionTransformer(SMALL).state_dict(), place)  # positions of another side
    with pytest.raises(ValueError, match=r"pos_embed.*\[1, 17, 16\].*\[1, 3137, 16\]"):
        load_dino("dino_vits16")


def test_wrong_files_and_names(tmp_path):
    """Unknown names list the known ones; odd files get our message, not one of pickle or torch."""
    for name in ("dino_vitx", "runs/none/model.pt", "tiny", tmp_path):
        with pytest.raises(FileNotFoundError, match="dino_vits16.*dinov2_vitl14_reg.*train.py"):
            load_dino(name)
    path = tmp_path / "w.pth"
    state = VisionTransformer(replace(SMALL, embed_dim=64, num_heads=1)).state_dict()
    swiglu = {key.replace("mlp.fc1", "mlp.w12"): value for key, value in state.items()}
    old = {"config": {"colour": 1}, "model": state}
    for content, match in [(torch.zeros(3), "Tensor"), (path, "Unpickling"), ({4: 5}, "patch"),
                           (swiglu, "blocks.0.mlp.fc1.weight"), ({**state, "a": state}, '"a"'),
                           (old, "colour.*trained by this version")]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"w.pth does not fit .*{match}.*pass another file"):
            load_dino(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="w.pth does not fit"):
        load_dino(path)


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


def test_loss_by_hand():
    """Three student and two teacher views: the four cross terms, each view's own left out."""
    student = torch.randn(3, 5, 4, generator=generator())
    teacher = torch.randn(2, 5, 4, generator=generator(1))
    centre = torch.tensor([0.1, -0.2, 0.3, 0.0])
    p, log_p = ((teacher - centre) / 0.04).softmax(dim=2), (student / 0.1).log_softmax(dim=2)
    want = sum(-(p[t] * log_p[s]).sum() for t, s in [(0, 1), (0, 2), (1, 0), (1, 2)]) / 5 / 4
    loss = dino.dino_loss(student, teacher, centre, 0.1, 0.04)[0]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)  # float32 sums in another order


def test_entropies_show_collapse():
    """Uniform outputs: log K; one prototype for all: 0; one each: healthy; centring undoes one."""
    one, each = torch.eye(8)[0].expand(2, 8, 8) * 9, torch.eye(8).expand(2, 8, 8) * 9
    zero, log_k = torch.zeros(8), math.log(8)
    for logits, centre, want in ((0 * one, zero, [log_k, log_k]), (one, zero, [0, 0]),
                                 (each, zero, [0, log_k]), (one, one[0, 0], [log_k, log_k])):
        logs = dino.dino_loss(logits, logits, centre, 0.1, 0.02)[1]
        assert [logs["teacher_entropy"], logs["batch_entropy"]] == pytest.approx(want, abs=1e-5)


def test_teacher_and_centre_closed_form():
    """Teacher: each step keeps a share of its gap to the student, on a cosine; centre: an EMA."""
    model = DINO(SMALL, replace(SMALL_DINO, momentum=(0.5, 1.0)))
    start = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    model.batch_centre.fill_(1.0)
    gap = 1.0
    for progress, keep in ((1.0, 1.0), (0.5, 0.75), (0.0, 0.5)):
        model.update_teacher(progress)
        gap *= keep
        for p, a in zip(model.teacher.parameters(), start):
            assert torch.allclose(p, a + 1 - gap, atol=1e-5)  # rounding
    assert torch.allclose(model.centre, torch.full((12,), 1 - 0.9 ** 3))


def test_loss_uses_both_kinds_of_crops_and_the_warm_up(monkeypatch):
    """Global crops of the side, local of half; centre from the teacher; temperature on its line."""
    seen = []
    monkeypatch.setattr(dino, "dino_loss", lambda *args: seen.append(args))
    model = DINO(SMALL, replace(SMALL_DINO, teacher_temp=(0.04, 0.07), local_crops=3))
    sides = []
    model.student["backbone"].register_forward_hook(lambda m, x, y: sides.append(x[0].shape))
    for progress in (0, 0.05, 0.1, 0.9):
        model.loss(images(), progress, generator())
    assert sides[:2] == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert [args[4] for args in seen] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    student, teacher = seen[-1][:2]
    assert student.shape == (5, 4, 12) and teacher.shape == (2, 4, 12)
    assert max(student.abs().max(), teacher.abs().max()) <= 1 + 1e-6  # cosines
    assert torch.allclose(model.batch_centre, teacher.mean(dim=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_student_only(autocast):
    """Each parameter of the student gets a gradient, also in bfloat16; the teacher gets none."""
    model = DINO(SMALL, SMALL_DINO)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(images(), 0.0, generator())[0]
    loss.backward()
    for name, p in model.student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())


def test_it_learns_and_resumes():
    """Thirty steps: lower loss, no collapse; half of them from saved states agree to the bit."""
    def start():
        torch.manual_seed(0)
        model = DINO(SMALL, replace(SMALL_DINO, prototypes=32))
        return model, torch.optim.AdamW(model.student.parameters(), lr=3e-3)

    def steps(model, optimizer, which):
        for i in which:
            loss, logs = model.loss(images(8), i / 30, generator(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_teacher(i / 30)
            losses.append(loss.item())
        return logs

    (model, optimizer), (resumed, other), losses = start(), start(), []
    steps(model, optimizer, range(15))
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share their moments
    logs = steps(model, optimizer, range(15, 30))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert logs["teacher_entropy"] < 0.7 * math.log(32) and logs["batch_entropy"] > 1.0
    steps(resumed, other, range(15, 30))
    assert losses[15:30] == losses[30:] and not resumed.teacher_vit().training
    assert all(torch.equal(v, resumed.state_dict()[key]) for key, v in model.state_dict().items())


# ---- the command ----

@pytest.mark.parametrize("arguments, match", [
    (["colour.png"], None), (["deep.png", "--embedder", "runs/a/model.pt"], None),
    (["colour.png", "--embedder", "tiny"], "python train.py"),
    (["x.png"], "x.png"), (["bad.png"], "bad.png"),
    (["colour.png", "--out", "no/such/a.png"], "no/such/a.png"),
])
def test_command(monkeypatch, capsys, tmp_path, arguments, match):
    """One panel for the image and one a head; bad weights, images, places: one line, code 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dino.py", "--image", *arguments])
    Path("runs/a").mkdir(parents=True)
    ours = {"config": asdict(SMALL), "model": VisionTransformer(SMALL).state_dict()}
    torch.save({"embedder": ours}, "runs/a/model.pt")
    Path("bad.png").write_text("not an image")
    Image.new("RGB", (30, 20), "red").save("colour.png")
    Image.fromarray((np.arange(900).reshape(30, 30) * 70).astype(np.uint16)).save("deep.png")
    if match:
        with pytest.raises(SystemExit, match="2"):
            dino.main()
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and match in text
        assert not Path("attention.png").exists()
    else:
        dino.main()
        assert Image.open("attention.png").size == (3 * 228, 228)  # 224 pixels and a border of 2
        deep = dino.open_image("deep.png", 30)
        assert (deep.min(), deep.max()) == (-1, 1) and len(deep.unique()) > 200  # not cut at 255
