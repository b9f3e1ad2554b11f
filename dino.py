"""Vision Transformer of DINO v1 and v2, and its training by self-distillation, from scratch.

Papers: ViT (Dosovitskiy 2021, arXiv 2010.11929); DINO (Caron 2021, arXiv 2104.14294); DINOv2 (Oquab
2023, arXiv 2304.07193); registers (Darcet 2023, arXiv 2309.16588); Sinkhorn-Knopp targets from SwAV
(Caron 2020, arXiv 2006.09882).

Images are (B, 3, H, W) float32 in [-1, 1], grey repeated to three channels. The ViT cuts them into
N patches; its tokens are CLS, R registers and the patches, (B, 1 + R + N, D). The first 1 + R
are global: they describe the whole image. `conditioning_tokens` picks those that condition.

    vit = load_dino("dinov2_vits14")                  # frozen; or a file of weights
    tokens = conditioning_tokens(vit, x, "global")    # (B, G, D)

Self-distillation, with student s, teacher t and temperatures T_s = 0.1, T_t = 0.05:

    targets   q = Sinkhorn(t(global crops) / T_t)     each row sums to 1, prototypes used equally
    loss      - sum_k q_k log softmax_k(s(other crops) / T_s)           DINO eq. 3
    teacher   t <- m t + (1 - m) s, m along a cosine from 0.98 to 1     DINO section 3.1

Deliberate differences from the published code: no stochastic depth, masked patches or KoLeo loss;
new networks start from sin-cos positions; crops are never flipped (the heart would change sides);
prototypes are normalised on use and trained from step 0; weight decay and the teacher's temperature
are constant; Sinkhorn balances the images of one process.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.speed import attention
from support.weights import load_model

TOKEN_KINDS = ("global", "cls", "cls4+mean", "patch")


@dataclass(frozen=True)
class ViTConfig:                      # the defaults are "tiny", the network trained here
    patch_size: int = 8               # pixels
    embed_dim: int = 192              # D, a multiple of 4 and of num_heads
    depth: int = 4                    # blocks
    num_heads: int = 3                # 64 channels each in all published models
    image_size: int = 64              # side in pixels that pos_embed belongs to
    registers: int = 0                # extra tokens between CLS and patches
    layer_scale: bool = False         # DINOv2: a gain after each branch (and an unused mask token)
    interpolate_offset: float = 0.0   # how positions are resized: see the RESIZE rules
    antialias: bool = True
    normalise: str = "per_image"      # see preprocess
    mlp_ratio: int = 4                # hidden width of the MLP / D
    norm_eps: float = 1e-6            # of LayerNorms; transformers' DINO v1 has 1e-12
    global_tokens: str = "cls4+mean"  # what "global" means in conditioning_tokens
    input_side: int = 0               # images are resized to this side; 0 = image_size


PIXELS = {  # mean and deviation of red, green and blue in [0, 1] that published networks expect
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "rad_dino": ((0.5307,) * 3, (0.2583,) * 3),
}

# Position embeddings are resized bicubically to the grid of patches; Hugging Face's code has
# neither the offset nor the antialiasing (see support.weights).
RESIZE_META = {"interpolate_offset": 0.1, "antialias": False}      # DINO and DINOv2, Meta's code
RESIZE_REGISTERS = {"interpolate_offset": 0.0, "antialias": True}  # Meta's models with registers

# Published networks see 224 px, whatever the size of their position embeddings.
PUBLISHED_TOKENS = {"normalise": "imagenet", "input_side": 224, "global_tokens": "cls+registers"}
V1 = {"image_size": 224, **RESIZE_META, **PUBLISHED_TOKENS}
V2 = {**V1, "image_size": 518, "layer_scale": True}
V2_REG = {**V2, "registers": 4, **RESIZE_REGISTERS}
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, depth, heads
VISION_TRANSFORMERS = {
    **{f"dino_vit{s}{p}": ViTConfig(p, *SIZES[s], **V1) for s in "sb" for p in (16, 8)},
    **{f"dinov2_vit{s}14": ViTConfig(14, *SIZES[s], **V2) for s in "sbl"},
    **{f"dinov2_vit{s}14_reg": ViTConfig(14, *SIZES[s], **V2_REG) for s in "sbl"},
    "tiny": ViTConfig(),
}


# ---- Vision Transformer: attribute names equal the keys of the published files ------------------

def preprocess(x, kind):
    """Images (B, 3, H, W) in [-1, 1] -> standardised by the image's own mean and deviation
    (kind "per_image"), or by the constants PIXELS[kind].
    """
    x = (x + 1) / 2
    if kind == "per_image":
        sd, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return (x - mean) / (sd + 0.1)
    mean, std = PIXELS[kind]
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def resize(x, side):
    """Images (B, C, H, W) in [-1, 1] -> (B, C, side, side), antialiased bicubic."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (grid*grid, dim): half the channels encode the row, half the column."""
    quarter = dim // 4
    angles = torch.arange(grid)[:, None] / 10000 ** (torch.arange(quarter) / quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)             # (grid, dim/2)
    rows = axis.repeat_interleave(grid, dim=0)                        # (grid*grid, dim/2)
    columns = axis.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


