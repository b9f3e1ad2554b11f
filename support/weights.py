"""One reader of published weights: find the file, read it safely, rename, say what the shapes say.

    state, settings = load_weights("stable-diffusion-v1-5/", "vae")
    vae = fill_weights(AutoencoderKL(VAEConfig(**settings)), state, "stable-diffusion-v1-5/")

Kinds are "vae", "unet" and "vit". A network's parameters have the official names (diffusers' for
the VAE and the U-Net, Meta's for the ViT); files with other names are renamed by the tables below.
Nothing in a file is executed. What cannot be loaded is refused with a line of three parts: got,
need, do. FileNotFoundError: there is no such file; ValueError: it is damaged, or does not fit.

Forms: one file (.safetensors, .bin, .pt, .pth, .ckpt), several files with an index.json, a folder
of diffusers, transformers or timm, a run's model.pt, and the names of PUBLISHED, downloaded once.
"""
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from support.command import one_line

# ---- published files: name -> (address, first digits of the file's SHA-256, or None) ------------

HUB = "https://huggingface.co/"
META = "https://dl.fbaipublicfiles.com/"
SD15 = HUB + "stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
PUBLISHED = {
    "vae": {
        "sd-vae-ft-mse": (HUB + "stabilityai/sd-vae-ft-mse/resolve/main/"
                          "diffusion_pytorch_model.safetensors", "a1d993488569e928"),
        "sd15": (SD15 + "vae/diffusion_pytorch_model.safetensors", "a2b5134f4dbc140d"),
    },
    "unet": {
        "sd15": (SD15 + "unet/diffusion_pytorch_model.safetensors", "19da7aaa4b880e59"),
    },
    "vit": {
        "dino_vits16": (META + "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
                        None),
        "dino_vits8": (META + "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", None),
        "dino_vitb16": (META + "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
                        "bf34ad0f424b9029"),
        "dino_vitb8": (META + "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
                       "575f0efc48389383"),
        "dinov2_vits14": (META + "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
                          "b938bf1bc15cd2ec"),
        "dinov2_vitb14": (META + "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
                          "0b8b82f85de91b42"),
        "dinov2_vitl14": (META + "dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
                          "d5383ea8f4877b24"),
        "dinov2_vits14_reg": (META + "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
                              "f433177089a68182"),
        "dinov2_vitb14_reg": (META + "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
                              "73182a088cf94833"),
        "dinov2_vitl14_reg": (META + "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
                              "36e4deffbaef061a"),
        "rad-dino": (HUB + "microsoft/rad-dino/resolve/main/model.safetensors", None),
    },
}
WHAT = {"vae": "an autoencoder", "unet": "a conditional U-Net", "vit": "a ViT of DINO or DINOv2"}

# ---- names: (pattern, replacement), applied one after the other to every name ------------------

# CompVis' autoencoder; the decoder's levels are counted from the other end (see rename_vae).
VAE_NAMES = (
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
)

# CompVis' U-Net, after its numbered blocks have been told apart (see rename_unet).
UNET_NAMES = (
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
)

# Meta's checkpoints, timm's and transformers' ViT.
VIT_NAMES = (
    (r"^(?:module\.|backbone\.|teacher\.|vit\.|dinov2\.|dinov2_with_registers\.)+", r""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),                  # chunks of blocks: DINOv2, trained
    (r"^reg_token$", r"register_tokens"),                       # timm
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),  # transformers from here on
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
)

# Entries that a training or a task leaves in a file, and that the networks here do not have.
LEFT_OUT = {
    "vae": r"^(loss|model_ema)\.",
    "unet": r"^model_ema\.",
    "vit": r"^(head|dino_head|ibot_head|classifier|pooler)\.",
}

