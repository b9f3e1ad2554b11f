"""Prompts that come from the images: cluster embeddings, name the clusters, encode the names.

"Image-derived annotations for histopathology" (arXiv 2312.09792): K-means on the global tokens of a
frozen ViT -> `Histology image of cancer tissue, morphology type seventeen` -> context (B, L, C) for
the U-Net's cross-attention. Everything is deterministic: same seed, same result.

    centers, assignment = kmeans(standardise(tokens.flatten(1)), k=33, seed=0)    # (K, D), (N,)
    prompts = build_prompts(assignment, labels, ENRICHED)                         # N strings
    context, mask = PromptEncoder(vocabulary_of(prompts), context_dim=192)(prompts[:8])

    python prompts.py RUN --choose-k 5:60        # S_Dbw of each K on RUN/cache/tokens.npy, as a PNG

Sources: greedy k-means++ (Arthur & Vassilvitskii 2007), S_Dbw (Halkidi & Vazirgiannis 2001).
Differences from the paper: a Transformer learned from scratch on the closed vocabulary of the
prompts replaces CLIP's text encoder; the final fit, too, is on standardised features; all global
tokens of an image, flattened, are its features. Keep TF32 off while clustering: it is too coarse.
"""
import argparse
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

BASELINE = "Histology image of <label> tissue"
ENRICHED = "Histology image of <label> tissue, morphology type <index>"
UNLABELLED = "Chest X-Ray image with morphology type <index>"

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


# ---- K-means -----------------------------------------------------------------------------------

def _squared_distances(x, x_squared, centers):
    """|c|^2 - 2 c.x + |x|^2 as one matmul, never below 0: (N, D), (N,), (k, D) -> (k, N)."""
    products = torch.addmm(x_squared, centers, x.T, alpha=-2)
    return products.add_(centers.square().sum(1, keepdim=True)).clamp_(min=0)


def _to_own(x, centers, assignment):
    """Squared distance of each point to its own center, without cancellation: (N,)."""
    pairs = zip(x.split(8192), assignment.split(8192))
    return torch.cat([(points - centers[own]).square().sum(1) for points, own in pairs])


def inertia(x, centers, assignment):
    """Sum (float) of squared distances of x (N, D) to the centers (k, D) they are assigned to."""
    return _to_own(x, centers, assignment).sum(dtype=torch.float64).item()


def _count_distinct(x, enough):
    """Number of distinct rows; stops early once there are `enough` of them."""
    rows = 4 * enough
    while (found := len(torch.unique(x[:rows], dim=0))) < enough and rows < len(x):
        rows *= 4
    return found


def _start(x, x_squared, k, generator):
    """Greedy k-means++: of a few points drawn by squared distance, keep the most useful one."""
    candidates = 2 + int(math.log(k))
    chosen = torch.randint(len(x), (1,), generator=generator).to(x.device)
    closest = _squared_distances(x, x_squared, x[chosen])[0]
    for _ in range(k - 1):
        cumulative = closest.cpu().double().cumsum(0)  # on the CPU: a GPU's sums vary with order
        draws = torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        picks = torch.searchsorted(cumulative, draws, right=True).clamp_(max=len(x) - 1)
        picks = picks.to(x.device)
        closer = torch.minimum(closest, _squared_distances(x, x_squared, x[picks]))
        best = closer.sum(1, dtype=torch.float64).argmin()
        chosen, closest = torch.cat([chosen, picks[best, None]]), closer[best]
    return x[chosen]


def _fill_empty(x, centers, assignment, sums, counts):
    """Give each empty cluster the farthest point; edits the last three arguments in place."""
    distance = _to_own(x, centers, assignment)
    for empty in (counts == 0).nonzero()[:, 0]:
        # Never the only member of another cluster: that one would be empty then.
        far = torch.where(counts[assignment] > 1, distance, -1).argmax()
        sums[assignment[far]] -= x[far]
        counts[assignment[far]] -= 1
        sums[empty], counts[empty], assignment[far] = x[far].double(), 1, empty
        # The next empty cluster must not take a twin of this point.
        distance = distance.minimum(_to_own(x, x[far, None], torch.zeros_like(assignment)))


