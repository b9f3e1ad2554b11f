"""Prompts derived from images: cluster embeddings, name the clusters, encode the names.

"Image-derived annotations for histopathology" (arXiv 2312.09792): K-means on the global tokens of a
frozen ViT -> `Histology image of cancer tissue, morphology type seventeen` -> context (B, L, C) for
the U-Net's cross-attention. The same seed gives the same result.

    centers, assignment = kmeans(tokens.flatten(1), k=33, seed=0)         # (K, D), (N,)
    prompts = build_prompts(assignment, labels, ENRICHED)                 # N strings
    encoder = PromptEncoder(vocabulary_of(prompts), context_dim=192)
    context, mask = encoder(encoder.tokenize(prompts[:8]))                # (8, L, 192), (8, L)

Sources: Lloyd 1982; k-means++ (Arthur & Vassilvitskii 2007).
Differences from the paper: a Transformer trained from scratch on the closed vocabulary of the
prompts replaces CLIP's text encoder, and its words start at the mean of their images; K-means sees
all global tokens of an image, standardised and flattened.
"""
import math
import re

import torch
from torch import nn

from support.command import UserError

# Templates of the paper.
BASELINE = "Histology image of <label> tissue"
ENRICHED = "Histology image of <label> tissue, morphology type <index>"
UNLABELLED = "Chest X-Ray image with morphology type <index>"

# Special ids.
PADDING = 0
BEGIN = 1

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


# ---- K-means -----------------------------------------------------------------------------------

def inertia(x, centers, assignment):
    """Sum of squared distances of x (N, D) to the centers (k, D) they are assigned to."""
    return (x - centers[assignment]).square().sum(dtype=torch.float64).item()


def first_centers(x, k, generator):
    """Greedy k-means++: k points of x (N, D), far apart; each is the best of four candidates."""
    chosen = torch.randint(len(x), (1,), generator=generator)
    closest = (x - x[chosen]).square().sum(1)
    for _ in range(k - 1):
        candidates = torch.multinomial(closest, 4, replacement=True, generator=generator)
        # Exact differences, because a duplicate must have distance 0.
        distances = torch.cdist(x, x[candidates], compute_mode="donot_use_mm_for_euclid_dist")
        closer = distances.square().minimum(closest[:, None])  # (N, 4)
        best = closer.sum(0).argmin()
        chosen = torch.cat([chosen, candidates[best, None]])
        closest = closer[:, best]
    return x[chosen]


def lloyd(x, centers):
    """Lloyd's algorithm on x (N, D) until no assignment changes -> centers (k, D), assignment (N,).
    """
    assignment = torch.full((len(x),), -1)
    for _ in range(100):
        # Assign each point to its nearest center.
        nearest = torch.cdist(x, centers).argmin(1)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest

        # Move each center to the mean of its points.
        counts = assignment.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, assignment, x)
        means = sums / counts.clamp(min=1)[:, None]

        # Restart an empty cluster at the point that is farthest from any center.
        if (counts == 0).any():
            distance = (x - centers[assignment]).square().sum(1)
            for empty in (counts == 0).nonzero()[:, 0]:
                means[empty] = x[distance.argmax()]
                distance = distance.minimum((x - means[empty]).square().sum(1))
        centers = means
    return centers, assignment


@torch.no_grad()
def kmeans(x, k, seed=0, starts=3):
    """K-means of x (N, D) -> centers (k, D), assignment (N,) int64: the best of `starts` runs.

    It runs on the CPU: GPUs round differently, and the clusters name the prompts.
    Raises: ValueError for NaN or infinity, and for k outside 1 to the number of distinct points.
    """
    points = x.cpu().float()
    if not points.isfinite().all():
        raise ValueError("got NaN or infinity, K-means needs finite numbers: check the embedder")
    distinct = len(points.unique(dim=0))
    if not 1 <= k <= distinct:
        raise ValueError(f"{k} clusters for {distinct} distinct points, need 1 to {distinct}: "
                         "choose fewer clusters or add images")

    # Distances between centered points lose fewer digits.
    mean = points.mean(0)
    points = points - mean
    generator = torch.Generator().manual_seed(seed)
    fits = [lloyd(points, first_centers(points, k, generator)) for _ in range(starts)]
    centers, assignment = min(fits, key=lambda fit: inertia(points, *fit))
    return (centers + mean).to(x.device), assignment.to(x.device)


