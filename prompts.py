"""Prompts that come from the images: cluster embeddings, name the clusters, encode the names.

"Image-derived annotations for histopathology" (arXiv 2312.09792): K-means on the global tokens of a
frozen ViT -> `Histology image of cancer tissue, morphology type seventeen` -> context (B, L, C) for
the U-Net's cross-attention. Everything is deterministic: same seed, same result.

    centers, assignment = kmeans(standardise(tokens.flatten(1)), k=33, seed=0)    # (K, D), (N,)
    prompts = build_prompts(assignment, labels, ENRICHED)                         # N strings
    encoder = PromptEncoder(vocabulary_of(prompts), context_dim=192)
    context, mask = encoder(encoder.tokenize(prompts[:8]))                # (8, L, 192), (8, L)

How many clusters: `python -m experiments choose_k RUN`.

Sources: Lloyd 1982; greedy k-means++ (Arthur & Vassilvitskii 2007).
Differences from the paper: a Transformer learned from scratch on the closed vocabulary of the
prompts replaces CLIP's text encoder, and its words start at the mean of their images; the final
fit, too, is on standardised features; all global tokens of an image, flattened, are its features.
Keep TF32 off while clustering: it is too coarse.
"""
import math
import re
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from support.points import check_points
from support.words import number_word

# Templates of the paper.
BASELINE = "Histology image of <label> tissue"
ENRICHED = "Histology image of <label> tissue, morphology type <index>"
UNLABELLED = "Chest X-Ray image with morphology type <index>"

# Ids of what is no word, in the rows of prompt ids.
PADDING = 0
BEGIN = 1


# ---------------------------------------------------------------------------- K-means

def standardise(x):
    """Columns of x (N, D) to mean 0 and standard deviation 1; a constant column becomes 0."""
    centred = x.float() - x.float().mean(0)
    std = centred.square().mean(0).sqrt()
    return centred / torch.where(std > 0, std, 1)


def squared_distances(x, x_squared, centers):
    """|c|^2 - 2 c.x + |x|^2 as one matmul, never below 0: (N, D), (N,), (k, D) -> (k, N)."""
    products = torch.addmm(x_squared, centers, x.T, alpha=-2)
    return products.add_(centers.square().sum(1, keepdim=True)).clamp_(min=0)


def distance_to_center(x, centers, assignment):
    """Squared distance of each point to the center it belongs to, without cancellation: (N,)."""
    pairs = zip(x.split(8192), assignment.split(8192))
    return torch.cat([(points - centers[numbers]).square().sum(1) for points, numbers in pairs])


def inertia(x, centers, assignment):
    """Sum (float) of squared distances of x (N, D) to the centers (k, D) they are assigned to."""
    return distance_to_center(x, centers, assignment).sum(dtype=torch.float64).item()


def first_centers(x, x_squared, k, generator):
    """Greedy k-means++: k points of x (N, D) to start from, (k, D), far from each other.

    The first is any point. Each further one is the best of a few that are drawn with a probability
    proportional to their squared distance from the nearest center so far.
    """
    candidates = 2 + int(math.log(k))
    chosen = torch.randint(len(x), (1,), generator=generator).to(x.device)
    closest = squared_distances(x, x_squared, x[chosen])[0]
    for _ in range(k - 1):
        # Draw: a uniform number falls into the step of the running sum that a point makes.
        cumulative = closest.cpu().double().cumsum(0)  # on the CPU: a GPU's sums vary with order
        draws = torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative[-1]
        picks = torch.searchsorted(cumulative, draws, right=True).clamp_(max=len(x) - 1)
        picks = picks.to(x.device)

        # Keep the candidate that leaves the smallest inertia.
        closer = torch.minimum(closest, squared_distances(x, x_squared, x[picks]))
        best = closer.sum(1, dtype=torch.float64).argmin()
        chosen = torch.cat([chosen, picks[best, None]])
        closest = closer[best]
    return x[chosen]


def fill_empty(x, centers, assignment, sums, counts):
    """Give each empty cluster the farthest point; edits the last three arguments in place."""
    distance = distance_to_center(x, centers, assignment)
    for empty in (counts == 0).nonzero()[:, 0]:
        # Never the only member of another cluster: that one would be empty then.
        far = torch.where(counts[assignment] > 1, distance, -1).argmax()

        # The point leaves its cluster and is the empty one's only member.
        sums[assignment[far]] -= x[far]
        counts[assignment[far]] -= 1
        sums[empty] = x[far].double()
        counts[empty] = 1
        assignment[far] = empty

        # The next empty cluster must not take a twin of this point.
        distance_to_it = distance_to_center(x, x[far, None], torch.zeros_like(assignment))
        distance = distance.minimum(distance_to_it)


