"""One reader of published weights: find the file, read it safely, rename, derive the settings.

    vae = load_model(AutoencoderKL, VAEConfig, "sd-vae-ft-mse", "vae")

Kinds are "vae", "unet" and "vit". Official names load as they are: diffusers' VAE and U-Net (a file
or folder, with its config.json), Meta's DINO, DINOv2 and registers. Hugging Face's ViTModel and
Dinov2Model (RAD-DINO) are renamed by the table below. This project's model.pt loads too. Everything
else is refused by name. Nothing in a file is executed.

Errors are FileNotFoundError if a file is missing and ValueError if it is damaged or of another
network, in one line of three parts: got, need, do.
"""
import json
import math
import re
from pathlib import Path

import torch

from support.command import one_line
from support.files import BOX
from support.tensors import read_tensors

# ---- published files ----------------------------------------------------------------------------

HUB = "https://huggingface.co/"
SD15 = HUB + "stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
DINO = "https://dl.fbaipublicfiles.com/dino/"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"
PUBLISHED = {
    "vae": {
        "sd-vae-ft-mse":
            HUB + "stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors",
        "sd15": SD15 + "vae/diffusion_pytorch_model.safetensors",
    },
    "unet": {
        "sd15": SD15 + "unet/diffusion_pytorch_model.safetensors",
    },
    "vit": {
        **{f"dino_vit{size}{p}": f"{DINO}dino_{file}{p}_pretrain/dino_{file}{p}_pretrain.pth"
           for size, file in (("s", "deitsmall"), ("b", "vitbase")) for p in (16, 8)},
        **{f"dinov2_vit{size}14": f"{DINOV2}dinov2_vit{size}14/dinov2_vit{size}14_pretrain.pth"
           for size in "sbl"},
        **{f"dinov2_vit{size}14_reg":
           f"{DINOV2}dinov2_vit{size}14/dinov2_vit{size}14_reg4_pretrain.pth" for size in "sbl"},
        "rad-dino": HUB + "microsoft/rad-dino/resolve/main/model.safetensors",
    },
}
# First digits of the files' SHA-256, where known.
SHA256 = {
    "vae": {"sd-vae-ft-mse": "a1d993488569e928", "sd15": "a2b5134f4dbc140d"},
    "unet": {"sd15": "19da7aaa4b880e59"},
    "vit": {"dino_vitb16": "bf34ad0f424b9029", "dino_vitb8": "575f0efc48389383",
            "dinov2_vits14": "b938bf1bc15cd2ec", "dinov2_vits14_reg": "f433177089a68182",
            "dinov2_vitb14": "0b8b82f85de91b42", "dinov2_vitb14_reg": "73182a088cf94833",
            "dinov2_vitl14": "d5383ea8f4877b24", "dinov2_vitl14_reg": "36e4deffbaef061a"},
}
NEEDED = {"vae": "diffusers' AutoencoderKL", "unet": "diffusers' UNet2DConditionModel",
          "vit": "a ViT of DINO or DINOv2"}

# ---- layouts: each (pattern, replacement) is applied to every name, one after the other --------

NAMES = {
    "vae": (  # attention before diffusers 0.15, as sd-vae-ft-mse has it
        (r"(\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ),
    "unet": (),
    "vit": (  # Hugging Face: ViTModel and Dinov2Model
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
    ),
}

# Options of config.json that change the results, and the only value that is implemented here.
ONLY = {
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True},
    "unet": {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5,
             "flip_sin_to_cos": True, "freq_shift": 0, "transformer_layers_per_block": 1,
             "resnet_time_scale_shift": "default"},
    "vit": {"hidden_act": "gelu", "use_swiglu_ffn": False},
}


def load_model(network, config_class, name_or_path, kind):
    """network(config_class(...)) in float32 with the weights of a published name, file or folder.

    kind: "vae", "unet" or "vit"
    Raises: FileNotFoundError, or ValueError for a damaged file or another network.
    """
    state, settings = load_weights(name_or_path, kind)
    try:
        with torch.device("meta"):  # no time spent on random weights
            model = network(config_class(**settings))
        model = model.to_empty(device="cpu")
        model.load_state_dict(state, strict=True)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} does not fit ({one_line(error)[:300]}): {NEEDED[kind]}, "
                         "or one of this version, is needed: pass another file") from error
    return model


