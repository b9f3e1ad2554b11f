"""Tests of unet.py: parity with diffusers on equal weights, masks, attention maps, weight files."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

REFERENCE = Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))

from make_diffusers import UNET_CASES, fill_parameters, inputs, layout  # noqa: E402
from unet import (Attention, Linear, Resample, UNet, UNetConfig, keep_attention,  # noqa: E402
                  timestep_embedding)

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


def test_timestep_embedding():
    """Cosines come first; the first frequency is 1 a step, the last nearly 1 / 10,000."""
    e = timestep_embedding(torch.tensor([0, 3]), 8)
    assert torch.equal(e[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    angles = 3 * 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(e[1], torch.cat([angles.cos(), angles.sin()]))
    assert torch.equal(timestep_embedding(torch.tensor([3.0]), 8), e[1:])


@torch.no_grad()
def test_starts_at_zero_and_ignores_batch_mates():
    """A new net predicts exactly 0; a filled one treats each batch entry on its own."""
    xt, context = inputs(1, (2, 4, 4, 6), (2, 3, 12))
    assert UNet(TINY)(xt, T, context).count_nonzero() == 0
    unet = tiny()
    both = unet(xt, T, context)
    alone = torch.cat([unet(xt[i:i + 1], T[i:i + 1], context[i:i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)  # only the order of sums differs
    for other in (unet(xt, T.flip(0), context), unet(xt, T, context.flip(0))):
        assert (other - both).abs().max() > 1e-2  # time and context are both heard


def test_every_parameter_gets_a_gradient():
    """No parameter is left out of the output (parameters randomised: branches start at zero)."""
    unet = tiny()
    xt, context, target = inputs(1, (2, 4, 8, 8), (2, 3, 12), (2, 4, 8, 8))
    (unet(xt, T, context) - target).square().mean().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-8, name


def test_query_and_key_learn_nothing_from_one_token():
    """With one context token the cross-attention weight is always 1, as the docstring warns."""
    unet = tiny()
    xt, context, target = inputs(1, (2, 4, 8, 8), (2, 1, 12), (2, 4, 8, 8))
    (unet(xt, T, context) - target).square().mean().backward()
    for name, p in unet.named_parameters():
        if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
            assert p.grad.abs().max() < 1e-8, name


def test_training_lowers_the_loss():
    """Thirty steps on one batch at least halve the error: zero-initialised branches do learn."""
    torch.manual_seed(0)
    unet = UNet(TINY)
    xt, context, target = inputs(1, (2, 4, 4, 4), (2, 3, 12), (2, 4, 4, 4))
    optimizer, losses = torch.optim.AdamW(unet.parameters(), 2e-3), []
    for _ in range(30):
        loss = (unet(xt, T, context) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("layer, plain, shape", (
    (Linear(6, 10), lambda m, x: F.linear(x, m.weight, m.bias), (2, 20, 6)),
    (Resample(6, up=True), lambda m, x: m.conv(F.interpolate(x, scale_factor=2.0)), (2, 6, 3, 5))))
def test_faster_forms_are_the_plain_ones(layer, plain, shape):
    """Linear as a convolution and doubling as a transposed one: equal values and gradients."""
    fill_parameters(layer, 0)
    x, = inputs(1, shape)
    wanted = [x.requires_grad_(), *layer.parameters()]
    results = [(y, *torch.autograd.grad(y.square().sum(), wanted))
               for y in (layer(x), plain(layer, x))]
    for ours, expected in zip(*results):  # sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("levels", ((False, True), (True, True), (False, False)))
def test_several_contexts_for_each_latent(levels):
    """Two contexts a latent equal two calls, wherever the first attention stands."""
    unet = fill_parameters(UNet(UNetConfig(4, 4, 64, (1, 2), 1, levels, 12, 8)), 0)
    xt, first, second = inputs(1, (2, 4, 4, 6), (2, 5, 12), (2, 5, 12))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0], [1] * 5]).bool()
    apart = torch.cat([unet(xt, T, first, mask[:2]), unet(xt, T, second, mask[2:])])
    together = unet(xt, T, torch.cat([first, second]), mask)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)  # sums in another order


@torch.no_grad()
def test_context_mask_equals_a_shorter_context():
    """Masked tokens have no influence, whatever they hold, with kept maps as without."""
    unet = tiny()
    xt, context = inputs(1, (2, 4, 4, 6), (2, 5, 12))
    mask = torch.tensor([True, True, True, False, False]).expand(2, 5)
    short = unet(xt, T, context[:, :3])
    context[:, 3:] = 100.0
    # 1e-5: exact in theory, sums in another order
    torch.testing.assert_close(unet(xt, T, context, mask), short, rtol=0, atol=1e-5)
    with keep_attention(unet, "attn2") as maps:
        torch.testing.assert_close(unet(xt, T, context, mask), short, rtol=0, atol=1e-5)
    assert all(m[..., 3:].count_nonzero() == 0 for m in maps.values())


@torch.no_grad()
def test_keep_attention():
    """Kept maps are softmax rows of the right shapes, the output stays, and the end is clean."""
    unet = tiny()
    xt, context = inputs(1, (2, 4, 4, 6), (2, 5, 12))
    plain = unet(xt, T, context)
    with keep_attention(unet) as maps:
        # 1e-5: fused and plain attention round differently
        torch.testing.assert_close(unet(xt, T, context), plain, rtol=0, atol=1e-5)
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    assert sorted(maps) == sorted(names) and len(names) == 2 * (1 + 1 + 2)
    for name, weights in maps.items():
        assert weights.shape == (2, 8, 6, 6 if name.endswith("attn1") else 5)  # 2 x 3 positions
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8, 6))
    before = {name: weights.clone() for name, weights in maps.items()}
    unet(2 * xt, T, context)
    assert all(torch.equal(maps[name], before[name]) for name in names)
    with pytest.raises(KeyError), keep_attention(unet, only="attn2") as cross:
        unet(xt, T, context)
        raise KeyError
    assert len(cross) == 4 and all(name.endswith("attn2") for name in cross)
    assert all(m.keep is None for m in unet.modules() if isinstance(m, Attention))


def test_refuses_what_does_not_fit():
    """Sides, context width, widths and level lists that do not fit are named with a way out."""
    unet = tiny()
    with pytest.raises(ValueError, match="6 x 5.*multiples of 2.*use 6 x 4"):
        unet(torch.zeros(1, 4, 5, 6), T[:1], torch.zeros(1, 2, 12))
    with pytest.raises(ValueError, match="7 entries.*built for 12"):
        unet(torch.zeros(1, 4, 4, 4), T[:1], torch.zeros(1, 2, 7))
    with pytest.raises(ValueError, match="64 channels.*num_heads 3"):
        UNetConfig(base_channels=64, num_heads=3)
    with pytest.raises(ValueError, match="got 2 attention_levels for 4"):
        UNetConfig(attention_levels=(True, False))


def test_loads_files_and_folders(tmp_path):
    """.safetensors (float16), .bin, a folder and its unet/ load, the config read off the shapes."""
    weights = {k: v.half() for k, v in tiny(4).state_dict().items()}
    header, data = {}, b""
    for name, tensor in weights.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    torch.save(weights, tmp_path / "w.bin")
    for path in (tmp_path, tmp_path / "unet", file, tmp_path / "w.bin"):
        loaded = UNet.from_pretrained(path)
        assert loaded.config == TINY
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float())
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        UNet.from_pretrained(file)


def test_refuses_other_weights(tmp_path):
    """A missing file, another net's file, and a config that does not match are each explained."""
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.*give another path"):
        UNet.from_pretrained(tmp_path / "nothing")
    torch.save({"encoder.conv_in.weight": torch.zeros(3)}, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="not a conditional U-Net.*'conv_in.weight'"):
        UNet.from_pretrained(tmp_path / "vae.pt")
    torch.save(tiny().state_dict(), tmp_path / "unet.pt")
    other = UNetConfig(4, 8, 64, (1, 2), 1, (False, True), 12, 8)
    with pytest.raises(ValueError, match=r"2 differ, first: conv_out.bias is \(4,\) instead of "
                       r"\(8,\); .*pass the matching file"):
        UNet.from_pretrained(tmp_path / "unet.pt", other)
