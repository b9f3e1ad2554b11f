"""Vision Transformer of DINO v1 and v2, and DINO self-distillation, from scratch.

Papers: ViT (Dosovitskiy 2021), DINO (Caron 2021), DINOv2 (Oquab 2023), registers (Darcet 2023).
Images are (B, 3, H, W) float32 in [-1, 1], grey repeated to three channels; tokens are (B, G, D),
CLS first. `python dino.py --image x.png` draws where the CLS token looks.

    vit = load_dino("dinov2_vits14")                  # frozen; or a file of weights
    tokens = conditioning_tokens(vit, x, "global")    # (B, G, D)

Deliberate differences from the published code: no stochastic depth; fresh networks start from
sin-cos positions; all crops are cut at once on the device, without flips (the heart would change
sides); prototypes are normalised where they are used and learn from the first step on; weight
decay and, by default, the teacher's temperature are constant (the paper raises both).
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

TOKEN_KINDS = ("global", "cls", "cls4+mean", "patch2", "patch")


@dataclass(frozen=True)
class ViTConfig:                      # the defaults are "tiny", the network trained here
    patch_size: int = 8               # pixels
    embed_dim: int = 192              # D, a multiple of 4 and of num_heads
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
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, depth, heads
VISION_TRANSFORMERS = {
    **{f"dino_vit{s}{p}": ViTConfig(p, *SIZES[s], **V1) for s in "sb" for p in (16, 8)},
    **{f"dinov2_vit{s}14": ViTConfig(14, *SIZES[s], **V2) for s in "sbl"},
    **{f"dinov2_vit{s}14_reg": ViTConfig(14, *SIZES[s], **V2_REG) for s in "sbl"},
    "tiny": ViTConfig(),
}


# ---- Vision Transformer: attribute names equal the keys of the published files ----

def preprocess(x, kind):
    """Images (B, 3, H, W) in [-1, 1] -> the same, normalised as ViTConfig.normalise says."""
    x = (x + 1) / 2
    if kind == "per_image":
        sd, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return (x - mean) / (sd + 0.1)
    mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    return (x - mean) / std


def resize(x, side):
    """Images (B, C, H, W) in [-1, 1] -> (B, C, side, side), antialiased bicubic."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (grid*grid, dim): half of the channels tell the row, half the column."""
    quarter = dim // 4
    angles = torch.arange(grid)[:, None] / 10000 ** (torch.arange(quarter) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                 # (grid, dim/2)
    return torch.cat([axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)], dim=1)


def init_linear(layer):
    """For Module.apply: weights of linear layers normal with deviation 0.02, biases zero."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


def attention_weights(q, k):
    """Softmax of scaled products: (B, heads, M, d), (B, heads, N, d) -> (B, heads, M, N)."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Linear(nn.Linear):
    """nn.Linear over tokens; on the CPU as a 1x1 convolution, the same sums at up to twice the
    speed: oneDNN, which convolves, uses AVX-512 on every maker's chips, the matrix product not."""

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[1] < 16:  # a handful of tokens: nothing to gain
            return super().forward(x)
        x = x.unsqueeze(1).movedim(-1, 1)                 # (B, N, D) -> (B, D, 1, N), same memory
        return F.conv2d(x, self.weight[:, :, None, None], self.bias).movedim(1, -1).squeeze(1)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def split(self, x):
        """Queries, keys and values, each (B, heads, N, d)."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # fused: 5 times slower there
            x = attention_weights(q, k) @ v
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
        self.mlp = nn.ModuleDict({"fc1": Linear(D, hidden), "fc2": Linear(hidden, D)})
        self.ls1, self.ls2 = (LayerScale(D) if c.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class VisionTransformer(nn.Module):
    """Vision Transformer with a CLS token and, in some models, registers."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        D, p = c.embed_dim, c.patch_size
        self.input_side = 224 if c.normalise == "imagenet" else c.image_size  # best side, in pixels
        self.native_grid = c.image_size // p
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, D, p, stride=p)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        patches = 0.5 * sincos_positions(self.native_grid, D)
        self.pos_embed = nn.Parameter(F.pad(patches, (0, 0, 1, 0))[None])  # row 0 belongs to CLS
        if c.registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, c.registers, D))
        if c.layer_scale:
            self.mask_token = nn.Parameter(torch.zeros(1, D))  # unused, but in DINOv2's files
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.apply(init_linear)

    def positions(self, rows, columns):
        """Position embeddings of CLS and a grid of patches, (1, 1 + rows*columns, D)."""
        c, n = self.config, self.native_grid
        if rows == columns == n:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
        size, factors = (rows, columns), None
        if c.interpolate_offset:  # the published code's 0.1 patch shifts the sampling points
            size, factors = None, [(side + c.interpolate_offset) / n for side in size]
        patches = F.interpolate(patches, size, factors, mode="bicubic", antialias=c.antialias)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> tokens before the first block (B, G + N, D)."""
        (B, _, H, W), p = x.shape, self.config.patch_size
        if H % p or W % p:
            raise ValueError(f"image of {H}x{W} pixels: sides that are multiples of the patch {p} "
                             f"are needed: resize to {H // p * p}x{W // p * p}")
        x = self.patch_embed["proj"](preprocess(x, self.config.normalise))
        x = x.flatten(2).transpose(1, 2)                                # (B, D, h, w) -> (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.positions(H // p, W // p)
        if self.config.registers:  # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def features(self, x, last=1):
        """CLS of the last blocks (B, last, D), global (B, G, D), patch tokens (B, N, D), normed."""
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
    """
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
    pooled = F.adaptive_avg_pool2d(grid, {"patch2": 2, "patch": 4}[kind]).flatten(2)
    return torch.cat([tokens[:, :1], pooled.transpose(1, 2)], dim=1)