def load_weights(name_or_path, kind):
    """The state dict under official names, and the fields of the network's config as a dict."""
    path = find_weights(name_or_path, kind)
    content = read_tensors(path)
    try:
        # A model.pt of this project holds the settings; elsewhere shapes and config.json tell them.
        if isinstance(content.get("config"), dict):
            state = content["embedder"] if kind == "vit" else content[kind]
            state = {name.removeprefix("vit."): value for name, value in state.items()}
            return state, content["config"][kind]
        state = rename(content.get("state_dict", content), kind)
        refuse(state, path, kind)
        read_settings = {"vae": vae_settings, "unet": unet_settings, "vit": vit_settings}[kind]
        return state, read_settings(state, read_config(path, kind), path)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} is not {NEEDED[kind]} ({one_line(error)} is missing): such "
                         "weights are needed: pass another file") from error


def find_weights(name_or_path, kind):
    """The file that a published name, a file or a folder stands for."""
    path = BOX if str(name_or_path) == "box" else Path(name_or_path)
    name = str(name_or_path).removeprefix("microsoft/")
    if path.is_file():
        return path
    if not path.exists() and name in PUBLISHED[kind]:
        return download(name, kind)
    for folder in (path, path / kind):
        for stem in ("model", "diffusion_pytorch_model", "pytorch_model"):
            for ending in (".pt", ".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
                if (folder / f"{stem}{ending}").is_file():
                    return folder / f"{stem}{ending}"
        if list(folder.glob("*.index*.json")):
            raise ValueError(f"{folder} has weights in several files: one file is needed: save it "
                             'with save_pretrained(FOLDER, max_shard_size="100GB")')
    raise FileNotFoundError(
        f"no weights at {path}: a .safetensors, .bin, .pt or .pth file, or a folder of diffusers "
        f"or transformers, is needed: pass one of {', '.join(PUBLISHED[kind])} or another path, or "
        "train your own with: python train.py")


def download(name, kind):
    """The file of a published name in torch.hub's folder, downloaded once."""
    url = PUBLISHED[kind][name]
    file = Path(url).name if url.endswith(".pth") else f"{kind}-{name}.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256[kind].get(name))
    except (OSError, RuntimeError) as error:  # no network, or another hash
        raise FileNotFoundError(f"could not download {name} ({one_line(error)}): the file is "
                                f"needed once: save {url} as {path}") from error
    return path


def rename(state, kind):
    """The state dict under official names."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES[kind]:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("pooler."):
            renamed[name] = tensor

    # Hugging Face projects queries, keys and values by three layers, Meta by one.
    for query in [name for name in renamed if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        renamed[query.replace("query", "qkv")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def refuse(state, path, kind):
    """Raises ValueError, with the way out, for layouts that look right but do not fit."""
    stem = state.get({"vae": "encoder.conv_in.weight", "vit": "patch_embed.proj.weight"}.get(kind))
    projection = state.get("mid_block.attentions.0.proj_in.weight")
    compvis = re.compile(r"model\.diffusion_model|first_stage_model|input_blocks|encoder\.down\.")
    no_mask_token = "blocks.0.ls1.gamma" in state and "mask_token" not in state

    if any(compvis.match(name) for name in state):
        got = "CompVis' layout"
        do = "convert it: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
    elif "reg_token" in state or no_mask_token:
        got = "timm's layout of DINOv2"
        do = "pass Meta's, such as dinov2_vits14_reg"
    elif projection is not None and projection.ndim == 2:
        got = "a U-Net of Stable Diffusion 2 (linear projections)"
        do = "pass sd15"
    elif stem is not None and stem.shape[1] == 1:
        got = "a network of one channel"
        do = "spread its first weights over three channels: w.expand(-1, 3, -1, -1) / 3"
    else:
        return
    raise ValueError(f"{path} holds {got}: {NEEDED[kind]} is needed: {do}")


# ---- settings: from shapes, and from config.json what shapes do not tell ------------------------

def read_config(path, kind):
    """The config.json of diffusers or transformers beside a file of weights, checked; or {}.

    "pixel_mean" in it is the mean that the folder's preprocessor_config.json subtracts.
    """
    config = {}
    for file, key in (("config.json", None), ("preprocessor_config.json", "image_mean")):
        try:
            if (path.parent / file).is_file():
                content = json.loads((path.parent / file).read_text(encoding="utf-8"))
                config |= {"pixel_mean": content.get(key)} if key else dict(content.items())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.parent / file} cannot be read ({error!r}): the one that came "
                             "with the weights is needed: download it again") from error
    if not {"_class_name", "model_type"} & config.keys():
        return {}
    for option, value in ONLY[kind].items():
        if config.get(option, value) != value:
            raise ValueError(f"{path.parent / 'config.json'} says {option} = {config[option]}, but "
                             f"only {value} is implemented: pass other weights")
    return config


def count_indices(state, prefix):
    """How many different indices follow prefix in the names."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def level_settings(state, prefix, config, path):
    """The fields that VAEConfig and UNetConfig share."""
    levels = range(count_indices(state, prefix))
    widths = [state[f"{prefix}{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    base = math.gcd(*widths)
    if not config and base not in (128, 320):  # of the published networks
        print(f"note: {path} has no config.json: norms of 32 groups and 8 heads are assumed")
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, f"{prefix}0.resnets."),
        "norm_groups": config.get("norm_num_groups", 0),
    }


def vae_settings(state, config, path):
    """Fields of VAEConfig."""
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        **level_settings(state, "encoder.down_blocks.", config, path),
    }


