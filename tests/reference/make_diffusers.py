"""Makes diffusers_vae.npz and diffusers_unet.npz: outputs of diffusers' networks.

Made with diffusers 0.42.1, torch 2.15.0, numpy 2.4.6, Python 3.11, CPU, float32:

    python tests/reference/make_diffusers.py

No weights are stored: `fill_parameters` gives equal weights to any two networks whose parameters
have the same names and shapes. The official architecture is stored as a hash (see `layout`).
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

# case -> (base_channels, channel_multipliers, layers_per_block, image (H, W))
VAE_CASES = {"three_levels": (32, (1, 2, 2), 1, (16, 24)), "two_levels": (32, (1, 2), 2, (12, 16))}
# case -> (base, multipliers, layers, attention_levels, context_dim, num_heads, latent (h, w))
UNET_CASES = {"ours": (32, (1, 2, 2), 1, (False, True, True), 24, 4, (8, 12)),
              "sd_pattern": (32, (1, 2, 2), 2, (True, True, False), 24, 2, (8, 4))}


def fill_parameters(net, seed):
    """Overwrite all parameters, in the order of their names; activations stay near 1."""
    random = np.random.RandomState(seed)
    for name, p in sorted(net.named_parameters()):
        noise = torch.from_numpy(random.standard_normal(tuple(p.shape))).float()
        if p.ndim > 1:
            noise = noise / np.sqrt(p[0].numel())  # 1 / sqrt(fan in)
        else:
            noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)  # norms near 1
        p.data.copy_(noise)
    return net.eval()


def inputs(seed, *shapes):
    """Standard normal arrays of the given shapes."""
    random = np.random.RandomState(seed)
    return [torch.from_numpy(random.standard_normal(shape)).float() for shape in shapes]


def layout(net):
    """sha256 of the sorted lines of names and shapes, and of each norm's groups and eps.

    eps is included because outputs of order 1 do not distinguish 1e-5 from 1e-6.
    """
    lines = [f"{name} {tuple(p.shape)}" for name, p in net.state_dict().items()]
    lines += [f"{name} {getattr(m, 'num_groups', 0)} {m.eps}" for name, m in net.named_modules()
              if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def diffusers_vae(base, multipliers, layers, latent_channels=4):
    from diffusers import AutoencoderKL

    n = len(multipliers)
    return AutoencoderKL(
        block_out_channels=tuple(base * m for m in multipliers), layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
        latent_channels=latent_channels, norm_num_groups=min(32, base))


def diffusers_unet(base, multipliers, layers, attention, context_dim, heads):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=tuple(base * m for m in multipliers), layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        cross_attention_dim=context_dim, attention_head_dim=heads, norm_num_groups=min(32, base))


@torch.no_grad()
def main():
    folder = Path(__file__).parent
    with torch.device("meta"):
        vae = diffusers_vae(128, (1, 2, 4, 4), 2)
        unet = diffusers_unet(320, (1, 2, 4, 4), 2, (True, True, True, False), 768, 8)

    arrays = {"layout": layout(vae)}
    for case, (base, multipliers, layers, (H, W)) in VAE_CASES.items():
        net = fill_parameters(diffusers_vae(base, multipliers, layers), seed=1)
        x, = inputs(2, (2, 3, H, W))
        f = 2 ** (len(multipliers) - 1)
        z, = inputs(3, (2, 4, H // f, W // f))
        posterior = net.encode(x).latent_dist
        arrays |= {f"{case}_mean": posterior.mean, f"{case}_logvar": posterior.logvar,
                   f"{case}_kl": posterior.kl(), f"{case}_decoded": net.decode(z).sample}
    np.savez_compressed(folder / "diffusers_vae.npz", **arrays)

    arrays = {"layout": layout(unet)}
    for case, (*architecture, context_dim, heads, (h, w)) in UNET_CASES.items():
        net = fill_parameters(diffusers_unet(*architecture, context_dim, heads), seed=1)
        xt, context = inputs(2, (2, 4, h, w), (2, 5, context_dim))
        t = torch.tensor([17, 981])
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
        arrays |= {f"{case}_out": net(xt, t, context).sample,
                   f"{case}_masked": net(xt, t, context, encoder_attention_mask=mask).sample}
    np.savez_compressed(folder / "diffusers_unet.npz", **arrays)


if __name__ == "__main__":
    main()