# ---- words -------------------------------------------------------------------------------------

def number_word(n):
    """An integer from 0 to 999 in English words: 342 -> "three hundred and forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_word(n % 100)}" if n % 100 else "")


def words_of(text):
    """Lower-case words and signs: "HER2+ tissue, type thirty-two" -> her2 + tissue type thirty-two.

    Signs count as words because labels may differ only in them (HER2+ and HER2-, <5 mm and >5 mm).
    """
    return re.findall(r"\w+(?:-\w+)*|[^\w\s,.:;'\"]", text.lower())


def vocabulary_of(prompts):
    """Sorted list of the distinct words of all prompts."""
    return sorted({word for prompt in set(prompts) for word in words_of(prompt)})


def find_prompt(text, prompts):
    """Index of the prompt with the same words as this text, ignoring case, or None."""
    words = words_of(text)
    return next((i for i, prompt in enumerate(prompts) if words_of(prompt) == words), None)


def build_prompts(assignment, labels, template):
    """Fill a template for each of N images -> list of N str.

    assignment: N cluster indices, or None if the template has no <index>
    labels: N str, put in lower case, or None if the template has no <label>
    """
    count = len(labels if assignment is None else assignment)
    indices = [""] * count if assignment is None else [number_word(int(i)) for i in assignment]
    labels = [""] * count if labels is None else [label.strip().lower() for label in labels]
    return [template.replace("<label>", label).replace("<index>", index)
            for label, index in zip(labels, indices, strict=True)]


# ---- the prompts of a run ----------------------------------------------------------------------

def labels_for_prompts(columns, column, condition, rows, name):
    """The label of each image in lower case, or None if prompts use no labels.

    columns: name -> list of str. column: the user's choice, "none", or None for "label" if there
    is one. rows: indices of the images in use. name: of the data set, for errors.
    """
    if column is None:
        column = "label" if "label" in columns or condition == "labels" else "none"
    if condition not in ("prompts", "labels") or (column == "none" and condition == "prompts"):
        return None
    if column not in columns:
        raise UserError(f"there is no label column {column!r}",
                        f"{name} has {', '.join(columns) or 'no table'}",
                        "pass another --label-column, or --condition prompts --label-column none")

    # Labels with equal words would silently become one condition.
    labels = [cell.strip().lower() for cell in columns[column]]
    used = sorted({labels[i] for i in rows})
    distinct = {tuple(words_of(label)) for label in used} - {()}
    if len(distinct) < max(2, len(used)):
        raise UserError(f"column {column!r} has the labels {', '.join(map(repr, used[:20]))}",
                        "two or more are needed, none empty, that differ in letters, digits or "
                        "signs other than . , : ;",
                        "correct the column, or pass another --label-column, or none")
    return labels


def plan_prompts(labels, n_images, condition, clusters=None, template=None):
    """(template, sorted label values, number of clusters) of a run's prompts.

    labels: list of str of the run's images, or None. clusters, template: the user's, or None for
    the paper's.
    """
    if condition not in ("prompts", "labels"):
        return "", (), 0
    values = tuple(sorted(set(labels or ())))
    clusters = (clusters or (33 if values else 10)) if condition == "prompts" else 0
    if clusters > min(n_images, 1000):
        raise UserError(f"{clusters} clusters for {n_images} training images",
                        "no more clusters than images are possible, and at most 1,000",
                        "pass e.g. --set clusters=10")

    # The template must name exactly what this run has.
    default = (ENRICHED if clusters else BASELINE) if values else UNLABELLED
    template = template or default
    for word, exists in (("<label>", bool(values)), ("<index>", bool(clusters))):
        if exists != (word in template):
            raise UserError(f"the template {template!r} {'lacks' if exists else 'has'} {word}",
                            f"this run has {'values' if exists else 'no values'} for it",
                            "correct the template, or leave it out")
    return template, values, clusters


def labels_of_prompts(labels, clusters):
    """The label of each of `all_prompts`, a list; "" if prompts have none."""
    return [label for label in labels or [""] for _ in range(clusters or 1)]


def all_prompts(labels, clusters, template):
    """Every prompt, a tuple of str, in the order of its number `label * clusters + cluster`."""
    indices = list(range(clusters or 1)) * len(labels or [""])
    return tuple(build_prompts(indices, labels_of_prompts(labels, clusters), template))


def prompt_numbers(values, labels, clusters, assignment):
    """Index in `all_prompts` for images with these labels (list of N) and clusters (N,) int64."""
    if not values:
        return assignment
    return torch.tensor([values.index(label) for label in labels]) * (clusters or 1) + assignment


def balance(prompts, n, seed=0):
    """n image indices (int64) in rounds, each with one image of every distinct prompt."""
    generator = torch.Generator().manual_seed(seed)
    images = {}
    for index, prompt in enumerate(prompts):
        images.setdefault(prompt, []).append(index)
    rounds = math.ceil(n / len(images))

    # A queue per prompt: its images, shuffled again and again until every round has one.
    queues = []
    for members in map(torch.tensor, images.values()):
        shuffles = [members[torch.randperm(len(members), generator=generator)]
                    for _ in range(math.ceil(rounds / len(members)))]
        queues.append(torch.cat(shuffles)[:rounds])

    # The order of the prompts in each round.
    turns = torch.rand(rounds, len(queues), generator=generator).argsort(1)
    return torch.stack(queues, 1).gather(1, turns).flatten()[:n]  # (rounds, prompts) -> (n,)


# ---- the encoder -------------------------------------------------------------------------------

class PromptEncoder(nn.Module):
    """Word-level text encoder: ids (B, L) int64 -> context (B, L, C) float, mask (B, L) bool.

    vocabulary: list of the known words, in the order of the embedding's rows.
    Ids come from `tokenize`: a begin token, the words of the prompt, padding. The mask is False,
    and the context 0, at padding. The empty prompt is the null condition: its begin token alone.
    """

    def __init__(self, vocabulary, context_dim, depth=2, num_heads=4, max_words=32):
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.max_words = max_words
        self.index = {word: i for i, word in enumerate(self.vocabulary, start=BEGIN + 1)}
        self.word_embed = nn.Embedding(BEGIN + 1 + len(self.vocabulary), context_dim)
        # Half the deviation of words (1), so that order matters from the start.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1 + max_words, context_dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(context_dim, num_heads, 4 * context_dim, dropout=0.0,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth))
        self.norm = nn.LayerNorm(context_dim)

    @torch.no_grad()
    def start_from_images(self, prompts, features, generator=None):
        """Initialise each word with the mean of the images whose prompts contain it.

        prompts: list of N str; features: (N, D) of their images, standardised, which a random
        projection maps to the width of a word. Types that look alike then start alike.
        """
        has_word = torch.tensor([[word in words for word in self.vocabulary]
                                 for words in map(words_of, prompts)]).to(features)  # (N, words)
        counts = has_word.sum(0)
        informative = (counts > 0) & (counts < len(prompts))
        width = self.word_embed.embedding_dim
        directions = torch.randn(features.shape[1], width, generator=generator)
        means = (has_word.T @ features / counts[:, None])[informative] @ directions.to(features)
        rows = torch.arange(BEGIN + 1, BEGIN + 1 + len(self.vocabulary))[informative.cpu()]
        self.word_embed.weight[rows] = means / means.square().mean().sqrt()  # deviation 1 as before

    def tokenize(self, prompts):
        """List of B str -> ids (B, 1 + max_words) int64; ValueError for unknown words."""
        split = [words_of(prompt) for prompt in prompts]
        unknown = sorted({word for words in split for word in words} - self.index.keys())
        if unknown:
            raise ValueError(f"unknown words in the prompt: {', '.join(unknown)}; the model knows "
                             f"those of its training: use {' '.join(self.vocabulary)}")
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
        return self.tokenize([""]).expand(batch, -1)

    def forward(self, ids, drop=None):
        """ids (B, L) -> context (B, L, C), mask (B, L); drop: (B,) bool, rows to leave empty."""
        if drop is not None:
            ids = torch.where(drop[:, None], self.null(len(ids)), ids)
        mask = ids != PADDING
        x = self.word_embed(ids) + self.pos_embed[:ids.shape[1]]  # (B, L) -> (B, L, C)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~mask)
        return self.norm(x) * mask[..., None], mask
