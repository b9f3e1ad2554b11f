"""AutoencoderKL: the autoencoder of Stable Diffusion, which gives latent diffusion its latents.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv 2112.10752, section 3.1 and appendix G); Kingma and Welling 2014, "Auto-Encoding
Variational Bayes" (arXiv 1312.6114, appendix B: the KL term).

Images x are (B, 3, H, W) float32 in [-1, 1], grey repeated to three channels. The encoder halves
the sides `levels - 1` times, so latents z are (B, 4, H / factor, W / factor) without a fixed scale:
`latent_statistics` measures shift and scale, and diffusion works on x0 = (z - shift) * scale.

    vae = AutoencoderKL.from_pretrained("vae.safetensors")    # or AutoencoderKL(VAEConfig(...))
    z = vae.encode(x).sample(generator); y = vae.decode(z)

Deliberate differences from the reference (diffusers, whose parameter names are kept):
- Levels narrower than 32 channels are allowed (see group_norm).
- The second convolution of every ResNet block starts at zero (see AutoencoderKL).
- No discriminator and no LPIPS: the loss is L1 + KL and, if asked for, a distance in the feature
  space of a frozen network that the caller passes in.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3  # of the image
    latent_channels: int = 4
    base_channels: int = 128  # width at full resolution
    channel_multipliers: tuple = (1, 2, 4, 4)  # width of each level / base; any number of levels
    layers_per_block: int = 2  # ResNet blocks a level in the encoder; the decoder has one more

    @property
    def widths(self):
        return [self.base_channels * m for m in self.channel_multipliers]

    @property
    def factor(self):
        """Image side / latent side."""
        return 2 ** (len(self.channel_multipliers) - 1)


class LatentGaussian:
    """The encoder's answer: a diagonal Gaussian over latents, mean and logvar (B, C, h, w)."""

    def __init__(self, mean, logvar):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)  # keeps exp() finite in float32

    @property
    def std(self):
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """One draw, mean + std * noise; the noise is drawn on the generator's own device.

        A generator's `share` (index, count), if it has one, says that these are the images
        index::count of a larger batch: noise is drawn for all of it, and theirs is kept.
        """
        device = generator.device if generator is not None else self.mean.device
        index, count = getattr(generator, "share", (0, 1))
        B, *rest = self.mean.shape
        noise = torch.randn(B, count, *rest, generator=generator, device=device)[:, index]
        return self.mean + self.std * noise.to(self.mean)

    def kl(self):
        """KL divergence from N(0, 1), in nats, summed over the latent: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


# ---------------------------------------------------------------- loss and statistics


def vae_loss(vae, x, generator=None, kl_weight=1e-6, perceptual=None, perceptual_weight=0.1):
    """Mean absolute error + kl_weight * KL + perceptual_weight * feature distance.

    The error is a mean over pixels; the KL is summed over the latent and averaged over the batch,
    the setting that was measured at 64 px. The sum grows with the latent's area: divide kl_weight
    by the ratio of areas if a larger latent reconstructs badly.

    perceptual: a frozen network, images (B, 3, H, W) in [-1, 1] -> features (B, D) or (B, N, D);
        its term is the squared distance of unit-length features, in [0, 4].
    Returns: loss, and a dict of detached scalars l1, kl (nats per image), perceptual if used.
    Source: Rombach et al. 2022, equation 25, without the discriminator.
    """
    reconstruction, latent = vae(x, generator)
    parts = {"l1": F.l1_loss(reconstruction, x), "kl": latent.kl().mean()}
    loss = parts["l1"] + kl_weight * parts["kl"]
    if perceptual is not None:
        with torch.no_grad():
            real = F.normalize(perceptual(x).float(), dim=-1)
        fake = F.normalize(perceptual(reconstruction).float(), dim=-1)
        parts["perceptual"] = (fake - real).square().sum(-1).mean()
        loss = loss + perceptual_weight * parts["perceptual"]
    return loss, {name: value.detach() for name, value in parts.items()}


def latent_statistics(batches):
    """Shift and scale (C,) that bring sampled latents to mean 0 and standard deviation 1.

    batches: iterable of (mean, std) pairs, each (B, C, h, w); read once, summed in float64.
    A sample's variance is the variance of the means plus the mean of the variances.
    Returns: shift and scale, float32, for x0 = (z - shift) * scale and z = x0 / scale + shift.
    """
    count, total, squares = 0, 0.0, 0.0
    for mean, std in batches:
        mean, std = mean.double(), std.double()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum((0, 2, 3))
        squares = squares + (mean**2 + std**2).sum((0, 2, 3))
    if count == 0:
        raise ValueError("got no latents to measure: need at least one batch of (mean, std), "
                         "pass the encoded training set")
    shift = total / count
    variance = (squares / count - shift**2).clamp(min=1e-12)
    return shift.float(), variance.rsqrt().float()


# ---------------------------------------------------------------- blocks


def group_norm(channels):
    """32 groups as in Stable Diffusion. Below 32 channels, groups of four: groups of one channel
    would wash out each image's brightness, for the output stands right behind a norm. (At 32
    they are of one channel too: equality with the reference comes first.)"""
    groups = math.gcd(32, channels) if channels >= 32 else max(1, channels // 4)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        q, k, v = (f(h).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out(h).transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # One zero row at the bottom, one zero column at the right: the published weights were
        # trained so. Padding all around has the same output shape but shifts the image.
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H, W) -> (B, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # Repeating pixels and then convolving with 3x3 weights is one transposed convolution with
        # 4x4 weights, each the sum of those that met the same pixel: 4 products, not 9, a pixel.
        weight = 4 * F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """ResNet blocks at one resolution, then at most one change of resolution."""

    def __init__(self, c_in, c_out, layers, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(layers))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for layer in self.children():
            for block in layer:
                x = block(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, downsample=i < last)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, upsample=i < last)
            for i, width in enumerate(widths))
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder; parameter names are those of diffusers' AutoencoderKL."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments = 2 * config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        for block in self.modules():
            if isinstance(block, ResnetBlock):  # starts as its shortcut
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(block.conv2.bias)
        self.to(memory_format=torch.channels_last)

    def encode(self, x):
        """Images (B, in_channels, H, W) in [-1, 1] -> LatentGaussian, float32.

        Raises: ValueError if a side is not a multiple of config.factor.
        """
        height, width = x.shape[-2:]
        f = self.config.factor
        if height % f or width % f or not height or not width:
            raise ValueError(
                f"image is {width} x {height}, but both sides must be multiples of {f} (the "
                f"autoencoder's factor): use {max(width // f, 1) * f} x {max(height // f, 1) * f}")
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return LatentGaussian(mean, logvar)

    def decode(self, z):
        """Latents (B, latent_channels, h, w) -> images of factor times the side, not clipped."""
        return self.decoder(self.post_quant_conv(z)).float()

    def forward(self, x, generator=None):
        """Returns the reconstruction of one latent draw, and the LatentGaussian."""
        latent = self.encode(x)
        return self.decode(latent.sample(generator)), latent

    @classmethod
    def from_pretrained(cls, name_or_path, config=None):
        """An autoencoder with the weights of a file, a folder, or a published name.

        name_or_path: .safetensors, .bin, .pt or .pth; a folder with diffusion_pytorch_model.*, in
            it or in its vae/; a run's model.pt; or a name of PUBLISHED, downloaded once.
        config: read off the tensors' shapes if None.
        Raises: FileNotFoundError, or ValueError for a broken file or another architecture.
        """
        path = find_weights(name_or_path)
        weights = modern_names(read_weights(path))
        config = config or infer_config(weights, path)
        with torch.device("meta"):  # no time lost on random numbers, no second copy
            vae = cls(config)
        return load_strict(vae, weights, path)


# ---------------------------------------------------------------- published weights

# name -> (address, first digits of the file's sha256 as public projects record it)
PUBLISHED = {
    "sd-vae-ft-mse": ("https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/"
                      "diffusion_pytorch_model.safetensors", "a1d993488569e928"),
    "sd15": ("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/vae/"
             "diffusion_pytorch_model.safetensors", "a2b5134f4dbc140d"),
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32}


def find_weights(name_or_path):
    """The weights file that a published name, a file or a folder stands for."""
    path = Path(name_or_path)
    if not path.exists() and str(name_or_path) in PUBLISHED:
        url, digits = PUBLISHED[str(name_or_path)]
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"vae-{name_or_path}.safetensors"
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # no network; or another hash
            raise FileNotFoundError(f"could not download {name_or_path} ({error}): it is needed "
                                    f"once, put {url} at {path}") from error
    for file in (path, *(folder / f"diffusion_pytorch_model{end}"
                         for folder in (path, path / "vae") for end in (".safetensors", ".bin"))):
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
    """The state dict in a weights file, floating tensors as float32; a run's model.pt will do."""
    if Path(path).suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights.get("vae", weights))
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