# Networks that are often taken for those that fit: what tells them, and their names.
REFUSED = {
    "vae": ((r"^(encoder|decoder)\.layers\.\d|^\d+\.conv\.\d", "TAESD, a tiny autoencoder"),
            (r"^quantize\.", "an autoencoder with a codebook (VQ)"),
            (r"(down|up)(_blocks)?\.\d+\.attn(entions)?\.", "an autoencoder with attention in its "
             "levels (kl-f16, kl-f32)")),
    "unet": ((r"^(add_embedding|label_emb)\.", "the U-Net of SDXL"),
             (r"controlnet|input_hint_block", "a ControlNet"),
             (r"lora_|\.lora", "LoRA differences without the network"),
             (r"^(single_)?transformer_blocks\.|^joint_blocks\.|^double_blocks\.",
              "a diffusion transformer")),
    "vit": ((r"\.mlp\.(w12|w3|weights_in|weights_out|fc1_g)\.", "a ViT with SwiGLU (ViT-g)"),
            (r"storage_tokens|rope_emb|^layer\.\d+\.attention\.q_proj|\.gamma_1$",
             "DINOv3, whose attention turns with the position (RoPE),"),
            (r"^(module\.|backbone\.)*layer1\.0\.conv1", "a ResNet"),
            (r"relative_position|^stages\.|downsample_layers", "a Swin or ConvNeXt network")),
}

# ---- what the shapes do not say -----------------------------------------------------------------

# Options of config.json that change the numbers and that the networks here have in one form only.
ONE_FORM = {
    "vae": {"act_fn": ("silu", "swish"), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
            "mid_block_add_attention": (True,)},
    "unet": {"act_fn": ("silu", "swish"), "norm_eps": (1e-5,), "freq_shift": (0,),
             "flip_sin_to_cos": (True,), "center_input_sample": (False,),
             "downsample_padding": (1,), "mid_block_scale_factor": (1, 1.0),
             "time_embedding_type": ("positional",), "time_embedding_act_fn": (None,),
             "timestep_post_act": (None,), "attention_type": ("default",),
             "dual_cross_attention": (False,), "only_cross_attention": (False,),
             "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
             "resnet_out_scale_factor": (1, 1.0), "transformer_layers_per_block": (1,),
             "mid_block_type": ("UNetMidBlock2DCrossAttn",)},
    "vit": {"hidden_act": ("gelu",), "use_swiglu_ffn": (False,)},
}
CLASSES = {"vae": ("AutoencoderKL",), "unet": ("UNet2DConditionModel",),
           "vit": ("vit", "dinov2", "dinov2_with_registers")}

# How each family of ViT resizes its positions, and how it normalises pixels.
META_POSITIONS = {"interpolate_offset": 0.1, "antialias": False}
META_REGISTERS = {"interpolate_offset": 0.0, "antialias": True}
TRANSFORMERS = {"interpolate_offset": 0.0, "antialias": False}
PIXEL_MEANS = {"imagenet": (0.485, 0.456, 0.406), "rad_dino": (0.5307, 0.5307, 0.5307)}


def load_weights(name_or_path, kind):
    """The weights that a published name, a file or a folder stands for.

    kind: "vae", "unet" or "vit"
    Returns: state, a dict of float32 tensors under the official names; and settings, a dict of the
        fields of VAEConfig, UNetConfig or ViTConfig that shapes and config.json tell.
    Raises: FileNotFoundError, or ValueError for a damaged file or another architecture.
    """
    path = find_weights(name_or_path, kind)
    content = read_tensors(path)

    # A file of this project tells its settings; all others have a config.json or only shapes.
    project = project_part(content, path, kind)
    if project is not None:
        state, settings = project
    else:
        state = rename(unwrap(content, path), path, kind)
        config = read_config(path, kind)
        read_settings = {"vae": vae_settings, "unet": unet_settings, "vit": vit_settings}[kind]
        try:
            settings = read_settings(state, config, path)
        except (LookupError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path} is not {WHAT[kind]}, {error} is missing: its weights are "
                             "needed: pass that file") from error
    state = {name: tensor.float() if tensor.is_floating_point() else tensor
             for name, tensor in state.items()}
    return state, settings


