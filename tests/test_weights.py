"""Tests of support/weights.py: official names and Hugging Face's layouts load, others are refused.

Libraries' layouts come with names, config.json and outputs (tests/reference/weights.npz).
"""
import json
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from dino import V1, V2, V2_REG, ViTConfig, VisionTransformer, load_dino
from make_diffusers import fill_parameters
from make_weights import DIFFUSERS, TRANSFORMERS, fill_state, inputs
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
           "vit": ViTConfig(14, 64, 2, 1, **{**V2, "image_size": 84}),
           "v1": ViTConfig(16, 64, 2, 1, **{**V1, "image_size": 64}),
           "reg": ViTConfig(14, 64, 2, 1, **{**V2_REG, "image_size": 84})}


@pytest.fixture(scope="module")
def states():
    """State dicts under official names; "v1" and "reg" are ViTs too."""
    return {name: dict(fill_parameters(NETWORKS.get(name, NETWORKS["vit"])[0](config),
                                       1).state_dict())
            for name, config in CONFIGS.items()}


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
    (folder / "config.json").write_text(json.dumps(files["config"]))
    return folder


def assert_close(ours, name):
    # float32 sums in another order differ by about 4e-6; other heads or groups by about 0.1
    np.testing.assert_allclose(ours, REFERENCE[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", DIFFUSERS)
@torch.no_grad()
def test_parity_with_diffusers(case, tmp_path):
    """Other heads and groups are read from config.json."""
    folder = library_folder(case, tmp_path)
    if case.startswith("vae"):
        vae = AutoencoderKL.from_pretrained(folder)
        x, z = inputs((2, 3, 16, 24), (2, 4, 8, 12))
        assert_close(vae.encode(x).mean, f"{case}_mean")
        assert_close(vae.decode(z), f"{case}_decoded")
    else:
        unet = UNet.from_pretrained(folder)
        xt, context = inputs((2, 4, 8, 12), (2, 5, 24))
        assert_close(unet(xt, torch.tensor([17, 981]), context), f"{case}_out")


@pytest.mark.parametrize("case", TRANSFORMERS)
@torch.no_grad()
def test_parity_with_transformers(case, tmp_path):
    """Positions are resized as there; heads come from config.json."""
    vit = load_dino(library_folder(case, tmp_path))
    x, = inputs((2, 3, 56, 84))
    assert vit.config.num_heads == 4
    assert_close(vit(x), f"{case}_out")


@pytest.mark.parametrize("name", ["v1", "vit", "reg"])
def test_official_vits(name, states, tmp_path):
    """Meta's files, and the same in a wrapper, give the config and the weights."""
    torch.save(states[name], tmp_path / "w.pth")
    assert assert_same(tmp_path / "w.pth", states[name], "vit") == CONFIGS[name]
    torch.save({"state_dict": states[name]}, tmp_path / "w.pth")
    assert assert_same(tmp_path / "w.pth", states[name], "vit") == CONFIGS[name]


# ---- files and folders ----

@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_files_and_folders(kind, states, tmp_path):
    """Half precision, variants and subfolders hold the same weights, read as float32."""
    half = {name: tensor.half() for name, tensor in states[kind].items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    stem = "diffusion_pytorch_model"
    for variant, ending, given, expected in (
            ("bin", ".bin", half, rounded), ("plain", ".safetensors", states[kind], states[kind]),
            ("fp16", ".fp16.safetensors", half, rounded)):
        folder = tmp_path / variant / kind
        folder.mkdir(parents=True)
        file = folder / f"{stem}{ending}"
        if ending == ".bin":
            torch.save(given, file)
        else:
            write_safetensors(file, given)
        for path in (file, folder, folder.parent):
            assert assert_same(path, expected, kind) == CONFIGS[kind]


def test_attention_names_of_older_diffusers(states, tmp_path):
    """Files with query, key, value and proj_attn, such as sd-vae-ft-mse, load."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in states["vae"].items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    torch.save(old, tmp_path / "old.pt")
    assert_same(tmp_path / "old.pt", states["vae"], "vae")


def test_own_checkpoints(states, tmp_path):
    """A run's model.pt and its folder, with settings that no shape tells."""
    vit_config = ViTConfig(14, 64, 2, 2, **{**V2, "image_size": 84})
    vit = {f"vit.{name}": value for name, value in states["vit"].items()}
    unet_config = UNetConfig(4, 4, 32, (1, 2, 3), 2, (True, True, False), 24, 4)
    content = {"version": 3, "vae": states["vae"], "unet": states["unet"], "embedder": vit,
               "config": {"vae": asdict(CONFIGS["vae"]), "unet": asdict(unet_config),
                          "vit": asdict(vit_config)}}
    torch.save(content, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"steps": 3}')  # the run's, not the network's
    for path in (tmp_path, tmp_path / "model.pt"):
        assert assert_same(path, states["vae"], "vae") == CONFIGS["vae"]
        assert assert_same(path, states["unet"], "unet") == unet_config
        assert assert_same(path, states["vit"], "vit").num_heads == 2

    torch.save({"config": {"vit": {"colour": 1}}, "embedder": vit}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="vit.pt does not fit .*colour.*pass another file"):
        load_dino(tmp_path / "vit.pt")


def test_published_names(states, monkeypatch, tmp_path):
    """A file in torch.hub's folder is used; without it and a network the error says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(url, path, hash_prefix):
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)

    for kind, names in PUBLISHED.items():
        for name, (url, _) in names.items():
            with pytest.raises(FileNotFoundError, match=f"could not download {name} .*no route.*"
                               f"save {url} as {tmp_path}/hub/checkpoints/"):
                load_weights(name, kind)

    checkpoints = tmp_path / "hub" / "checkpoints"
    torch.save(states["v1"], checkpoints / "dino_deitsmall16_pretrain.pth")
    assert load_dino("dino_vits16").config == CONFIGS["v1"]
    write_safetensors(checkpoints / "vae-sd-vae-ft-mse.safetensors", states["vae"])
    assert AutoencoderKL.from_pretrained("sd-vae-ft-mse").config == CONFIGS["vae"]
    write_safetensors(checkpoints / "vit-rad-dino.safetensors", states["vit"])
    for name in ("rad-dino", "microsoft/rad-dino"):
        config = load_dino(name).config
        assert config.normalise == "rad_dino" and config.input_side == 0


# ---- config.json, and what does not fit ----

def write_folder(folder, state, config, preprocessor=None):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def test_config_is_honoured(states, tmp_path):
    """Heads, groups and pixel statistics come from the folder; other programs' are left alone."""
    unet = {"_class_name": "UNet2DConditionModel"}
    for key, heads in (("attention_head_dim", 4), ("num_attention_heads", 2)):
        write_folder(tmp_path / "u", states["unet"], {**unet, key: heads, "norm_num_groups": 16})
        settings = load_weights(tmp_path / "u", "unet")[1]
        assert settings["num_heads"] == heads and settings["norm_groups"] == 16
    write_folder(tmp_path / "v", states["vae"], {"steps": 3})  # another program's
    assert load_weights(tmp_path / "v", "vae")[1]["norm_groups"] == 0

    dinov2 = {"model_type": "dinov2", "num_attention_heads": 4}
    for mean, rule in (([0.485, 0.456, 0.406], "imagenet"), ([0.5307] * 3, "rad_dino")):
        write_folder(tmp_path / "d", states["vit"], dinov2, {"image_mean": mean})
        assert load_weights(tmp_path / "d", "vit")[1]["normalise"] == rule
    write_folder(tmp_path / "d", states["vit"], dinov2, {"image_mean": [0.5] * 3})
    with pytest.raises(ValueError, match="mean 0.5 .*pass other weights"):
        load_weights(tmp_path / "d", "vit")


@pytest.mark.parametrize("kind,config,match", [
    ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos = False.*pass other weights"),
    ("unet", {"attention_head_dim": 5}, "u does not fit .*num_heads"),
    ("unet", {"attention_head_dim": [2, 4, 6]}, "one number for all levels"),
    ("vae", "{", "config.json is damaged .*download it again")])
def test_config_is_refused(kind, config, match, states, tmp_path):
    """Options that are not implemented here are refused when the folder is read."""
    if isinstance(config, dict):
        config = {"_class_name": {"vae": "AutoencoderKL"}.get(kind, "UNet2DConditionModel"),
                  **config}
    write_folder(tmp_path / "u", states[kind], config)
    with pytest.raises(ValueError, match=match):
        load_model(*NETWORKS[kind], tmp_path / "u", kind)


@pytest.mark.parametrize("kind,change,match", [
    ("vae", lambda s: {"first_stage_model.encoder.conv_in.weight": s["encoder.conv_in.weight"]},
     "CompVis.*from_single_file"),
    ("unet", lambda s: {name: t[..., 0, 0] if "proj_in.weight" in name else t
                        for name, t in s.items()}, "Stable Diffusion 2 .*sd15"),
    ("vit", lambda s: {name: t for name, t in s.items() if name != "mask_token"}, "timm.*Meta's")])
def test_other_layouts_are_refused_by_name(kind, change, match, states, tmp_path):
    """Layouts that are often taken for those that fit are called by name, with the way out."""
    torch.save(change(states[kind]), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt holds .*{match}"):
        load_weights(tmp_path / "w.pt", kind)


def test_missing_and_other_files(states, tmp_path):
    """A wrong path lists what is accepted; other networks say what is missing; loading is strict.
    """
    with pytest.raises(FileNotFoundError, match="no weights at .*train.py"):
        load_weights(tmp_path / "nothing", "vae")
    for kind, other in (("vae", "unet"), ("unet", "vae"), ("vit", "vae")):
        torch.save(states[other], tmp_path / "w.pt")
        with pytest.raises(ValueError, match="w.pt is not .* is missing.*pass another file"):
            load_weights(tmp_path / "w.pt", kind)

    state = {**states["vae"], "decoder.extra.weight": torch.zeros(1)}
    del state["quant_conv.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt does not fit .*quant_conv.bias.*pass another file"):
        AutoencoderKL.from_pretrained(tmp_path / "w.pt")
