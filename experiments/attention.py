"""Where does the embedder look? Attention of CLS to the patches of an image, one panel per head.

    python -m experiments attention --image chest.png
    python -m experiments attention --image chest.png --embedder dinov2_vits14_reg

The picture: the image and a heat map for each head of the last block, from black through red and
yellow to white at its maximum. The number: exp(entropy) of a head's attention over patches, from 1
(one patch) to N (all equal).
"""
import torch
import torch.nn.functional as F

from dino import load_dino
from support.command import user_errors
from support.fast import attention_weights
from support.files import resolve_checkpoint
from support.images import load_image
from support.pictures import save_grid

PANEL = 224  # pixels


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


def effective_patches(maps):
    """exp(entropy) of each map (N, h, w) as a distribution over its patches: (N,)."""
    p = maps.flatten(1) / maps.sum(dim=(1, 2))[:, None]
    return (-torch.xlogy(p, p).sum(dim=1)).exp()


def add_flags(parser):
    add = parser.add_argument
    add("--image", required=True, help="image file")
    add("--embedder", help="name or file of weights (default: those of the newest run)")
    add("--out", default="attention.png", help="the picture")


@torch.no_grad()
def main(args):
    weights = args.embedder or resolve_checkpoint()
    with user_errors():
        vit = load_dino(weights)
    x = load_image(args.image, vit.input_side)[None]                # (1, 3, side, side)
    maps = attention_maps(vit, x)[0]                                # (heads, h, w)

    # The image, then a panel a head; the patches stay square and sharp.
    panels = [F.interpolate(x, size=PANEL, mode="bicubic", antialias=True).clamp(-1, 1),
              F.interpolate(heat(maps), size=PANEL)]
    save_grid(args.out, [torch.cat(panels)])

    patches = maps[0].numel()
    for head, effective in enumerate(effective_patches(maps), start=1):
        print(f"head {head}: looks at {effective:.1f} of {patches} patches")
    print(f"{args.out}: image and {vit.config.num_heads} heads of {weights}")
