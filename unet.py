"""UNet: the conditional U-Net of Stable Diffusion 1.5, with self- and cross-attention.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv 2112.10752, section 3.3: conditioning by cross-attention); Ronneberger et al. 2015, "U-Net"
(arXiv 1505.04597); Vaswani et al. 2017 (arXiv 1706.03762: attention, sinusoidal embedding);
Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202: GEGLU).

    unet = UNet(UNetConfig(base_channels=64, channel_multipliers=(1, 2, 2), context_dim=192, ...))
    prediction = unet(xt, t, context)    # (B, 4, h, w), (B,), (B, K, context_dim) -> (B, 4, h, w)

xt is a noisy latent of about unit variance, t a step in 0..999 (int64 or float), context the
condition tokens. What is predicted (noise or v) is the schedule's business, not the net's. With
K = 1 the softmax over one token is always 1: query and key then learn nothing, so use several.

Deliberate differences from the reference (diffusers, whose parameter names are kept, so that
`load_state_dict(strict=True)` loads Stable Diffusion 1.5 into the default config):
- GroupNorm has gcd(32, channels) groups, so that narrow nets can be built.
- Branches start at zero (see UNet.__init__).
- Sides that are not multiples of 2^(levels - 1) are refused, not padded.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4  # of the latent
    out_channels: int = 4  # of the prediction
    base_channels: int = 320  # width of the first level
    channel_multipliers: tuple = (1, 2, 4, 4)  # width of each level / base_channels
    layers_per_block: int = 2  # ResNet blocks a level going down; going up has one more
    attention_levels: tuple = (True, True, True, False)  # levels with transformers; the middle has
    context_dim: int = 768  # width of a condition token
    num_heads: int = 8  # attention heads, the same at every level

    def __post_init__(self):
        if len(self.attention_levels) != len(self.channel_multipliers):
            raise ValueError(f"got {len(self.attention_levels)} attention_levels for "
                             f"{len(self.channel_multipliers)} channel_multipliers: need one for "
                             "each level, make them equally long")
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
    """Steps (B,) -> (B, dim) float32: cosines, then sines, of t at dim / 2 wavelengths from
    2 pi to 10,000 * 2 pi steps, geometrically spaced.
    Source: Vaswani et al. 2017, section 3.5, with cosines first as in Stable Diffusion.
    """
    half = dim // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (B,) -> (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@contextmanager
def keep_attention(unet, only=""):
    """While active, forward passes leave their softmax maps in the dict that this yields.

    only: keep the modules whose name contains this: "attn1" (self), "attn2" (cross), "up_blocks".
    Yields: dict, module name -> (B, heads, N, M) weights of the last forward, over N = h*w
        positions and M = N (self) or K (cross) keys; rows sum to 1. Only kept modules leave the
        fused attention, so use `only` at large sides: N*M is 16.8 million at 64 x 64.
    """
    maps = {}
    kept = [(name, module) for name, module in unet.named_modules()
            if isinstance(module, Attention) and only in name]
    try:
        for name, module in kept:
            module.keep = (maps, name)
        yield maps
    finally:
        for _, module in kept:
            module.keep = None


# ---------------------------------------------------------------- blocks


def group_norm(channels, eps):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


class Linear(nn.Linear):
    """nn.Linear over tokens; on the CPU as a 1x1 convolution, the same sums at up to twice the
    speed: oneDNN, which convolves, uses AVX-512 on every maker's chips, the matrix product not."""

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[1] < 16:  # a handful of tokens: nothing to gain
            return super().forward(x)
        x = x.unsqueeze(1).movedim(-1, 1)  # (B, N, C) -> (B, C, 1, N), the same memory
        return F.conv2d(x, self.weight[:, :, None, None], self.bias).movedim(1, -1).squeeze(1)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, time_dim):
        super().__init__()
        self.norm1 = group_norm(c_in, 1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = group_norm(c_out, 1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention from x (B, N, dim) to source (B, M, source_dim)."""

    keep = None  # set by keep_attention: (dict, name)

    def __init__(self, dim, source_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(source_dim, dim, bias=False)
        self.to_v = Linear(source_dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(self, x, source, mask=None):
        q, k, v = (h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N or M, d)
                   for h in (self.to_q(x), self.to_k(source), self.to_v(source)))
        if self.keep is None:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = scores.softmax(dim=-1)  # (B, heads, N, M)
            maps, name = self.keep
            maps[name] = weights.detach()
            h = weights.to(v.dtype) @ v
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, dim)


class GEGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = Linear(dim, 2 * hidden)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # The reference has a dropout of probability 0 in the middle; Identity keeps the numbering.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

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
    def __init__(self, dim, config):
        super().__init__()
        self.norm = group_norm(dim, 1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, config)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context, mask):
        B, C, H, W = x.shape
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        h = self.transformer_blocks[0](h, context, mask)
        h = h.transpose(1, 2).reshape(B, C, H, W)  # (B, H*W, C) -> (B, C, H, W)
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Halves (stride 2) or, with up=True, doubles both sides."""

    def __init__(self, channels, up=False):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x):
        if not self.up:
            return self.conv(x)
        # Repeating pixels and then convolving with 3x3 weights is one transposed convolution with
        # 4x4 weights, each the sum of those that met the same pixel: 4 products, not 9, a pixel.
        weight = 4 * F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Blocks at one resolution: ResNet blocks from each of `c_ins` to c_out channels, each followed
    by a transformer where attention is on; last a change of resolution, if any."""

    def __init__(self, c_ins, c_out, attention, config, down=False, up=False):
        super().__init__()
        time_dim = 4 * config.base_channels
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c_out, time_dim) for c_in in c_ins)
        self.attentions = nn.ModuleList(
            SpatialTransformer(c_out, config) for _ in c_ins if attention)
        if down:
            self.downsamplers = nn.ModuleList([Resample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Resample(c_out, up=True)])
        self.down, self.up = down, up

    def layer(self, i, x, time, context, mask):
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context, mask) if self.attentions else x


class MidBlock(nn.Module):
    def __init__(self, channels, config):
        super().__init__()
        time_dim = 4 * config.base_channels
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, time_dim) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, config)])

    def forward(self, x, time, context, mask):
        x = self.attentions[0](self.resnets[0](x, time), context, mask)
        return self.resnets[1](x, time)


class TimeEmbedding(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """The denoising network; parameter names are those of diffusers' UNet2DConditionModel."""

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        widths, layers = config.widths, config.layers_per_block
        base, last = config.base_channels, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)
        self.time_embedding = TimeEmbedding(base, 4 * base)

        self.down_blocks = nn.ModuleList()
        skips = [base]  # widths of the tensors handed across, in the order forward() makes them
        for i, width in enumerate(widths):
            c_ins = [skips[-1]] + [width] * (layers - 1)
            self.down_blocks.append(
                Level(c_ins, width, config.attention_levels[i], config, down=i < last))
            skips += [width] * (layers + (i < last))

        self.mid_block = MidBlock(widths[-1], config)

        self.up_blocks = nn.ModuleList()
        below = widths[-1]  # width of what comes from the level below
        for i in reversed(range(len(widths))):
            width = widths[i]
            c_ins = [c + skips.pop() for c in [below] + [width] * layers]
            self.up_blocks.append(
                Level(c_ins, width, config.attention_levels[i], config, up=i > 0))
            below = width

        self.conv_norm_out = group_norm(base, 1e-5)
        self.conv_out = nn.Conv2d(base, config.out_channels, 3, padding=1)

        # Zero: the last layer of every residual branch, so that each block starts as its shortcut
        # and short trainings converge sooner; and conv_out, so that the first prediction is 0,
        # the mean of both noise and v. Loading weights overwrites all of it.
        zero = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zero.append(module.conv2)
            elif isinstance(module, Attention):
                zero.append(module.to_out[0])
            elif isinstance(module, FeedForward):
                zero.append(module.net[2])
        for module in zero:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)  # so image <-> tokens needs no copy

    def forward(self, xt, t, context, context_mask=None):
        """Predicts noise or v.

        xt: (B, in_channels, h, w) noisy latents; sides are multiples of config.factor
        t: (B,) int64 or float, steps
        context: (B, K, context_dim) condition tokens; or (R*B, K, context_dim), R contexts for each
            latent, block after block: what precedes the first attention is then done once
        context_mask: as context without the last axis, bool, True = attend, at least one a row
        Returns: (B or R*B, out_channels, h, w), dtype of xt.
        Raises: ValueError if a side or the width of the context does not fit.
        """
        height, width = xt.shape[-2:]
        f = self.config.factor
        if height % f or width % f:
            raise ValueError(f"latent is {width} x {height}, but both sides must be multiples of "
                             f"{f} ({len(self.down_blocks)} U-Net levels): use "
                             f"{max(width // f, 1) * f} x {max(height // f, 1) * f}")
        if context.shape[-1] != self.config.context_dim:
            raise ValueError(f"context tokens have {context.shape[-1]} entries, but this U-Net was "
                             f"built for {self.config.context_dim}: set context_dim or project")
        mask = None if context_mask is None else context_mask[:, None, None, :]

        # time: every ResNet block starts with the same SiLU, so it is done once
        time = timestep_embedding(t, self.config.base_channels).to(xt.dtype)
        time = F.silu(self.time_embedding(time))

        # down
        x = self.conv_in(xt)
        skips = [x]
        for level in self.down_blocks:
            if len(x) < len(context) and (level.attentions or not level.down):
                copies = len(context) // len(x)  # from here on each context goes its own way
                x, time, *skips = (torch.cat([h] * copies) for h in (x, time, *skips))
            for i in range(len(level.resnets)):
                x = level.layer(i, x, time, context, mask)
                skips.append(x)
            if level.down:
                x = level.downsamplers[0](x)
                skips.append(x)

        x = self.mid_block(x, time, context, mask)

        # up
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C_skip, h, w)
                x = level.layer(i, x, time, context, mask)
            if level.up:
                x = level.upsamplers[0](x)

        return self.conv_out(F.silu(self.conv_norm_out(x))).to(xt.dtype)

    @classmethod
    def from_pretrained(cls, name_or_path, config=None):
        """A U-Net with the weights of a file, a folder, or a published name.

        name_or_path: .safetensors, .bin, .pt or .pth; a folder with diffusion_pytorch_model.*, in
            it or in its unet/; or a name of PUBLISHED, downloaded once.
        config: read off the tensors' shapes if None, with num_heads 8, which no shape tells.
        Raises: FileNotFoundError, or ValueError for a broken file or another architecture.
        """
        path = find_weights(name_or_path)
        weights = read_weights(path)
        config = config or infer_config(weights, path)
        with torch.device("meta"):  # no time lost on random numbers, no second copy
            unet = cls(config)
        return load_strict(unet, weights, path)


