"""UNet: the conditional U-Net of Stable Diffusion, with self- and cross-attention.

Papers: latent diffusion (Rombach 2022, arXiv 2112.10752, section 3.3: conditioning by
cross-attention); U-Net (Ronneberger 2015); attention and sinusoidal embedding (Vaswani 2017); GEGLU
(Shazeer 2020, arXiv 2002.05202).

    unet = UNet(UNetConfig(base_channels=64, channel_multipliers=(1, 2, 2), context_dim=192, ...))
    prediction = unet(xt, t, context)    # (B, 4, h, w), (B,), (B, K, context_dim) -> (B, 4, h, w)

xt is a noisy latent of about unit variance, t a timestep in 0..999. The schedule decides what is
predicted: noise or v. With K = 1 every attention weight is 1 and query and key learn nothing, so
use several context tokens.

    xt -- conv_in -- down_blocks (ResNet blocks, transformers, halving) -- mid_block --+
                        | skip connections: each layer's output, last first            |
    prediction -- conv_out -- up_blocks (ResNet blocks, transformers, doubling) -------+

Parameter names are those of diffusers, so `load_state_dict(strict=True)` loads Stable Diffusion 1.5
into the default config. Deliberate differences: GroupNorm has gcd(32, channels) groups, so that
networks can be narrow; residual branches start at zero; sides that are not multiples of
2^(levels - 1) raise an error instead of being padded.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.speed import attention
from support.weights import load_model


@dataclass(frozen=True)
class UNetConfig:                           # the defaults are Stable Diffusion 1.5
    in_channels: int = 4                    # of the latent
    out_channels: int = 4                   # of the prediction
    base_channels: int = 320                # width of the first level
    channel_multipliers: tuple = (1, 2, 4, 4)  # width of each level / base_channels
    layers_per_block: int = 2               # ResNet blocks a level; up levels have one more
    attention_levels: tuple = (True, True, True, False)  # levels with transformers
    context_dim: int = 768                  # width of a condition token
    num_heads: int = 8                      # attention heads
    norm_groups: int = 0                    # of every GroupNorm; 0 = gcd(32, channels)

    def __post_init__(self):
        if len(self.attention_levels) != len(self.channel_multipliers):
            raise ValueError(f"got {len(self.attention_levels)} attention_levels for "
                             f"{len(self.channel_multipliers)} channel_multipliers: need one per "
                             "level, make them equally long")
        for width in self.widths:
            if width % self.num_heads:
                raise ValueError(f"a level is {width} channels wide: need a multiple of num_heads "
                                 f"{self.num_heads}, change base_channels or num_heads")

    @property
    def widths(self):
        return [self.base_channels * m for m in self.channel_multipliers]

    @property
    def factor(self):
        """Sides of xt must be multiples of this."""
        return 2 ** (len(self.channel_multipliers) - 1)


def timestep_embedding(t, dim):
    """Timesteps (B,) -> (B, dim) float32: cosines, then sines, at dim / 2 wavelengths spaced
    geometrically from 2 pi to 10,000 * 2 pi. Source: Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (B,) -> (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ---- blocks ------------------------------------------------------------------------------------

def group_norm(channels, eps, config):
    groups = config.norm_groups or math.gcd(32, channels)
    return nn.GroupNorm(groups, channels, eps=eps)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, and a shortcut."""

    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm1 = group_norm(c_in, 1e-5, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.base_channels, c_out)
        self.norm2 = group_norm(c_out, 1e-5, config)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention from x (B, N, dim) to source (B, M, source_dim)."""

    def __init__(self, dim, source_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(source_dim, dim, bias=False)
        self.to_v = nn.Linear(source_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def split_heads(self, h):
        return h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # -> (B, heads, N, d)

    def forward(self, x, source, mask=None):
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(self.to_k(source))
        v = self.split_heads(self.to_v(source))
        h = attention(q, k, v, mask)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, dim)


class GEGLU(nn.Module):
    """A linear layer; the second half of its output, through GELU, gates the first."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated MLP on each token, four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        # Identity keeps the numbering of diffusers, which has a dropout here.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each with a residual."""

    def __init__(self, dim, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, config.context_dim, config.num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context, mask):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over the positions of a feature map, with a residual."""

    def __init__(self, dim, config):
        super().__init__()
        self.norm = group_norm(dim, 1e-6, config)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, config)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context, mask):
        B, C, H, W = x.shape
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        h = self.transformer_blocks[0](h, context, mask)
        h = h.transpose(1, 2).reshape(B, C, H, W)                  # (B, H*W, C) -> (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Layers at one resolution: ResNet blocks with `c_ins` input channels, each followed by a
    transformer if the level has attention."""

    def __init__(self, c_ins, index, config):
        super().__init__()
        width = config.widths[index]
        self.resnets = nn.ModuleList(ResnetBlock(c_in, width, config) for c_in in c_ins)
        self.attentions = nn.ModuleList()
        if config.attention_levels[index]:
            self.attentions.extend(SpatialTransformer(width, config) for _ in c_ins)

    def layer(self, i, x, time, context, mask):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, mask) if self.attentions else x


class DownBlock(Level):
    """A level on the way down; all levels but the last end by halving the sides."""

    def __init__(self, c_ins, index, config):
        super().__init__(c_ins, index, config)
        self.downsamplers = nn.ModuleList()  # one or none
        if index < len(config.widths) - 1:
            self.downsamplers.append(Downsample(config.widths[index]))

    def forward(self, x, time, context, mask):
        """Returns x, and the list of all layers' outputs: the skip connections."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """ResNet block, transformer, ResNet block at the lowest resolution."""

    def __init__(self, config):
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, config) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, config)])

    def forward(self, x, time, context, mask):
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context, mask)
        return self.resnets[1](x, time)


class UpBlock(Level):
    """A level on the way up: each layer concatenates a skip connection; all levels but the first
    end by doubling the sides."""

    def __init__(self, c_ins, index, config):
        super().__init__(c_ins, index, config)
        self.upsamplers = nn.ModuleList()  # one or none
        if index > 0:
            self.upsamplers.append(Upsample(config.widths[index]))

    def forward(self, x, skips, time, context, mask):
        """skips: one per layer, in the order in which DownBlock made them."""
        for i, skip in enumerate(reversed(skips)):
            x = torch.cat([x, skip], dim=1)  # (B, C + C_skip, h, w)
            x = self.layer(i, x, time, context, mask)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """The denoising network; parameter names are those of diffusers' UNet2DConditionModel."""

    checkpointing = False  # True: recompute activations in backward, for less memory and more time
    repeated_blocks = (ResnetBlock, TransformerBlock)  # see support.speed.compile_blocks

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths = config.widths
        layers = config.layers_per_block
        levels = len(widths)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        base = config.base_channels
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(base, 4 * base),
                                             "linear_2": nn.Linear(4 * base, 4 * base)})

        # Down. skips: channels of the skip connections.
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for i in range(levels):
            c_ins = [skips[-1]] + [widths[i]] * (layers - 1)
            self.down_blocks.append(DownBlock(c_ins, i, config))
            skips += [widths[i]] * layers
            if i < levels - 1:
                skips.append(widths[i])

        self.mid_block = MidBlock(config)

        # Up. Each layer also gets a skip; a level's first layer gets the output of the level below.
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i in reversed(range(levels)):
            c_ins = [c + skips.pop() for c in [below] + [widths[i]] * layers]
            self.up_blocks.append(UpBlock(c_ins, i, config))
            below = widths[i]

        self.conv_norm_out = group_norm(widths[0], 1e-5, config)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.zero_branches()
        self.to(memory_format=torch.channels_last)  # image <-> tokens without a copy

    def zero_branches(self):
        """Zero the last layer of every residual branch, so that each block starts as its shortcut,
        and conv_out, so that the first prediction is 0, the mean of noise and of v."""
        last_layers = {ResnetBlock: "conv2", Attention: "to_out.0", FeedForward: "net.2",
                       UNet: "conv_out"}
        for module in self.modules():
            if type(module) in last_layers:
                layer = module.get_submodule(last_layers[type(module)])
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, xt, t, context, context_mask=None):
        """Predicts noise or v: (B, out_channels, h, w), dtype of xt.

        xt: (B, in_channels, h, w) noisy latents; sides are multiples of config.factor
        t: (B,) int64 or float timesteps
        context: (B, K, context_dim) condition tokens
        context_mask: (B, K) bool, True = attend, at least one per row; None attends to all
        """
        sides = xt.shape[-2:]
        assert not any(side % self.config.factor for side in sides), (
            f"latent of {sides[0]} x {sides[1]}: sides must be multiples of {self.config.factor}")
        assert context.shape[-1] == self.config.context_dim, (
            f"context tokens have {context.shape[-1]} entries instead of {self.config.context_dim}")
        mask = None if context_mask is None else context_mask[:, None, None, :]

        # Time embedding, with the SiLU that every ResNet block would apply to it.
        time = timestep_embedding(t, self.config.base_channels).to(xt.dtype)
        time = F.silu(self.time_embedding["linear_1"](time))
        time = F.silu(self.time_embedding["linear_2"](time))         # (B, 4 * base_channels)

        # Down: keep all layers' outputs as skip connections.
        x = self.conv_in(xt)
        skips = [x]
        for level in self.down_blocks:
            x, outputs = self.apply_level(level, x, time, context, mask)
            skips += outputs

        x = self.apply_level(self.mid_block, x, time, context, mask)

        # Up: each layer takes the last remaining skip connection.
        for level in self.up_blocks:
            layers = len(level.resnets)
            x = self.apply_level(level, x, skips[-layers:], time, context, mask)
            skips = skips[:-layers]

        return self.conv_out(F.silu(self.conv_norm_out(x))).to(xt.dtype)

    def apply_level(self, level, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(level, *inputs, use_reentrant=False, preserve_rng_state=False)
        return level(*inputs)

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Load a published name, file or folder; raises as load_model."""
        return load_model(cls, UNetConfig, name_or_path, "unet")
