"""The hierarchical regional transformer for whole slides, and its focused inference.

A slide is a bag of patch features (N, D) with grid positions (N, 2) and one label for the bag:

    patches -> windows of neighbours -> class token of each -> windows of those -> ... -> logit

Inference is focused: pass 1 sees random regions, pass 2 the same number of regions around those
with the strongest evidence of tumour. Without windows the model is ABMIL, or mean pooling.

Shapes: B slides, R regions per slide, T patches per region, D feature width, d width inside,
n tokens of any level, M regions of all slides in a row.

Sources: arXiv 2308.12634, details unpublished (self-attention inside regions, stacked; focused
inference; 256 patches per pass: random, 64 regions of 2x2 or 4 of 8x8). ABMIL: Ilse et al. 2018,
equation 9.

Our choices: learned relative position biases, two blocks per level, gated attention over regions
(cost grows linearly with the bag), class tokens initialised by it, a loss at every level. Pass 2
goes where pass 1's evidence of tumour, smoothed over positions, is highest; the logit pools both.
For stacked windows (8x8) pass 1 scans windows of 2x2, because large regions miss most of a slide.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.seeds import step_seed

CHUNK = 16384  # patches per call, which bounds the memory of whole bags


@dataclass(frozen=True)
class MILConfig:
    in_dim: int                # D
    windows: tuple = (2,)      # sides of the windows, patches first; () is a baseline
    pool: str = "attention"    # or "mean"
    dim: int = 64              # d
    num_heads: int = 4
    depth: int = 2             # blocks per level


# ---- regions and focus -------------------------------------------------------------------------

def region_table(grid, windows, shift=(0, 0)):
    """Patch indices (R, T) of each region, -1 where one is missing, and the regions' places (R, 2).

    grid (N, 2) int64. The T cells are ordered so that each window of each level is contiguous.
    """
    # The cells of a region, window by window.
    cells = [(0, 0)]
    side = 1
    for window in windows:
        corners = [(side * i, side * j) for i in range(window) for j in range(window)]
        cells = [(row + a, column + b) for row, column in corners for a, b in cells]
        side *= window
    slot = torch.empty(side, side, dtype=torch.int64)
    slot[tuple(torch.tensor(cells).T)] = torch.arange(side ** 2)

    # One integer per place, because unique() is much faster on scalars than on pairs.
    moved = grid + torch.as_tensor(shift)
    rows, columns = (moved // side).T
    width = int(columns.max()) + 1 if len(grid) else 1
    index, region = torch.unique(rows * width + columns, return_inverse=True)
    places = torch.stack([index // width, index % width], dim=1)

    table = torch.full((len(places), side ** 2), -1)
    table[region, slot[tuple((moved % side).T)]] = torch.arange(len(grid))
    return table, places


def draw_regions(slide, windows, generator):
    """A slide's regions at a random offset, in random order: table (R, T) of patch indices, and
    centres (R, 2) in patches."""
    side = math.prod(windows)
    shift = torch.randint(side, (2,), generator=generator)
    table, places = region_table(slide.grid, windows, shift)
    order = torch.randperm(len(table), generator=generator)
    return table[order], (places[order] + 0.5) * side - shift


def focus(seen, evidence, unseen, count, reach):
    """The `count` unseen regions with the highest expected evidence, as rows of `unseen` (R, 2).

    seen (S, 2), evidence (S,): centres and evidence of the regions of pass 1, over which a Gaussian
    of `reach` patches averages, shrunk towards the overall mean with weight 0.3.
    """
    near = (-(torch.cdist(unseen, seen) / reach).square() / 2).exp()
    expected = (near @ evidence + 0.3 * evidence.mean()) / (near.sum(dim=1) + 0.3)
    return expected.topk(min(count, len(expected))).indices


# ---- the model ---------------------------------------------------------------------------------

class RegionBlock(nn.Module):
    """ViT block on windows of side x side cells: x (M, 1 + T, d), absent (M, 1 + T) bool -> the
    first `wanted` tokens (None: all). It starts as the identity (see RegionalMIL)."""

    def __init__(self, config, side):
        super().__init__()
        d = config.dim
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        for last in (self.proj, self.mlp[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

        # One bias per head and offset; indices 0 to 2 belong to the class token.
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offset = cells[:, None] - cells + side - 1                       # (T, T, 2), from 0
        index = offset[..., 0] * (2 * side - 1) + offset[..., 1] + 3
        index = F.pad(index, (1, 0, 1, 0))
        index[0, 1:] = 1
        index[1:, 0] = 2
        self.register_buffer("index", index, persistent=False)
        self.bias = nn.Parameter(torch.zeros(config.num_heads, (2 * side - 1) ** 2 + 3))

    def forward(self, x, absent, wanted=None):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # 3 x (M, heads, 1 + T, d')
        bias = self.bias[:, self.index].masked_fill(absent[:, None, None], -math.inf)
        h = F.scaled_dot_product_attention(q[:, :, :wanted], k, v, attn_mask=bias[:, :, :wanted])
        x = x[:, :wanted] + self.proj(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class RegionLevel(nn.Module):
    """Tokens (M, T, d), present (M, T), attention (M, T) -> class token of each window (M, d). It
    starts as the attention-weighted mean, because a free initial token trains too slowly."""

    def __init__(self, config, side):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(config.dim))
        self.blocks = nn.ModuleList(RegionBlock(config, side) for _ in range(config.depth))

    def forward(self, x, present, attention):
        x = torch.cat([self.cls_token + attention[:, None] @ x, x], dim=1)  # (M, 1 + T, d)
        absent = ~F.pad(present, (1, 0), value=True)
        for block in self.blocks[:-1]:
            x = block(x, absent)
        return self.blocks[-1](x, absent, wanted=1)[:, 0]  # only the class token is used


class RegionalMIL(nn.Module):
    """Regions of a bag -> logit. Without windows a region is a patch: ABMIL, or mean pooling.

    One gated attention and one head serve all levels, whose tokens share one space because blocks
    start as the identity. Every level predicts the label: patches find the tumour first.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.dim
        self.register_buffer("shift", torch.zeros(config.in_dim))  # mean of training features
        self.register_buffer("scale", torch.ones(config.in_dim))   # their standard deviation
        self.embed = nn.Linear(config.in_dim, d)
        self.levels = nn.ModuleList(RegionLevel(config, side) for side in config.windows)

        # Gated attention, equation 9 of Ilse et al., and the classifier.
        self.value = nn.Linear(d, d)
        self.gate = nn.Linear(d, d)
        self.score = nn.Linear(d, 1)
        self.head = nn.Linear(d, 1)

    def attention(self, x, present):
        """Tokens (B, n, d), present (B, n) -> (B, n), summing to 1, or to 0 if all are absent."""
        score = self.score(self.value(x).tanh() * self.gate(x).sigmoid())[..., 0]
        if self.config.pool == "mean":
            score = torch.zeros_like(score)
        return score.masked_fill(~present, -1e9).softmax(dim=1) * present

    def encode(self, x, present):
        """Regions (M, T, D), or windows of the first level alone, present (M, T) -> tokens (M, d),
        attention to each patch (M, T), and the inputs of each level, patches first: a list of
        tokens (M, n, d), present (M, n)."""
        M = len(x)
        weight = self.embed.weight / self.scale  # standardises the features
        x = F.gelu(F.linear(x, weight, self.embed.bias - weight @ self.shift))

        share = present.float()
        below = []
        for level, side in zip(self.levels, self.config.windows):
            if below and len(x) == M:  # a window of the first level alone
                break
            x = x.reshape(-1, side ** 2, x.shape[-1])                    # a row per window
            present = present.reshape(-1, side ** 2)
            below.append((x.view(M, -1, x.shape[-1]), present.view(M, -1)))

            attention = self.attention(x, present)
            x = level(x, present, attention)
            present = present.any(dim=1)
            # A patch's share is the product of the attention over all levels.
            share = share.view(attention.numel(), -1) * attention.reshape(-1, 1)
        return x.view(M, -1), share.view(M, -1), below

    def pool(self, tokens, present):
        """Tokens (B, R, d), present (B, R) -> logits (B,), attention (B, R), which sums to 1."""
        attention = self.attention(tokens, present)
        return self.head((attention[:, None] @ tokens)[:, 0])[:, 0], attention

    def forward(self, x, present):
        """x (B, R, T, D), present (B, R, T) bool -> logits (B,)."""
        tokens = self.encode(x.flatten(0, 1), present.flatten(0, 1))[0]
        return self.pool(tokens.unflatten(0, x.shape[:2]), present.any(dim=2))[0]

    def loss(self, x, present, labels):
        """x (B, R, T, D), present (B, R, T) bool, labels (B,) of 0 and 1 -> mean cross-entropy over
        levels, and over the bag and its halves, because one pass sees half as much as two."""
        regions, _, below = self.encode(x.flatten(0, 1), present.flatten(0, 1))
        levels = [*below, (regions[:, None], present.any(dim=2).view(-1, 1))]

        logits = []
        targets = []
        for tokens, there in levels:
            tokens = tokens.reshape(len(x), -1, tokens.shape[-1])  # (B * R, n, d) -> (B, R * n, d)
            there = there.reshape(len(x), -1)
            for half in (slice(None), slice(0, None, 2), slice(1, None, 2)):
                filled = there[:, half].any(dim=1)  # a bag of one patch has an empty half
                logits.append(self.pool(tokens[filled, half], there[filled, half])[0])
                targets.append(labels[filled])
        return F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(targets))


