"""One reader of published weights: find the file, read it safely, rename, see what it tells.

    load_model(AutoencoderKL, VAEConfig, "sd-vae-ft-mse", "vae")     # in three steps:
    state, settings = load_weights("sd-vae-ft-mse", "vae")
    vae = AutoencoderKL(VAEConfig(**settings))
    fill_weights(vae, state, "sd-vae-ft-mse")

Kinds are "vae", "unet" and "vit". The networks' parameters have official names (diffusers' for VAE
and U-Net, Meta's for the ViT); other layouts are renamed by the tables below. Forms: one file
(.safetensors, .bin, .pt, .pth, .ckpt), several with an index.json, a folder of diffusers,
transformers or timm, a run's model.pt, and the names of PUBLISHED, downloaded once.

Nothing in a file is executed. What does not fit is refused by a line of three parts (got, need,
do): FileNotFoundError if a file is missing, ValueError if it is damaged or of another network.
"""
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from support.files import resolve_checkpoint
from support.command import one_line
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
        "dino_vits16": DINO + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "dino_vits8": DINO + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
        "dino_vitb16": DINO + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "dino_vitb8": DINO + "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
        "dinov2_vits14": DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth",
        "dinov2_vitb14": DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "dinov2_vitl14": DINOV2 + "dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "dinov2_vits14_reg": DINOV2 + "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        "dinov2_vitb14_reg": DINOV2 + "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        "dinov2_vitl14_reg": DINOV2 + "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        "rad-dino": HUB + "microsoft/rad-dino/resolve/main/model.safetensors",
    },
}
# First digits of the files' SHA-256, as public projects record them; of the others none is known.
SHA256 = {
    "vae": {"sd-vae-ft-mse": "a1d993488569e928", "sd15": "a2b5134f4dbc140d"},
    "unet": {"sd15": "19da7aaa4b880e59"},
    "vit": {"dino_vitb16": "bf34ad0f424b9029", "dino_vitb8": "575f0efc48389383",
            "dinov2_vits14": "b938bf1bc15cd2ec", "dinov2_vits14_reg": "f433177089a68182",
            "dinov2_vitb14": "0b8b82f85de91b42", "dinov2_vitb14_reg": "73182a088cf94833",
            "dinov2_vitl14": "d5383ea8f4877b24", "dinov2_vitl14_reg": "36e4deffbaef061a"},
}
NEEDED = {"vae": "an autoencoder of Stable Diffusion's kind",
          "unet": "a conditional U-Net of Stable Diffusion's kind",
          "vit": "a ViT of DINO or DINOv2"}

# ---- names: each (pattern, replacement) is applied to every name, one after the other ----------

