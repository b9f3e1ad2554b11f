"""support/weights.py: official names and Hugging Face's layouts load, others are refused.

tests/reference/weights.npz has the names, config.json and outputs of the libraries' networks.
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
from support.weights import PUBLISHED, load_model, read_tensors, write_safetensors
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

REFERENCE = np.load(Path(__file__).parent / "reference" / "weights.npz")
NETWORKS = {"vae": (AutoencoderKL, VAEConfig), "unet": (UNet, UNetConfig),
            "vit": (VisionTransformer, ViTConfig)}
# Three levels and two blocks per level, so that counting them from the wrong end shows.
CONFIGS = {"vae": VAEConfig(3, 4, 32, (1, 2, 4), 1),
           "unet": UNetConfig(4, 4, 32, (1, 2, 3), 2, (True, True, False), 24, 8),
           "vit": ViTConfig(14, 64, 2, 1, **{**V2, "image_size": 84}),
           "v1": ViTConfig(16, 64, 2, 1, **{**V1, "image_size": 64}),
           "reg": ViTConfig(14, 64, 2, 1, **{**V2_REG, "image_size": 84})}


@pytest.fixture(scope="module")
def states():
    """State dicts under official names; "v1" and "reg" are ViTs."""
    return {name: dict(fill_parameters(NETWORKS.get(name, NETWORKS["vit"])[0](config),
                                       1).state_dict())
            for name, config in CONFIGS.items()}


def assert_same(path, state, kind):
    """The file loads as exactly this state; returns the network's config."""
    model = load_model(*NETWORKS[kind], path, kind)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
    return model.config


# ---- layouts of libraries, with their outputs ----

def library_folder(case, folder):
    """A folder as the library saves it, with the weights of the stored outputs."""
    files = json.loads(str(REFERENCE[case]))
    stem = "diffusion_pytorch_model" if case in DIFFUSERS else "model"
    write_safetensors(folder / f"{stem}.safetensors", fill_state(files["shapes"]))
    (folder / "config.json").write_text(json.dumps(files["config"]))
    return folder