def fill_weights(model, state, source):
    """Puts state into model, whose parameters may be on the meta device; returns model.

    Raises: ValueError if any name or shape differs.
    """
    needed = model.state_dict()
    wrong = []
    for name in sorted({*needed, *state}):
        given = tuple(state[name].shape) if name in state else "missing"
        wanted = tuple(needed[name].shape) if name in needed else "nothing"
        if given != wanted:
            wrong.append(f"{name} is {given} instead of {wanted}")
    if wrong:
        raise ValueError(f"{source} has weights of another architecture, {len(wrong)} differ, "
                         f"first: {'; '.join(wrong[:2])}: the layout of {model.config} is needed: "
                         "pass the matching file")

    # Convolutions keep the order in memory that the model was built with.
    def ordered(tensor, like):
        if tensor.stride() == like.stride():
            return tensor
        return torch.empty_like(like, device=tensor.device).copy_(tensor)

    fitted = {name: ordered(state[name], tensor) for name, tensor in needed.items()}
    model.load_state_dict(fitted, strict=True, assign=True)
    return model


def load_model(network, config_class, name_or_path, kind):
    """network(config_class(...)) with the weights of name_or_path; Raises as load_weights."""
    state, settings = load_weights(name_or_path, kind)
    try:
        with torch.device("meta"):  # no time lost on random numbers, no second copy
            model = network(config_class(**settings))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} does not fit ({one_line(error)}): {WHAT[kind]} as this "
                         "version builds it is needed: pass another file") from error
    return fill_weights(model, state, name_or_path)


# ---- finding ------------------------------------------------------------------------------------

def find_weights(name_or_path, kind):
    """The file (or index.json of several files) that a published name, file or folder stands for.
    """
    path = Path(name_or_path)
    name = str(name_or_path).removeprefix("microsoft/")
    if not path.exists() and name in PUBLISHED[kind]:
        return download(name, kind)
    if path.is_file():
        return path

    # A folder: our own run, or the file names of diffusers and transformers, full precision first.
    folders = (path, path / kind)
    names = ["model.pt"]
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin"):
            names += [stem + ending, f"{stem}{ending}.index.json",
                      f"{stem}.fp16{ending}", f"{stem}{ending}.index.fp16.json"]
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"no weights at {path}: a .safetensors, .bin, .pt, .pth or .ckpt file or a folder of "
        f"diffusers or transformers is needed: give another path or one of "
        f"{', '.join(PUBLISHED[kind])}, or train your own with python train.py")


def download(name, kind):
    """The file of a published name, in torch.hub's folder, downloaded if it is not there."""
    url, digits = PUBLISHED[kind][name]
    ending = Path(url).suffix
    file = Path(url).name if kind == "vit" and ending == ".pth" else f"{kind}-{name}{ending}"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
    except (OSError, RuntimeError) as error:  # no network; or another hash
        raise FileNotFoundError(f"could not download {name} ({one_line(error)}): it is needed "
                                f"once: put {url} at {path}") from error
    return path