def init_linear(layer):
    """For Module.apply: normal weights with deviation 0.02 and zero biases in linear layers."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

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
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))               # (B, heads, N, d) -> (B, N, D)


class LayerScale(nn.Module):
    """A learned gain for each channel."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Self-attention, then an MLP on each token, each with a norm before and a residual."""

    def __init__(self, config):
        super().__init__()
        dim = config.embed_dim
        hidden = config.mlp_ratio * dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        h = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2(self.mlp["fc2"](h))


class VisionTransformer(nn.Module):
    """Vision Transformer with a CLS token and, in some models, registers."""

    repeated_blocks = (Block,)  # see support.speed.compile_blocks

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        patch = config.patch_size
        self.input_side = config.input_side or config.image_size  # native resolution in pixels
        self.native_grid = config.image_size // patch

        # From pixels to tokens. Row 0 of the positions belongs to CLS.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        positions = 0.5 * sincos_positions(self.native_grid, dim)
        self.pos_embed = nn.Parameter(F.pad(positions, (0, 0, 1, 0))[None])
        if config.registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, config.registers, dim))
        if config.layer_scale:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused, but in DINOv2's files

        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.apply(init_linear)

    def positions(self, rows, columns):
        """Position embeddings of CLS and a grid of patches, (1, 1 + rows*columns, D)."""
        native = self.native_grid
        if rows == columns == native:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2)

        # Meta's first code passes scale factors offset by 0.1 patch instead of a size, which
        # shifts the points where positions are sampled.
        offset = self.config.interpolate_offset
        target = {"size": (rows, columns)}
        if offset:
            target = {"scale_factor": [(side + offset) / native for side in (rows, columns)]}
        patches = F.interpolate(patches, mode="bicubic", antialias=self.config.antialias, **target)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> tokens before the first block (B, G + N, D)."""
        B, _, H, W = x.shape
        p = self.config.patch_size
        if H % p or W % p:
            raise ValueError(f"image of {H}x{W} pixels: sides that are multiples of the patch {p} "
                             f"are needed: resize to {H // p * p}x{W // p * p}")
        x = self.patch_embed["proj"](preprocess(x, self.config.normalise))
        x = x.flatten(2).transpose(1, 2)                              # (B, D, h, w) -> (B, N, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)   # (B, 1 + N, D)
        x = x + self.positions(H // p, W // p)
        if self.config.registers:  # without positions
            registers = self.register_tokens.expand(B, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)     # (B, G + N, D)
        return x

    def features(self, x, last=1):
        """CLS of the last blocks (B, last, D), global (B, G, D), patch tokens (B, N, D), normed."""
        x = self.embed(x)
        cls = []
        for block in self.blocks:
            x = block(x)
            cls.append(x[:, 0])
        x = self.norm(x)
        G = 1 + self.config.registers
        return self.norm(torch.stack(cls[-last:], dim=1)), x[:, :G], x[:, G:]

    def forward(self, x):
        """Global tokens (B, G, D): CLS, then registers; x (B, 3, H, W) in [-1, 1]."""
        return self.features(x)[1]


def conditioning_tokens(vit, x, kind="global"):
    """Tokens (B, G, D) that condition the diffusion model, from images (B, 3, H, W) of any side.

    "global"     as ViTConfig.global_tokens says: "cls+registers", G = 1 + registers, in published
                 networks; "cls4+mean" in those trained here
    "cls"        CLS alone, G = 1
    "cls4+mean"  CLS of the last four blocks and the mean patch token, G = 5
    "patch"      CLS and the patch tokens pooled to 4x4, G = 17. For the ablation only: patch tokens
                 keep the layout and let the model copy its source.
    """
    cls, tokens, patches = vit.features(resize(x, vit.input_side), last=4)
    if kind == "global":
        kind = vit.config.global_tokens
    if kind == "cls+registers":
        return tokens
    if kind == "cls":
        return tokens[:, :1]
    if kind == "cls4+mean":
        return torch.cat([cls, patches.mean(dim=1, keepdim=True)], dim=1)

    # Patch tokens, pooled over the image.
    side = vit.input_side // vit.config.patch_size
    grid = patches.transpose(1, 2).unflatten(2, (side, side))         # (B, N, D) -> (B, D, h, w)
    pooled = F.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)          # (B, 16, D)
    return torch.cat([tokens[:, :1], pooled], dim=1)


# ---- Self-distillation with no labels -----------------------------------------------------------

# Paper values in parentheses.
LOCAL_CROPS = 2              # of half the side, besides two global ones (8)
GLOBAL_AREA = (0.5, 1.0)     # share of the image in a global crop (0.4 to 1)
LOCAL_AREA = (0.1, 0.5)      # and in a local one (0.05 to 0.4)
JITTER = 0.12                # of brightness, contrast and gamma, relative
STUDENT_TEMP = 0.1           # (0.1)
TEACHER_TEMP = 0.05          # (0.04 rising to 0.07)
MOMENTUM = (0.98, 1.0)       # of the teacher, along a cosine (0.996 to 1)


@dataclass(frozen=True)
class DINOConfig:
    head_dim: int = 512      # hidden width of the head (2048, no batch norm)
    bottleneck: int = 128    # (256)
    prototypes: int = 256    # K (65536)


def float32_on(device):
    """Context manager: autocast off, because bf16 is too coarse to divide by 0.05."""
    return torch.autocast(device.type, enabled=False)


def random_crops(images, count, side, area, jitter, generator):
    """`count` views of each image, (count*B, C, side, side) in [-1, 1], view after view.

    area: (low, high), the share of the image's area in a view; its aspect is 3/4 to 4/3
    jitter: brightness, contrast and gamma are between 1 - jitter and 1 + jitter
    """
    x = images.float().repeat(count, 1, 1, 1)
    n = len(x)
    u = torch.rand(9, n, generator=generator, device=x.device)  # one row for each draw below

    # A box of random size, shape and place, as an affine map from [-1, 1] to [-1, 1].
    size = (area[0] + (area[1] - area[0]) * u[0]).sqrt()
    aspect = (4 / 3) ** (u[1] - 0.5)
    width = (size * aspect).clamp(max=1)
    height = (size / aspect).clamp(max=1)
    across = (2 * u[2] - 1) * (1 - width)
    down = (2 * u[3] - 1) * (1 - height)
    zero = torch.zeros_like(width)
    box = torch.stack([width, zero, across, zero, height, down], dim=1).view(n, 2, 3)
    grid = F.affine_grid(box, (n, 1, side, side), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    # Brightness, contrast and gamma, on [0, 1].
    brightness, contrast, gamma = (1 + jitter * (2 * u[4:7] - 1)).view(3, n, 1, 1, 1)
    x = (x + 1) / 2 * brightness
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1) ** gamma

    # Half of the views are blurred; all get noise, the same in each channel, so grey stays grey.
    blur, noise = u[7:].view(2, n, 1, 1, 1)
    smooth = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = x + (2 * blur - 1).clamp(min=0) * (smooth - x)
    grain = torch.randn(n, 1, side, side, generator=generator, device=x.device)
    return (x + 0.03 * noise * grain).clamp(0, 1) * 2 - 1


def sinkhorn(logits, temperature, rounds=3):
    """Logits (N, K) of N views and K prototypes -> soft targets (N, K): each row sums to 1, each
    column to nearly N / K, so the views cannot all choose one prototype.

    In logarithms, so that no exponential overflows.
    Source: Sinkhorn and Knopp 1967; Caron et al. 2020, section 3.1; Oquab et al. 2023, section 4.
    """
    log_q = logits / temperature
    for _ in range(rounds):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)  # each prototype
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)  # each view
    return log_q.exp()


def dino_loss(student, targets, student_temp):
    """Mean cross-entropy between the teacher's targets and other views of the student.

    student: logits (S, B, K), whose first two views are the teacher's; targets: (2, B, K)
    Returns: loss, and two entropies in nats: of a target, and of the batch's mean target.
    Source: DINO equation 3.
    """
    log_p = (student / student_temp).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", targets, log_p) / student.shape[1]
    other = 1 - torch.eye(*pairs.shape, device=pairs.device)
    loss = (pairs * other).sum() / other.sum()

    mean = targets.mean(dim=(0, 1))
    logs = {"teacher_entropy": -torch.xlogy(targets, targets).sum(dim=-1).mean(),
            "batch_entropy": -torch.xlogy(mean, mean).sum()}
    return loss, logs


class DINOHead(nn.Module):
    """MLP, L2 norm, cosine with each prototype: (B, D) -> logits (B, K) in [-1, 1], float32."""

    def __init__(self, dim, config):
        super().__init__()
        hidden = config.head_dim
        # Batch norm by the batch's own statistics, for student and teacher.
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.GELU(),
            nn.Linear(hidden, config.bottleneck))
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))
        self.apply(init_linear)

    def forward(self, x):
        x = self.mlp(x)
        with float32_on(x.device):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.prototypes, dim=-1))


class DINO(nn.Module):
    """Student and teacher; the teacher is the EMA of the student with momentum(progress).

    Collapse shows in the logs as a teacher_entropy of log K: all images look alike to the teacher.
    batch_entropy is always near log K because of Sinkhorn. Source: DINO algorithm 1.
    """

    def __init__(self, vit_config, config=DINOConfig()):
        super().__init__()
        self.vit_config = vit_config
        self.student = nn.ModuleDict({"backbone": VisionTransformer(vit_config),
                                      "head": DINOHead(vit_config.embed_dim, config)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def momentum(self, progress):
        """m along half a cosine; progress in [0, 1]."""
        start, end = MOMENTUM
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def teacher_vit(self):
        """The teacher's ViT, frozen."""
        return self.teacher["backbone"].eval()

    def loss(self, images, generator):
        """Loss and values to log (scalars); images (B, 3, H, W) in [-1, 1]."""
        B = len(images)
        side = self.vit_config.image_size
        half = side // 2 - side // 2 % self.vit_config.patch_size

        # Views of the images: two large ones, and a few small ones of half the side.
        with float32_on(images.device):
            images = resize(images, side)
            large = random_crops(images, 2, side, GLOBAL_AREA, JITTER, generator)
            small = random_crops(images, LOCAL_CROPS, half, LOCAL_AREA, JITTER, generator)

        # The teacher sees only the large views, the student all of them.
        with torch.no_grad():
            cls = self.teacher["backbone"](large)[:, 0]
            teacher = self.teacher["head"](cls)                       # (2*B, K)
        cls = torch.cat([self.student["backbone"](crops)[:, 0] for crops in (large, small)])
        student = self.student["head"](cls)                           # (S*B, K)

        with float32_on(images.device):
            targets = sinkhorn(teacher, TEACHER_TEMP)
            return dino_loss(student.unflatten(0, (-1, B)), targets.unflatten(0, (2, B)),
                             STUDENT_TEMP)


# ---- Weights ------------------------------------------------------------------------------------

def load_dino(name_or_path):
    """Frozen ViT in eval mode: published weights by name, or a file of weights by path."""
    vit = load_model(VisionTransformer, ViTConfig, name_or_path, "vit")
    return vit.requires_grad_(False).eval()
