"""AutoencoderKL: the autoencoder of Stable Diffusion, from images to latents and back.

Papers: latent diffusion (Rombach 2022, arXiv 2112.10752, section 3.1 and appendix G); variational
autoencoders (Kingma & Welling 2014, arXiv 1312.6114, appendix B: the KL term).

Images x are (B, 3, H, W) float32 in [-1, 1], grey repeated to three channels. The encoder halves
the sides `levels - 1` times: latents z are (B, 4, H / factor, W / factor). Their scale varies, so
`latent_statistics` measures it, and diffusion works on x0 = (z - shift) * scale. A stem of 2 first
turns each 2 x 2 square of pixels into channels, which is four times as fast at 128 px. A linear
path beside encoder and decoder starts as the PCA of patches: see start_from_patches.

    vae = AutoencoderKL.from_pretrained("vae.safetensors")    # or AutoencoderKL(VAEConfig(...))
    z = vae.encode(x).sample(generator); y = vae.decode(z)

Training (vae_loss), with the encoder's mean m and deviation s, and noise e ~ N(0, 1):

    z = m + s e        loss = |x - decode(z)| + 1e-6 * KL(N(m, s^2) || N(0, 1))

Parameter names are those of diffusers. Deliberate differences: levels may have fewer than 32
channels (see group_norm); the second convolution of every ResNet block starts at zero; there is a
stem, and a linear path that starts as PCA; the loss has no discriminator and no LPIPS.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.speed import attention
from support.weights import load_model


@dataclass(frozen=True)
class VAEConfig:                            # the defaults are Stable Diffusion's
    in_channels: int = 3                    # of the image
    latent_channels: int = 4
    base_channels: int = 128                # width at full resolution
    channel_multipliers: tuple = (1, 2, 4, 4)  # width of each level / base_channels
    layers_per_block: int = 2               # ResNet blocks a level; the decoder has one more
    stem: int = 1                           # side of the pixel squares turned into channels
    norm_groups: int = 0                    # of every GroupNorm; 0 = see group_norm
    linear: bool = False                    # a linear path beside the networks: start_from_patches

    @property
    def widths(self):
        return [self.base_channels * m for m in self.channel_multipliers]

    @property
    def factor(self):
        """Image side / latent side."""
        return self.stem * 2 ** (len(self.channel_multipliers) - 1)


class LatentGaussian:
    """Encoder output: a diagonal Gaussian over latents, mean and logvar (B, C, h, w)."""

    def __init__(self, mean, logvar):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)  # keeps exp() finite in float32

    @property
    def std(self):
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """One draw, mean + std * noise, with noise from the generator's own device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self):
        """KL divergence from N(0, 1) in nats, summed over the latent: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


# ---- loss and statistics ------------------------------------------------------------------------

def vae_loss(vae, x, generator=None, kl_weight=1e-6):
    """Mean absolute error + kl_weight * KL.

    The KL is summed over the latent, so it grows with its area: lower kl_weight if larger images
    reconstruct badly.
    Returns: loss, and a dict of detached scalars l1 and kl (nats per image).
    Source: Rombach et al. 2022, equation 25, without discriminator and perceptual distance.
    """
    reconstruction, posterior = vae(x, generator)
    terms = {"l1": F.l1_loss(reconstruction, x), "kl": posterior.kl().mean()}
    loss = terms["l1"] + kl_weight * terms["kl"]
    return loss, {name: value.detach() for name, value in terms.items()}


def latent_statistics(batches):
    """Shift and scale (C,) float32 that give x0 = (z - shift) * scale mean 0 and deviation 1.

    batches: iterable of (mean, std) pairs, each (B, C, h, w). The variance of a drawn z is the
    variance of the means plus the mean of the variances.
    """
    count = 0
    moments = 0.0
    for mean, std in batches:
        mean = mean.double()
        std = std.double()
        moments = moments + torch.stack([mean, mean**2 + std**2]).sum((1, 3, 4))  # (2, C)
        count += mean[:, 0].numel()

    shift, square = moments / count
    variance = (square - shift**2).clamp(min=1e-12)
    return shift.float(), variance.rsqrt().float()


@torch.no_grad()
def start_from_patches(vae, images):
    """Set the linear path of an untrained `vae` to the PCA of the images' patches.

    images: (N, in_channels, H, W) in [-1, 1]. Patches p of factor x factor pixels have the mean m
    and the covariance U L U^T. The eigenvectors U of the largest eigenvalues L stay, one for each
    latent channel:

        z = L^(-1/2) U^T (p - m)        y = m + U L^(1/2) z

    Both networks start at zero. So before any training the autoencoder is the best linear one
    (Eckart & Young 1936), with white latents; training adds what a linear map cannot do.
    """
    patches = F.pixel_unshuffle(images.double(), vae.config.factor)
    patches = patches.transpose(0, 1).flatten(1)  # (N, D, h, w) -> (D, N*h*w)
    mean = patches.mean(1)
    variances, vectors = torch.linalg.eigh(patches.cov())  # in ascending order
    axes = vectors[:, -vae.config.latent_channels:].flip(1)  # (D, C)
    deviations = variances[-vae.config.latent_channels:].flip(0).clamp(min=1e-12).sqrt()

    encode = (axes / deviations).T
    decode = axes * deviations
    vae.linear_encode.weight.copy_(encode[:, :, None, None])
    vae.linear_encode.bias.copy_(-encode @ mean)
    vae.linear_decode.weight.copy_(decode[:, :, None, None])
    vae.linear_decode.bias.copy_(mean)


def channel_importance(vae, scale):
    """Root mean square change of pixels that one deviation of each latent channel causes through
    the linear path, relative to all channels: (C, 1, 1) with mean square 1. scale: (C,) 1 / std."""
    weight = vae.linear_decode.weight.flatten(1)  # (D, C)
    change = weight.norm(dim=0) / scale.to(weight)
    return (change / change.square().mean().sqrt())[:, None, None]


# ---- blocks -------------------------------------------------------------------------------------

def group_norm(channels, groups=0):
    """GroupNorm with `groups` groups; 0 means 32, or groups of four channels if there are fewer
    than 32: groups of one would erase brightness, because the output layer follows a norm."""
    if groups == 0:
        groups = math.gcd(32, channels) if channels >= 32 else max(1, channels // 4)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)      # (B, C, H, W) -> (B, H*W, C)
        q = self.to_q(h).unsqueeze(1)                          # (B, 1, H*W, C), one head
        k = self.to_k(h).unsqueeze(1)
        v = self.to_v(h).unsqueeze(1)
        h = attention(q, k, v).squeeze(1)
        return x + self.to_out(h).transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # Zeros at the bottom and at the right only, as the published weights were trained;
        # padding all around would shift the image.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """ResNet blocks at one resolution, then at most one change of resolution."""

    def __init__(self, c_in, c_out, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """ResNet block, attention, ResNet block at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> mean and logvar together (B, 2 * latent_channels, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        layers = config.layers_per_block
        groups = config.norm_groups
        self.stem = config.stem
        pixels = config.stem**2 * config.in_channels
        self.conv_in = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], layers, groups, downsample=i < last)
            for i in range(len(widths)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(F.pixel_unshuffle(x, self.stem))
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> images (B, in_channels, H, W); mirrors the encoder."""

    def __init__(self, config):
        super().__init__()
        widths = config.widths[::-1]
        last = len(widths) - 1
        layers = config.layers_per_block + 1
        groups = config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], layers, groups, upsample=i < last)
            for i in range(len(widths)))
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.stem = config.stem
        pixels = config.stem**2 * config.in_channels
        self.conv_out = nn.Conv2d(widths[-1], pixels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.conv_norm_out(x))), self.stem)


class AutoencoderKL(nn.Module):
    """Encoder and decoder; parameter names are those of diffusers' AutoencoderKL."""

    repeated_blocks = (ResnetBlock, Attention)  # see support.speed.compile_blocks

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments = 2 * config.latent_channels  # mean and logvar
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

        # Each ResNet block starts as its shortcut.
        for block in self.modules():
            if isinstance(block, ResnetBlock):
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(block.conv2.bias)
        if config.linear:
            self._add_linear_path()
        self.to(memory_format=torch.channels_last)

    def _add_linear_path(self):
        """Two 1 x 1 convolutions between patches as channels and latents; both networks start at
        zero beside them, with a small deviation."""
        config = self.config
        pixels = config.in_channels * config.factor ** 2
        self.linear_encode = nn.Conv2d(pixels, config.latent_channels, 1)
        self.linear_decode = nn.Conv2d(config.latent_channels, pixels, 1)
        for last in (self.encoder.conv_out, self.quant_conv, self.decoder.conv_out):
            nn.init.zeros_(last.bias)
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(last.weight)
        nn.init.constant_(self.quant_conv.bias[config.latent_channels:], -6.0)  # logvar

    def encode(self, x):
        """Images (B, in_channels or 1, H, W) in [-1, 1] -> LatentGaussian, float32. Raises
        ValueError if a side is not a multiple of config.factor."""
        height, width = x.shape[-2:]
        factor = self.config.factor
        if height % factor or width % factor or not height or not width:
            nearest = [max(side // factor, 1) * factor for side in (width, height)]
            raise ValueError(f"image is {width} x {height}: sides must be multiples of {factor} "
                             f"(the autoencoder's factor): use {nearest[0]} x {nearest[1]}")
        x = x.expand(-1, self.config.in_channels, -1, -1)  # grey: the same in each channel
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        if self.config.linear:
            mean = mean + self.linear_encode(F.pixel_unshuffle(x, factor)).float()
        return LatentGaussian(mean, logvar)

    def decode(self, z):
        """Latents (B, latent_channels, h, w) -> images (B, in_channels, H, W), not clipped."""
        y = self.decoder(self.post_quant_conv(z)).float()
        if self.config.linear:
            y = y + F.pixel_shuffle(self.linear_decode(z), self.config.factor).float()
        return y

    def forward(self, x, generator=None):
        """Returns the reconstruction from one latent draw, and the LatentGaussian."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Load a published name, file or folder; raises as load_model."""
        return load_model(cls, VAEConfig, name_or_path, "vae")
