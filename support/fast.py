"""Operations in a form that computes faster, with the values and gradients of the plain one."""
import math

import torch
import torch.nn.functional as F
from torch import nn


def attention_weights(q, k, mask=None):
    """Softmax of scaled products: (B, heads, M, d), (B, heads, N, d) -> (B, heads, M, N), float32.

    mask: bool, broadcast to the result, True = attend.
    """
    scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def attention(q, k, v, mask=None):
    """Values v (B, heads, N, d) by those weights: (B, heads, M, d).

    On the CPU in bf16 step by step, for there PyTorch's fused kernel is 5 to 10 times slower.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention_weights(q, k, mask).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Linear(nn.Linear):
    """nn.Linear over tokens (B, N, C); on the CPU in float32 a 1x1 convolution, up to twice as
    fast.

    The sums are the same. oneDNN, which convolves, uses AVX-512 on every maker's chips; the matrix
    product that nn.Linear calls does not, but for bf16. PyTorch gives it no 1x1 convolution of
    fewer than 16 images in one thread, and a handful of tokens gains nothing: those stay plain.
    """

    def forward(self, x):
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or x.shape[1] < 16 or (
                len(x) < 16 and torch.get_num_threads() == 1):
            return super().forward(x)
        x = x.unsqueeze(1).movedim(-1, 1)        # (B, N, C) -> (B, C, 1, N), the same memory
        x = F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return x.movedim(1, -1).squeeze(1)       # (B, C', 1, N) -> (B, N, C')


def double(x, conv):
    """Repeat every pixel of x (B, C, H, W) 2x2 times, then apply conv, 3x3: (B, C', 2H, 2W).

    Both together are one transposed convolution with 4x4 weights, each the sum of those of the 3x3
    that meet the same pixel: 4 products an output pixel, not 9.
    """
    weight = 4 * F.avg_pool2d(conv.weight.flip(2, 3), 2, stride=1, padding=1)
    return F.conv_transpose2d(x, weight.transpose(0, 1), conv.bias, stride=2, padding=1)
