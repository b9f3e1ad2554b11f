"""Makes dino.npz: outputs of the official DINO and DINOv2 networks on random weights and images.

    python tests/reference/make_dino.py DINO_CLONE DINOV2_CLONE

Made with facebookresearch/dino 7c446df, facebookresearch/dinov2 b8931f7 (both Apache-2.0), torch
2.15.0, numpy 2.4. Weights and images come from numpy's RandomState, so only results are stored:
CASE/HxW/global (2, G, D), /last (2, blocks, D), /patches (2, N, D), /attention (v1), and keys/NAME,
a sha256 of the sorted "name shape" lines of the official state dict.
"""

import hashlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
# name: (patch, native side, registers, DINOv2?, sides (H, W)). Width 48, depth 3, 3 heads.
CASES = {
    "v1": (8, 32, 0, False, [(32, 32), (40, 40), (24, 56), (16, 16)]),
    "v2": (14, 56, 0, True, [(56, 56), (70, 70), (28, 84), (28, 28)]),
    "v2_reg": (14, 56, 4, True, [(56, 56), (70, 70), (28, 84), (28, 28)]),
}
NAMES = ("dino_vits16", "dino_vitb8", "dinov2_vits14", "dinov2_vitl14_reg")


def fill(module, seed=0):
    """Random weights in the order of the sorted names: deviation 0.2, gains around 1."""
    random = np.random.RandomState(seed)
    state = module.state_dict()
    for name in sorted(state):
        values = 0.2 * random.standard_normal(state[name].shape)
        gain = name.endswith("gamma") or (name.endswith("weight") and values.ndim == 1)
        state[name] = torch.from_numpy(values + gain).float()
    module.load_state_dict(state)
    return module.eval()


def picture(side, seed=1):
    """Random images (2, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, (2, 3, *side))).float()


def fingerprint(state):
    """sha256 of the sorted names and shapes of a state dict."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def official_input(x):
    """As in the official evaluation: [0, 1], then normalised with ImageNet's statistics."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std


@torch.no_grad()
def main(dino, dinov2):
    sys.path[:0] = [dino, dinov2]
    import vision_transformer as v1
    from dinov2.hub import backbones
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    # Outputs of miniatures.
    results = {}
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    for case, (patch, native, registers, is_v2, sides) in CASES.items():
        if is_v2:  # the options of dinov2/hub/backbones.py
            vit = DinoVisionTransformer(
                img_size=native, patch_size=patch, embed_dim=48, depth=3, num_heads=3,
                block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention), init_values=1.0,
                block_chunks=0, num_register_tokens=registers, interpolate_antialias=registers > 0,
                interpolate_offset=0.0 if registers else 0.1)
        else:
            vit = v1.VisionTransformer(img_size=[native], patch_size=patch, embed_dim=48, depth=3,
                                       num_heads=3, qkv_bias=True, norm_layer=norm)
        fill(vit)
        for side in sides:
            x, key = official_input(picture(side)), f"{case}/{side[0]}x{side[1]}"
            if is_v2:
                out = vit.forward_features(x)
                cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
                tokens = torch.cat([cls[:, None], out["x_norm_regtokens"]], dim=1)
                last = [c for _, c in vit.get_intermediate_layers(x, 3, return_class_token=True)]
            else:
                blocks = vit.get_intermediate_layers(x, 3)
                tokens, patches = vit(x)[:, None], blocks[-1][:, 1:]
                last = [block[:, 0] for block in blocks]
                attention = vit.get_last_selfattention(x)[:, :, 0, 1:]
                results[key + "/attention"] = attention.numpy()
            results[key + "/global"], results[key + "/patches"] = tokens.numpy(), patches.numpy()
            results[key + "/last"] = torch.stack(last, dim=1).numpy()

    # Names and shapes of the published networks.
    for name in NAMES:
        if name.startswith("dinov2"):
            vit = getattr(backbones, name)(pretrained=False)
        else:
            vit = {"s": v1.vit_small, "b": v1.vit_base}[name[8]](patch_size=int(name[9:]))
        results["keys/" + name] = np.array(fingerprint(vit.state_dict()))
    np.savez_compressed(Path(__file__).with_name("dino.npz"), **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