# ---- Weights ----

def build_vit(name, seed=0):
    """Architecture `name` with random weights drawn from `seed`; "random" is the tiny one."""
    config = VISION_TRANSFORMERS.get("tiny" if name == "random" else name)
    if config is None:
        raise ValueError(f"embedder {name!r} is unknown: need one of random, "
                         f"{', '.join(VISION_TRANSFORMERS)}: pass one of these")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(config)


# First digits of the files' SHA-256, as public projects record them; none are known of dino_vits.
SHA256 = {"dino_vitb16": "bf34ad0f424b9029", "dino_vitb8": "575f0efc48389383",
          "dinov2_vits14": "b938bf1bc15cd2ec", "dinov2_vits14_reg": "f433177089a68182",
          "dinov2_vitb14": "0b8b82f85de91b42", "dinov2_vitb14_reg": "73182a088cf94833",
          "dinov2_vitl14": "d5383ea8f4877b24", "dinov2_vitl14_reg": "36e4deffbaef061a"}


def weights_url(name):
    """Address of a published file."""
    stem = name.replace("dino_vits", "dino_deitsmall").replace("dino_vitb", "dino_vitbase")
    stem = stem.replace("_reg", "_reg4") + "_pretrain"
    folder = "dinov2/" + name.removesuffix("_reg") if "v2" in name else "dino/" + stem
    return f"https://dl.fbaipublicfiles.com/{folder}/{stem}.pth"