def lloyd(x, x_squared, centers, max_iter, tol, chunk):
    """Lloyd's steps from given centers: each point to its nearest center, each center to the mean
    of its points, until nothing moves -> (centers (k, D), assignment (N,)).

    A point can change clusters only once the centers have moved by more than its slack: how much
    farther its second nearest center is than its nearest. The others are skipped, and sums change
    by the points that moved: the result is that of plain Lloyd, at about half the work.
    """
    k = len(centers)
    assignment = torch.full((len(x),), k, device=x.device)  # k: in no cluster yet
    slack = x.new_zeros(len(x))
    sums = torch.zeros_like(centers, dtype=torch.float64)  # of the points of each cluster
    counts = sums.new_zeros(k)
    for _ in range(max_iter):
        anything_moved = False
        for rows in (slack <= 0).nonzero()[:, 0].split(chunk):
            # The nearest center of each point, and how much farther the next one is.
            points = x.index_select(0, rows)  # four times faster than x[rows]
            distance = squared_distances(points, x_squared[rows], centers)
            first, nearest = distance.min(0)
            second = distance.scatter_(0, nearest[None], math.inf).amin(0)
            slack[rows] = second.sqrt() - first.sqrt()

            # Take the points that moved out of one sum and into another.
            moved = (nearest != assignment[rows]).nonzero()[:, 0]
            if len(moved):
                anything_moved = True
                joined = F.one_hot(nearest[moved], k + 1)
                left = F.one_hot(assignment[rows[moved]], k + 1)
                change = (joined - left)[:, :k]  # (moved, k)
                sums += change.T.to(x.dtype) @ points[moved]  # index_add would vary on a GPU
                counts += change.sum(0)
                assignment[rows] = nearest

        # An empty cluster gets a point; no bound holds after that.
        has_empty = bool((counts == 0).any())
        if has_empty:
            fill_empty(x, centers, assignment, sums, counts)

        # Centers move to the means, and every point's slack shrinks by what that can have changed.
        new_centers = (sums / counts[:, None]).to(x.dtype)
        shift = (new_centers - centers).norm(dim=1)
        centers = new_centers
        slack = torch.zeros_like(slack) if has_empty else slack - shift[assignment] - shift.max()
        if not anything_moved or shift.square().sum() <= tol:
            break

    # The last move of the centers may have changed who is nearest.
    nearest = [squared_distances(points, squared, centers).min(0).indices
               for points, squared in zip(x.split(chunk), x_squared.split(chunk))]
    return centers, torch.cat(nearest)


