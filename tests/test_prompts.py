"""prompts.py: K-means, words, balancing, the encoder."""
import math

import numpy as np
import pytest
import torch

from prompts import (BASELINE, ENRICHED, UNLABELLED, PromptEncoder, all_prompts, balance,
                     build_prompts, find_prompt, inertia, kmeans, labels_for_prompts, number_word,
                     plan_prompts, prompt_numbers, vocabulary_of)
from support.command import UserError
from support.datasets import ImageSet, open_dataset
from support.training_set import draw_clusters, drop_outliers, find_outliers

# Inertia of sklearn.cluster.KMeans(12, n_init=10, random_state=0), scikit-learn 1.9.1, numpy 2.4.6,
# on reference_data(kind).
SKLEARN_INERTIA = {"blobs": 23673.21, "noise": 595.75}


def reference_data(kind):
    """1500 points from a numpy seed: 12 overlapping Gaussian blobs in 16-D or 8-D uniform noise."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.random((1500, 8), dtype=np.float32)
    centers = 1.5 * rng.standard_normal((12, 16))
    points = centers[rng.integers(0, 12, 1500)] + rng.standard_normal((1500, 16))
    return points.astype(np.float32)


# ---- K-means

def test_kmeans_recovers_separated_blobs():
    """One cluster per blob and the blob's mean as its center, far away from the origin too."""
    truth = torch.arange(7).repeat_interleave(40)
    x = torch.randn(280, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 20 * truth
    for offset in (0.0, 1000.0):
        centers, assignment = kmeans(x + offset, 7)
        assert centers.shape == (7, 4) and assignment.dtype == torch.int64
        pairs = set(zip(truth.tolist(), assignment.tolist()))
        assert len(pairs) == 7 and len({a for _, a in pairs}) == 7
        for blob, cluster in pairs:
            # float32 at 1000 resolves 6e-5
            assert torch.allclose(centers[cluster], x[truth == blob].mean(0) + offset, atol=5e-4)


def test_kmeans_is_deterministic_and_leaves_global_random_state_alone():
    """Same seed, same bits; another seed differs on noise; torch's own generator is untouched."""
    x = torch.from_numpy(reference_data("noise"))
    before = torch.get_rng_state()
    first, again, other = (kmeans(x, 12, seed=s, starts=1) for s in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_kmeans_inertia_against_scikit_learn(kind):
    """At most 1.01 of scikit-learn's stored inertia (the project's bound), at least 0.97."""
    x = torch.from_numpy(reference_data(kind))
    ours = inertia(x, *kmeans(x, 12))
    # Far below a good optimum would mean that inertia() itself is wrong.
    assert 0.97 <= ours / SKLEARN_INERTIA[kind] <= 1.01


def test_duplicates_never_give_nan():
    """k = number of distinct points, each many times: every one becomes a center exactly once."""
    distinct = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [9.0, -3.0]])
    x = distinct.repeat(50, 1)
    for seed in range(5):
        centers, assignment = kmeans(x, 4, seed=seed, starts=1)
        assert inertia(x, centers, assignment) < 1e-9  # squares of float32 rounding at 9
        assert len(assignment.unique()) == 4


@pytest.mark.parametrize("x, k, words", [
    (torch.zeros(5, 2), 2, "2 clusters for 1 distinct points"),
    (torch.tensor([[0.0], [math.nan], [1.0]]), 1, "got NaN or infinity")])
def test_kmeans_refuses(x, k, words):
    """Too few distinct points, and NaN."""
    with pytest.raises(ValueError, match=words):
        kmeans(x, k)


# ---- Words

def test_number_words():
    """English words, with a hyphen between tens and ones; a thousand different ones."""
    for n, word in ((17, "seventeen"), (32, "thirty-two"), (342, "three hundred and forty-two")):
        assert number_word(n) == word
    assert len({number_word(n) for n in range(1000)}) == 1000


def test_prompts_word_for_word():
    """The three templates of the paper, label in lower case, index as a number word."""
    index = torch.tensor([17, 0])
    assert build_prompts(index, ["Cancer", "healthy "], ENRICHED) == [
        "Histology image of cancer tissue, morphology type seventeen",
        "Histology image of healthy tissue, morphology type zero"]
    assert build_prompts(index, ["CANCER", "healthy"], BASELINE) == [
        "Histology image of cancer tissue", "Histology image of healthy tissue"]
    assert build_prompts([3], None, UNLABELLED) == [
        "Chest X-Ray image with morphology type three"]