def _lloyd(x, x_squared, centers, max_iter, tol, chunk):
    """Lloyd's steps from given centers -> (centers, assignment).

    A point can change clusters only when the centers have moved by more than its second nearest
    center was farther off than its nearest (its slack). The others are skipped, and sums change by
    the points that moved: the result is that of plain Lloyd, at about half the work.
    """
    k = len(centers)
    assignment = torch.full((len(x),), k, device=x.device)  # k: in no cluster yet
    slack = x.new_zeros(len(x))
    sums = torch.zeros_like(centers, dtype=torch.float64)
    counts = sums.new_zeros(k)
    for _ in range(max_iter):
        steady = True
        for rows in (slack <= 0).nonzero()[:, 0].split(chunk):
            points = x.index_select(0, rows)  # four times faster than x[rows]
            distance = _squared_distances(points, x_squared[rows], centers)
            first, nearest = distance.min(0)
            second = distance.scatter_(0, nearest[None], math.inf).amin(0)
            slack[rows] = second.sqrt() - first.sqrt()
            moved = (nearest != assignment[rows]).nonzero()[:, 0]
            if len(moved):
                steady = False
                joined, left = nearest[moved], assignment[rows[moved]]
                change = (F.one_hot(joined, k + 1) - F.one_hot(left, k + 1))[:, :k]  # (moved, k)
                sums += change.T.to(x.dtype) @ points[moved]  # index_add would vary on a GPU
                counts += change.sum(0)
                assignment[rows] = nearest
        if reseeded := bool((counts == 0).any()):
            _fill_empty(x, centers, assignment, sums, counts)
        new_centers = (sums / counts[:, None]).to(x.dtype)
        shift = (new_centers - centers).norm(dim=1)
        centers = new_centers
        slack = torch.zeros_like(slack) if reseeded else slack - shift[assignment] - shift.max()
        if steady or shift.square().sum() <= tol:
            break
    nearest = [_squared_distances(points, squared, centers).min(0).indices
               for points, squared in zip(x.split(chunk), x_squared.split(chunk))]
    return centers, torch.cat(nearest)


