"""Tests of unet.py: parity with diffusers on equal weights, masks, checkpointing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from make_diffusers import UNET_CASES, fill_parameters, inputs, layout
from unet import UNet, UNetConfig

REFERENCE = Path(__file__).parent / "reference"

TINY = UNetConfig(base_channels=64, channel_multipliers=(1, 2), layers_per_block=1,
                  attention_levels=(False, True), context_dim=12, num_heads=8)
T = torch.tensor([17, 981])


def tiny(seed=0):
    return fill_parameters(UNet(TINY), seed)


@pytest.mark.parametrize("case", UNET_CASES)
@torch.no_grad()
def test_parity_with_diffusers(case):
    """Output equals diffusers' on equal weights, with and without a mask over the context."""
    base, multipliers, layers, attention, context_dim, heads, (h, w) = UNET_CASES[case]
    stored = np.load(REFERENCE / "diffusers_unet.npz")
    config = UNetConfig(4, 4, base, multipliers, layers, attention, context_dim, heads)
    unet = fill_parameters(UNet(config), seed=1)
    xt, context = inputs(2, (2, 4, h, w), (2, 5, context_dim))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool()
    # 1e-4: float32 sums in another order differ by about 1e-6; the reference adds -10,000 to
    # masked scores, whose weight is 0 in float32 as well
    np.testing.assert_allclose(unet(xt, T, context), stored[f"{case}_out"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(unet(xt, T, context, mask), stored[f"{case}_masked"], rtol=0,
                               atol=1e-4)


def test_default_is_stable_diffusions():
    """The default config has Stable Diffusion 1.5's parameter names, shapes, norms and count."""
    with torch.device("meta"):
        unet = UNet()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert layout(unet) == np.load(REFERENCE / "diffusers_unet.npz")["layout"]


@torch.no_grad()
def test_starts_at_zero():
    """A new net predicts exactly 0."""
    xt, context = inputs(1, (2, 4, 4, 6), (2, 3, 12))
    assert UNet(TINY)(xt, T, context).count_nonzero() == 0


def test_every_parameter_gets_a_gradient():
    """No parameter is left out of the output (parameters randomised: branches start at zero)."""
    unet = tiny()
    xt, context, target = inputs(1, (2, 4, 8, 8), (2, 3, 12), (2, 4, 8, 8))
    (unet(xt, T, context) - target).square().mean().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("autocast", (False, True))
def test_checkpointing_keeps_the_gradients(autocast):
    """Recomputed levels give the same gradients, to the bit, and keep less memory."""
    unet = tiny()
    xt, target = inputs(1, (2, 4, 8, 8), (2, 4, 8, 8))
    context, = inputs(2, (2, 3, 12))

    def gradients_and_memory():
        """Gradients, and how many numbers the forward pass keeps for them."""
        unet.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (unet(xt, T, context) - target).square().mean()
        kept = sum(sizes)
        loss.backward()
        return [p.grad.clone() for p in unet.parameters()], kept

    plain, kept_plain = gradients_and_memory()
    unet.checkpointing = True
    recomputed, kept_recomputed = gradients_and_memory()
    assert all(map(torch.equal, plain, recomputed))
    assert kept_recomputed < 0.3 * kept_plain