def test_prompts_are_found_whatever_their_capitals():
    texts = build_prompts(None, ["Tumour", "HER2+", "HER2-"], BASELINE)
    assert find_prompt("histology IMAGE of Tumour tissue", texts) == 0
    assert find_prompt("Histology image of HER2- tissue", texts) == 2
    assert find_prompt("Histology image of tumour", texts) is None


# ---- The prompts of a run

def test_labels_for_prompts():
    """Lower case, without spaces; none for tokens, without a table, or where the user says none;
    labels must differ in their words."""
    def labels_of(column, condition="prompts", cells=(" A", "b", "a ", "B"), name="label"):
        return labels_for_prompts({name: cells}, column, condition, range(4), "the set")

    assert labels_of(None) == labels_of("label", "labels") == ["a", "b", "a", "b"]
    assert labels_of(None, "dino") is None and labels_of("none") is None
    assert labels_of(None, name="age") is None
    with pytest.raises(UserError, match="labels 'a b', 'a, b', 'c'.*that differ in letters"):
        labels_of("label", cells=["a, b", "a b", "c", "c"])


@pytest.mark.parametrize("labels, condition, clusters, template, plan", [
    (True, "prompts", None, None, (ENRICHED, ("a", "b"), 33)),
    (False, "prompts", None, None, (UNLABELLED, (), 10)),
    (True, "labels", None, None, (BASELINE, ("a", "b"), 0)),
    (True, "prompts", 4, "<label> <index>", ("<label> <index>", ("a", "b"), 4))])
def test_prompts_are_planned(labels, condition, clusters, template, plan):
    """The paper's template for what there is: labels, clusters, both."""
    labels = ["a", "b"] * 50 if labels else None
    assert plan_prompts(labels, 100, condition, clusters, template) == plan


def test_prompts_are_numbered_by_label_and_cluster():
    """The number of an image's label and cluster is the place of its prompt."""
    texts = all_prompts(("a", "b"), 3, "<label> <index>")
    assert texts == ("a zero", "a one", "a two", "b zero", "b one", "b two")
    numbers = prompt_numbers(("a", "b"), ["b", "a", "b"], 3, torch.tensor([2, 1, 0]))
    assert [texts[i] for i in numbers] == ["b two", "a one", "b zero"]
    assert prompt_numbers(("a", "b"), ["b", "a"], 0, torch.zeros(2).long()).tolist() == [1, 0]
    assert prompt_numbers((), None, 2, torch.tensor([1, 0])).tolist() == [1, 0]


def in_memory(images):
    return ImageSet("patches", "", images.shape[-1], list(map(str, range(len(images)))), {},
                    cache=dict(enumerate(images)))


def test_patches_that_show_nothing(tmp_path):
    """Each phantom is tissue; black, blank and blurred ones are named; pale fat is tissue."""
    tissue = open_dataset("histology", 96, count=40).batch(range(40))
    assert find_outliers(tissue) == [""] * 40
    fat = torch.full((1, 3, 96, 96), 0.9)
    fat[..., ::12] = 0.1
    odd = torch.cat([torch.full((1, 3, 96, 96), -0.9), torch.full((1, 3, 96, 96), 0.95),
                     torch.nn.functional.avg_pool2d(tissue[:1], 25, 1, 12), fat])
    assert find_outliers(odd) == ["black", "blank", "out of focus", ""]
    both = in_memory(torch.cat([tissue, odd]))
    assert drop_outliers(both, "labels") == {"40": "black", "41": "blank", "42": "out of focus"}
    assert drop_outliers(both, "dino") == {}
    draw_clusters(tmp_path / "x.png", both, torch.arange(3), torch.tensor([0, 2, 0]), 0)  # no 1


def test_grey_images_are_never_dropped():
    """Grey images are no patches, sharp or soft."""
    grey = torch.nn.functional.interpolate(torch.rand(30, 1, 4, 4), 64, mode="bilinear") * 2 - 1
    grey = grey.repeat(1, 3, 1, 1)
    assert "out of focus" in find_outliers(grey)
    assert drop_outliers(in_memory(grey), "prompts") == {}


def test_balance_draws_every_prompt_equally_often():
    """Rounds of all prompts, a rare prompt as often as a common one, images of one in turns."""
    texts = ["common"] * 50 + ["rare"] * 2 + ["middle"] * 7
    order = balance(texts, 300, seed=1)
    assert order.dtype == torch.int64 and order.shape == (300,)
    drawn = [texts[i] for i in order.tolist()]
    assert all(set(drawn[i:i + 3]) == set(texts) for i in range(0, 300, 3))
    counts = torch.bincount(order, minlength=59)
    assert (counts[:50] == 2).all() and (counts[50:52] == 50).all()
    assert set(counts[52:].tolist()) <= {14, 15}  # 100 draws of 7 images
    assert torch.equal(order, balance(texts, 300, seed=1))