# ---------------------------------------------------------------- published weights

# name -> (address, first digits of the file's sha256 as public projects record it)
PUBLISHED = {
    "sd15": ("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/unet/"
             "diffusion_pytorch_model.safetensors", "19da7aaa4b880e59"),
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def find_weights(name_or_path):
    """The weights file that a published name, a file or a folder stands for."""
    path = Path(name_or_path)
    if not path.exists() and str(name_or_path) in PUBLISHED:
        url, digits = PUBLISHED[str(name_or_path)]
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"unet-{name_or_path}.safetensors"
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # no network; or another hash
            raise FileNotFoundError(f"could not download {name_or_path} ({error}): it is needed "
                                    f"once, put {url} at {path}") from error
    for file in (path, *(folder / f"diffusion_pytorch_model{end}"
                         for folder in (path, path / "unet") for end in (".safetensors", ".bin"))):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no weights at {path}: need a .safetensors, .bin, .pt or .pth file or "
                            "a folder with diffusion_pytorch_model.safetensors, give another path "
                            f"or one of {', '.join(PUBLISHED)}")


def read_safetensors(path):
    """All tensors of a .safetensors file: name -> tensor. Raises ValueError if it is not whole.

    Layout: length of the header (u64, little endian); the header, JSON: name -> dtype, shape and
    byte range; then the raw tensors without gaps.
    """
    tensors, end = {}, 0
    try:
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            first, stop = entry["data_offsets"]
            if first != end or stop - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the byte range of {name} is wrong")
            raw = torch.from_numpy(data)[start + first:start + stop].clone()
            tensors[name], end = raw.view(dtype).reshape(shape), stop
        if start + end != len(data):
            raise ValueError(f"{len(data)} bytes where the header needs {start + end}")
    except Exception as error:  # a damaged header raises nearly any type
        raise ValueError(f"{path} is not a whole safetensors file ({error!r}): need one as "
                         "published, download it again") from error
    return tensors


