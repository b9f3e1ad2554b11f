"""The hierarchical regional transformer for whole slides, and its focused inference.

A slide is a bag of patch features (N, D) with places (N, 2) and one label for all of them:

    patches -> windows of neighbours -> class token of each -> windows of those -> ... -> logit

Inference is focused: pass 1 sees random regions, pass 2 as many around those it attended to most.
Without windows the model is ABMIL, or mean pooling.

Shapes: B slides, R regions of a slide, T patches of a region, D numbers of a patch, d inside, n
tokens of any level, M regions of all slides in a row.

Sources: arXiv 2308.12634, of which only ideas are known (self-attention inside regions, stacked;
focused inference; 256 patches: random ones, 64 regions of 2x2 or 4 of 8x8). ABMIL: Ilse et al.
2018, equation 9.

Our choices, as the paper's are not known: learned relative biases, two blocks a level, gated
attention over regions (one query: cost grows linearly with the bag), the same attention as the
start of each class token, a loss at every level, and the focus: pass 2 goes where what pass 1
attended to as a sign of tumour, smoothed over its places, is highest; the logit is of both passes.
Stacked windows (8x8) scan in pass 1 by 64 windows of 2x2, for four large regions miss most of a
slide.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.seeds import step_seed

CHUNK = 16384  # patches encoded at once, which bounds the memory of whole bags


@dataclass(frozen=True)
class MILConfig:
    in_dim: int                # D, width of the features
    windows: tuple = (2,)      # sides of the windows, patches first; () is a baseline
    pool: str = "attention"    # or "mean"
    dim: int = 64              # d, width inside
    num_heads: int = 4
    depth: int = 2             # blocks of each level


# ---- regions and focus -------------------------------------------------------------------------

def region_table(grid, windows, shift=(0, 0)):
    """Patches (R, T) of each region, -1 where one is missing, and places (R, 2) of the regions.

    grid (N, 2) int64. The T cells are in such an order that each window of each level lies in one
    stretch.
    """
    # the cells of a region: windows of the first level one after the other, and so on
    cells = [(0, 0)]
    side = 1
    for window in windows:
        corners = [(side * i, side * j) for i in range(window) for j in range(window)]
        cells = [(row + a, column + b) for row, column in corners for a, b in cells]
        side *= window
    slot = torch.empty(side, side, dtype=torch.int64)
    slot[tuple(torch.tensor(cells).T)] = torch.arange(side ** 2)

    # places as single numbers are told apart much faster than as pairs, and in the same order
    moved = grid + torch.as_tensor(shift)
    rows, columns = (moved // side).T
    width = int(columns.max()) + 1 if len(grid) else 1
    numbers, region = torch.unique(rows * width + columns, return_inverse=True)
    places = torch.stack([numbers // width, numbers % width], dim=1)

    table = torch.full((len(places), side ** 2), -1)
    table[region, slot[tuple((moved % side).T)]] = torch.arange(len(grid))
    return table, places


def draw_regions(slide, windows, generator):
    """(table (R, T), centres (R, 2), in patches) of a slide's regions in random order, at a random
    offset."""
    side = math.prod(windows)
    shift = torch.randint(side, (2,), generator=generator)
    table, places = region_table(slide.grid, windows, shift)
    order = torch.randperm(len(table), generator=generator)
    return table[order], (places[order] + 0.5) * side - shift


def focus(seen, evidence, unseen, count, reach):
    """The `count` unseen regions of highest expected evidence, as rows of `unseen` (R, 2).

    seen (S, 2), evidence (S,): regions of pass 1; centres and reach in patches. Expected is the
    mean over seen regions, each weighted by a Gaussian of its distance (deviation: reach), and,
    with weight 0.3, the mean of all."""
    near = (-(torch.cdist(unseen, seen) / reach).square() / 2).exp()
    expected = (near @ evidence + 0.3 * evidence.mean()) / (near.sum(dim=1) + 0.3)
    return expected.topk(min(count, len(expected))).indices


# ---- the model ---------------------------------------------------------------------------------

class RegionBlock(nn.Module):
    """ViT block on windows of side x side cells: x (M, 1 + T, d), absent (M, 1 + T) bool -> the
    first `wanted` tokens (None: all). A missing neighbour is never attended to. Starts as the
    identity (see RegionalMIL)."""

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

        # one bias a head and offset; 0 to 2 are of the class token, which has no place
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offset = cells[:, None] - cells + side - 1                       # (T, T, 2), from 0 on
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
    """Tokens (M, T, d), present (M, T), attention (M, T) -> class token of each window (M, d).
    The class token starts at what the attention gathers, for from a start of its own it learns
    too slowly to find a few patches among thousands."""

    def __init__(self, config, side):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(config.dim))
        self.blocks = nn.ModuleList(RegionBlock(config, side) for _ in range(config.depth))

    def forward(self, x, present, attention):
        x = torch.cat([self.cls_token + attention[:, None] @ x, x], dim=1)  # (M, 1 + T, d)
        absent = ~F.pad(present, (1, 0), value=True)
        for block in self.blocks[:-1]:
            x = block(x, absent)
        return self.blocks[-1](x, absent, wanted=1)[:, 0]  # nobody reads the other tokens


class RegionalMIL(nn.Module):
    """Regions of a bag -> logit. Without windows a region is a patch: ABMIL, or mean pooling.

    One gated attention and one head serve all levels: blocks start as the identity, so tokens of
    all levels live in one space. Training asks every level for the label (deep supervision): the
    patches, of which there are many, find the tumour first, and the regions take over from them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.dim
        self.register_buffer("shift", torch.zeros(config.in_dim))  # mean of training features
        self.register_buffer("scale", torch.ones(config.in_dim))   # and their deviation
        self.embed = nn.Linear(config.in_dim, d)
        self.levels = nn.ModuleList(RegionLevel(config, side) for side in config.windows)

        # gated attention, equation 9 of Ilse et al., and the slide's classifier
        self.value = nn.Linear(d, d)
        self.gate = nn.Linear(d, d)
        self.score = nn.Linear(d, 1)
        self.head = nn.Linear(d, 1)

    def attention(self, x, present):
        """Tokens (B, n, d), present (B, n) -> (B, n), which sums to 1, or to 0 where all miss."""
        score = self.score(self.value(x).tanh() * self.gate(x).sigmoid())[..., 0]
        if self.config.pool == "mean":
            score = torch.zeros_like(score)
        return score.masked_fill(~present, -1e9).softmax(dim=1) * present

    def encode(self, x, present):
        """Regions (M, T, D), present (M, T) -> tokens (M, d), attention to each patch (M, T), and
        what the levels joined: a list of tokens (M, n, d), present (M, n), patches first. Regions
        may be smaller ones, of the first levels alone."""
        M = len(x)
        weight = self.embed.weight / self.scale  # standardises the features
        x = F.gelu(F.linear(x, weight, self.embed.bias - weight @ self.shift))

        share = present.float()
        below = []
        for level, side in zip(self.levels, self.config.windows):
            if below and len(x) == M:
                break  # one token a region: the levels above have nothing to join
            x = x.reshape(-1, side ** 2, x.shape[-1])                    # a row a window
            present = present.reshape(-1, side ** 2)
            below.append((x.view(M, -1, x.shape[-1]), present.view(M, -1)))

            attention = self.attention(x, present)
            x = level(x, present, attention)
            present = present.any(dim=1)
            # a patch gets its share of its window, times that of its window in the next, and so on
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
        """x (B, R, T, D), present (B, R, T) bool, labels (B,) of 0 and 1 -> cross-entropy, the mean
        over levels, and over the bag and its halves, for one pass sees half of what two see."""
        regions, _, below = self.encode(x.flatten(0, 1), present.flatten(0, 1))
        levels = [*below, (regions[:, None], present.any(dim=2).view(-1, 1))]

        logits = []
        targets = []
        for tokens, there in levels:
            tokens = tokens.reshape(len(x), -1, tokens.shape[-1])  # (B * R, n, d) -> (B, R * n, d)
            there = there.reshape(len(x), -1)
            for half in (slice(None), slice(0, None, 2), slice(1, None, 2)):
                filled = there[:, half].any(dim=1)  # a bag of one patch has one half
                logits.append(self.pool(tokens[filled, half], there[filled, half])[0])
                targets.append(labels[filled])
        return F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(targets))


