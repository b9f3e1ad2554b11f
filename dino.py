"""Vision Transformer of DINO v1 and v2, and DINO self-distillation, from scratch.

Papers: ViT (Dosovitskiy 2021), DINO (Caron 2021), DINOv2 (Oquab 2023), registers (Darcet 2023).
Images are (B, 3, H, W) float32 in [-1, 1], grey repeated to three channels; `preprocess` makes of
them what a network was trained on. Tokens are (B, G, D), CLS first.

    vit = load_dino("dinov2_vits14")                  # frozen; or a file of weights, or "random"
    tokens = conditioning_tokens(vit, x, "global")    # (B, G, D)

Deliberate differences from the published code: no stochastic depth; fresh networks start from
sin-cos positions; all crops are cut at once on the device, without flips (the heart would change
sides); prototypes are normalised where they are used. The defaults train in minutes on a CPU.
"""

import argparse
import copy
import math
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOKEN_KINDS = ("global", "cls", "cls4+mean", "patch2", "patch")


@dataclass(frozen=True)
class ViTConfig:                      # the defaults are "tiny", the network trained here
    patch_size: int = 8               # pixels
    embed_dim: int = 192              # D, a multiple of num_heads
    depth: int = 4                    # blocks
    num_heads: int = 3                # 64 channels each in all published models
    image_size: int = 64              # side in pixels that pos_embed belongs to
    registers: int = 0                # extra tokens between CLS and patches
    layer_scale: bool = False         # DINOv2: a gain after each branch (and an unused mask token)
    interpolate_offset: float = 0.0   # added to the grid when positions are resized; 0 = exact size
    antialias: bool = True            # when positions are resized
    normalise: str = "per_image"      # (x - mean) / (sd + 0.1) of each image, or "imagenet"
    mlp_ratio: int = 4                # hidden width of the MLP / D


V1 = {"image_size": 224, "interpolate_offset": 0.1, "antialias": False, "normalise": "imagenet"}
V2 = {**V1, "image_size": 518, "layer_scale": True}
V2_REG = {**V2, "registers": 4, "interpolate_offset": 0.0, "antialias": True}
VISION_TRANSFORMERS = {
    "dino_vits16": ViTConfig(16, 384, 12, 6, **V1), "dino_vits8": ViTConfig(8, 384, 12, 6, **V1),
    "dino_vitb16": ViTConfig(16, 768, 12, 12, **V1), "dino_vitb8": ViTConfig(8, 768, 12, 12, **V1),
    "dinov2_vits14": ViTConfig(14, 384, 12, 6, **V2),
    "dinov2_vitb14": ViTConfig(14, 768, 12, 12, **V2),
    "dinov2_vitl14": ViTConfig(14, 1024, 24, 16, **V2),
    "dinov2_vits14_reg": ViTConfig(14, 384, 12, 6, **V2_REG),
    "dinov2_vitb14_reg": ViTConfig(14, 768, 12, 12, **V2_REG),
    "dinov2_vitl14_reg": ViTConfig(14, 1024, 24, 16, **V2_REG),
    "tiny": ViTConfig(),
}
# No published file name holds a hash, so there is nothing for torch.hub's check_hash to compare.
WEIGHTS = {
    "dino_vits16": "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dinov2_vits14": "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitl14": "dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_vits14_reg": "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2_vitb14_reg": "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_vitl14_reg": "dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
}


# ---- Vision Transformer: attribute names equal the keys of the published files ----

