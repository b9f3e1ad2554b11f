"""Tests of support/fast.py: the faster forms are the plain ones."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "reference"))

from make_diffusers import fill_parameters, inputs
from support.fast import Linear, attention, double


def plain_linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def plain_double(conv, x):
    return conv(F.interpolate(x, scale_factor=2.0))


@pytest.mark.parametrize("layer, fast, plain, shape", (
    (Linear(6, 10), lambda layer, x: layer(x), plain_linear, (16, 20, 6)),
    (Linear(6, 10), lambda layer, x: layer(x), plain_linear, (2, 20, 6)),
    (Linear(6, 10, bias=False), lambda layer, x: layer(x), plain_linear, (2, 5, 6)),
    (nn.Conv2d(6, 6, 3, padding=1), lambda conv, x: double(x, conv), plain_double, (2, 6, 3, 5))))
def test_faster_forms_are_the_plain_ones(layer, fast, plain, shape):
    """Linear as a convolution and doubling as a transposed one: equal values and gradients."""
    fill_parameters(layer, 0)
    x, = inputs(1, shape)
    wanted = [x.requires_grad_(), *layer.parameters()]
    results = [(y, *torch.autograd.grad(y.square().sum(), wanted))
               for y in (fast(layer, x), plain(layer, x))]
    for ours, expected in zip(*results):  # sums in another order
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03)))
def test_attention_is_the_fused_one(dtype, tolerance):
    """With a mask, values and gradients, in both formats: those of the fused kernel in float32."""
    q, k, v = inputs(0, (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))
    mask = torch.tensor([True, True, False, True, True, True, False]).view(1, 1, 1, 7)
    results = []
    for kind, function in ((dtype, attention), (torch.float32, F.scaled_dot_product_attention)):
        parts = [part.to(kind).requires_grad_() for part in (q, k, v)]
        h = function(*parts, mask)
        results.append((h, *torch.autograd.grad(h.float().square().sum(), parts)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


def test_linear_in_bf16_is_the_plain_one():
    """Under autocast nothing is convolved: bit-equal to nn.Linear."""
    layer = Linear(6, 10)
    fill_parameters(layer, 0)
    x, = inputs(1, (16, 20, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain_linear(layer, x))
