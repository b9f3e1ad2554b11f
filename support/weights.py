"""Published weights: find the file, read it safely, rename, derive the settings.

    vae = load_model(AutoencoderKL, VAEConfig, "sd-vae-ft-mse", "vae")    # or "unet", "vit"

Official names load unchanged: diffusers' VAE and U-Net (a file or folder, with its config.json),
Meta's DINO, DINOv2 and registers. Hugging Face's ViTModel and Dinov2Model (RAD-DINO) are renamed by
the table below. This project's model.pt loads too. Nothing in a file is executed.
"""
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from support.command import one_line
from support.files import BOX, atomic_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}  # of safetensors

# Kind -> name -> (address, first digits of the SHA-256 if known).
HUB = "https://huggingface.co/"
SD15 = HUB + "stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
DINO = "https://dl.fbaipublicfiles.com/dino/"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"
FILE = "diffusion_pytorch_model.safetensors"
PUBLISHED = {
    "vae": {
        "sd-vae-ft-mse": (HUB + "stabilityai/sd-vae-ft-mse/resolve/main/" + FILE, "a1d99348"),
        "sd15": (SD15 + "vae/" + FILE, "a2b5134f"),
    },
    "unet": {
        "sd15": (SD15 + "unet/" + FILE, "19da7aaa"),
    },
    "vit": {
        "dino_vits16": (DINO + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", None),
        "dino_vits8": (DINO + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", None),
        "dino_vitb16": (DINO + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "bf34ad0f"),
        "dino_vitb8": (DINO + "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", "575f0efc"),
        "dinov2_vits14": (DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1b"),
        "dinov2_vitb14": (DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f8"),
        "dinov2_vitl14": (DINOV2 + "dinov2_vitl14/dinov2_vitl14_pretrain.pth", "d5383ea8"),
        "dinov2_vits14_reg": (DINOV2 + "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", "f4331770"),
        "dinov2_vitb14_reg": (DINOV2 + "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", "73182a08"),
        "dinov2_vitl14_reg": (DINOV2 + "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", "36e4deff"),
        "rad-dino": (HUB + "microsoft/rad-dino/resolve/main/model.safetensors", None),
    },
}
NEEDED = {"vae": "diffusers' AutoencoderKL", "unet": "diffusers' UNet2DConditionModel",
          "vit": "a ViT of DINO or DINOv2"}

# Each (pattern, replacement) is applied to every name, one after the other.
RENAMED = (
    # diffusers before 0.15, as sd-vae-ft-mse has it
    (r"(\.attentions\.0)\.(query|key|value)\.", lambda m: f"{m[1]}.to_{m[2][0]}."),
    (r"(\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    # Hugging Face's ViTModel and Dinov2Model
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", r"pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj."),
    (r"^encoder\.layer\.", r"blocks."),
    (r"^layernorm\.", r"norm."),
    (r"\.layernorm_before\.", r".norm1."),
    (r"\.layernorm_after\.", r".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", r".attn.proj."),
    (r"\.intermediate\.dense\.", r".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def load_model(network, config_class, name_or_path, kind):
    """network(config_class(...)) in float32 with the weights of a published name, file or folder.

    kind: "vae", "unet" or "vit"
    Raises FileNotFoundError, or ValueError for a damaged file or another network.
    """
    path = find_weights(name_or_path, kind)
    try:
        content = read_tensors(path)
        if isinstance(content.get("config"), dict):  # a model.pt of this project
            state = content["embedder" if kind == "vit" else kind]
            state = {name.removeprefix("vit."): value for name, value in state.items()}
            settings = content["config"][kind]
        else:
            state = rename(content.get("state_dict", content))
            refuse(state, kind)
            read_settings = {"vae": vae_settings, "unet": unet_settings, "vit": vit_settings}[kind]
            settings = read_settings(state, read_config(path.parent), path)

        with torch.device("meta"):  # no time spent on random weights
            model = network(config_class(**settings))
        model = model.to_empty(device="cpu")
        model.load_state_dict(state, strict=True)
    except Exception as error:  # damaged and foreign files raise all kinds of errors
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} does not fit: {one_line(why)[:300]}: a complete state dict of "
                         f"{NEEDED[kind]} is needed: pass another file") from error
    return model


# ---- files --------------------------------------------------------------------------------------

def find_weights(name_or_path, kind):
    """The path of a file, of the weights in a folder, or of a published name, downloaded once."""
    path = BOX if str(name_or_path) == "box" else Path(name_or_path)
    if path.is_file():
        return path
    for folder in (path, path / kind):
        for stem in ("model", "diffusion_pytorch_model", "pytorch_model"):
            for ending in (".pt", ".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
                if (folder / f"{stem}{ending}").is_file():
                    return folder / f"{stem}{ending}"
        if list(folder.glob("*.index*.json")):
            raise ValueError(f"{folder} has weights in several files: one file is needed: save it "
                             'with save_pretrained(FOLDER, max_shard_size="100GB")')
    name = str(name_or_path).removeprefix("microsoft/")
    if path.exists() or name not in PUBLISHED[kind]:
        raise FileNotFoundError(
            f"no weights at {path}: a file of weights, or a folder of diffusers or transformers, "
            f"is needed: pass one of {', '.join(PUBLISHED[kind])} or another path, or train your "
            "own with: python train.py")

    url, digits = PUBLISHED[kind][name]
    file = Path(url).name if url.endswith(".pth") else f"{kind}-{name}.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # no network, or another hash
            raise FileNotFoundError(f"could not download {name} ({one_line(error)}): the file is "
                                    f"needed once: save {url} as {path}") from error
    return path


def read_tensors(path):
    """The content of a file of weights; code inside it is never executed."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path):
    """All tensors of a .safetensors file: name -> tensor.

    Layout: length of the header (u64, little endian); the header, JSON: name -> dtype, shape and
    byte range; then the raw tensors.
    """
    data = np.memmap(path, mode="c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    data = torch.from_numpy(data[start:])
    tensors = {}
    for name, entry in header.items():
        first, stop = entry["data_offsets"]
        values = data[first:stop].clone().view(DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def write_safetensors(path, state):
    """Write a dict of tensors in that layout, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


# ---- layouts ------------------------------------------------------------------------------------

def rename(state):
    """The state dict under official names."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("pooler."):
            renamed[name] = tensor

    # Hugging Face projects queries, keys and values by three layers, Meta by one.
    for query in [name for name in renamed if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        renamed[query.replace("query", "qkv")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def refuse(state, kind):
    """ValueError, with the way out, for layouts that look right but do not fit."""
    stem = state.get({"vae": "encoder.conv_in.weight", "vit": "patch_embed.proj.weight"}.get(kind))
    projection = state.get("mid_block.attentions.0.proj_in.weight")
    compvis = re.compile(r"model\.diffusion_model|first_stage_model|input_blocks|encoder\.down\.")
    no_mask_token = "blocks.0.ls1.gamma" in state and "mask_token" not in state
    cases = (
        (any(map(compvis.match, state)), "it has CompVis' layout: convert it with "
         "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"),
        ("reg_token" in state or no_mask_token, "it has timm's layout of DINOv2: pass Meta's "
         "weights, such as dinov2_vits14_reg"),
        (projection is not None and projection.ndim == 2, "it is a U-Net of Stable Diffusion 2 "
         "(linear projections): pass sd15"),
        (stem is not None and stem.shape[1] == 1, "it takes images of one channel: spread its "
         "first weights over three: w.expand(-1, 3, -1, -1) / 3"),
    )
    for applies, reason in cases:
        if applies:
            raise ValueError(reason)


# ---- settings: from shapes, and what shapes do not tell from config.json ------------------------

def read_config(folder):
    """config.json and preprocessor_config.json of diffusers or transformers as one dict, or {}."""
    config = {}
    for path in (folder / "config.json", folder / "preprocessor_config.json"):
        if path.is_file():
            config |= json.loads(path.read_text(encoding="utf-8"))
    return config


def count_indices(state, prefix):
    """How many different indices follow prefix in the names."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def level_settings(state, prefix, config):
    """The fields that VAEConfig and UNetConfig share."""
    levels = range(count_indices(state, prefix))
    widths = [state[f"{prefix}{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    base = math.gcd(*widths)
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, f"{prefix}0.resnets."),
        "norm_groups": config.get("norm_num_groups", 0),  # 0: 32, or fewer for odd widths
    }


def vae_settings(state, config, path):
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        **level_settings(state, "encoder.down_blocks.", config),
    }


def unet_settings(state, config, path):
    levels = range(count_indices(state, "down_blocks."))
    # What diffusers calls attention_head_dim is the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    if isinstance(heads, list):
        raise ValueError("its levels differ in the number of heads")
    key = state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "attention_levels": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in state
                                  for i in levels),
        "context_dim": key.shape[1],
        "num_heads": heads,
        **level_settings(state, "down_blocks.", config),
    }


def vit_settings(state, config, path):
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    heads = config.get("num_attention_heads", dim / 64)  # 64 channels each in published networks
    if heads != int(heads):
        raise ValueError("a config.json beside it must tell num_attention_heads")
    mean = config.get("image_mean", [0.5307 if "rad-dino" in str(path) else 0.485])[0]
    if min(abs(mean - 0.485), abs(mean - 0.5307)) > 1e-3:
        raise ValueError(f"its pixel mean {mean} is neither ImageNet's nor RAD-DINO's")
    is_rad_dino = mean > 0.5
    return {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": count_indices(state, "blocks."),
        "num_heads": int(heads),
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        "registers": registers,
        "layer_scale": "mask_token" in state,
        # The RESIZE rules of dino.py: Meta's first, registers, transformers.
        "interpolate_offset": 0.0 if registers or "model_type" in config else 0.1,
        "antialias": registers > 0,
        "normalise": "rad_dino" if is_rad_dino else "imagenet",
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // dim,
        "norm_eps": config.get("layer_norm_eps", 1e-6),
        "global_tokens": "cls+registers",
        "input_side": 0 if is_rad_dino else 224,
    }