def preprocess(x, kind):
    """Images (B, 3, H, W) in [-1, 1] -> the same, normalised as ViTConfig.normalise says."""
    x = (x + 1) / 2
    if kind == "per_image":
        sd, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return (x - mean) / (sd + 0.1)
    mean, std = (x.new_tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def resize(x, side):
    """Images (B, C, H, W) in [-1, 1] -> (B, C, side, side), antialiased bicubic."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (grid*grid, dim): half of the channels for each axis."""
    quarter = math.ceil(dim / 4)
    angles = torch.arange(grid)[:, None] / 10000 ** (torch.arange(quarter) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                 # (grid, dim/2)
    both = [axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)]
    return torch.cat(both, dim=2).flatten(0, 1)[:, :dim]


def init_linear(module):
    """Truncated normal of standard deviation 0.02 for all linear weights, zero for their biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def attention_weights(q, k):
    """Softmax of scaled products: (B, heads, M, d), (B, heads, N, d) -> (B, heads, M, N)."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """Queries, keys and values, each (B, heads, N, d)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            x = attention_weights(q, k) @ v  # five times as fast there as torch's fused kernel
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))               # (B, heads, N, d) -> (B, N, D)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, hidden = c.embed_dim, c.mlp_ratio * c.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn = Attention(D, c.num_heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(D, hidden), act=nn.GELU(),
                                             fc2=nn.Linear(hidden, D)))
        self.ls1, self.ls2 = (LayerScale(D) if c.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Vision Transformer with a CLS token and, in some models, registers."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.native_grid = c.image_size // c.patch_size
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(3, c.embed_dim, c.patch_size, stride=c.patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, c.embed_dim))
        patches = 0.5 * sincos_positions(self.native_grid, c.embed_dim)
        self.pos_embed = nn.Parameter(F.pad(patches, (0, 0, 1, 0))[None])  # row 0 belongs to CLS
        if c.registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, c.registers, c.embed_dim))
        if c.layer_scale:
            self.mask_token = nn.Parameter(torch.zeros(1, c.embed_dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)
        init_linear(self)

    @property
    def input_side(self):
        """Side in pixels that `conditioning_tokens` resizes to: 224 for published weights."""
        c = self.config
        return 224 - 224 % c.patch_size if c.normalise == "imagenet" else c.image_size

    def positions(self, rows, columns):
        """Position embeddings of CLS and a grid of patches, (1, 1 + rows*columns, D).

        Bicubic, as the published code: without registers by a factor that is 0.1 patch too large,
        which shifts the sampling points and so belongs to the weights; with registers exactly.
        """
        c, n = self.config, self.native_grid
        if rows == columns == n:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
        target = {"size": (rows, columns)}
        if c.interpolate_offset:
            factors = [(side + c.interpolate_offset) / n for side in (rows, columns)]
            target = {"scale_factor": factors}
        patches = F.interpolate(patches, mode="bicubic", antialias=c.antialias, **target)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> tokens before the first block (B, G + N, D)."""
        B, C, H, W = x.shape
        p = self.config.patch_size
        if C != 3 or H % p or W % p:
            raise ValueError(f"image of {C} channels and {H}x{W} pixels: the ViT needs 3 channels "
                             f"(repeat grey) and sides that are multiples of its patch {p}: resize "
                             f"to {max(H // p, 1) * p}x{max(W // p, 1) * p}")
        x = self.patch_embed(preprocess(x, self.config.normalise))
        x = x.flatten(2).transpose(1, 2)                                # (B, D, h, w) -> (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.positions(H // p, W // p)
        if self.config.registers:  # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def features(self, x, last=1):
        """All after the final norm: CLS of the last blocks, global tokens, patch tokens.

        x (B, 3, H, W) in [-1, 1] -> (B, last, D), (B, 1 + registers, D), (B, N, D).
        Raises: ValueError if a side is no multiple of the patch.
        """
        x, cls, G = self.embed(x), [], 1 + self.config.registers
        for block in self.blocks:
            x = block(x)
            cls.append(x[:, 0])
        x = self.norm(x)
        return self.norm(torch.stack(cls[-last:], dim=1)), x[:, :G], x[:, G:]

    def forward(self, x):
        """Global tokens (B, G, D): CLS, then registers; x (B, 3, H, W) in [-1, 1]."""
        return self.features(x)[1]


def attention_maps(vit, x):
    """Attention of CLS to each patch in the last block, (B, heads, H/patch, W/patch)."""
    p, tokens = vit.config.patch_size, vit.embed(x)
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    q, k, _ = vit.blocks[-1].attn.split(vit.blocks[-1].norm1(tokens))
    patches = attention_weights(q[:, :, :1], k)[:, :, 0, 1 + vit.config.registers:]
    return patches.unflatten(2, (x.shape[2] // p, x.shape[3] // p))     # (B, heads, N) -> grid


def conditioning_tokens(vit, x, kind="global"):
    """Tokens (B, G, D) that condition the diffusion model, from images (B, 3, H, W) of any side.

    "global"           published weights: CLS and registers; own or random ones: as "cls4+mean"
    "cls"              CLS alone, G = 1
    "cls4+mean"        CLS of the last four blocks and the mean patch token, G = 5
    "patch2", "patch"  CLS and the patch tokens pooled to 2x2 or 4x4, G = 5 or 17. For the ablation
                       only: patch tokens keep the layout and let the model copy its source.
    Raises: ValueError for another kind.
    """
    if kind not in TOKEN_KINDS:
        raise ValueError(f"tokens {kind!r} are unknown: a kind out of {', '.join(TOKEN_KINDS)} is "
                         "needed: use global")
    x = resize(x, vit.input_side)
    cls, tokens, patches = vit.features(x, last=4)
    if kind == "global" and vit.config.normalise == "per_image":
        kind = "cls4+mean"
    if kind == "cls4+mean":
        return torch.cat([cls, patches.mean(dim=1, keepdim=True)], dim=1)
    if kind in ("global", "cls"):
        return tokens if kind == "global" else tokens[:, :1]
    side = vit.input_side // vit.config.patch_size
    grid = patches.transpose(1, 2).unflatten(2, (side, side))           # (B, N, D) -> (B, D, h, w)
    pooled = F.adaptive_avg_pool2d(grid, 2 if kind == "patch2" else 4).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :1], pooled], dim=1)


# ---- Weights ----

def build_vit(name, seed=0):
    """Architecture `name` with random weights drawn from `seed`; "random" is the tiny one."""
    if name not in VISION_TRANSFORMERS and name != "random":
        raise ValueError(f"embedder {name!r} is unknown: a name or a file of weights is needed: "
                         f"use one of {', '.join(VISION_TRANSFORMERS)}, random, or a path")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        return VisionTransformer(VISION_TRANSFORMERS["tiny" if name == "random" else name])


def load_dino(name_or_path):
    """Frozen ViT in eval mode: published weights by name, "random", or a file of weights.

    The file may be a published one, a full training checkpoint of DINO (its teacher is taken), or
    one of ours: {"config": dict, "model": state_dict}, alone or under "embedder". For a bare file
    the shapes tell the architecture; 64 channels a head and ImageNet normalisation are assumed.
    Raises: ValueError for an unknown name or unfit file; FileNotFoundError without file or network.
    """
    name = str(name_or_path)
    if Path(name).is_file():
        content = _read(name)
        ours = content.get("embedder", content)
        if isinstance(ours, dict) and {"config", "model"} <= set(ours):
            try:
                config = ViTConfig(**ours["config"])
            except TypeError as error:
                raise ValueError(f"{name} is of another version ({error}): the fields of ViTConfig "
                                 "are needed: train it again") from None
            return _load(config, ours["model"], name)
        state = _backbone(content)
        return _load(_config_from_shapes(state, name), state, name)
    if name == "tiny":
        raise FileNotFoundError("no weights for 'tiny': it is trained here, not published: run "
                                "`python train.py` and pass runs/NAME/model.pt, or use random")
    if "/" in name or name.endswith((".pt", ".pth")):
        raise FileNotFoundError(f"no file {name}: the weights of a ViT are needed: check the path, "
                                f"or use one of {', '.join(WEIGHTS)}")
    if name not in WEIGHTS:
        return build_vit(name).requires_grad_(False).eval()
    return _load(VISION_TRANSFORMERS[name], _backbone(_read(_download(name))), name)


def _download(name):
    """Path of a published file in torch.hub's cache, downloaded if it is not there."""
    url = "https://dl.fbaipublicfiles.com/" + WEIGHTS[name]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:  # no network, no such address, or no room
            raise FileNotFoundError(f"cannot download {url} ({error}): {name} needs this file: put "
                                    f"it at {path}, or pass its path, not its name") from None
    return path


def _read(path):
    """Content of a file of weights, a dict; nothing in the file is executed."""
    try:  # DINO's full checkpoints hold their arguments in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        reason = str(error).split("\n")[0][:80]
        raise ValueError(f"cannot read {path} ({reason}): a dict of tensors saved by torch.save is "
                         "needed: delete it and get it again, or pass another file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: a dict of tensors is needed: "
                         "save the state_dict of the network")
    return content


def _backbone(content):
    """State dict of the ViT, without the prefixes and heads of training checkpoints."""
    state = next((content[k] for k in ("teacher", "student") if isinstance(content.get(k), dict)),
                 content)
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {k[len("backbone."):]: v for k, v in state.items() if k.startswith("backbone.")}
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def _config_from_shapes(state, source):
    """Architecture of a bare state dict."""
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    for key, dimensions in needed.items():
        if getattr(state.get(key), "ndim", 0) != dimensions:
            raise ValueError(f"{source} has no usable {key!r} (its first key is "
                             f"{next(iter(state), None)!r}): a ViT-S, B or L of DINO or DINOv2 is "
                             "needed: pass another file")
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return ViTConfig(patch, dim, depth, max(dim // 64, 1),
                     math.isqrt(state["pos_embed"].shape[1] - 1) * patch, registers,
                     "blocks.0.ls1.gamma" in state, 0.0 if registers else 0.1, registers > 0,
                     "imagenet", len(state["blocks.0.mlp.fc1.weight"]) // dim)


def _load(config, state, source):
    """Frozen ViT with these weights; every key and every shape must fit."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        vit = VisionTransformer(config)
    need = {key: tuple(value.shape) for key, value in vit.state_dict().items()}
    got = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    wrong = [f"{key} (got {got.get(key, 'none')}, need {need.get(key, 'none')})"
             for key in sorted({*need, *got}) if need.get(key) != got.get(key)]
    if wrong:
        raise ValueError(f"{source} is no ViT of width {config.embed_dim}, depth {config.depth}, "
                         f"patch {config.patch_size}: {'; '.join(wrong[:3])}: pass the file that "
                         "belongs to this name, or another file")
    vit.load_state_dict(state)
    return vit.requires_grad_(False).eval()


# ---- Self-distillation with no labels ----

@dataclass(frozen=True)
class DINOConfig:                       # in brackets: the paper
    head_dim: int = 512                 # hidden width of the head (2048, no batch norm)
    bottleneck: int = 128               # (256)
    prototypes: int = 256               # K (65536)
    local_crops: int = 2                # of half the side, besides two global ones (8)
    global_area: tuple = (0.5, 1.0)     # share of the image in a global crop (0.4 to 1)
    local_area: tuple = (0.1, 0.5)      # and in a local one (0.05 to 0.4)
    jitter: float = 0.12                # of brightness, contrast and gamma, relative
    student_temp: float = 0.1           # (0.1)
    teacher_temp: tuple = (0.02, 0.02)  # start and end of a linear warm-up (0.04 to 0.07)
    warm_up: float = 0.1                # share of training that it takes (30 epochs)
    momentum: tuple = (0.98, 1.0)       # of the teacher, along a cosine (0.996 to 1)
    centre_momentum: float = 0.9        # (0.9)
    freeze: float = 0.0                 # share of training before prototypes move (1 epoch)


def cosine(start, end, progress):
    """Half a cosine from start to end; progress in [0, 1] (paper's weight decay: 0.04 to 0.4)."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(start, end, progress, share):
    """Straight line from start to end over the first `share` of training, then constant."""
    return end if progress >= share else start + (end - start) * progress / share


def random_crops(images, count, side, area, jitter, generator):
    """`count` views of each image, (count*B, C, side, side) in [-1, 1], view after view.

    Random box (share of the area in `area`, aspect 3/4 to 4/3), brightness, contrast, gamma, blur
    and noise; no flip. All draws come from `generator`, which lives on the device of the images.
    """
    x = images.float().repeat(count, 1, 1, 1)
    n = len(x)
    u = torch.rand(9, n, generator=generator, device=x.device)
    size, aspect = (area[0] + (area[1] - area[0]) * u[0]).sqrt(), (4 / 3) ** (u[1] - 0.5)
    w, h, zero = (size * aspect).clamp(max=1), (size / aspect).clamp(max=1), torch.zeros_like(size)
    box = [w, zero, (2 * u[2] - 1) * (1 - w), zero, h, (2 * u[3] - 1) * (1 - h)]
    grid = F.affine_grid(torch.stack(box, 1).view(n, 2, 3), (n, 1, side, side), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    brightness, contrast, gamma = (1 + jitter * (2 * u[4:7] - 1)).view(3, n, 1, 1, 1)
    blur, noise = u[7:].view(2, n, 1, 1, 1)
    x = (x + 1) / 2 * brightness
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1) ** gamma
    smooth = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = x + (2 * blur - 1).clamp(min=0) * (smooth - x)  # half of the views stay sharp
    grain = torch.randn(n, 1, side, side, generator=generator, device=x.device)  # grey stays grey
    return (x + 0.03 * noise * grain).clamp(0, 1) * 2 - 1


def multi_crop(images, generator, vit_config, config=DINOConfig()):
    """Two global crops an image, (2*B, C, S, S), and the local ones, (local*B, C, S/2, S/2)."""
    side, p = vit_config.image_size, vit_config.patch_size
    kinds = [(2, side, config.global_area),
             (config.local_crops, max(side // 2 // p, 1) * p, config.local_area)]
    images = resize(images, side)
    return [random_crops(images, *kind, config.jitter, generator) for kind in kinds if kind[0]]


def dino_loss(student, teacher, centre, student_temp, teacher_temp):
    """Mean cross-entropy of student views under teacher views, never of a view with itself.

    student (S, B, K) and teacher (2, B, K) are logits, the first two views are the same crops; also
    returns the teacher's probabilities (2, B, K). Source: DINO eq. 3, with the centre of sec. 3.1.
    """
    q = ((teacher - centre) / teacher_temp).softmax(dim=-1)
    log_p = (student / student_temp).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", q, log_p) / student.shape[1]
    other = 1 - torch.eye(*pairs.shape, device=pairs.device)
    return (pairs * other).sum() / other.sum(), q


def entropy(p):
    """Mean entropy in nats of distributions (..., K)."""
    return -torch.xlogy(p, p).sum(dim=-1).mean()


class DINOHead(nn.Module):
    """MLP, L2 norm, cosine with each prototype: (B, D) -> logits (B, K) in [-1, 1], float32."""

    def __init__(self, dim, c):
        super().__init__()
        layers = []
        for width in (dim, c.head_dim):
            norm = nn.BatchNorm1d(c.head_dim, track_running_stats=False)  # the batch's own, always
            layers += [nn.Linear(width, c.head_dim), norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(c.head_dim, c.bottleneck))
        self.prototypes = nn.Parameter(torch.randn(c.prototypes, c.bottleneck))
        init_linear(self)

    def forward(self, x, frozen=False):
        x, prototypes = self.mlp(x), self.prototypes.detach() if frozen else self.prototypes
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to divide by 0.02
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(prototypes, dim=-1))


class DINO(nn.Module):
    """Student, EMA teacher and centre; optimizer and clock are the caller's.

    Each step: `loss, logs = dino.loss(images, progress, generator)`, backward, a step of the
    optimizer over `dino.student.parameters()`, `dino.update_teacher(progress)`. The state_dict is
    complete. Two collapses show in the logs: teacher_entropy at log K (all prototypes alike), or
    batch_entropy at 0 (one prototype for all images). Source: DINO algorithm 1.
    """

    def __init__(self, vit_config, config=DINOConfig()):
        super().__init__()
        self.vit_config, self.config = vit_config, config
        self.student = nn.ModuleDict({"backbone": VisionTransformer(vit_config),
                                      "head": DINOHead(vit_config.embed_dim, config)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("batch_centre", torch.zeros(config.prototypes))

    def teacher_vit(self):
        """The teacher's ViT, frozen: in the paper it is better than the student throughout."""
        return self.teacher["backbone"].eval()

    def loss(self, images, progress, generator):
        """Loss and values to log (scalars); images (B, 3, H, W) in [-1, 1], progress in [0, 1]."""
        c, B = self.config, len(images)
        crops = multi_crop(images, generator, self.vit_config, c)
        with torch.no_grad():
            teacher = self.teacher["head"](self.teacher["backbone"](crops[0])[:, 0])
            self.batch_centre.copy_(teacher.mean(dim=0))
        cls = torch.cat([self.student["backbone"](x)[:, 0] for x in crops])
        student = self.student["head"](cls, frozen=progress < c.freeze)
        student, teacher = student.unflatten(0, (-1, B)), teacher.unflatten(0, (2, B))
        loss, q = dino_loss(student, teacher, self.centre, c.student_temp,
                            linear(*c.teacher_temp, progress, c.warm_up))
        return loss, {"teacher_entropy": entropy(q), "batch_entropy": entropy(q.mean(dim=(0, 1)))}

    @torch.no_grad()
    def update_teacher(self, progress):
        """Teacher follows the student, centre the last batch. Source: DINO sec. 3.1 and eq. 4."""
        momentum = cosine(*self.config.momentum, progress)
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(theirs, 1 - momentum)
        self.centre.lerp_(self.batch_centre, 1 - self.config.centre_momentum)


# ---- Attention maps as a picture ----

def open_image(path, side):
    """Image file -> centre crop (1, 3, side, side) in [-1, 1]; deep grey uses its own range."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # more than 8 bits, which convert() would cut off
        deep = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(np.uint8(255 * (deep - deep.min()) / max(np.ptp(deep), 1e-6)))
    pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def draw_attention(vit, x, panel=224):
    """PIL image: x (1, 3, H, W) in [-1, 1], then one heat map for each head."""
    maps = attention_maps(vit, x)[0]
    maps = 3 * maps / maps.amax(dim=(1, 2), keepdim=True)  # black, red, yellow, white
    heat = torch.stack([(maps - channel).clamp(0, 1) for channel in range(3)], dim=1)
    panels = torch.cat([F.interpolate(picture, size=panel) for picture in ((x + 1) / 2, heat)])
    row = F.pad(panels, (2, 2, 2, 2), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
    return Image.fromarray((255 * row).round().byte().numpy())


def main():
    parser = argparse.ArgumentParser(description="Draw the attention of CLS, one panel per head.")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--embedder", help="name or file of weights (default: the newest run's)")
    parser.add_argument("--size", type=int, help="side the ViT sees, in pixels (default: its own)")
    parser.add_argument("--out", default="attention.png", help="picture (default: %(default)s)")
    args = parser.parse_args()
    try:
        runs = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
        if not args.embedder and not runs:
            raise FileNotFoundError("no --embedder and no runs/*/model.pt: weights of a ViT are "
                                    "needed: run `python train.py`, or pass --embedder dino_vits8")
        vit = load_dino(args.embedder or runs[-1])
        side, p = args.size if args.size is not None else vit.input_side, vit.config.patch_size
        if side < p or side % p:
            raise ValueError(f"--size {side}: a multiple of the patch {p} is needed: use --size "
                             f"{max(side // p, 1) * p}")
        try:
            x = open_image(args.image, side)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"cannot read {args.image} ({error}): an image is needed: check the "
                             "path and the file")
        picture = draw_attention(vit, x)
        try:
            picture.save(args.out)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot write {args.out} ({error}): a .png in a folder that is "
                             "there is needed: change --out")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: image and {vit.config.num_heads} heads of {args.embedder or runs[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