# ---- reading ------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def read_tensors(path):
    """What is in a file of weights, or in all files of an index.json: a dict."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".json":
        return read_shards(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load does not look at the checksums
                    raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)  # nothing is executed
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except Exception as error:  # a damaged file makes torch.load raise nearly any type
        reason = one_line(error).split(". ")[0][:200]
        raise ValueError(
            f"{path} is not a file of plain tensors ({type(error).__name__}: {reason}): a whole "
            "state dict is needed: download it again, or save it with "
            "torch.save(model.state_dict(), path)") from error
    return content


def read_shards(path):
    """All tensors of the files that an index.json names: {"weight_map": {tensor: file}}."""
    tensors = {}
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(file).name != file or file.endswith(".json") for file in files):
            raise ValueError("a file of another folder")
    except Exception as error:  # whatever else stands in the file
        raise ValueError(f"{path} is not an index of weights ({error!r}): need one as published: "
                         "download it again") from error
    for file in files:
        if not (path.parent / file).is_file():
            raise FileNotFoundError(f"{path.parent / file} is missing: all {len(files)} files that "
                                    f"{path.name} names are needed: download it too")
        tensors |= read_tensors(path.parent / file)
    return tensors


def read_safetensors(path):
    """All tensors of a .safetensors file: name -> tensor. Raises ValueError if it is not whole.

    Layout: length of the header (u64, little endian); the header, JSON: name -> dtype, shape and
    byte range; then the raw tensors without gaps.
    """
    tensors = {}
    end = 0
    try:
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            first, stop = entry["data_offsets"]
            if first != end or stop - first != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"the byte range of {name} is wrong")
            raw = torch.from_numpy(data)[start + first:start + stop].clone()
            tensors[name] = raw.view(dtype).reshape(entry["shape"])
            end = stop
        if start + end != len(data):
            raise ValueError(f"{len(data)} bytes where the header needs {start + end}")
    except Exception as error:  # a damaged header raises nearly any type
        raise ValueError(f"{path} is not a whole safetensors file ({error!r}): need one as "
                         "published: download it again") from error
    return tensors


def read_config(path, kind):
    """The config.json beside a file of weights, checked against ONE_FORM; None if there is none."""
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        named = config.get("_class_name") or config.get("model_type")
        preprocessor = path.parent / "preprocessor_config.json"
        if preprocessor.is_file():
            config["pixels"] = json.loads(preprocessor.read_text(encoding="utf-8"))["image_mean"]
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error!r}): the JSON that came with the weights "
                         "is needed: download it again") from error

    if named is not None and named not in CLASSES[kind]:
        raise ValueError(f"{file} says {named}: {WHAT[kind]} ({' or '.join(CLASSES[kind])}) is "
                         "needed: pass another folder")
    for option, allowed in ONE_FORM[kind].items():
        value = config.get(option, allowed[0])
        value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if value not in allowed:
            raise ValueError(f"{file} says {option} = {value}, which the network here does not "
                             f"have: {allowed[0]} is needed: pass other weights")
    return config


# ---- renaming -----------------------------------------------------------------------------------

def project_part(content, path, kind):
    """State and settings out of a file of this project, or None if it is not one."""
    part = content.get("embedder", content) if kind == "vit" else content
    is_project = isinstance(content.get("config"), dict) and isinstance(part, dict) and (
        "model" in part if kind == "vit" else kind in content)
    if not is_project:
        return None
    try:
        state = part["model"] if kind == "vit" else content[kind]
        settings = dict(part["config"] if kind == "vit" else content["config"][kind])
        for field in ("layers_per_block", "depth"):
            if settings.get(field, 1) > len(state):
                raise ValueError(f"{field} is {settings[field]}, with {len(state)} tensors")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit ({error!r}): a model.pt trained by this version is "
                         "needed: pass another file") from error
    return state, settings


def unwrap(content, path):
    """The state dict that stands, alone or below a name, in the file of a training."""
    for name in ("state_dict", "model", "teacher", "student", "ema"):
        if isinstance(content.get(name), dict):
            content = content[name]
    if not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} is not a file of plain tensors (not every entry is one): need a "
                         "state dict: save it with torch.save(model.state_dict(), path)")
    return {str(name): tensor for name, tensor in content.items()}


def rename(state, path, kind):
    """The state dict under official names, without entries that belong to a training."""
    prefix = {"vae": "first_stage_model.", "unet": "model.diffusion_model."}.get(kind)
    if prefix and any(name.startswith(prefix) for name in state):  # Stable Diffusion in one file
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()
                 if name.startswith(prefix)}
    refuse_by_name(state, path, kind)
    finish = {"vae": finish_vae, "unet": finish_unet, "vit": finish_vit}[kind]
    return {name: tensor for name, tensor in finish(state).items()
            if not re.search(LEFT_OUT[kind], name)}


def refuse_by_name(state, path, kind):
    """Raises ValueError for networks that are often mistaken for those that fit."""
    for pattern, name in REFUSED[kind]:
        if any(re.search(pattern, key) for key in state):
            raise ValueError(f"{path} holds {name}, which does not fit: {WHAT[kind]} is needed: "
                             f"pass another file, or one of {', '.join(PUBLISHED[kind])}")


def finish_vae(state):
    """Levels of CompVis' decoder from the other end; attention as linear layers; grey as RGB."""
    is_compvis = any(name.startswith("decoder.mid.") for name in state)
    last = count_indices(state, "decoder.up.") - 1
    finished = {}
    for name, tensor in apply_table(state, VAE_NAMES).items():
        if is_compvis and name.startswith("decoder.up_blocks."):
            level = int(name.split(".")[2])
            name = name.replace(f"up_blocks.{level}.", f"up_blocks.{last - level}.", 1)
        if ".attentions." in name and tensor.ndim == 4:  # a convolution of 1x1 pixels
            tensor = tensor[:, :, 0, 0]
        finished[name] = tensor

    # Grey images are repeated to three channels: a third of the sum of three equal channels.
    first = finished.get("encoder.conv_in.weight")
    if first is not None and first.ndim == 4 and first.shape[1] == 1:
        finished["encoder.conv_in.weight"] = first.expand(-1, 3, -1, -1) / 3
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            if name in finished and len(finished[name]) == 1:
                finished[name] = torch.cat(3 * [finished[name]])
    return finished