NAMES = {
    # CompVis; last the four names that diffusers gave to attention before 2023
    "vae": (
        (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
        (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
        (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
        (r"\.nin_shortcut\.", r".conv_shortcut."),
        (r"coder\.norm_out\.", r"coder.conv_norm_out."),
        (r"(\.attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
        (r"(\.attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
        (r"(\.attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
        (r"(\.attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
    ),
    # CompVis, once place_blocks has told its blocks apart
    "unet": (
        (r"^time_embed\.0\.", r"time_embedding.linear_1."),
        (r"^time_embed\.2\.", r"time_embedding.linear_2."),
        (r"^out\.0\.", r"conv_norm_out."),
        (r"^out\.2\.", r"conv_out."),
        (r"^middle_block\.0\.", r"mid_block.resnets.0."),
        (r"^middle_block\.1\.", r"mid_block.attentions.0."),
        (r"^middle_block\.2\.", r"mid_block.resnets.1."),
        (r"\.in_layers\.0\.", r".norm1."),
        (r"\.in_layers\.2\.", r".conv1."),
        (r"\.emb_layers\.1\.", r".time_emb_proj."),
        (r"\.out_layers\.0\.", r".norm2."),
        (r"\.out_layers\.3\.", r".conv2."),
        (r"\.skip_connection\.", r".conv_shortcut."),
    ),
    "vit": (
        # trainings: wrappers, and blocks in chunks
        (r"^(?:module\.|backbone\.|vit\.|dinov2\.|dinov2_with_registers\.)+", r""),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        # timm
        (r"^reg_token$", r"register_tokens"),
        # transformers: ViT and DINOv2, and the names that version 5 gives them in memory
        (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"^embeddings\.position_embeddings$", r"pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj."),
        (r"^(?:encoder\.layer|layers)\.", r"blocks."),
        (r"^layernorm\.", r"norm."),
        (r"\.layernorm_before\.", r".norm1."),
        (r"\.layernorm_after\.", r".norm2."),
        (r"\.attention\.(?:attention\.query|q_proj)\.", r".attn.query."),
        (r"\.attention\.(?:attention\.key|k_proj)\.", r".attn.key."),
        (r"\.attention\.(?:attention\.value|v_proj)\.", r".attn.value."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", r".attn.proj."),
        (r"\.intermediate\.dense\.", r".mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    ),
}
# Where a file holds several networks: what the names of the wanted one begin with.
PREFIX = {"vae": "first_stage_model.", "unet": "model.diffusion_model.", "vit": "teacher."}
# What a training or a task leaves in a file, and the networks here do not have.
LEFT_OUT = {"vae": r"^(loss|model_ema)\.", "unet": r"^model_ema\.",
            "vit": r"^(head|dino_head|ibot_head|classifier|pooler)\."}
# Networks that are often taken for those that fit: a pattern of their names, and what they are.
REFUSED = {
    "vae": (
        (r"^(encoder|decoder)\.layers\.\d|^\d+\.conv\.\d", "TAESD, the tiny autoencoder"),
        (r"^quantize\.", "an autoencoder with a codebook (VQ)"),
        (r"coder\.(down|up)(_blocks)?\.\d+\.att", "kl-f16 or another with attention in its levels"),
    ),
    "unet": (
        (r"^(add_embedding|label_emb)\.", "the U-Net of SDXL"),
        (r"controlnet|^input_hint_block", "a ControlNet"),
        (r"lora", "LoRA differences without their network"),
        (r"^(single_)?transformer_blocks\.|^joint_blocks\.|^double_blocks\.", "a transformer"),
    ),
    "vit": (
        (r"\.mlp\.(w12|w3|weights_in|weights_out|fc1_g)\.", "a ViT with SwiGLU (ViT-g)"),
        (r"storage_token|rope_|^layer\.\d+\.attention|\.gamma_1$", "DINOv3, which turns queries "
         "and keys by their position (RoPE)"),
        (r"^(module\.|backbone\.)*layer1\.0\.conv1", "a ResNet"),
        (r"relative_position|^stages\.|downsample_layers", "a Swin or ConvNeXt network"),
    ),
}

# ---- config.json: what shapes do not tell -------------------------------------------------------

CLASSES = {"vae": ("AutoencoderKL",), "unet": ("UNet2DConditionModel",),
           "vit": ("vit", "dinov2", "dinov2_with_registers")}
# Options that change the numbers, and the values that the networks here have.
ONE_FORM = {
    "vae": {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,)},
    "unet": {"act_fn": ("silu", "swish"), "norm_eps": (1e-5,), "freq_shift": (0,),
             "flip_sin_to_cos": (True,), "center_input_sample": (False,),
             "downsample_padding": (1,), "mid_block_scale_factor": (1,),
             "time_embedding_type": ("positional",), "time_embedding_act_fn": (None,),
             "timestep_post_act": (None,), "attention_type": ("default",),
             "dual_cross_attention": (False,), "only_cross_attention": (False,),
             "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
             "resnet_out_scale_factor": (1,), "transformer_layers_per_block": (1,),
             "mid_block_type": ("UNetMidBlock2DCrossAttn",)},
    "vit": {"hidden_act": ("gelu",), "use_swiglu_ffn": (False,)},
}
# A config.json that has none of these is another program's.
TELLING = {"_class_name", "model_type", "architecture", "attention_head_dim",
           "num_attention_heads", "norm_num_groups"}.union(*ONE_FORM.values())
PIXEL_MEANS = {"imagenet": (0.485, 0.456, 0.406), "rad_dino": (0.5307, 0.5307, 0.5307)}


def load_model(network, config_class, name_or_path, kind):
    """network(config_class(...)) with the weights of name_or_path; raises as load_weights."""
    state, settings = load_weights(name_or_path, kind)
    try:
        with torch.device("meta"):  # no time lost on random numbers, no second copy
            model = network(config_class(**settings))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} does not fit ({one_line(error)}): {NEEDED[kind]}, or one "
                         "trained by this version, is needed: pass another file") from error
    return fill_weights(model, state, name_or_path)


def load_weights(name_or_path, kind):
    """The weights that a published name, a file or a folder stands for.

    kind: "vae", "unet" or "vit"
    Returns: state, a dict of float32 tensors under the official names; and settings, the fields of
        VAEConfig, UNetConfig or ViTConfig that shapes and config.json tell, as a dict.
    Raises: FileNotFoundError, or ValueError for a damaged file or another network.
    """
    path = find_weights(name_or_path, kind)
    content = read_tensors(path)
    if kind == "vit":
        content = content.get("embedder", content)

    # Files of this project tell their settings; of others the shapes do, and a config.json.
    if isinstance(content.get("config"), dict):
        state, settings = project_part(content, path, kind)
    else:
        state = unwrap(content, path, kind)
        read_settings = {"vae": vae_settings, "unet": unet_settings, "vit": vit_settings}[kind]
        try:
            state = rename(state, path, kind)
            settings = read_settings(state, read_config(path, kind), path)
        except (LookupError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"{path} is not {NEEDED[kind]} ({one_line(error)} is missing): the "
                             "weights of one are needed: pass that file") from error
    return {name: tensor.float() for name, tensor in state.items()}, settings


def fill_weights(model, state, source):
    """Puts state into model, whose parameters may be on the meta device; returns model.

    Raises: ValueError if any name or shape differs, linear layers and 1x1 convolutions apart.
    """
    needed = model.state_dict()
    filled = {}
    wrong = []
    for name in sorted({*needed, *state}):
        given = tuple(state[name].shape) if name in state else None
        wanted = tuple(needed[name].shape) if name in needed else None
        if None in (given, wanted) or not same_weights(given, wanted):
            wrong.append(f"{name} is {given or 'missing'} instead of {wanted or 'nothing'}")
            continue
        filled[name] = state[name].reshape(wanted)
        if filled[name].stride() != needed[name].stride():  # the model's own order in memory
            filled[name] = torch.empty_like(needed[name], device="cpu").copy_(filled[name])
    if wrong:
        raise ValueError(f"{source} has weights of another architecture, {len(wrong)} differ, "
                         f"first: {'; '.join(wrong[:2])}: the layout of {model.config} is needed: "
                         "pass the matching file")
    model.load_state_dict(filled, strict=True, assign=True)
    return model


def same_weights(shape, other):
    """Whether two shapes are equal; a linear layer equals a convolution of 1x1 pixels."""
    return other in (shape, (*shape, 1, 1)) or shape == (*other, 1, 1)


# ---- finding ------------------------------------------------------------------------------------

def find_weights(name_or_path, kind):
    """The file, or the index.json of several, that a published name, file or folder stands for."""
    path = Path(name_or_path)
    name = str(name_or_path).removeprefix("microsoft/")
    if not path.exists() and name in PUBLISHED[kind]:
        return download(name, kind)
    if path.is_file():
        return path
    if name == "box":
        return resolve_checkpoint("box")

    # A folder of this project, or with the file names of diffusers and transformers.
    names = ["model.pt"]
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin"):
            names += [stem + ending, f"{stem}{ending}.index.json",
                      f"{stem}.fp16{ending}", f"{stem}{ending}.index.fp16.json"]
    for folder in (path, path / kind):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"no weights at {path}: a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder of "
        "diffusers or transformers, is needed: give another path or one of "
        f"{', '.join(PUBLISHED[kind])}, or train your own with: python train.py")


def download(name, kind):
    """The file of a published name, in torch.hub's folder; fetched if it is not there."""
    url = PUBLISHED[kind][name]
    file = Path(url).name if url.endswith(".pth") else f"{kind}-{name}.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256[kind].get(name))
    except (OSError, RuntimeError) as error:  # no network; or another hash
        raise FileNotFoundError(f"could not download {name} ({one_line(error)}): its file is "
                                f"needed, once: put {url} at {path}") from error
    return path


# ---- reading ------------------------------------------------------------------------------------

def read_config(path, kind):
    """The config.json beside a file of weights, checked; an empty dict if there is none.

    Under "pixel_mean" stands the mean that the folder's preprocessing subtracts, if it is told.
    """
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    preprocessor = path.parent / "preprocessor_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        named = config.get("_class_name") or config.get("model_type")
        config["pixel_mean"] = config.get("pretrained_cfg", {}).get("mean")  # timm
        if preprocessor.is_file():
            text = preprocessor.read_text(encoding="utf-8")
            config["pixel_mean"] = json.loads(text).get("image_mean")
    except Exception as error:  # whatever else stands in the files
        raise ValueError(f"{file} cannot be read ({error!r}): the one that came with the weights "
                         "is needed: download it again") from error

    if not TELLING & config.keys():
        return {}
    if named is not None and named not in CLASSES[kind]:
        raise ValueError(f"{file} says {named}: {NEEDED[kind]} ({' or '.join(CLASSES[kind])}) is "
                         "needed: pass another folder")
    for option, allowed in ONE_FORM[kind].items():
        value = config.get(option, allowed[0])
        values = value if isinstance(value, list) else [value]
        if not all(value in allowed for value in values):
            raise ValueError(f"{file} says {option} = {value}, which the network here cannot do: "
                             f"{allowed[0]} is needed: pass other weights")
    return config


# ---- what is in a file --------------------------------------------------------------------------

def project_part(content, path, kind):
    """State and settings out of a file that this project wrote."""
    try:
        if kind == "vit":
            state = content["model"]
            settings = dict(content["config"])
        else:
            state = content[kind]
            settings = dict(content["config"][kind])
        if not all(map(torch.is_tensor, state.values())):
            raise ValueError("not every entry is a tensor")
        for field in ("layers_per_block", "depth"):
            if settings.get(field, 1) > len(state):
                raise ValueError(f"{field} is {settings[field]}, with {len(state)} tensors")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit ({error!r}): a model.pt trained by this version is "
                         "needed: pass another file") from error
    return state, settings


def unwrap(content, path, kind):
    """The state dict in the file of a training, which may hold more."""
    for name in ("state_dict", "model", "teacher", "student", kind):
        if isinstance(content.get(name), dict):
            content = content[name]
    if not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} is not a file of plain tensors (not every entry is one): a state "
                         "dict is needed: save it with torch.save(model.state_dict(), path)")
    return {str(name): tensor for name, tensor in content.items()}


def rename(state, path, kind):
    """The state dict under official names, without entries that belong to a training."""
    prefix = PREFIX[kind]
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()
                 if name.startswith(prefix)}
    for pattern, what in REFUSED[kind]:
        if any(re.search(pattern, name) for name in state):
            raise ValueError(f"{path} holds {what}, which does not fit: {NEEDED[kind]} is needed: "
                             f"pass another file, or one of {', '.join(PUBLISHED[kind])}")

    if kind == "vae":
        state = turn_levels(state)
    elif kind == "unet":
        state = place_blocks(state)
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES[kind]:
            name = re.sub(pattern, replacement, name)
        if not re.search(LEFT_OUT[kind], name):
            renamed[name] = tensor
    if kind == "vit":
        renamed = finish_vit(renamed)
    return grey_to_colour(renamed)


def turn_levels(state):
    """CompVis counts the levels of the decoder from full resolution, diffusers from the latent."""
    last = count_indices(state, "decoder.up.") - 1

    def turn(match):
        return f"decoder.up.{last - int(match[1])}."
    return {re.sub(r"^decoder\.up\.(\d+)\.", turn, name): tensor for name, tensor in state.items()}


def place_blocks(state):
    """CompVis counts all blocks of a U-Net in a row: their level and place in it."""
    if "input_blocks.0.0.weight" not in state:
        return state
    changes = [int(name.split(".")[1]) for name in state if name.endswith(".op.weight")]
    layers = min(changes, default=count_indices(state, "input_blocks.")) - 1  # ResNets a level

    def place(match):
        side, number, part, change = match.groups()
        way = "up" if side == "output" else "down"
        number = int(number) if side == "output" else int(number) - 1  # input 0 is conv_in
        level, layer = divmod(number, layers + 1)
        if change:
            return f"{way}_blocks.{level}.{way}samplers.0.conv."
        return f"{way}_blocks.{level}.{'resnets' if part == '0' else 'attentions'}.{layer}."

    placed = {}
    for name, tensor in state.items():
        name = name.replace("input_blocks.0.0.", "conv_in.")
        name = re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)\.(op\.|conv\.)?", place, name)
        placed[name] = tensor
    return placed


def finish_vit(state):
    """One projection for queries, keys and values; positions and mask token as in Meta's files."""
    for query in [name for name in state if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(name in state for name in names):
            three = [state.pop(name) for name in names]
            state[query.replace("query", "qkv")] = torch.cat(three)

    # timm's registers: positions have no row for CLS, whose own is part of the token.
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)

    # DINOv2 has a mask token, which conditioning does not use and timm leaves out.
    state.pop("mask_token", None)
    if "blocks.0.ls1.gamma" in state:
        state["mask_token"] = torch.zeros(1, len(state["blocks.0.ls1.gamma"]))
    return state


def grey_to_colour(state):
    """One channel as three equal ones, as which grey images come: the same results."""
    for name in ("encoder.conv_in.weight", "patch_embed.proj.weight"):
        if name in state and state[name].shape[1] == 1:
            state[name] = state[name].expand(-1, 3, -1, -1) / 3
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        if name in state and len(state[name]) == 1:
            state[name] = torch.cat(3 * [state[name]])
    return state


# ---- settings -----------------------------------------------------------------------------------

def count_indices(state, prefix):
    """How many different indices follow prefix in the names."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def vae_settings(state, config, path):
    """Fields of VAEConfig."""
    levels = range(count_indices(state, "encoder.down_blocks."))
    widths = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    base = math.gcd(*widths)
    settings = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, "encoder.down_blocks.0.resnets."),
        **norm_groups(config, widths, path),
    }
    if not config and base != 128:  # published ones have 128
        print(f"note: {path} has no config.json, and shapes do not tell the groups of its norms: "
              "32 are assumed")
    return settings


def unet_settings(state, config, path):
    """Fields of UNetConfig."""
    base = state["conv_in.weight"].shape[0]
    levels = range(count_indices(state, "down_blocks."))
    widths = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    middle = "mid_block.attentions.0."

    # What diffusers calls attention_head_dim is the number of heads, one or one for each level.
    # Stable Diffusion 2, which projects by linear layers, has 64 channels a head.
    if state[middle + "proj_in.weight"].ndim == 2:
        rule = "64 channels a head"
        heads = tuple(max(width // 64, 1) for width in widths)
    else:
        rule = "8 heads"
        heads = 8
    if config:
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
        heads = tuple(heads) if isinstance(heads, list) else heads
    elif base != 320:  # published ones have 320
        print(f"note: {path} has no config.json, and shapes do not tell its heads and groups: "
              f"{rule} and 32 groups are assumed")
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, "down_blocks.0.resnets."),
        "attention_levels": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in state
                                  for i in levels),
        "context_dim": state[middle + "transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "num_heads": heads,
        **norm_groups(config, widths, path),
    }


def norm_groups(config, widths, path):
    """{"norm_groups": number} where a config.json asks for another than the networks take."""
    groups = config.get("norm_num_groups", 32)
    if groups not in range(1, max(widths, default=32) + 1):
        raise ValueError(f"{path.parent / 'config.json'} says norm_num_groups = {groups}: a number "
                         "from 1 to that of the channels is needed: pass other weights")
    is_default = not config or (groups == 32 and all(width % 32 == 0 for width in widths))
    return {} if is_default else {"norm_groups": groups}


def vit_settings(state, config, path):
    """Fields of ViTConfig."""
    dim = state["patch_embed.proj.weight"].shape[0]
    patch = state["patch_embed.proj.weight"].shape[3]
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    heads = config.get("num_attention_heads", dim / 64)  # 64 channels each in published ones
    if heads not in range(1, dim + 1) or dim % heads:
        raise ValueError(f"{path} has {dim} channels and {heads} heads: heads of 64 channels each, "
                         "or as many as a config.json beside it says in num_attention_heads, are "
                         "needed: mend or add that")
    settings = {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": count_indices(state, "blocks."),
        "num_heads": int(heads),
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        "registers": registers,
        "layer_scale": "mask_token" in state,
        "normalise": pixel_rule(config, path),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // dim,
    }

    # How positions are resized: Meta's first code added 0.1 patches, transformers does not.
    settings["interpolate_offset"] = 0.0 if registers or "model_type" in config else 0.1
    settings["antialias"] = registers > 0
    if config.get("layer_norm_eps", 1e-6) != 1e-6:
        settings["norm_eps"] = config["layer_norm_eps"]
    return settings


def pixel_rule(config, path):
    """ViTConfig.normalise: by the mean that the folder tells, or by RAD-DINO's name."""
    mean = config.get("pixel_mean")
    if mean is None:
        is_rad_dino = re.search("rad[-_]?dino", f"{path.parent.name}/{path.name}", re.IGNORECASE)
        return "rad_dino" if is_rad_dino else "imagenet"
    for rule, known in PIXEL_MEANS.items():
        if np.allclose(mean, known, atol=1e-3):
            return rule
    raise ValueError(f"{path.parent} says that the mean {mean} is taken from pixels: that of "
                     "ImageNet or of RAD-DINO is needed: pass other weights")
