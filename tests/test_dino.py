"""Tests of dino.py: equality with the official networks, files of weights, self-distillation."""

import copy
import math
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reference")]

import dino  # noqa: E402
from dino import (DINO, DINOConfig, ViTConfig, VISION_TRANSFORMERS, VisionTransformer,  # noqa: E402
                  attention_maps, build_vit, conditioning_tokens, load_dino)
from make_dino import CASES, NAMES, fill, fingerprint, picture  # noqa: E402

SMALL = ViTConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, image_size=16)
SMALL_DINO = DINOConfig(head_dim=32, bottleneck=8, prototypes=12)


def reference_config(case):
    """Our config of a network in dino.npz."""
    patch, native, registers, is_v2, _ = CASES[case]
    options = dino.V2_REG if registers else dino.V2 if is_v2 else dino.V1
    return ViTConfig(patch, 48, 3, 3, **{**options, "image_size": native})


def images(n=4, side=16, seed=0):
    """Smooth random images (n, 3, side, side) in [-1, 1]."""
    noise = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=side, mode="bilinear") * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the network ----

@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_official_network(case):
    """Same weights and image give the official tokens, at the native side and three others."""
    reference = np.load(ROOT / "tests" / "reference" / "dino.npz")
    vit = fill(VisionTransformer(reference_config(case)))
    for side in CASES[case][4]:
        x = picture(side)
        last, tokens, patches = vit.features(x, last=3)
        got = {"last": last, "global": tokens, "patches": patches}
        if case == "v1":
            got["attention"] = attention_maps(vit, x).flatten(2)
        for name, value in got.items():
            want = reference[f"{case}/{side[0]}x{side[1]}/{name}"]
            # float32 rounding of another attention kernel; see the next test for what errors give
            assert np.abs(value.numpy() - want).max() < 1e-4, (side, name)
        assert torch.equal(vit(x), tokens)


@pytest.mark.parametrize("change", [{"interpolate_offset": 0.0}, {"antialias": True}])
@torch.no_grad()
def test_interpolation_details_matter(change):
    """The parity test can fail: another way to resize positions shows at a side not native."""
    reference = np.load(ROOT / "tests" / "reference" / "dino.npz")
    vit = fill(VisionTransformer(replace(reference_config("v2"), **change)))
    error = [np.abs(vit(picture(side)).numpy() - reference[f"v2/{side[0]}x{side[1]}/global"]).max()
             for side in ((56, 56), (28, 84))]
    assert error[0] < 1e-4 and error[1] > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_official_keys_and_shapes(name):
    """Names and shapes of all parameters equal those of the official network."""
    reference = np.load(ROOT / "tests" / "reference" / "dino.npz")
    with torch.device("meta"):
        state = VisionTransformer(VISION_TRANSFORMERS[name]).state_dict()
    assert fingerprint(state) == str(reference["keys/" + name])