def assert_close(ours, name):
    # float32 sums in another order differ by 4e-6; other heads or groups by about 0.1
    np.testing.assert_allclose(ours, REFERENCE[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", DIFFUSERS)
@torch.no_grad()
def test_parity_with_diffusers(case, tmp_path):
    """Unusual heads and groups are read from config.json."""
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
    """Position embeddings are resized as in transformers; heads come from config.json."""
    vit = load_dino(library_folder(case, tmp_path))
    x, = inputs((2, 3, 56, 84))
    assert vit.config.num_heads == 4
    assert_close(vit(x), f"{case}_out")


@pytest.mark.parametrize("name", ["v1", "vit", "reg"])
def test_official_vits(name, states, tmp_path):
    """Meta's files, in a wrapper, give the config and the weights."""
    torch.save({"state_dict": states[name]}, tmp_path / "w.pth")
    assert assert_same(tmp_path / "w.pth", states[name], "vit") == CONFIGS[name]


# ---- files and folders ----

@pytest.mark.parametrize("kind", ["vae", "unet"])
def test_files_and_folders(kind, states, tmp_path):
    """Files in half precision, in folders and subfolders, load as float32."""
    half = {name: tensor.half() for name, tensor in states[kind].items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    for ending in (".bin", ".safetensors"):
        folder = tmp_path / ending / kind
        folder.mkdir(parents=True)
        file = folder / f"diffusion_pytorch_model.fp16{ending}"
        if ending == ".bin":
            torch.save(half, file)
        else:
            write_safetensors(file, half)
        for path in (file, folder, folder.parent):
            assert assert_same(path, rounded, kind) == CONFIGS[kind]


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
    """A run's model.pt and its folder, with settings that do not follow from shapes."""
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


def test_published_names(states, monkeypatch, tmp_path):
    """A file in torch.hub's folder is used; if a download fails, the error says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(url, path, hash_prefix):
        raise URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)

    for kind, names in PUBLISHED.items():
        for name, (url, _) in names.items():
            with pytest.raises(FileNotFoundError, match=f"could not download {name} .*no route.*"
                               f"save {url} as {tmp_path}/hub/checkpoints/"):
                load_model(*NETWORKS[kind], name, kind)

    checkpoints = tmp_path / "hub" / "checkpoints"
    torch.save(states["v1"], checkpoints / "dino_deitsmall16_pretrain.pth")
    assert load_dino("dino_vits16").config == CONFIGS["v1"]
    write_safetensors(checkpoints / "vit-rad-dino.safetensors", states["vit"])
    assert load_dino("rad-dino").config.normalise == "rad_dino"


# ---- config.json, and what does not fit ----

def write_folder(folder, state, config, preprocessor=None):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_config_is_honoured(states, tmp_path):
    """Heads of one number and pixel statistics come from the folder; others are refused."""
    write_folder(tmp_path / "u", states["unet"], {"attention_head_dim": [2, 4, 6]})
    with pytest.raises(ValueError, match="levels differ in the number of heads"):
        UNet.from_pretrained(tmp_path / "u")

    dinov2 = {"model_type": "dinov2", "num_attention_heads": 4}
    for mean, rule in (([0.485, 0.456, 0.406], "imagenet"), ([0.5307] * 3, "rad_dino")):
        write_folder(tmp_path / "d", states["vit"], dinov2, {"image_mean": mean})
        assert load_dino(tmp_path / "d").config.normalise == rule
    write_folder(tmp_path / "d", states["vit"], dinov2, {"image_mean": [0.5] * 3})
    with pytest.raises(ValueError, match="mean 0.5 is neither"):
        load_dino(tmp_path / "d")


@pytest.mark.parametrize("kind,change,match", [
    ("vae", lambda s: {"first_stage_model.encoder.conv_in.weight": s["encoder.conv_in.weight"]},
     "CompVis.*from_single_file"),
    ("unet", lambda s: {name: t[..., 0, 0] if "proj_in.weight" in name else t
                        for name, t in s.items()}, "Stable Diffusion 2 .*sd15"),
    ("vae", lambda s: {**s, "encoder.conv_in.weight": s["encoder.conv_in.weight"][:, :1]},
     "one channel.*expand"),
    ("vit", lambda s: {name: t for name, t in s.items() if name != "mask_token"}, "timm.*Meta's"),
    ("unet", lambda s: {**s, "conv_out.bias": s["conv_out.bias"][:3]}, "size mismatch.*conv_out"),
    ("vae", lambda s: {**s, "decoder.extra.weight": torch.zeros(1)}, "decoder.extra.weight")])
def test_other_layouts_are_refused(kind, change, match, states, tmp_path):
    """Layouts that are often confused with those that fit are named, with the way out."""
    torch.save(change(states[kind]), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"(?s)w.pt does not fit: .*{match}.*pass another file"):
        load_model(*NETWORKS[kind], tmp_path / "w.pt", kind)


def test_sharded_weights(tmp_path):
    """Shards are refused with the way to join them."""
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several files.*max_shard_size"):
        AutoencoderKL.from_pretrained(tmp_path)


# ---- safetensors ----

def test_safetensors_round_trip(tmp_path):
    """A file made by hand, of all kinds of shapes, and our own with the same tensors."""
    path = tmp_path / "w.safetensors"
    arrays = {"F32": np.arange(6, dtype=np.float32).reshape(2, 3), "F16": np.float16([0.5, -2, 1]),
              "I64": np.array(2**40), "F64": np.zeros((0, 3))}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": name, "shape": array.shape,
                        "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    tensors = read_tensors(path)
    tensors |= {"bf16": torch.tensor([1.5], dtype=torch.bfloat16), "view": torch.rand(3, 2).T}
    write_safetensors(path, tensors)
    again = read_tensors(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    for name, array in arrays.items():
        assert again[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:8] + b"x" + content[9:],
    lambda content: content.replace(b'"shape": [', b'"shape": [9, ', 1)])
def test_damaged_safetensors_are_refused(damage, states, tmp_path):
    """Truncated files, and headers that make no sense."""
    path = tmp_path / "w.safetensors"
    write_safetensors(path, states["vae"])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="w.safetensors does not fit.*pass another file"):
        AutoencoderKL.from_pretrained(path)