def finish_unet(state):
    """CompVis' U-Net counts all blocks in a row: their level and place in it, as diffusers say."""
    if "input_blocks.0.0.weight" not in state:
        return state
    changes = [int(name.split(".")[1]) for name in state
               if re.match(r"input_blocks\.\d+\.0\.op\.weight", name)]
    layers = min(changes, default=count_indices(state, "input_blocks.")) - 1  # ResNets a level

    def place(match):
        side, number, part, change = match.groups()
        if side == "input" and number == "0":
            return "conv_in."
        counted = int(number) - 1 if side == "input" else int(number)
        level, layer = divmod(counted, layers + 1)
        blocks = "down_blocks" if side == "input" else "up_blocks"
        if change:
            sampler = "downsamplers" if side == "input" else "upsamplers"
            return f"{blocks}.{level}.{sampler}.0.conv."
        return f"{blocks}.{level}.{'resnets' if part == '0' else 'attentions'}.{layer}."

    pattern = re.compile(r"^(input|output)_blocks\.(\d+)\.(\d+)\.(op\.|conv\.)?")
    placed = {pattern.sub(place, name): tensor for name, tensor in state.items()}
    return apply_table(placed, UNET_NAMES)


def finish_vit(state):
    """One projection for queries, keys and values; positions with a row for CLS; grey as RGB."""
    state = apply_table(state, VIT_NAMES)

    # Three projections become one. In the order of its parts, as qkv holds them.
    for name in [name for name in state if re.search(r"\.attn\.query\.", name)]:
        three = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in state for part in three):
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(n) for n in three])

    # timm's registers: the positions have no row for CLS, which holds its own already.
    positions = state.get("pos_embed")
    if positions is not None and positions.ndim == 3 and is_square(positions.shape[1]):
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)

    # DINOv2's files hold a mask token, which is not used; timm leaves it out.
    if "blocks.0.ls1.gamma" in state and "cls_token" in state:
        state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    else:
        state.pop("mask_token", None)

    first = state.get("patch_embed.proj.weight")
    if first is not None and first.ndim == 4 and first.shape[1] == 1:  # see finish_vae
        state["patch_embed.proj.weight"] = first.expand(-1, 3, -1, -1) / 3
    return state


def apply_table(state, table):
    """The state dict with every (pattern, replacement) of the table applied to every name."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# ---- settings -----------------------------------------------------------------------------------

def count_indices(state, prefix):
    """How many different indices follow prefix in the names."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def is_square(number):
    return math.isqrt(number) ** 2 == number


