"""Tests of support/weights.py: every published layout, from miniatures that are made here.

Layouts of libraries come with their names, config.json and outputs (tests/reference/weights.npz);
others are made from our own names by the opposite of what the reader does, and must give back the
same network.
"""
import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "reference"))

from dino import V1, V2, V2_REG, ViTConfig, VisionTransformer, load_dino
from make_diffusers import fill_parameters
from make_weights import DIFFUSERS, TIMM, TRANSFORMERS, fill_state, inputs
from support import weights
from support.tensors import write_safetensors
from support.weights import PUBLISHED, load_model, load_weights
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

REFERENCE = np.load(Path(__file__).parent / "reference" / "weights.npz")
NETWORKS = {"vae": (AutoencoderKL, VAEConfig), "unet": (UNet, UNetConfig),
            "vit": (VisionTransformer, ViTConfig)}
# Three levels, so that counting them from the wrong end shows; two ResNet blocks a level likewise.
CONFIGS = {"vae": VAEConfig(3, 4, 32, (1, 2, 4), 1),
           "unet": UNetConfig(4, 4, 32, (1, 2, 3), 2, (True, True, False), 24, 8),
           "vit": ViTConfig(14, 64, 2, 1, **{**V2, "image_size": 84})}
V1_CONFIG = ViTConfig(16, 64, 2, 1, **{**V1, "image_size": 64})
REG_CONFIG = ViTConfig(14, 64, 2, 1, **{**V2_REG, "image_size": 84})


@pytest.fixture(scope="module")
def states():
    """State dicts under our own names, by kind; "v1" and "reg" are ViTs too."""
    made = {kind: NETWORKS[kind][0](config) for kind, config in CONFIGS.items()}
    made["v1"] = VisionTransformer(V1_CONFIG)
    made["reg"] = VisionTransformer(REG_CONFIG)
    found = {name: dict(fill_parameters(network, 1).state_dict())
             for name, network in made.items()}
    for name in ("vit", "reg"):
        found[name]["mask_token"].zero_()  # not used
    return found


def assert_same(path, state, kind):
    """The file holds exactly this state; returns the config of the network that it fills."""
    model = load_model(*NETWORKS[kind], path, kind)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    return model.config


# ---- layouts of libraries, with their outputs ----

def library_folder(case, folder):
    """A folder as the library saves it, with the values its outputs were made with."""
    files = json.loads(str(REFERENCE[case]))
    stem = "diffusion_pytorch_model" if case in DIFFUSERS else "model"
    write_safetensors(folder / f"{stem}.safetensors", fill_state(files["shapes"]))
    if files["config"] is not None:
        (folder / "config.json").write_text(json.dumps(files["config"]))
    return folder