@torch.no_grad()
def kmeans(x, k, seed=0, n_init=10, max_iter=300, chunk=None):
    """K-means of x (N, D) on x's device -> centers (k, D), assignment (N,) int64 in 0..k-1.

    Best of `n_init` greedy k-means++ starts by inertia. A start ends when no point moves, or when
    the squared moves of the centers sum to 1e-4 of the mean variance (scikit-learn's rule).
    Memory: x, one copy, some numbers a point, and the distances of `chunk` points at a time.
    Sums are float64, which MPS lacks: pass a CPU tensor there.
    Raises: ValueError for a rank other than 2, NaN or infinity, k or n_init < 1, k above the
        distinct points.
    Source: Lloyd 1982; Arthur & Vassilvitskii 2007; points skipped by a bound after Hamerly 2010.
    """
    if x.ndim != 2:
        raise ValueError(f"points have shape {tuple(x.shape)}, K-means needs (N, D): "
                         "flatten each point to one row")
    if k < 1 or n_init < 1:
        raise ValueError(f"k is {k} and n_init {n_init}, K-means needs at least 1 cluster and 1 "
                         "start: pass such numbers")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if bad := int((~x.sum(1).isfinite()).sum()):
        raise ValueError(f"{bad} of {len(x)} points hold NaN or infinity, K-means needs finite "
                         "numbers: drop those rows or check what made them")
    if (distinct := _count_distinct(x, k)) < k:
        raise ValueError(f"{distinct} distinct points for k = {k}, K-means needs at least k: "
                         "lower k (--clusters) or add images")
    mean = x.mean(0)
    x = x - mean  # small numbers: less cancellation in _squared_distances
    x_squared = x.square().sum(1)
    tol = 1e-4 * x_squared.mean() / x.shape[1]
    # Few enough numbers for a CPU's cache (twice as fast), or 0.3 GB on a GPU.
    chunk = chunk or max(1, 2 ** (19 if x.device.type == "cpu" else 26) // (x.shape[1] + k))
    seeds = torch.randint(2**62, (n_init,), generator=torch.Generator().manual_seed(seed))

    def fit(start_seed):
        generator = torch.Generator().manual_seed(start_seed)
        start = _start(x, x_squared, k, generator)
        centers, assignment = _lloyd(x, x_squared, start, max_iter, tol, chunk)
        return inertia(x, centers, assignment), centers, assignment

    # Starts side by side, one thread each: faster than all threads on the small steps of one.
    threads = torch.get_num_threads()
    workers = min(n_init, threads) if x.device.type == "cpu" else 1
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            _, centers, assignment = min(pool.map(fit, seeds.tolist()), key=lambda run: run[0])
    finally:
        torch.set_num_threads(threads)
    return centers + mean, assignment


# ---- How many clusters -------------------------------------------------------------------------

def standardise(x):
    """Columns of x (N, D) to mean 0 and standard deviation 1; a constant column becomes 0."""
    centred = x.float() - x.float().mean(0)
    std = centred.square().mean(0).sqrt()
    return centred / torch.where(std > 0, std, 1)


@torch.no_grad()
def sdbw(x, centers, assignment, radius="paper"):
    """S_Dbw validity index (float, lower is better) = Scat + Dens_bw of x (N, D) in k clusters.

    s_i: the variances (a vector) of cluster i about its center v_i; s: those of all points.
    Scat = mean_i |s_i| / |s|: how wide the clusters are.
    Dens_bw = mean over i != j of density(u_ij) / max(density(v_i), density(v_j), 1), u_ij midway
    from v_i to v_j, density(u) = number of points of clusters i and j within r of u: how full the
    space between clusters is.
    radius "paper": r = sqrt(sum_i |s_i|) / k. It hardly grows with D while distances do, so from
    about 8 columns on Dens_bw is 0, and Scat alone always prefers more clusters.
    radius "rms", our remedy: r = root of mean_i of the sum of s_i, the usual distance to a center.
    Raises: ValueError for fewer than 2 clusters or another radius.
    Source: Halkidi & Vazirgiannis 2001.
    """
    k, mean = len(centers), x.mean(0)
    if k < 2 or radius not in ("paper", "rms"):
        raise ValueError(f'{k} clusters and radius "{radius}", S_Dbw compares at least 2 within '
                         "paper or rms: pass such values")
    centers = (centers - mean).double()
    clusters = [(x[assignment == i] - mean).double() for i in range(k)]
    spread = torch.stack([(points - v).square().sum(0) / max(len(points), 1)
                          for points, v in zip(clusters, centers)])  # (k, D), row i: s_i
    norms, total = spread.norm(dim=1), x.double().var(0, correction=0).norm()
    squared_r = norms.sum() / k**2 if radius == "paper" else spread.sum(1).mean()
    apart = torch.cdist(centers, centers).square()
    # Row i, column j: points of cluster i within r of v_j, and within r of u_ij.
    at_center, at_middle = torch.zeros_like(apart), torch.zeros_like(apart)
    for i, points in enumerate(clusters):
        distance = _squared_distances(points, points.square().sum(1), centers)  # (k, n)
        at_center[i] = (distance <= squared_r).sum(1)
        # The distance to a midpoint is the median of a triangle whose three sides are known.
        median = (distance + distance[i]) / 2 - apart[i, :, None] / 4
        at_middle[i] = (median <= squared_r).sum(1)
    density = at_center.diagonal()[:, None] + at_center.T  # row i, column j: density(v_i)
    ratio = (at_middle + at_middle.T) / density.maximum(density.T).clamp(min=1)
    between = (ratio.sum() - ratio.diagonal().sum()) / (k * (k - 1))
    return (norms.mean() / total + between).item()


def choose_k(x, ks, seed=0, n_init=10, radius="rms"):
    """S_Dbw of the K-means fit for each k -> (list of (k, score) with k rising, k of least score).

    x: (N, D), standardised here: each fit is that of kmeans(standardise(x), k, seed, n_init).
    """
    x = standardise(x)
    # Largest first: a k that is too large is refused before the long work.
    table = [(k, sdbw(x, *kmeans(x, k, seed, n_init), radius)) for k in sorted(ks, reverse=True)]
    if not table:
        raise ValueError("no k to choose from, the range needs at least one: widen it")
    return table[::-1], min(table[::-1], key=lambda row: row[1])[0]


# ---- Words -------------------------------------------------------------------------------------

def number_word(n):
    """English words of an integer: 17 -> "seventeen", 342 -> "three hundred and forty-two".

    Raises: ValueError outside 0 to 999.
    """
    if not 0 <= n <= 999:
        raise ValueError(f"got number {n}, prompts count from 0 to 999: use fewer clusters")
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_word(n % 100)}" if n % 100 else "")