@torch.no_grad()
def kmeans(x, k, seed=0, n_init=10, max_iter=300, chunk=None):
    """K-means of x (N, D) on x's device -> centers (k, D), assignment (N,) int64 in 0..k-1.

    Best of `n_init` greedy k-means++ starts by inertia. A start ends when no point moves, or when
    the squared moves of the centers sum to 1e-4 of the mean variance (scikit-learn's rule).
    Memory: x, one copy, some numbers a point, and the distances of `chunk` points at a time.
    Sums are float64, which MPS lacks: its points are clustered on the CPU.
    Raises: ValueError for a rank other than 2, NaN or infinity, k or n_init < 1, k above the
        distinct points.
    Source: Lloyd 1982; Arthur & Vassilvitskii 2007; points skipped by a bound after Hamerly 2010.
    """
    if x.device.type == "mps":
        fit = kmeans(x.cpu(), k, seed, n_init, max_iter, chunk)
        return fit[0].to(x.device), fit[1].to(x.device)
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    check_points(x, k, n_init)

    # Small numbers: less cancellation in squared_distances.
    mean = x.mean(0)
    x = x - mean
    x_squared = x.square().sum(1)
    tol = 1e-4 * x_squared.mean() / x.shape[1]
    if chunk is None:  # few enough numbers for a CPU's cache (twice as fast), or 0.3 GB on a GPU
        numbers = 2 ** 19 if x.device.type == "cpu" else 2 ** 26
        chunk = max(1, numbers // (x.shape[1] + k))

    def one_start(start_seed):
        generator = torch.Generator().manual_seed(start_seed)
        start = first_centers(x, x_squared, k, generator)
        centers, assignment = lloyd(x, x_squared, start, max_iter, tol, chunk)
        return inertia(x, centers, assignment), centers, assignment

    # Starts side by side, one thread each: faster than all threads on the small steps of one.
    seeds = torch.randint(2**62, (n_init,), generator=torch.Generator().manual_seed(seed)).tolist()
    threads = torch.get_num_threads()
    workers = min(n_init, threads) if x.device.type == "cpu" else 1
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            _, centers, assignment = min(pool.map(one_start, seeds), key=lambda fit: fit[0])
    finally:
        torch.set_num_threads(threads)
    return centers + mean, assignment


# ---------------------------------------------------------------------------- words

def build_prompts(assignment, labels, template):
    """Fill a template for each of N images -> list of N str.

    assignment: N cluster indices (tensor or list), or None for a template without <index>.
    labels: N str (put in lower case), or None for a template without <label>.
    Raises: ValueError for a value that the template needs and lacks, and for unequal lengths.
    """
    # The words for each placeholder.
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

    # A queue for each prompt: its images in as many shuffles as the rounds need.
    queues = []
    for members in map(torch.tensor, images.values()):
        shuffles = [members[torch.randperm(len(members), generator=generator)]
                    for _ in range(math.ceil(rounds / len(members)))]
        queues.append(torch.cat(shuffles)[:rounds])

    turns = torch.rand(rounds, len(queues), generator=generator).argsort(1)
    return torch.stack(queues, 1).gather(1, turns).flatten()[:n]  # (rounds, prompts) -> (n,)


def words_of(prompt):
    """Lower-case words of a prompt; "thirty-two" is one, other punctuation is dropped."""
    return re.findall(r"\w+(?:-\w+)*", prompt.lower())


def vocabulary_of(prompts):
    """Sorted list of the distinct words of all prompts."""
    return sorted({word for prompt in set(prompts) for word in words_of(prompt)})


# ---------------------------------------------------------------------------- the encoder

class PromptEncoder(nn.Module):
    """Word-level text encoder: ids (B, L) int64 -> context (B, L, C) float, mask (B, L) bool.

    vocabulary: list of the known words, to be saved with the weights whose rows it names.
    Ids come from `tokenize`: a begin token, the words of the prompt, padding. The mask is False,
    and the context 0, at padding. The empty prompt is the null condition: its begin token alone.
    """

    def __init__(self, vocabulary, context_dim, depth=2, num_heads=4, max_words=32):
        super().__init__()
        if context_dim % num_heads:
            raise ValueError(f"context_dim is {context_dim}, the encoder needs a multiple of its "
                             f"{num_heads} heads: pass another context_dim or num_heads")
        self.vocabulary = list(vocabulary)
        self.max_words = max_words
        self.index = {word: i for i, word in enumerate(self.vocabulary, start=BEGIN + 1)}
        self.word_embed = nn.Embedding(BEGIN + 1 + len(self.vocabulary), context_dim)
        # Half the deviation of words (1): their order counts from the first step on.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1 + max_words, context_dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(context_dim, num_heads, 4 * context_dim, dropout=0.0,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth))
        self.norm = nn.LayerNorm(context_dim)

    @torch.no_grad()
    def start_from_images(self, prompts, features, generator=None):
        """Starts each word at the mean of the images whose prompts have it, drawn at random into
        the width of a word; words of all prompts stay where they are.

        Types that look alike then start alike, and are learned sooner: after 300 U-Net steps on
        real patches wrong prompts raised the error at the last timestep by 0.25, from random words
        by 0.12. Ours; the paper's encoder knows its words from texts.

        prompts: list of N str; features: (N, D) of their images, mean 0 and deviation 1
        """
        has_word = torch.tensor([[word in words for word in self.vocabulary]
                                 for words in map(words_of, prompts)]).to(features)  # (N, words)
        counts = has_word.sum(0)
        telling = (counts > 0) & (counts < len(prompts))
        width = self.word_embed.embedding_dim
        directions = torch.randn(features.shape[1], width, generator=generator)
        means = (has_word.T @ features / counts[:, None])[telling] @ directions.to(features)
        rows = torch.arange(BEGIN + 1, BEGIN + 1 + len(self.vocabulary))[telling.cpu()]
        self.word_embed.weight[rows] = means / means.square().mean().sqrt()  # deviation 1 as before

    def tokenize(self, prompts):
        """List of B str -> ids (B, 1 + max_words) int64, on the encoder's device.

        Raises: ValueError for unknown words (it lists the known ones) and for too long prompts.
        """
        split = [words_of(prompt) for prompt in prompts]
        unknown = sorted({word for words in split for word in words} - self.index.keys())
        if unknown:
            raise ValueError(f"unknown in the prompt: {', '.join(unknown)}; this model needs words "
                             f"of its training: use {' '.join(self.vocabulary)}")
        longest = max(map(len, split))
        if longest > self.max_words:
            raise ValueError(f"prompt of {longest} words, the encoder needs at most "
                             f"{self.max_words}: shorten it")

        ids = []
        for words in split:
            padding = [PADDING] * (self.max_words - len(words))
            ids.append([BEGIN, *(self.index[word] for word in words), *padding])
        return torch.tensor(ids, device=self.pos_embed.device)

    def null(self, batch):
        """Ids of the empty prompt: (batch, 1 + max_words) int64."""
        ids = torch.full((batch, 1 + self.max_words), PADDING, device=self.pos_embed.device)
        ids[:, 0] = BEGIN
        return ids

    def forward(self, ids):
        mask = ids != PADDING
        x = self.word_embed(ids) + self.pos_embed[:ids.shape[1]]  # (B, L) -> (B, L, C)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~mask)
        return self.norm(x) * mask[..., None], mask