def config_from_shapes(state):
    """ViTConfig of a state dict of DINO or DINOv2, which all have 64 channels a head."""
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = sum(key.endswith("norm1.weight") for key in state)
    options = V2_REG if "register_tokens" in state else V2 if "mask_token" in state else V1
    side = math.isqrt(state["pos_embed"].shape[1] - 1) * patch
    return ViTConfig(patch, dim, depth, dim // 64, **{**options, "image_size": side})


def load_dino(name_or_path):
    """Frozen ViT in eval mode: published weights by name, or a file of weights by path.

    The file is a published one or ours, {"config": dict, "model": state_dict}, alone or under
    "embedder". Raises: FileNotFoundError without file or network; ValueError if it does not fit.
    """
    source, config = str(name_or_path), None
    published = [name for name in VISION_TRANSFORMERS if name != "tiny"]
    try:
        path = Path(source)
        if source in published:
            config, source = VISION_TRANSFORMERS[source], weights_url(source)
            path = Path(torch.hub.get_dir(), "checkpoints", Path(source).name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path),
                                               hash_prefix=SHA256.get(str(name_or_path)))
        content = torch.load(path, map_location="cpu", weights_only=True)  # nothing is executed
        content = content.get("embedder", content)
        if "config" in content:
            config, content = ViTConfig(**content["config"]), content["model"]
            if config.depth > len(content):
                raise ValueError(f"{config.depth} blocks, {len(content)} tensors")
        vit = VisionTransformer(config or config_from_shapes(content))
        vit.load_state_dict(content)  # every name and every shape must fit
    except OSError as error:  # no such file, or no network
        raise FileNotFoundError(
            f"cannot get {source} ({error}): weights of a ViT are needed: pass a file, or one of "
            f"{', '.join(published)} (without network put its file into {torch.hub.get_dir()}"
            "/checkpoints), or train a tiny one by `python train.py`") from None
    except Exception as error:  # zip, pickle, torch and other content each raise their own
        reason = " ".join(str(error).split(". ")[0].split())[:240]  # the first sentence, one line
        raise ValueError(
            f"{source} does not fit ({type(error).__name__}: {reason}): a ViT-S, B or L of DINO or "
            "DINOv2, or one trained by this version, is needed: pass another file, or delete a "
            f"damaged download in {torch.hub.get_dir()}/checkpoints") from None
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


def random_crops(images, count, side, area, jitter, generator):
    """`count` views of each image, (count*B, C, side, side) in [-1, 1], view after view.

    Random box (share of the area in `area`, aspect 3/4 to 4/3), brightness, contrast, gamma, blur
    and noise, all drawn from `generator` on the device of the images. Its `share` (index, parts),
    if it has one, says that these are the images index::parts of a larger batch: views of all of it
    are drawn, and theirs kept.
    """
    x = images.float().repeat(count, 1, 1, 1)
    n, draw = len(x), dict(generator=generator, device=images.device)
    index, parts = getattr(generator, "share", (0, 1))
    u = torch.rand(9, n, parts, **draw)[..., index]
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
    grain = torch.randn(n, parts, side, side, **draw)[:, index, None]  # one channel: grey stays
    return (x + 0.03 * noise * grain).clamp(0, 1) * 2 - 1