def build_prompts(assignment, labels, template):
    """Fill a template for each of N images -> list of N str.

    assignment: N cluster indices (tensor or list), or None for a template without <index>.
    labels: N str (put in lower case), or None for a template without <label>.
    Raises: ValueError for a value that the template needs and lacks, and for unequal lengths.
    """
    indices = None if assignment is None else [number_word(int(i)) for i in assignment]
    labels = None if labels is None else [label.strip().lower() for label in labels]
    for placeholder, values in (("<label>", labels), ("<index>", indices)):
        if placeholder in template and (values is None or "" in values):
            missing = "all" if values is None else f"image {values.index('')}"
            raise ValueError(f'{placeholder} is missing ({missing}), "{template}" needs one for '
                             "each image: pass it or take another template")
    columns = [values for values in (indices, labels) if values is not None]
    if len({len(values) for values in columns}) != 1:
        raise ValueError(f"got {[len(values) for values in columns]} indices and labels, each "
                         "image needs one of each: pass lists of one length")
    blank = [""] * len(columns[0])
    return [template.replace("<label>", label).replace("<index>", index)
            for label, index in zip(labels or blank, indices or blank)]


def balance(prompts, n, seed=0):
    """Order of n image indices (int64) in which every distinct prompt comes equally often.

    Each round has every prompt once, in random order; a prompt's images take turns, shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    images = {}
    for index, prompt in enumerate(prompts):
        images.setdefault(prompt, []).append(index)
    rounds = math.ceil(n / len(images))
    queues = []
    for members in map(torch.tensor, images.values()):
        shuffles = [members[torch.randperm(len(members), generator=generator)]
                    for _ in range(math.ceil(rounds / len(members)))]
        queues.append(torch.cat(shuffles)[:rounds])
    turns = torch.rand(rounds, len(queues), generator=generator).argsort(1)
    return torch.stack(queues, 1).gather(1, turns).flatten()[:n]  # (rounds, prompts) -> (n,)


def words_of(prompt):
    """Lower-case words of a prompt; a hyphen parts words, other punctuation is dropped."""
    return re.findall(r"\w+", prompt.lower())


def vocabulary_of(prompts):
    """Sorted list of the distinct words of all prompts."""
    return sorted({word for prompt in set(prompts) for word in words_of(prompt)})


# ---- The encoder -------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm Transformer block: self-attention over the words, then an MLP."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask):
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, L, 3 C) -> three of (B, heads, L, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(attended.transpose(1, 2).reshape(B, L, C))
        return x + self.mlp(self.norm2(x))


class PromptEncoder(nn.Module):
    """Word-level text encoder: list of B str -> context (B, L, C) float, mask (B, L) bool.

    vocabulary: list of the known words, to be saved with the weights whose rows it names.
    L is 1 (a begin token) + the words of the longest prompt. The mask is False, and the context 0,
    at padding. The empty prompt is the null condition: its begin token alone.
    """

    def __init__(self, vocabulary, context_dim, depth=2, num_heads=4, max_words=32):
        super().__init__()
        if context_dim % num_heads:
            raise ValueError(f"context_dim is {context_dim}, the encoder needs a multiple of its "
                             f"{num_heads} heads: pass another context_dim or num_heads")
        self.vocabulary, self.max_words = list(vocabulary), max_words
        self.index = {word: i for i, word in enumerate(self.vocabulary, start=1)}  # 0: begin
        self.word_embed = nn.Embedding(1 + len(self.vocabulary), context_dim)
        # Half the deviation of words (1): their order counts from the first step on.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1 + max_words, context_dim))
        self.blocks = nn.ModuleList(Block(context_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(context_dim)

    def tokenize(self, prompts):
        """List of B str -> ids (B, L) int64, mask (B, L) bool.

        Raises: ValueError for unknown words (it lists the known ones) and for too long prompts.
        """
        split = [words_of(prompt) for prompt in prompts]
        if unknown := sorted({word for words in split for word in words} - self.index.keys()):
            raise ValueError(f"unknown in the prompt: {', '.join(unknown)}; this model needs words "
                             f"of its training: use {' '.join(self.vocabulary)}")
        lengths = torch.tensor([1 + len(words) for words in split])
        if lengths.max() > 1 + self.max_words:
            raise ValueError(f"prompt of {lengths.max() - 1} words, the encoder needs at most "
                             f"{self.max_words}: shorten it")
        mask = torch.arange(lengths.max()) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([i for words in split
                                  for i in (0, *(self.index[word] for word in words))])
        return ids.to(self.pos_embed.device), mask.to(self.pos_embed.device)

    def forward(self, prompts):
        ids, mask = self.tokenize(prompts)
        x = self.word_embed(ids) + self.pos_embed[:ids.shape[1]]  # (B, L) -> (B, L, C)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask[..., None], mask


# ---- Command line ------------------------------------------------------------------------------

def draw_table(table, best, path, width=640, height=400, margin=60):
    """Line chart of (k, score) rows as a PNG; the best k is ringed."""
    ks, scores = map(np.array, zip(*table))
    across = margin + (ks - ks[0]) / max(np.ptp(ks), 1) * (width - 2 * margin)
    down = margin + (scores.max() - scores) / (np.ptp(scores) or 1) * (height - 2 * margin)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.line(list(zip(across, down)), fill="navy", width=2)
    pen.text((margin, 20), f"S_Dbw over clusters K, lower is better: K = {best}", fill="black")
    for i in {0, len(ks) - 1, int(scores.argmin())}:
        pen.text((across[i] - 6, height - margin + 10), str(ks[i]), fill="black")
    for i in (scores.argmin(), scores.argmax()):
        pen.text((8, down[i] - 6), f"{scores[i]:.4f}", fill="black")
    x, y = across[scores.argmin()], down[scores.argmin()]
    pen.ellipse((x - 5, y - 5, x + 5, y + 5), outline="red", width=2)
    canvas.save(path)


def main():
    parser = argparse.ArgumentParser(description="Choose a run's number of clusters K by S_Dbw.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder that holds cache/tokens.npy")
    parser.add_argument("--choose-k", default="5:60", metavar="FIRST:LAST", help="range of K")
    parser.add_argument("--step", type=int, default=1, help="step of the range")
    parser.add_argument("--seed", type=int, default=0, help="seed of K-means")
    args = parser.parse_args()
    path = args.run / "cache" / "tokens.npy"
    try:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, the choice needs a run's cached tokens: "
                                    f"run python train.py --out {args.run} first")
        ends = re.fullmatch(r"(\d+):(\d+)", args.choose_k)
        if not ends or args.step < 1 or not 2 <= int(ends[1]) <= int(ends[2]):
            raise ValueError(f"got --choose-k {args.choose_k} --step {args.step}, a range needs "
                             "2 <= FIRST <= LAST and a step >= 1: try --choose-k 5:60")
        tokens = torch.tensor(np.load(path, mmap_mode="r", allow_pickle=False))  # (N, G, D)
        features = tokens.flatten(1).to("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{len(features)} images; features: their {features.shape[1]} global token values, "
              "flattened and standardised", flush=True)
        ks = range(int(ends[1]), int(ends[2]) + 1, args.step)
        table, best = choose_k(features, ks, args.seed)
        for k, score in table:
            print(f"K {k:4d}   S_Dbw {score:.4f}{'   <- least' if k == best else ''}")
        draw_table(table, best, args.run / "choose_k.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"least S_Dbw at K = {best}; drawn: {args.run / 'choose_k.png'}")


if __name__ == "__main__":
    main()