# ---- inference ---------------------------------------------------------------------------------

def encode_regions(model, slide, regions):
    """Tokens (R, d) and patch attention (R, T) of regions (R, T), a chunk at a time."""
    tokens = []
    shares = []
    for chunk in regions.split(max(1, CHUNK // regions.shape[1])):
        x = slide.take(chunk).to(model.scale.device)
        chunk_tokens, chunk_share, _ = model.encode(x, (chunk >= 0).to(x.device))
        tokens.append(chunk_tokens)
        shares.append(chunk_share)
    return torch.cat(tokens), torch.cat(shares)


@torch.no_grad()
def predict(model, slide, patches, focused=False, seed=0):
    """A slide's logit, the regions seen (R, T), their attention (R, T), how many are of pass 1.

    patches: how many one pass sees. focused: a second pass of the same size (see `focus`).
    """
    generator = torch.Generator().manual_seed(step_seed(seed, slide.name))
    windows = model.config.windows
    focused = focused and patches < len(slide.grid)
    scan = windows[:1] if focused else windows

    def pool(tokens):
        logit, attention = model.pool(tokens[None], tokens.new_ones(1, len(tokens)).bool())
        return logit, attention[0]

    # Pass 1: random regions.
    table, centres = draw_regions(slide, scan, generator)
    first = min(len(table), max(1, patches // table.shape[1]))
    seen = table[:first]
    tokens, share = encode_regions(model, slide, seen)
    logit, attention = pool(tokens)

    # Pass 2: negative evidence also gets attention; follow positive evidence only.
    if focused and first < len(table):
        evidence = (attention * model.head(tokens)[:, 0].clamp(min=0)).sqrt().cpu()
        unseen, places = table[first:], centres[first:]
        if scan != windows:
            unseen, places = draw_regions(slide, windows, generator)
        count = max(1, patches // unseen.shape[1])
        reach = max(1.5 * math.prod(scan), 0.5 * math.prod(windows))
        unseen = unseen[focus(centres[:first], evidence, places, count, reach)]
        more_tokens, more_share = encode_regions(model, slide, unseen)

        # Tokens of all levels share one space, so both passes are pooled together.
        missing = unseen.shape[1] - seen.shape[1]
        seen = torch.cat([F.pad(seen, (0, missing), value=-1), unseen])
        share = torch.cat([F.pad(share, (0, missing)), more_share])
        logit, attention = pool(torch.cat([tokens, more_tokens]))
    return logit.item(), seen, (attention[:, None] * share).cpu(), first