def dino_loss(student, teacher, centre, student_temp, teacher_temp):
    """Mean cross-entropy of student views under teacher views, never of a view with itself.

    student (S, B, K) and teacher (2, B, K) are logits, the first two views are the same crops; also
    returns two entropies in nats. Source: DINO eq. 3, with the centre of sec. 3.1.
    """
    q = ((teacher - centre) / teacher_temp).softmax(dim=-1)
    log_p = (student / student_temp).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", q, log_p) / student.shape[1]
    other = 1 - torch.eye(*pairs.shape, device=pairs.device)
    logs = {name: -torch.xlogy(p, p).sum(dim=-1).mean()
            for name, p in (("teacher_entropy", q), ("batch_entropy", q.mean(dim=(0, 1))))}
    return (pairs * other).sum() / other.sum(), logs


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over the processes (ranks) that torchrun started; x itself if alone."""

    @staticmethod
    def forward(ctx, x):
        mean = x.clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean

    @staticmethod
    def backward(ctx, grad):  # the loss of every rank depends on x: their gradients' mean
        return MeanOverRanks.forward(ctx, grad)


class BatchNorm(nn.BatchNorm1d):
    """By the statistics of the batch, of all of it where ranks share it; x (B, C).

    nn.SyncBatchNorm does the same, but on GPUs alone.
    """

    def forward(self, x):
        if not dist.is_initialized():
            return super().forward(x)
        mean = MeanOverRanks.apply(x.float().mean(0))
        variance = MeanOverRanks.apply((x.float() - mean).square().mean(0))
        normed = (x.float() - mean) * (variance + self.eps).rsqrt()
        return (normed * self.weight + self.bias).to(x.dtype)


class DINOHead(nn.Module):
    """MLP, L2 norm, cosine with each prototype: (B, D) -> logits (B, K) in [-1, 1], float32."""

    def __init__(self, dim, c):
        super().__init__()
        h, own = c.head_dim, {"track_running_stats": False}
        self.mlp = nn.Sequential(nn.Linear(dim, h), BatchNorm(h, **own), nn.GELU(),
                                 nn.Linear(h, h), BatchNorm(h, **own), nn.GELU(),
                                 nn.Linear(h, c.bottleneck))
        self.prototypes = nn.Parameter(torch.randn(c.prototypes, c.bottleneck))
        self.apply(init_linear)

    def forward(self, x):
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse to divide by 0.02
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.prototypes, dim=-1))


class DINO(nn.Module):
    """Student, EMA teacher and centre; a step is `loss`, backward, optimizer, `update_teacher`.

    Only `student` has gradients. Two collapses show in the logs: teacher_entropy at log K (all
    prototypes alike), or batch_entropy at 0 (one for all images). Source: DINO algorithm 1.
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
        c, B, side = self.config, len(images), self.vit_config.image_size
        half = side // 2 - side // 2 % self.vit_config.patch_size
        images = resize(images, side)
        large = random_crops(images, 2, side, c.global_area, c.jitter, generator)
        small = random_crops(images, c.local_crops, half, c.local_area, c.jitter, generator)
        with torch.no_grad():
            teacher = self.teacher["head"](self.teacher["backbone"](large)[:, 0])
            self.batch_centre.copy_(MeanOverRanks.apply(teacher.mean(dim=0)))
        cls = torch.cat([self.student["backbone"](crops)[:, 0] for crops in (large, small)])
        student = self.student["head"](cls).unflatten(0, (-1, B))
        start, end = c.teacher_temp
        temp = start + (end - start) * min(progress / c.warm_up, 1)
        return dino_loss(student, teacher.unflatten(0, (2, B)), self.centre, c.student_temp, temp)

    @torch.no_grad()
    def update_teacher(self, progress):
        """Teacher follows the student, centre the last batch. Source: DINO sec. 3.1 and eq. 4."""
        start, end = self.config.momentum
        momentum = end + (start - end) * (1 + math.cos(math.pi * progress)) / 2  # half a cosine
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters()):
            mine.lerp_(theirs, 1 - momentum)
        self.centre.lerp_(self.batch_centre, 1 - self.config.centre_momentum)


# ---- Attention maps as a picture ----

def open_image(path, side):
    """Image file -> centre crop (1, 3, side, side) in [-1, 1]; deep grey uses its own range."""
    formats = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # of others, EPS runs a program
    image = ImageOps.exif_transpose(Image.open(path, formats=formats))
    if image.mode[0] in "IF":  # more than 8 bits, which convert() would cut off
        deep = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(np.uint8(255 * (deep - deep.min()) / max(np.ptp(deep), 1e-6)))
    pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def draw_attention(vit, x):
    """PIL image: x (1, 3, H, W) in [-1, 1], then one heat map for each head."""
    maps = attention_maps(vit, x)[0]
    maps = 3 * maps / maps.amax(dim=(1, 2), keepdim=True)  # black, red, yellow, white
    heat = torch.stack([(maps - channel).clamp(0, 1) for channel in range(3)], dim=1)
    panels = torch.cat([F.interpolate(picture, size=224) for picture in ((x + 1) / 2, heat)])
    row = F.pad(panels, (2, 2, 2, 2), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
    return Image.fromarray((255 * row).round().byte().numpy())


def main():
    parser = argparse.ArgumentParser(description="Draw the attention of CLS, one panel per head.")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--embedder", help="name or file of weights (default: the newest run's)")
    parser.add_argument("--out", default="attention.png", help="picture (default: %(default)s)")
    args = parser.parse_args()
    runs = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    weights = args.embedder or (runs or ["tiny"])[-1]  # load_dino says how to train tiny
    try:
        vit = load_dino(weights)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    try:
        draw_attention(vit, open_image(args.image, vit.input_side)).save(args.out)
    except Exception as error:  # Pillow raises many kinds
        parser.exit(2, f"error: cannot draw {args.image} to {args.out} ({error}): an image and a "
                       ".png in an existing folder are needed: change --image or --out\n")
    print(f"{args.out}: image and {vit.config.num_heads} heads of {weights}")


if __name__ == "__main__":
    main()