def test_preprocessing():
    """ImageNet statistics act on [0, 1]; standardising each image takes its brightness away."""
    x = images()
    got = dino.preprocess(x, "imagenet")
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        want = ((x[:, channel] + 1) / 2 - mean) / std
        assert torch.allclose(got[:, channel], want, atol=1e-5)  # values reach 2.6: rounding
    sd, mean = torch.std_mean((x + 1) / 2, dim=(1, 2, 3), keepdim=True)
    got = dino.preprocess(x, "per_image")
    assert torch.allclose(got, ((x + 1) / 2 - mean) / (sd + 0.1), atol=1e-5)
    assert torch.allclose(got, dino.preprocess(x + 0.3, "per_image"), atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_close():
    """The path that CPUs take in bfloat16 gives the tokens of float32, to its precision."""
    vit, x = build_vit("tiny"), images(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = vit(x)
    assert not torch.equal(got, vit(x))
    assert (got - vit(x)).abs().max() < 0.1  # tokens reach 3; 8 bits through 4 blocks


def test_sincos_positions_differ_and_repeat_along_axes():
    """No two patches share a position; half of the channels depend on the row only."""
    p = dino.sincos_positions(5, 16)
    assert torch.cdist(p, p).add(torch.eye(25)).min() > 0.1
    assert torch.equal(p.view(5, 5, 16)[2, 0, :8], p.view(5, 5, 16)[2, 4, :8])
    assert torch.equal(p.view(5, 5, 16)[0, 2, 8:], p.view(5, 5, 16)[4, 2, 8:])


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 3, 16, 15), (1, 1, 16, 16)])
def test_wrong_sides_and_channels_are_refused(shape):
    """Sides that are no multiple of the patch, and one channel, give a message with a way out."""
    with pytest.raises(ValueError, match="patch 4: resize to 16x"):
        VisionTransformer(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("normalise, counts", [("per_image", (5, 1, 5, 5, 17)),
                                               ("imagenet", (3, 1, 5, 5, 17))])
@torch.no_grad()
def test_conditioning_tokens(normalise, counts):
    """Each kind has its shape, from an image of any side, and means what it says."""
    config = replace(SMALL, depth=4, image_size=32, patch_size=8, registers=2, normalise=normalise)
    vit = VisionTransformer(config)
    x = images(2, 40)
    got = {kind: conditioning_tokens(vit, x, kind) for kind in dino.TOKEN_KINDS}
    assert tuple(t.shape[1] for t in got.values()) == counts
    assert all(t.shape[0] == 2 and t.shape[2] == 16 for t in got.values())
    side = 224 if normalise == "imagenet" else 32
    assert vit.input_side == side
    last, tokens, patches = vit.features(dino.resize(x, side), last=4)
    mean = patches.mean(dim=1)
    assert torch.equal(got["cls"], tokens[:, :1]) and torch.equal(got["cls4+mean"][:, :4], last)
    assert torch.equal(got["global"], tokens if normalise == "imagenet" else got["cls4+mean"])
    # means of equal windows average to the mean of all: rounding only
    assert torch.allclose(got["patch"][:, 1:].mean(dim=1), mean, atol=1e-5)
    assert torch.allclose(got["patch2"][:, 1:].mean(dim=1), mean, atol=1e-5)
    with pytest.raises(ValueError, match="global, cls"):
        conditioning_tokens(vit, x, "tokens")


def test_published_models_see_224_pixels():
    """224 is a multiple of all published patches, so nothing is cut."""
    with torch.device("meta"):
        sides = {name: VisionTransformer(c).input_side for name, c in VISION_TRANSFORMERS.items()}
    assert sides.pop("tiny") == 64 and set(sides.values()) == {224}


@torch.no_grad()
def test_attention_maps_are_shares_of_one():
    """Positive, one map a head, and with CLS and registers they would sum to one."""
    maps = attention_maps(VisionTransformer(replace(SMALL, registers=3)), images(2, 20))
    assert maps.shape == (2, 2, 5, 5) and maps.min() > 0 and maps.sum(dim=(2, 3)).max() < 1


# ---- weights ----

def test_frozen_and_seeded():
    """Loaded networks have no trainable parameter and no train mode; equal seeds, equal weights."""
    state = torch.get_rng_state()
    vit = load_dino("random")
    assert not any(p.requires_grad for p in vit.parameters()) and not vit.training
    assert torch.equal(vit.cls_token, build_vit("random").cls_token)
    assert not torch.equal(vit.cls_token, build_vit("tiny", seed=1).cls_token)
    assert torch.equal(state, torch.get_rng_state())
    x = images(1, 64).requires_grad_()
    assert vit(x).sum().backward() is None and x.grad.abs().max() > 0  # usable as a perceptual loss


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapping", ["bare", "v1 full", "v2 teacher", "student"])
def test_architecture_from_a_file(case, wrapping, tmp_path):
    """Published files and full training checkpoints give back network and config."""
    config = replace(reference_config(case), embed_dim=64, num_heads=1, depth=2)
    vit = fill(VisionTransformer(config))
    state = vit.state_dict()
    both = {**{"backbone." + key: value for key, value in state.items()},
            "head.last_layer.weight_v": torch.zeros(3), "dino_head.mlp.0.weight": torch.zeros(3)}
    content = {"bare": state, "v2 teacher": {"teacher": both},
               "student": {"student": {"module." + key: value for key, value in both.items()}},
               "v1 full": {"student": {}, "teacher": both, "epoch": 3, "args": Namespace(lr=1.0)}}
    torch.save(content[wrapping], tmp_path / "weights.pth")
    loaded = load_dino(tmp_path / "weights.pth")
    assert loaded.config == config
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("wrap", [lambda ours: ours, lambda ours: {"embedder": ours, "unet": {}}])
def test_own_checkpoints(wrap, tmp_path):
    """A dict of config and tensors loads by path, alone or as part of a model.pt."""
    vit = VisionTransformer(SMALL)
    ours = {"config": asdict(SMALL), "model": vit.state_dict()}
    torch.save(wrap(ours), tmp_path / "model.pt")
    loaded = load_dino(tmp_path / "model.pt")
    assert loaded.config == SMALL and torch.equal(loaded(images()), vit(images()))
    torch.save(wrap({**ours, "config": {"colour": 1}}), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="another version.*train it again"):
        load_dino(tmp_path / "model.pt")


def test_weights_by_name(monkeypatch, tmp_path):
    """A file in torch.hub's cache is used; without it and without network the error says where."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(VISION_TRANSFORMERS, "dino_vits16", replace(SMALL, **dino.V1))

    def no_network(url, path):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = "https://dl.fbaipublicfiles.com/dino/.*no route.*put it at"
    with pytest.raises(FileNotFoundError, match=message) as e:
        load_dino("dino_vits16")
    place = Path(str(e.value).split("put it at ")[1].split(",")[0])
    vit = VisionTransformer(VISION_TRANSFORMERS["dino_vits16"])
    torch.save(vit.state_dict(), place)
    assert torch.equal(load_dino("dino_vits16").cls_token, vit.cls_token)
    torch.save(VisionTransformer(SMALL).state_dict(), place)  # positions of another side
    with pytest.raises(ValueError, match=r"pos_embed \(got \(1, 17, 16\), need \(1, 3137, 16\)\)"):
        load_dino("dino_vits16")
    assert set(dino.WEIGHTS) == set(VISION_TRANSFORMERS) - {"tiny"}


def test_wrong_files_and_names(tmp_path):
    """Unknown names list the known ones; odd files get our message, not one of pickle or torch."""
    with pytest.raises(ValueError, match="unknown.*dino_vits16.*dinov2_vitl14_reg.*tiny.*random"):
        load_dino("dino_vitx")
    with pytest.raises(FileNotFoundError, match="no file .*check the path"):
        load_dino("runs/none/model.pt")
    with pytest.raises(FileNotFoundError, match="train.py"):
        load_dino("tiny")
    path = tmp_path / "w.pth"
    state = VisionTransformer(SMALL).state_dict()
    swiglu = {key.replace("mlp.fc1", "mlp.w12"): value for key, value in state.items()}
    chunked = {key.replace("blocks.", "blocks.0."): value for key, value in state.items()}
    for content, match in [(torch.zeros(3), "holds a Tensor"), ({"fc": torch.zeros(3)}, "'fc'"),
                           (swiglu, "blocks.0.mlp.fc1.weight"),
                           (chunked, "blocks.0.mlp.fc1.weight"),
                           ({**state, "extra": torch.zeros(1)}, "extra .got .1,., need none"),
                           ({"teacher": 3, 4: 5}, "patch_embed")]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=match):
            load_dino(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot read"):
        load_dino(path)


# ---- self-distillation ----

def test_schedules():
    """Cosine and linear schedules hit their ends and their middle."""
    assert [dino.cosine(0.996, 1.0, p) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    assert dino.cosine(0.04, 0.4, 0.25) == pytest.approx(0.4 - 0.18 * (1 + math.cos(math.pi / 4)))
    assert [dino.linear(0.04, 0.07, p, 0.1) for p in (0, 0.05, 0.1, 0.9)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07])


def test_multi_crop_shapes_range_and_determinism():
    """Global and local crops in [-1, 1]; equal generators, equal crops; grey stays grey."""
    x = images(3, 24)[:, :1].repeat(1, 3, 1, 1)
    large, small = dino.multi_crop(x, generator(), SMALL)
    assert large.shape == (6, 3, 16, 16) and small.shape == (6, 3, 8, 8)
    assert large.abs().max() <= 1 and torch.equal(large[:, 0], large[:, 2])
    assert torch.equal(large, dino.multi_crop(x, generator(), SMALL)[0])
    assert not torch.equal(large, dino.multi_crop(x, generator(1), SMALL)[0])
    assert not torch.equal(large[:3], large[3:])
    assert len(dino.multi_crop(x, generator(), SMALL, DINOConfig(local_crops=0))) == 1


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


def test_loss_by_hand():
    """Three student and two teacher views: the four cross terms, each view's own left out."""
    student = torch.randn(3, 5, 4, generator=generator())
    teacher = torch.randn(2, 5, 4, generator=generator(1))
    centre = torch.tensor([0.1, -0.2, 0.3, 0.0])
    loss, q = dino.dino_loss(student, teacher, centre, 0.1, 0.04)
    want = 0.0
    for t, s in [(0, 1), (0, 2), (1, 0), (1, 2)]:
        for b in range(5):
            target = torch.softmax((teacher[t, b] - centre) / 0.04, dim=0)
            want -= (target * torch.log_softmax(student[s, b] / 0.1, dim=0)).sum().item() / 5 / 4
    assert loss.item() == pytest.approx(want, rel=1e-5)  # float32 sums in another order
    assert torch.allclose(q.sum(dim=-1), torch.ones(2, 5))


def test_entropies_show_collapse():
    """Uniform outputs have entropy log K; one prototype for all has 0, also in the batch mean."""
    alike, one = torch.zeros(2, 6, 8), torch.tensor([9.0] + 7 * [0.0]).expand(2, 6, 8)
    centre = torch.zeros(8)
    for logits, want in ((alike, math.log(8)), (one, 0.0)):
        q = dino.dino_loss(logits, logits, centre, 0.1, 0.02)[1]
        assert dino.entropy(q).item() == pytest.approx(want, abs=1e-6)
        assert dino.entropy(q.mean(dim=(0, 1))).item() == pytest.approx(want, abs=1e-6)
    spread = 9 * torch.eye(8).expand(2, 8, 8)  # each image has its own prototype: healthy
    q = dino.dino_loss(spread, spread, centre, 0.1, 0.02)[1]
    assert dino.entropy(q) < 1e-6
    assert dino.entropy(q.mean(dim=(0, 1))).item() == pytest.approx(math.log(8))
    # centring takes a constant preference away, so the second collapse cannot last
    q = dino.dino_loss(one, one, one[0, 0], 0.1, 0.02)[1]
    assert dino.entropy(q).item() == pytest.approx(math.log(8), rel=1e-5)


def test_teacher_and_centre_closed_form():
    """With a constant student the teacher keeps m^n of its start; the centre is an EMA as well."""
    model = DINO(SMALL, replace(SMALL_DINO, momentum=(0.9, 0.9)))
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    start = [p.clone() for p in model.teacher.parameters()]
    target = [p.clone() for p in model.student.parameters()]
    centre = torch.zeros(12)
    for step in range(5):
        model.batch_centre.fill_(float(step))
        model.update_teacher(0.5)
        centre = 0.9 * centre + 0.1 * step
    for p, a, b in zip(model.teacher.parameters(), start, target):
        assert torch.allclose(p, b + 0.9 ** 5 * (a - b), atol=1e-5)
    assert torch.allclose(model.centre, centre)
    model.config = replace(SMALL_DINO, momentum=(0.9, 1.0))
    before = model.teacher["backbone"].cls_token.clone()
    model.update_teacher(1.0)
    assert torch.equal(model.teacher["backbone"].cls_token, before)  # stands still at the end


def test_batch_centre_is_the_mean_of_teacher_outputs():
    """The centre is taken from both global crops through the teacher, before centring."""
    model = DINO(SMALL, SMALL_DINO)
    model.loss(images(), 0.0, generator())
    large = dino.multi_crop(images(), generator(), SMALL, SMALL_DINO)[0]
    logits = model.teacher["head"](model.teacher["backbone"](large)[:, 0])
    assert logits.abs().max() <= 1 + 1e-6  # cosines
    assert torch.allclose(model.batch_centre, logits.mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_student_only(autocast):
    """Each parameter of the student gets a gradient, also in bfloat16; the teacher gets none."""
    model = DINO(SMALL, SMALL_DINO)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, logs = model.loss(images(), 0.0, generator())
    loss.backward()
    assert loss.dtype == torch.float32 and set(logs) == {"teacher_entropy", "batch_entropy"}
    for name, p in model.student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())


def test_frozen_prototypes():
    """In the first share of training the last layer gets no gradient, later it does."""
    model = DINO(SMALL, replace(SMALL_DINO, freeze=0.5))
    for progress, frozen in ((0.4, True), (0.5, False)):
        model.zero_grad()
        model.loss(images(), progress, generator())[0].backward()
        assert (model.student["head"].prototypes.grad is None) == frozen


def test_resume_equals_no_stop():
    """Teacher, student and centre come back from the state_dict: next steps agree to the bit."""
    def step(model, optimizer, i):
        loss, _ = model.loss(images(), i / 4, generator(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher(i / 4)
        return loss

    first, second = DINO(SMALL, SMALL_DINO), DINO(SMALL, SMALL_DINO)
    one = torch.optim.AdamW(first.student.parameters())
    for i in range(2):
        step(first, one, i)
    second.load_state_dict(first.state_dict())
    two = torch.optim.AdamW(second.student.parameters())
    two.load_state_dict(copy.deepcopy(one.state_dict()))  # else both share their moments
    for i in range(2, 4):
        assert torch.equal(step(first, one, i), step(second, two, i))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_it_learns():
    """Thirty steps on four images bring the loss down without either collapse."""
    torch.manual_seed(0)
    model = DINO(SMALL, replace(SMALL_DINO, prototypes=32))
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    history = []
    for i in range(30):
        loss, logs = model.loss(images(8), i / 30, generator(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher(i / 30)
        history.append(loss.item())
    assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])
    assert logs["teacher_entropy"] < 0.7 * math.log(32) and logs["batch_entropy"] > 1.0
    vit = model.teacher_vit()
    assert not vit.training and not any(p.requires_grad for p in vit.parameters())


# ---- the command ----

def run(monkeypatch, capsys, *arguments):
    """Exit code and both outputs of `python dino.py ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["dino.py", *map(str, arguments)])
    return dino.main(), "".join(capsys.readouterr())


def test_command_draws_attention(monkeypatch, capsys, tmp_path):
    """One panel for the image and one a head, from 8-bit colour and from 16-bit grey."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    vit = VisionTransformer(SMALL)
    ours = {"config": asdict(SMALL), "model": vit.state_dict()}
    torch.save({"embedder": ours}, "runs/a/model.pt")
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save("colour.png")
    Image.fromarray((np.arange(900).reshape(30, 30) * 70).astype(np.uint16)).save("deep.png")
    for image, extra in (("colour.png", ["--size", 32]),
                         ("deep.png", ["--embedder", "runs/a/model.pt"])):
        code, text = run(monkeypatch, capsys, "--image", image, *extra)
        assert code == 0 and "attention.png" in text
        assert Image.open("attention.png").size == (3 * 228, 228)  # 224 pixels and a border of 2
    deep = dino.open_image("deep.png", 30)
    assert deep.min() == -1 and deep.max() == 1 and len(deep.unique()) > 200  # not cut off at 255


@pytest.mark.parametrize("arguments, match", [
    (["--image", "x.png"], "python train.py"),
    (["--image", "x.png", "--embedder", "random"], "x.png"),
    (["--image", "bad.png", "--embedder", "random"], "bad.png"),
    (["--image", "good.png", "--embedder", "dino"], "dino_vits16"),
    (["--image", "good.png", "--embedder", "random", "--size", "30"], "use --size 24"),
    (["--image", "good.png", "--embedder", "random", "--size", "0"], "use --size 8"),
    (["--image", "good.png", "--embedder", "random", "--out", "no/such/a.png"], "no/such/a.png"),
    (["--image", "good.png", "--embedder", "random", "--out", "picture"], "picture"),
])
def test_command_refuses_with_exit_code_2(monkeypatch, capsys, tmp_path, arguments, match):
    """No weights, image or name, odd sides, a place not writable: one line, code 2."""
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save("good.png")
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2 and text.startswith("error: ") and match in text and text.count("\n") == 1
