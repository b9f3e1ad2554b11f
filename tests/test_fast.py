"""support/fast.py: attention equals the fused kernel."""
import pytest
import torch
import torch.nn.functional as F

from make_diffusers import inputs
from support.fast import attention


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
