"""support/fast.py: attention equals the fused kernel; a compiled block is one graph."""
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from make_diffusers import inputs
from support import fast
from support.fast import attention, compile_blocks, compile_where_it_pays, repeated_blocks
from unet import UNet, UNetConfig

UNET = UNetConfig(4, 4, 8, (1,), 1, (True,), 12, 2)  # one level: tracing takes long


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03)))
def test_attention_equals_the_fused_kernel(dtype, tolerance):
    """Values and gradients, with a mask, in both formats."""
    q, k, v = inputs(0, (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))
    mask = torch.tensor([True, True, False, True, True, True, False]).view(1, 1, 1, 7)
    results = []
    for kind, function in ((dtype, attention), (torch.float32, F.scaled_dot_product_attention)):
        parts = [part.to(kind).requires_grad_() for part in (q, k, v)]
        h = function(*parts, mask)
        results.append((h, *torch.autograd.grad(h.float().square().sum(), parts)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def counter():
    """A backend that counts graphs and runs them eagerly."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def steps(unet, count, batch=2):
    for _ in range(count):
        xt, context = inputs(1, (batch, 4, 4, 4), (batch, 3, 12))
        unet(xt, torch.arange(batch), context).square().mean().backward()


def test_compiled_blocks_keep_their_graphs(counter):
    """Blocks compile without a break; steps add no graph, another batch at most one per block."""
    unet = UNet(UNET)
    compile_blocks(unet, backend=counter, fullgraph=True)
    steps(unet, 1)
    first = counter.frame_count
    blocks = sum(isinstance(module, UNet.repeated_blocks) for module in unet.modules())
    assert 0 < first <= blocks
    steps(unet, 2)
    assert counter.frame_count == first
    steps(unet, 1, batch=3)
    assert counter.frame_count <= 2 * first


@pytest.mark.parametrize("wanted, device, steps, seconds, compiled", (
    (None, "cuda", 1000, (2.0, 1.0), True),
    (None, "cuda", 1000, (1.0, 2.0), False),  # slower: undone
    (None, "cuda", 100, (2.0, 1.0), False),   # too short a run to try
    (None, "cpu", 1000, (2.0, 1.0), False),
    (False, "cuda", 1000, (2.0, 1.0), False),
    (True, "cpu", 1, (), True),
))
def test_blocks_are_compiled_where_it_pays(monkeypatch, counter, wanted, device, steps, seconds,
                                           compiled):
    """By the seconds of a step before and after; blocks that are not faster run as before."""
    timings = iter(seconds)
    monkeypatch.setattr(fast, "shortest", lambda step: next(timings))
    unet = UNet(UNET)
    chosen = compile_where_it_pays(unet, wanted, torch.device(device), steps, lambda: None,
                                   backend=counter)
    assert chosen == compiled
    assert all((block._compiled_call_impl is not None) == compiled
               for block in repeated_blocks(unet))