def assert_close(ours, name):
    # float32 sums in another order differ by about 4e-6; other heads or groups by about 0.1
    np.testing.assert_allclose(ours, REFERENCE[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", DIFFUSERS)
@torch.no_grad()
def test_parity_with_diffusers(case, tmp_path):
    """Other heads, groups and channels, and linear projections, are read off config.json."""
    folder = library_folder(case, tmp_path)
    if case.startswith("vae"):
        vae = AutoencoderKL.from_pretrained(folder)
        channels = DIFFUSERS[case][1].get("in_channels", 3)
        x, z = inputs((2, channels, 16, 24), (2, 4, 8, 12))
        assert_close(vae.encode(x.expand(-1, 3, -1, -1)).mean, f"{case}_mean")
        assert_close(vae.decode(z)[:, :channels], f"{case}_decoded")
    else:
        unet = UNet.from_pretrained(folder)
        xt, context = inputs((2, 4, 8, 12), (2, 5, 24))
        assert_close(unet(xt, torch.tensor([17, 981]), context), f"{case}_out")


@pytest.mark.parametrize("case", [*TRANSFORMERS, *TIMM])
@torch.no_grad()
def test_parity_with_transformers_and_timm(case, tmp_path):
    """Folders of both libraries, with positions resized where they do it; heads off config.json."""
    vit = load_dino(library_folder(case, tmp_path))
    x, = inputs((2, 3, 56 if case in TRANSFORMERS else 84, 84))
    assert vit.config.num_heads == (4 if case in TRANSFORMERS else 1)
    assert_close(vit(x), f"{case}_out")


# ---- layouts made from our own names ----

def rename(state, *pairs):
    """The state with every (pattern, replacement) applied to every name."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def compvis_vae(state):
    """As the authors of latent diffusion name it: levels of the decoder from the other end."""
    last = 2

    def up(match):
        return f"up.{last - int(match[1])}."
    state = rename(
        state, (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.", up), (r"(up\.\d)\.resnets", r"\1.block"),
        (r"(up\.\d)\.upsamplers\.0", r"\1.upsample"), (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"), (r"attn_1\.to_([qkv])", r"attn_1.\1"),
        (r"attn_1\.to_out\.0", "attn_1.proj_out"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"))
    return {name: tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
            for name, tensor in state.items()}


def compvis_unet(state, layers=2):
    """As the authors name it: blocks counted in a row, through all levels."""
    def place(match):
        side, level, kind, layer = match.groups()
        number = int(level) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{number + layers + 1}.0.op"
        if kind == "upsamplers":
            part = 1 if int(level) == 0 else 2  # behind the attention, where there is one
            return f"output_blocks.{number + layers}.{part}.conv"
        number += int(layer) + (1 if side == "down" else 0)
        blocks = "input_blocks" if side == "down" else "output_blocks"
        return f"{blocks}.{number}.{0 if kind == 'resnets' else 1}"
    return rename(
        state, (r"(resnets\.\d)\.norm1", r"\1.in_layers.0"),
        (r"(resnets\.\d)\.conv1", r"\1.in_layers.2"),
        (r"(resnets\.\d)\.time_emb_proj", r"\1.emb_layers.1"),
        (r"(resnets\.\d)\.norm2", r"\1.out_layers.0"),
        (r"(resnets\.\d)\.conv2", r"\1.out_layers.3"),
        (r"(resnets\.\d)\.conv_shortcut", r"\1.skip_connection"),
        (r"(up|down)_blocks\.(\d)\.(\w+samplers)\.(\d)\.conv", place),
        (r"(up|down)_blocks\.(\d)\.(resnets|attentions)\.(\d)", place),
        (r"mid_block\.resnets\.0", "middle_block.0"),
        (r"mid_block\.attentions\.0", "middle_block.1"),
        (r"mid_block\.resnets\.1", "middle_block.2"),
        (r"time_embedding\.linear_1", "time_embed.0"),
        (r"time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"))


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_compvis_files(ending, states, tmp_path, capsys):
    """The authors' files: the autoencoder alone, and all of Stable Diffusion in one file."""
    vae = compvis_vae(states["vae"])
    unet = compvis_unet(states["unet"])
    assert {"decoder.up.0.block.1.conv2.weight", "encoder.mid.attn_1.proj_out.bias"} <= vae.keys()
    assert {"input_blocks.3.0.op.bias", "output_blocks.2.1.conv.weight", "middle_block.1.norm.bias",
            "output_blocks.5.2.conv.weight", "input_blocks.4.0.skip_connection.bias"} <= unet.keys()
    whole = {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    whole |= {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    whole["cond_stage_model.transformer.position_ids"] = torch.arange(77)
    whole["model_ema.decay"] = torch.ones(())
    alone = {**vae, "loss.logvar": torch.zeros(())}

    for name, content in (("alone", alone), ("whole", whole)):
        if ending == ".safetensors":
            write_safetensors(tmp_path / f"{name}.safetensors", content)
        else:
            torch.save({"state_dict": content, "global_step": 7}, tmp_path / f"{name}.ckpt")
        assert assert_same(tmp_path / f"{name}{ending}", states["vae"], "vae") == CONFIGS["vae"]
    assert "shapes do not tell the groups" in capsys.readouterr().out
    assert assert_same(tmp_path / f"whole{ending}", states["unet"], "unet") == CONFIGS["unet"]
    note = capsys.readouterr().out
    assert f"whole{ending} has no config.json" in note and "8 heads and 32 groups" in note


def test_older_attention_names_of_diffusers(states, tmp_path):
    """Files with query, key, value, proj_attn, linear or 1x1 convolutions, load as the new ones."""
    for is_convolution in (False, True):
        old = rename(states["vae"], (r"\.to_q\.", ".query."), (r"\.to_k\.", ".key."),
                     (r"\.to_v\.", ".value."), (r"\.to_out\.0\.", ".proj_attn."))
        if is_convolution:
            old = {name: tensor[:, :, None, None] if ".attentions.0.group" not in name and
                   ".attentions." in name and tensor.ndim == 2 else tensor
                   for name, tensor in old.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
        torch.save(old, tmp_path / "old.pt")
        assert_same(tmp_path / "old.pt", states["vae"], "vae")


def head(prefix):
    return {f"{prefix}head.mlp.0.weight": torch.zeros(8, 64),
            f"{prefix}head.last_layer.weight_g": torch.ones(4, 1)}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def separate(state, query="attention.attention.query", key="attention.attention.key",
             value="attention.attention.value"):
    """qkv as three layers."""
    separated = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, third in zip((query, key, value), tensor.chunk(3)):
                separated[name.replace("attn.qkv", part)] = third.clone()
        else:
            separated[name] = tensor
    return separated


def in_transformers(state):
    """facebook/dinov2-* and microsoft/rad-dino."""
    return rename(
        separate(state), (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
        ("^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."), (r"^blocks", "encoder.layer"),
        (r"attn\.proj", "attention.output.dense"), (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"))


def in_transformers_vit(state):
    """facebook/dino-*."""
    return rename(
        in_transformers(state), (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."))


def in_version_5(state):
    """What transformers 5 calls its layers in memory."""
    state = separate(state, "attention.q_proj", "attention.k_proj", "attention.v_proj")
    return rename(in_transformers_vit(state), (r"encoder\.layer\.", "layers."),
                  (r"attention\.output\.dense", "attention.o_proj"),
                  (r"intermediate\.dense", "mlp.fc1"), (r"output\.dense", "mlp.fc2"))


def timm_registers(state):
    """The class token holds its position."""
    state = rename(without(state, "mask_token"), ("register_tokens", "reg_token"))
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


VIT_FORMS = {
    "official v1": ("v1", dict),
    "official v2": ("vit", dict),
    "official registers": ("reg", dict),
    "full checkpoint of DINO": ("v1", lambda s: {
        "student": {**prefixed("module.backbone.", s), **head("module.")},
        "teacher": {**prefixed("backbone.", s), **head("")}, "epoch": 100,
        "optimizer": {"state": {}}, "args": argparse.Namespace(arch="vit_small")}),
    "student of DINO": ("v1", lambda s: {"student": prefixed("module.backbone.", s)}),
    "teacher of DINOv2": ("vit", lambda s: {
        "teacher": {**prefixed("backbone.", s), **head("dino_"), **head("ibot_")}}),
    "block chunks of DINOv2": ("reg", lambda s: {"teacher": rename(
        prefixed("backbone.", s), (r"blocks\.(\d)", r"blocks.7.\1"))}),
    "both networks of DINOv2": ("reg", lambda s: {"model": {
        **prefixed("teacher.backbone.", s), **prefixed("student.backbone.", s)}}),
    "module.": ("v1", lambda s: prefixed("module.", s)),
    "under state_dict": ("v1", lambda s: {"state_dict": s}),
    "under model": ("v1", lambda s: {"model": s, "epoch": 1}),
    "with a linear head": ("v1", lambda s: {**s, "head.weight": torch.zeros(2, 64),
                                            "head.bias": torch.zeros(2)}),
    "timm": ("vit", lambda s: without(s, "mask_token")),
    "timm registers": ("reg", timm_registers),
    "transformers dino": ("v1", lambda s: {**in_transformers_vit(s),
                                           "pooler.dense.weight": torch.zeros(64, 64)}),
    "transformers 5 in memory": ("v1", in_version_5),
    "transformers dinov2": ("vit", in_transformers),
    "transformers registers": ("reg", in_transformers),
    "transformers classifier": ("vit", lambda s: {**prefixed("dinov2.", in_transformers(s)),
                                                  "classifier.weight": torch.zeros(2, 128)}),
}


@pytest.mark.parametrize("form", VIT_FORMS)
@torch.no_grad()
def test_vit_forms(form, states, tmp_path):
    """All layouts of a ViT give the same tokens; the file is .pth or, if it can be, .safetensors.
    """
    name, make = VIT_FORMS[form]
    content = make(states[name])
    config = {"v1": V1_CONFIG, "vit": CONFIGS["vit"], "reg": REG_CONFIG}[name]
    reference = VisionTransformer(config)
    reference.load_state_dict(states[name])
    x, = inputs((1, 3, 70, 84) if name != "v1" else (1, 3, 48, 64))
    torch.save(content, tmp_path / "w.pth")
    paths = [tmp_path / "w.pth"]
    if all(map(torch.is_tensor, content.values())):
        write_safetensors(tmp_path / "w.safetensors", content)
        paths.append(tmp_path / "w.safetensors")
    for path in paths:
        vit = load_dino(path)
        assert vit.config == config
        # timm adds the position to the class token beforehand: one rounding
        torch.testing.assert_close(vit(x), reference(x), rtol=0,
                                   atol=1e-5 if form == "timm registers" else 0)


@torch.no_grad()
def test_one_channel(states, tmp_path):
    """Grey networks work on grey images as three channels, with the results of one."""
    x, = inputs((1, 1, 56, 56))
    grey = dict(states["vae"])
    grey["encoder.conv_in.weight"] = grey["encoder.conv_in.weight"].sum(1, keepdim=True)
    grey["decoder.conv_out.weight"] = grey["decoder.conv_out.weight"][:1]
    grey["decoder.conv_out.bias"] = grey["decoder.conv_out.bias"][:1]
    torch.save(grey, tmp_path / "grey.pt")
    torch.save(states["vae"], tmp_path / "colour.pt")
    one = AutoencoderKL.from_pretrained(tmp_path / "grey.pt")
    three = AutoencoderKL.from_pretrained(tmp_path / "colour.pt")
    colour = x.expand(-1, 3, -1, -1)
    latent = one.encode(colour).mean
    torch.testing.assert_close(latent, three.encode(colour).mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.encode(x).mean, latent)
    y = one.decode(latent)
    assert torch.equal(y[:, 0], y[:, 2])
    torch.testing.assert_close(y[:, :1], three.decode(latent)[:, :1], rtol=0, atol=1e-5)

    grey = dict(states["vit"])
    grey["patch_embed.proj.weight"] = grey["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.save(grey, tmp_path / "stem.pt")
    stem = load_dino(tmp_path / "stem.pt").patch_embed["proj"]
    torch.testing.assert_close(stem(colour) - stem.bias[:, None, None],
                               torch.conv2d(x, grey["patch_embed.proj.weight"], stride=14),
                               rtol=0, atol=1e-5)


# ---- files and folders ----

@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_files_and_folders(kind, states, tmp_path):
    """Half precision, variants, pieces and subfolders hold the same weights, read as float32."""
    half = {name: tensor.half() for name, tensor in states[kind].items()}
    brain = {name: tensor.bfloat16() for name, tensor in states[kind].items()}
    stem = "diffusion_pytorch_model"

    def folder(variant):
        path = tmp_path / variant / kind
        path.mkdir(parents=True)
        return path
    torch.save(half, folder("bin") / f"{stem}.bin")
    write_safetensors(folder("plain") / f"{stem}.safetensors", states[kind])
    write_safetensors(folder("fp16") / f"{stem}.fp16.safetensors", half)
    write_safetensors(folder("bf16") / f"{stem}.safetensors", brain)
    places = {name: f"{stem}-{i % 2}.safetensors" for i, name in enumerate(half)}
    pieces = folder("pieces")
    (pieces / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for place in set(places.values()):
        write_safetensors(pieces / place, {name: tensor for name, tensor in half.items()
                                           if places[name] == place})

    expected = {"bin": half, "plain": states[kind], "fp16": half, "bf16": brain, "pieces": half}
    for variant, tensors in expected.items():
        file, = (tmp_path / variant / kind).glob(f"{stem}.*")
        for path in (file, file.parent, file.parent.parent):
            found, _ = load_weights(path, kind)
            assert found.keys() == tensors.keys()
            for name, tensor in found.items():
                assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float())


def test_own_checkpoints(states, tmp_path):
    """A run's model.pt, its folder, and an embedder alone, with settings that no shape tells."""
    vit = {"config": asdict(ViTConfig(14, 64, 2, 2, **{**V2, "image_size": 84})),
           "model": states["vit"]}
    unet_config = UNetConfig(4, 4, 32, (1, 2, 3), 2, (True, True, False), 24, 4)
    content = {"version": 2, "vae": states["vae"], "unet": states["unet"], "embedder": vit,
               "config": {"vae": asdict(CONFIGS["vae"]), "unet": asdict(unet_config), "vit": {}}}
    torch.save(content, tmp_path / "model.pt")
    torch.save(vit, tmp_path / "vit.pt")
    (tmp_path / "config.json").write_text('{"steps": 3}')  # the run's, not the network's
    for path in (tmp_path, tmp_path / "model.pt"):
        assert assert_same(path, states["vae"], "vae") == CONFIGS["vae"]
        assert assert_same(path, states["unet"], "unet") == unet_config
        assert assert_same(path, states["vit"], "vit").num_heads == 2
    assert assert_same(tmp_path / "vit.pt", states["vit"], "vit").num_heads == 2

    for settings, match in (({"colour": 1}, "colour"), ({"depth": 10**9}, "depth")):
        torch.save({"config": settings, "model": states["vit"]}, tmp_path / "vit.pt")
        with pytest.raises(ValueError, match=f"vit.pt does not fit .*{match}.*trained by this "
                           "version.*pass another file"):
            load_dino(tmp_path / "vit.pt")
    torch.save({"config": {"depth": 2}, "model": {"norm.weight": "text"}}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="vit.pt does not fit .*not every entry is a tensor"):
        load_dino(tmp_path / "vit.pt")
    torch.save({"config": {}, "unet": states["unet"]}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="does not fit .*'vae'"):
        AutoencoderKL.from_pretrained(tmp_path / "vit.pt")


def test_published_names(states, monkeypatch, tmp_path, capsys):
    """A file in torch.hub's folder is used; without it and a network the error says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def no_network(url, path, hash_prefix):
        asked.append((url, path, hash_prefix))
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)

    for kind, names in PUBLISHED.items():
        for name, url in names.items():
            with pytest.raises(FileNotFoundError, match=f"could not download {name} .*no route.*"
                               f"put {url} at {tmp_path}/hub/checkpoints/"):
                load_weights(name, kind)
            assert asked[-1][0] == url
    places = {url.removeprefix("https://dl.fbaipublicfiles.com/"): (Path(path).name, digits)
              for url, path, digits in asked}
    assert places["dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"] == (
        "dinov2_vitl14_reg4_pretrain.pth", "36e4deffbaef061a")
    assert "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth" in places
    assert "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth" in places

    checkpoints = tmp_path / "hub" / "checkpoints"
    torch.save(states["v1"], checkpoints / "dino_deitsmall16_pretrain.pth")
    assert load_dino("dino_vits16").config == V1_CONFIG
    write_safetensors(checkpoints / "vae-sd-vae-ft-mse.safetensors", states["vae"])
    assert AutoencoderKL.from_pretrained("sd-vae-ft-mse").config == CONFIGS["vae"]
    write_safetensors(checkpoints / "vit-rad-dino.safetensors", in_transformers(states["vit"]))
    for name in ("rad-dino", "microsoft/rad-dino"):
        assert load_dino(name).config.normalise == "rad_dino"


# ---- config.json ----

def write_folder(folder, state, config, preprocessor=None):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def test_config_is_honoured(states, tmp_path, capsys):
    """Heads, groups and pixels' normalisation come from the folder, and nothing is assumed."""
    write_folder(tmp_path / "u", states["unet"], {"_class_name": "UNet2DConditionModel",
                                                  "attention_head_dim": 4})
    assert load_weights(tmp_path / "u", "unet")[1]["num_heads"] == 4
    write_folder(tmp_path / "u", states["unet"], {"num_attention_heads": [2, 4, 6]})
    assert load_weights(tmp_path / "u", "unet")[1]["num_heads"] == (2, 4, 6)
    write_folder(tmp_path / "v", states["vae"], {"norm_num_groups": 16})
    assert load_weights(tmp_path / "v", "vae")[1]["norm_groups"] == 16
    assert not capsys.readouterr().out
    write_folder(tmp_path / "v", states["vae"], {"steps": 3})  # another program's
    load_weights(tmp_path / "v", "vae")
    assert "32 are assumed" in capsys.readouterr().out

    dinov2 = {"model_type": "dinov2", "num_attention_heads": 4}
    for mean, rule in (([0.485, 0.456, 0.406], "imagenet"), ([0.5307] * 3, "rad_dino")):
        write_folder(tmp_path / "d", in_transformers(states["vit"]), dinov2, {"image_mean": mean})
        settings = load_weights(tmp_path / "d", "vit")[1]
        assert settings["normalise"] == rule and settings["num_heads"] == 4
    timm = {"architecture": "vit_tiny", "pretrained_cfg": {"mean": [0.5] * 3}}
    for config, preprocessor in ((dinov2, {"image_mean": [0.5] * 3}), (timm, None)):
        write_folder(tmp_path / "t", states["vit"], config, preprocessor)
        with pytest.raises(ValueError, match=r"mean \[0.5, 0.5, 0.5\].*pass other weights"):
            load_weights(tmp_path / "t", "vit")
        (tmp_path / "t" / "preprocessor_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind,config,match", [
    ("unet", {"act_fn": "gelu"}, "act_fn = gelu.*silu is needed: pass other weights"),
    ("unet", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
    ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
    ("unet", {"attention_head_dim": 5}, "u does not fit .*num_heads"),
    ("unet", {"attention_head_dim": "many"}, "u does not fit"),
    ("unet", {"attention_head_dim": [2, 4]}, "u does not fit .*num_heads"),
    ("unet", {"norm_num_groups": 7}, "u does not fit .*divisible"),
    ("vae", {"norm_num_groups": 0}, "norm_num_groups = 0.*needed: pass other weights"),
    ("vae", {"norm_num_groups": "many"}, "norm_num_groups = many"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "config.json says AutoencoderTiny.*AutoencoderKL"),
    ("vae", {"_class_name": "VQModel"}, "says VQModel"),
    ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention"),
    ("vae", "{", "config.json cannot be read.*download it again"),
    ("vae", "[]", "config.json cannot be read"),
    ("vit", {"model_type": "dinov3_vit"}, "says dinov3_vit.*dinov2"),
    ("vit", {"model_type": "beit"}, "says beit"),
    ("vit", {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
    ("vit", {"num_attention_heads": 5}, "64 channels and 5 heads"),
    ("vit", {"num_attention_heads": "many"}, "64 channels and many heads"),
    ("vit", {"hidden_act": "quick_gelu"}, "hidden_act")])
def test_config_is_refused(kind, config, match, states, tmp_path):
    """What the networks here cannot do is refused when the folder is read."""
    write_folder(tmp_path / "u", states[kind], config)
    with pytest.raises(ValueError, match=match):
        load_model(*NETWORKS[kind], tmp_path / "u", kind)


# ---- what does not fit ----

@pytest.mark.parametrize("kind,names,what", [
    ("vae", ["encoder.layers.0.weight"], "TAESD"), ("vae", ["1.conv.0.weight"], "TAESD"),
    ("vae", ["quantize.embedding.weight"], "codebook"),
    ("vae", ["encoder.down.4.attn.0.q.weight"], "kl-f16"),
    ("unet", ["add_embedding.linear_1.weight"], "SDXL"), ("unet", ["label_emb.0.0.weight"], "SDXL"),
    ("unet", ["controlnet_cond_embedding.conv_in.weight"], "ControlNet"),
    ("unet", ["lora_unet_down_blocks_0.alpha"], "LoRA"),
    ("unet", ["transformer_blocks.0.norm1.weight"], "transformer"),
    ("vit", ["blocks.0.mlp.w12.weight"], "SwiGLU"),
    ("vit", ["encoder.layer.0.mlp.weights_in.weight"], "SwiGLU"),
    ("vit", ["storage_tokens"], "DINOv3"), ("vit", ["layer.0.attention.q_proj.weight"], "DINOv3"),
    ("vit", ["blocks.0.gamma_1"], "DINOv3"), ("vit", ["module.layer1.0.conv1.weight"], "ResNet"),
    ("vit", ["stages.0.0.gamma"], "ConvNeXt")])
def test_refused_by_name(kind, names, what, tmp_path):
    """Networks that are often taken for those that fit are called by their name."""
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt holds .*{what}.*is needed: pass another file"):
        load_weights(tmp_path / "w.pt", kind)


def test_missing_and_other_files(states, tmp_path, monkeypatch):
    """Wrong paths list what is accepted; foreign files say what is missing; shapes are compared."""
    monkeypatch.chdir(tmp_path)
    for kind in NETWORKS:
        for path in (tmp_path / "nothing", tmp_path, "tiny", "runs/none/model.pt"):
            with pytest.raises(FileNotFoundError, match="no weights at .*give another path or one "
                               f"of {next(iter(PUBLISHED[kind]))}.*train.py"):
                load_weights(path, kind)
    for kind, other, missing in (("vae", "unet", "'encoder.conv_in.weight'"),
                                 ("unet", "vae", "'conv_in.weight'"),
                                 ("vit", "vae", "'patch_embed.proj.weight'")):
        torch.save(states[other], tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"w.pt is not {weights.NEEDED[kind]} .{missing} is "
                           "missing.*pass that file"):
            load_weights(tmp_path / "w.pt", kind)
        for content in ({4: 5}, {"state_dict": {"a": 1}}, {}, {**states[kind], "a": states[kind]}):
            torch.save(content, tmp_path / "w.pt")
            with pytest.raises(ValueError, match="w.pt is not "):
                load_weights(tmp_path / "w.pt", kind)

    names = {"vae": "encoder.conv_in.weight", "unet": "conv_in.weight",
             "vit": "patch_embed.proj.weight"}
    for kind, name in names.items():  # a shape that no network has
        for shape in ((3,), (3, 1)):
            torch.save({**states[kind], name: torch.zeros(shape)}, tmp_path / "w.pt")
            with pytest.raises(ValueError, match="w.pt .*needed: pass "):
                load_model(*NETWORKS[kind], tmp_path / "w.pt", kind)

    state = dict(states["vae"])
    state["decoder.extra.weight"] = torch.zeros(1)
    state["encoder.conv_out.bias"] = torch.zeros(5)
    del state["quant_conv.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"3 differ, first: decoder.extra.weight is \(1,\) instead "
                       r"of nothing; encoder.conv_out.bias is \(5,\) instead of \(8,\).*pass the"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")

    narrow = VisionTransformer(ViTConfig(4, 48, 1, 3, 16)).state_dict()
    torch.save(narrow, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="48 channels and 0.75 heads.*config.json"):
        load_dino(tmp_path / "w.pt")


def test_filling_keeps_the_order_in_memory(states, tmp_path):
    """Convolutions stay as the network laid them out, and parameters can be trained."""
    torch.save(states["unet"], tmp_path / "w.pt")
    loaded = UNet.from_pretrained(tmp_path / "w.pt")
    fresh = UNet(CONFIGS["unet"])
    for (name, parameter), other in zip(loaded.named_parameters(), fresh.parameters()):
        assert parameter.requires_grad and parameter.stride() == other.stride(), name