def modern_names(weights):
    """Renames the attention of files published before 2023; 1x1 convolutions become linear."""
    renamed = {}
    for name, tensor in weights.items():
        if ".attentions." in name:
            head, part, kind = name.rsplit(".", 2)
            name = f"{head}.{OLD_NAMES.get(part, part)}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def infer_config(weights, path):
    """VAEConfig read off the shapes of a state dict in diffusers' layout."""
    try:
        base, in_channels = weights["encoder.conv_in.weight"].shape[:2]
        widths = [weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
                  for i in range(count_indices(weights, "encoder.down_blocks."))]
        return VAEConfig(in_channels, weights["post_quant_conv.weight"].shape[0], base,
                         tuple(width // base for width in widths),
                         count_indices(weights, "encoder.down_blocks.0.resnets."))
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not an autoencoder in diffusers' layout, {error} is missing: "
                         "need the weights of a vae/ folder, pass that one") from error


def main():
    config = VAEConfig(base_channels=16, channel_multipliers=(1, 2, 4), layers_per_block=1)
    vae = AutoencoderKL(config)
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = vae.encode(x)
    loss, parts = vae_loss(vae, x, torch.Generator().manual_seed(0))
    print(f"{config}\nparameters {sum(p.numel() for p in vae.parameters()):,}")
    print(f"x {tuple(x.shape)} -> z {tuple(latent.mean.shape)} -> "
          f"{tuple(vae.decode(latent.mean).shape)}, factor {config.factor}")
    print(f"loss {loss:.4f}, l1 {parts['l1']:.4f}, kl {parts['kl']:.1f} nats an image")


if __name__ == "__main__":
    main()
