"""Tests of vae.py: parity with diffusers on equal weights, loss, statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch

from make_diffusers import VAE_CASES, fill_parameters, inputs, layout
from vae import (AutoencoderKL, LatentGaussian, VAEConfig, channel_importance, latent_statistics,
                 start_from_patches, vae_loss)

REFERENCE = Path(__file__).parent / "reference"

# 64 channels: with 32 or fewer each is a group of its own, and the norm cancels biases before it
TINY = VAEConfig(base_channels=64, channel_multipliers=(1, 2), layers_per_block=1)


def tiny(seed=0):
    return fill_parameters(AutoencoderKL(TINY), seed)


@pytest.mark.parametrize("case", VAE_CASES)
@torch.no_grad()
def test_parity_with_diffusers(case):
    """Encoder (with its right-bottom padding), KL and decoder equal diffusers' on equal weights."""
    base, multipliers, layers, (H, W) = VAE_CASES[case]
    stored = np.load(REFERENCE / "diffusers_vae.npz")
    vae = fill_parameters(AutoencoderKL(VAEConfig(3, 4, base, multipliers, layers)), seed=1)
    latent = vae.encode(inputs(2, (2, 3, H, W))[0])
    f = vae.config.factor
    decoded = vae.decode(inputs(3, (2, 4, H // f, W // f))[0])
    # 1e-4: float32 sums in another order differ by about 1e-6; a wrong padding by about 1
    for ours, name in ((latent.mean, "mean"), (latent.logvar, "logvar"), (decoded, "decoded")):
        np.testing.assert_allclose(ours, stored[f"{case}_{name}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(latent.kl(), stored[f"{case}_kl"], rtol=1e-5)


def test_default_is_stable_diffusions():
    """The default config has the official parameter names, shapes, norms and count."""
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert layout(vae) == np.load(REFERENCE / "diffusers_vae.npz")["layout"]


def test_every_parameter_gets_a_gradient():
    """No parameter is left out of the loss (parameters randomised: branches start at zero)."""
    vae = tiny()
    loss, _ = vae_loss(vae, inputs(1, (2, 3, 8, 8))[0], torch.Generator().manual_seed(0))
    loss.backward()
    for name, p in vae.named_parameters():
        if name.endswith("to_k.bias"):  # adds the same to all scores of a query: softmax drops it
            continue
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name


def test_kl():
    """KL is 0 for N(0, 1), the closed form of two Gaussians elsewhere; logvar is clamped."""
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(LatentGaussian(zeros, zeros).kl(), torch.zeros(2))
    mean, logvar = inputs(0, (2, 4, 3, 3), (2, 4, 3, 3))
    p = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    closed = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(LatentGaussian(mean, logvar).kl(), closed.sum((1, 2, 3)))
    extreme = LatentGaussian(zeros, torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1) + zeros)
    assert extreme.logvar.min() == -30 and extreme.logvar.max() == 20


def test_loss_terms():
    """The loss is its parts, weighted."""
    vae, x = tiny(), inputs(1, (2, 3, 8, 8))[0]
    loss, parts = vae_loss(vae, x, torch.Generator().manual_seed(0), kl_weight=1e-3)
    y, latent = vae(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, (x - y).abs().mean() + 1e-3 * latent.kl().mean())
    torch.testing.assert_close(parts["kl"], latent.kl().mean())


def test_latent_statistics():
    """Streamed shift and scale equal those of sampled latents, which become mean 0, deviation 1."""
    scales = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1)
    mean = inputs(0, (64, 3, 16, 16))[0] * scales + 2
    std = 0.5 * scales.expand_as(mean)
    shift, scale = latent_statistics((mean[i:i + 10], std[i:i + 10]) for i in range(0, 64, 10))
    torch.testing.assert_close(shift, mean.mean((0, 2, 3)))
    direct = (mean.double().var((0, 2, 3), unbiased=False) + 0.25 * scales.flatten()**2).rsqrt()
    torch.testing.assert_close(scale, direct.float())
    latent = LatentGaussian(mean, 2 * std.log())
    z, again = (latent.sample(torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(z, again)
    x0 = (z - shift.view(1, 3, 1, 1)) * scale.view(1, 3, 1, 1)
    # 16,384 draws a channel: standard errors are below 0.008
    assert x0.mean((0, 2, 3)).abs().max() < 0.03 and (x0.std((0, 2, 3)) - 1).abs().max() < 0.03


# ---- the linear path

def smooth_images(n, side, seed=0):
    """Images whose neighbouring pixels are alike, so that few components explain much."""
    coarse = torch.randn(n, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear") * 0.4
    return images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))


def linear_vae(images):
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(3, 5, 16, (1, 2), 1, stem=2, linear=True))
    start_from_patches(vae, images)
    return vae


@torch.no_grad()
def test_before_training_the_linear_path_is_pca():
    """Reconstructions equal the projection of 4 x 4 patches on their first five principal axes, by
    an SVD; latents are white."""
    images = smooth_images(40, 16)
    vae = linear_vae(images)
    latents = vae.encode(images).mean

    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)                     # (N, 3, 4, 4, 4, 4)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    centred = flat - flat.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:5]
    projected = (centred @ axes.T @ axes + flat.mean(0)).view(40, 4, 4, 3, 4, 4)
    expected = projected.permute(0, 3, 1, 4, 2, 5).reshape(40, 3, 16, 16).float()
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-5)

    torch.testing.assert_close(latents.transpose(0, 1).flatten(1).cov(), torch.eye(5), rtol=0,
                               atol=1e-4)

    # How much each latent matters is the deviation of its component, whatever the latent's own.
    deviations = torch.linalg.svdvals(centred)[:5].float()
    importance = channel_importance(vae, torch.ones(5)).flatten()
    torch.testing.assert_close(importance, deviations / deviations.square().mean().sqrt())
    vae.linear_decode.weight[:, 2] *= 3  # the same images from a third of the latent
    scale = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])
    torch.testing.assert_close(channel_importance(vae, scale).flatten(), importance)


def test_a_stem_moves_squares_of_pixels_to_channels():
    """A stem of 2 halves the sides before the first convolution; no pixel changes its place."""
    vae = AutoencoderKL(VAEConfig(3, 8, 16, (1, 2), 1, stem=2))
    x = inputs(1, (2, 3, 16, 24))[0]
    assert vae.config.factor == 4
    assert vae.encode(x).mean.shape == (2, 8, 4, 6) and vae(x)[0].shape == x.shape
    seen = []
    vae.encoder.conv_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vae.encode(x)
    assert torch.equal(seen[0][:, :4], x[:, :1].unfold(2, 2, 2).unfold(3, 2, 2).reshape(
        2, 8, 12, 4).permute(0, 3, 1, 2))


def test_training_never_falls_behind_pca():
    """On a fixed batch, each of 40 steps reconstructs better than PCA, the last much better."""
    images = smooth_images(8, 16)
    vae = linear_vae(images)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(41):
        with torch.no_grad():
            errors.append((vae.decode(vae.encode(images).mean) - images).abs().mean().item())
        optimizer.zero_grad()
        vae_loss(vae, images, generator)[0].backward()
        optimizer.step()
    assert max(errors[1:]) <= errors[0] and errors[-1] < 0.9 * errors[0], errors
