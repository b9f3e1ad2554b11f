"""Where the embedder looks: attention of CLS to the patches of an image, one map per head.

    maps = attention_maps(vit, images)        # (B, heads, H/patch, W/patch)
    pictures = heat(maps[0])                  # (heads, 3, H/patch, W/patch)
"""
import torch

from support.speed import attention_weights


@torch.no_grad()
def attention_maps(vit, x):
    """Images x (B, 3, H, W) in [-1, 1] -> attention of CLS to each patch in the last block,
    (B, heads, H/patch, W/patch). Maps sum to 1 minus the attention to CLS and registers."""
    tokens = vit.embed(x)
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    last = vit.blocks[-1]
    q, k, _ = last.attn.split(last.norm1(tokens))
    cls = attention_weights(q[:, :, :1], k)[:, :, 0]                # (B, heads, G + N)
    patches = cls[:, :, 1 + vit.config.registers:]
    patch = vit.config.patch_size
    return patches.unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))


def heat(maps):
    """Maps (N, h, w) >= 0 -> colours (N, 3, h, w) in [-1, 1]: black, red, yellow, white."""
    level = 3 * maps / maps.amax(dim=(1, 2), keepdim=True)
    colours = torch.stack([(level - channel).clamp(0, 1) for channel in range(3)], dim=1)
    return 2 * colours - 1