# ---- The encoder

@pytest.fixture
def encoder():
    """A small encoder of the words of 66 prompts."""
    texts = build_prompts(list(range(33)) * 2, ["healthy"] * 33 + ["cancer"] * 33, ENRICHED)
    torch.manual_seed(0)
    return PromptEncoder(vocabulary_of(texts), context_dim=16, max_words=12).eval()


def encode(encoder, *prompts):
    return encoder(encoder.tokenize(prompts))


LONG = "Histology image of cancer tissue, morphology type thirty-two"
SHORT = "cancer tissue"


def test_padding_does_not_change_outputs(encoder):
    """One begin token and the words are attended, padding has context 0; a prompt beside a longer
    one has the context that it has alone."""
    together, mask = encode(encoder, LONG, SHORT, "")
    assert together.shape == (3, 13, 16) and mask.sum(1).tolist() == [9, 3, 1]
    assert not together[~mask].any()
    for i, prompt in enumerate([LONG, SHORT, ""]):
        alone, _ = encoder(encoder.tokenize([prompt])[:, :mask[i].sum()])
        # other matmul shapes: float32 rounding of numbers of order 1
        assert torch.allclose(together[i][mask[i]], alone[0], atol=1e-5)


def test_context_tells_prompts_and_word_orders_apart(encoder):
    """Another type, another order of words and the null condition give another context."""
    a, _ = encode(encoder, "cancer type two")
    b, _ = encode(encoder, "cancer type three")
    c, _ = encode(encoder, "type two cancer")
    null, mask = encoder(encoder.null(2))
    assert torch.equal(encoder.null(2), encoder.tokenize(["", ""]))
    assert (a - b).abs().max() > 0.1 and (a - c).abs().max() > 0.1  # entries are of order 1
    assert mask.tolist() == 2 * [[True] + 12 * [False]] and torch.equal(null[0], null[1])
    assert (null[0, 0] - a[0, 0]).abs().max() > 1e-3  # the begin token hears the other words


def test_dropped_prompts_are_the_null_condition(encoder):
    """`drop` gives the context and mask of the empty prompt, and leaves the others alone."""
    ids = encoder.tokenize([LONG, SHORT, LONG])
    context, mask = encoder(ids, drop=torch.tensor([False, True, False]))
    plain, plain_mask = encoder(ids)
    null, null_mask = encoder(encoder.null(1))
    assert torch.allclose(context[1], null[0], atol=1e-5) and torch.equal(mask[1], null_mask[0])
    assert torch.allclose(context[[0, 2]], plain[[0, 2]], atol=1e-5)  # float32 rounding
    assert torch.equal(mask[[0, 2]], plain_mask[[0, 2]])


def test_words_start_where_their_images_lie(encoder):
    """Words of like images are alike, of opposite ones opposite; the others stay as they were."""
    before = encoder.word_embed.weight.clone()
    texts = [f"Histology image of {label} tissue, morphology type {number}"
             for label in ("cancer", "healthy") for number in ("one", "two", "twenty-one")]
    features = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    features[[1, 4]] = features[[0, 3]]  # "one" and "two" look alike
    features -= features.mean(0)         # so the labels, three images each, are opposite
    encoder.start_from_images(texts, features, torch.Generator().manual_seed(1))

    words = encoder.word_embed.weight
    moved = [encoder.index[word] for word in ("cancer", "healthy", "one", "two", "twenty-one")]
    others = [i for i in range(len(words)) if i not in moved]
    assert torch.equal(words[others], before[others]) and words.requires_grad
    cancer, healthy, one, two, _ = words[moved]
    torch.testing.assert_close(cancer, -healthy)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(words[moved].square().mean(), torch.tensor(1.0))


def test_unknown_words_and_long_prompts_are_refused(encoder):
    """The error names the unknown words and lists all the known ones."""
    with pytest.raises(ValueError, match="in the prompt: benign, melanoma;.*seventeen"):
        encoder.tokenize(["melanoma tissue, benign", "cancer"])
    with pytest.raises(ValueError, match="40 words.*at most 12.*shorten"):
        encoder.tokenize(["cancer " * 40])