def read_weights(path):
    """The state dict in a weights file, floating tensors as float32."""
    if Path(path).suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
            if not all(map(torch.is_tensor, weights.values())):
                raise ValueError("not every entry is a tensor")
        except Exception as error:  # a damaged file makes torch.load raise nearly any type
            raise ValueError(f"{path} is not a file of plain tensors ({type(error).__name__}): "
                             "need a state dict, save it with torch.save(model.state_dict(), "
                             "path)") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def load_strict(model, weights, path):
    """Puts weights (name -> tensor) into model; every name and shape must agree.  Returns model."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{name} is {given.get(name, 'missing')} instead of {own.get(name, 'nothing')}"
             for name in sorted({*own, *given}) if own.get(name) != given.get(name)]
    if wrong:
        raise ValueError(f"{path} has weights of another architecture, {len(wrong)} differ, first: "
                         f"{'; '.join(wrong[:2])}: need diffusers' layout of {model.config}, pass "
                         "the matching file")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(memory_format=torch.channels_last)


def count_indices(weights, prefix):
    """How many different indices follow prefix in the names."""
    return len({k[len(prefix):].split(".")[0] for k in weights if k.startswith(prefix)})


def infer_config(weights, path):
    """UNetConfig read off the shapes of a state dict in diffusers' layout; num_heads stays 8."""
    try:
        base, in_channels = weights["conv_in.weight"].shape[:2]
        levels = range(count_indices(weights, "down_blocks."))
        middle = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        widths = [weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
        return UNetConfig(
            in_channels, weights["conv_out.weight"].shape[0], base,
            tuple(width // base for width in widths),
            count_indices(weights, "down_blocks.0.resnets."),
            tuple(f"down_blocks.{i}.attentions.0.norm.weight" in weights for i in levels),
            weights[middle].shape[1])
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a conditional U-Net in diffusers' layout, {error} is "
                         "missing: need the weights of a unet/ folder, pass that one") from error


def main():
    config = UNetConfig(base_channels=64, channel_multipliers=(1, 2, 2), layers_per_block=1,
                        attention_levels=(False, True, True), context_dim=192, num_heads=4)
    unet = UNet(config)
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 4, 16, 24, generator=generator)
    context = torch.randn(2, 5, 192, generator=generator)
    with torch.no_grad(), keep_attention(unet) as maps:
        prediction = unet(xt, torch.tensor([0, 999]), context)
    print(f"{config}\nparameters {sum(p.numel() for p in unet.parameters()):,}")
    print(f"xt {tuple(xt.shape)}, context {tuple(context.shape)} -> {tuple(prediction.shape)}")
    for name, weights in maps.items():
        print(f"{name:55} (B, heads, N, M) {tuple(weights.shape)}")


if __name__ == "__main__":
    main()