def vae_settings(state, config, path):
    """Fields of VAEConfig."""
    base, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = range(count_indices(state, "encoder.down_blocks."))
    widths = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    settings = {
        "in_channels": in_channels,
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, "encoder.down_blocks.0.resnets."),
    }
    if config is not None:
        settings |= norm_groups(config, widths)
    elif base != 128:  # that of all published ones
        print(f"note: {path} has no config.json, and shapes do not tell the groups of its norms: "
              "32 are assumed")
    return settings


def unet_settings(state, config, path):
    """Fields of UNetConfig."""
    base, in_channels = state["conv_in.weight"].shape[:2]
    levels = range(count_indices(state, "down_blocks."))
    widths = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    attention = tuple(f"down_blocks.{i}.attentions.0.norm.weight" in state for i in levels)
    middle = "mid_block.attentions.0."
    settings = {
        "in_channels": in_channels,
        "out_channels": state["conv_out.weight"].shape[0],
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "layers_per_block": count_indices(state, "down_blocks.0.resnets."),
        "attention_levels": attention,
        "context_dim": state[middle + "transformer_blocks.0.attn2.to_k.weight"].shape[1],
    }
    is_linear = state[middle + "proj_in.weight"].ndim == 2  # Stable Diffusion 2
    if is_linear:
        settings["linear_projection"] = True

    # "attention_head_dim" is the number of heads, in diffusers' files: one, or one for each level.
    if config is not None:
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        settings["num_heads"] = tuple(heads) if isinstance(heads, list) else heads
        settings |= norm_groups(config, widths)
        return settings
    settings["num_heads"] = tuple(max(width // 64, 1) for width in widths) if is_linear else 8
    if base != 320:  # that of all published ones
        rule = "64 channels a head" if is_linear else "8 heads"
        print(f"note: {path} has no config.json, and shapes do not tell its heads and groups: "
              f"{rule} and 32 groups are assumed")
    return settings


def norm_groups(config, widths):
    """{"norm_groups": n}, where a config.json asks for others than the networks have anyway."""
    groups = config.get("norm_num_groups", 32)
    is_default = groups == 32 and all(width % 32 == 0 for width in widths)
    return {} if is_default else {"norm_groups": groups}


def vit_settings(state, config, path):
    """Fields of ViTConfig."""
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    settings = {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": count_indices(state, "blocks."),
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        "registers": registers,
        "layer_scale": "mask_token" in state,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // dim,
        "normalise": pixel_rule(config or {}, path),
        **(META_REGISTERS if registers else META_POSITIONS),
    }

    # transformers resize positions to the exact size.
    heads = None
    if config is not None:
        heads = config.get("num_attention_heads")
        if "model_type" in config and not registers:
            settings |= TRANSFORMERS
        if config.get("layer_norm_eps", 1e-6) != 1e-6:
            settings["norm_eps"] = config["layer_norm_eps"]
    if heads is None and dim % 64:
        raise ValueError(f"{path} has {dim} channels, and shapes do not tell its heads: a multiple "
                         "of 64, which has 64 a head, or a config.json with num_attention_heads "
                         "beside it is needed: add that")
    settings["num_heads"] = heads or dim // 64
    return settings


def pixel_rule(config, path):
    """ViTConfig.normalise of a preprocessor_config.json, or of RAD-DINO's name."""
    means = config.get("pixels")
    if means is None:
        is_rad_dino = re.search(r"rad-?_?dino", f"{path.parent.name}/{path.name}", re.IGNORECASE)
        return "rad_dino" if is_rad_dino else "imagenet"
    for rule, known in PIXEL_MEANS.items():
        if np.allclose(means, known, atol=1e-3):
            return rule
    raise ValueError(f"{path.parent / 'preprocessor_config.json'} normalises pixels by the mean "
                     f"{means}: that of ImageNet or of RAD-DINO is needed: pass other weights")