def unet_settings(state, config, path):
    """Fields of UNetConfig."""
    settings = level_settings(state, "down_blocks.", config, path)
    levels = range(len(settings["channel_multipliers"]))
    # What diffusers calls attention_head_dim is the number of heads, one or one for each level.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    query = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "attention_levels": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in state
                                  for i in levels),
        "context_dim": state[query].shape[1],
        "num_heads": tuple(heads) if isinstance(heads, list) else heads,
        **settings,
    }


def vit_settings(state, config, path):
    """Fields of ViTConfig."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    heads = config.get("num_attention_heads", dim / 64)  # 64 channels each in published ones
    if heads not in range(1, dim + 1) or dim % heads:
        raise ValueError(f"{path} has {dim} channels and {heads} heads: 64 channels a head, or the "
                         "num_attention_heads of a config.json beside it, are needed: correct that")
    mean = config.get("pixel_mean")
    is_rad_dino = "rad-dino" in str(path) if mean is None else abs(mean[0] - 0.5307) < 1e-3
    if mean is not None and not is_rad_dino and abs(mean[0] - 0.485) > 1e-3:
        raise ValueError(f"{path.parent} subtracts the mean {mean} from pixels: ImageNet's or "
                         "RAD-DINO's is needed: pass other weights")
    return {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": count_indices(state, "blocks."),
        "num_heads": int(heads),
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        "registers": registers,
        "layer_scale": "mask_token" in state,
        # The RESIZE rules of dino.py: Meta's first, registers, transformers.
        "interpolate_offset": 0.0 if registers or config else 0.1,
        "antialias": registers > 0,
        "normalise": "rad_dino" if is_rad_dino else "imagenet",
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // dim,
        "norm_eps": config.get("layer_norm_eps", 1e-6),
        "global_tokens": "cls+registers",
        "input_side": 0 if is_rad_dino else 224,
    }