@torch.no_grad()
def predict(model, slide, patches, focused=False, seed=0):
    """A slide's (logit, patches (R, T) that were seen, their attention (R, T), regions of pass 1).

    patches: how many one pass sees. focused: a second pass of as many (see `focus`); the first one
    then looks at windows of the first level, for a few large regions would miss most of a slide.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, slide.name))
    windows = model.config.windows
    focused = focused and patches < len(slide.grid)
    scan = windows[:1] if focused else windows

    def encode(regions):
        """Tokens and attention of regions (R, T), a chunk at a time."""
        encoded = []
        for chunk in regions.split(max(1, CHUNK // regions.shape[1])):
            x = slide.take(chunk).to(model.scale.device)
            encoded.append(model.encode(x, (chunk >= 0).to(x.device))[:2])
        tokens, shares = zip(*encoded)
        return torch.cat(tokens), torch.cat(shares)

    def pool(tokens):
        """Logit (1,) and attention (1, R) of tokens (R, d), none of which is missing."""
        return model.pool(tokens[None], tokens.new_ones(1, len(tokens), dtype=torch.bool))

    # pass 1: random regions
    table, centres = draw_regions(slide, scan, generator)
    first = min(len(table), max(1, patches // table.shape[1]))
    seen = table[:first]
    tokens, share = encode(seen)
    logit, attention = pool(tokens)

    # pass 2: attention goes to what speaks against a tumour too: only what speaks for one leads on
    if focused and first < len(table):
        evidence = (attention[0] * model.head(tokens)[:, 0].clamp(min=0)).sqrt().cpu()
        unseen, places = table[first:], centres[first:]
        if scan != windows:
            unseen, places = draw_regions(slide, windows, generator)
        count = max(1, patches // unseen.shape[1])
        reach = max(1.5 * math.prod(scan), 0.5 * math.prod(windows))
        unseen = unseen[focus(centres[:first], evidence, places, count, reach)]
        more_tokens, more_share = encode(unseen)

        # Tokens of all levels live in one space, so both passes are pooled together.
        missing = unseen.shape[1] - seen.shape[1]
        seen = torch.cat([F.pad(seen, (0, missing), value=-1), unseen])
        share = torch.cat([F.pad(share, (0, missing)), more_share])
        logit, attention = pool(torch.cat([tokens, more_tokens]))
    return logit.item(), seen, (attention[0][:, None] * share).cpu(), first
