"""prompts.py: K-means, words, balancing, the encoder."""
import math

import numpy as np
import pytest
import torch

import prompts
from prompts import (BASELINE, ENRICHED, UNLABELLED, PromptEncoder, balance, build_prompts, inertia,
                     kmeans, number_word, standardise, vocabulary_of)

# Inertia of sklearn.cluster.KMeans(12, n_init=10, random_state=0), scikit-learn 1.9.1, numpy 2.4.6,
# on reference_data(kind); tests/reference/make_kmeans.py prints it.
SKLEARN_INERTIA = {"blobs": 23673.21, "noise": 595.75}


def reference_data(kind):
    """1500 points from a numpy seed: 12 overlapping Gaussian blobs in 16-D or 8-D uniform noise."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.random((1500, 8), dtype=np.float32)
    centers = 1.5 * rng.standard_normal((12, 16))
    points = centers[rng.integers(0, 12, 1500)] + rng.standard_normal((1500, 16))
    return points.astype(np.float32)


def blobs(k, dim=4, per_blob=40, distance=20.0, seed=0):
    """k unit Gaussian blobs, `distance` apart along a grid, so well separated -> points, truth."""
    generator = torch.Generator().manual_seed(seed)
    side = math.ceil(math.sqrt(k))
    centers = torch.zeros(k, dim)
    centers[:, 0], centers[:, 1] = torch.arange(k) % side, torch.arange(k) // side
    truth = torch.arange(k).repeat_interleave(per_blob)
    return distance * centers[truth] + torch.randn(len(truth), dim, generator=generator), truth


def nearest(x, centers):
    """Slow exact assignment in float64."""
    return (x.double()[:, None] - centers.double()).square().sum(2).argmin(1)


# ---- K-means

def test_kmeans_recovers_separated_blobs():
    """One cluster per blob and the blob's mean as its center, far away from the origin too."""
    for offset in (0.0, 1000.0):
        x, truth = blobs(7)
        x = x + offset
        centers, assignment = kmeans(x, 7)
        assert centers.shape == (7, 4) and assignment.dtype == torch.int64
        pairs = set(zip(truth.tolist(), assignment.tolist()))
        assert len(pairs) == 7 and len({a for _, a in pairs}) == 7
        for blob, cluster in pairs:
            # float32 at 1000 resolves 6e-5
            assert torch.allclose(centers[cluster], x[truth == blob].mean(0), atol=5e-4)


def test_kmeans_is_deterministic_and_leaves_global_random_state_alone():
    """Same seed, same bits; another seed differs on noise; torch's own generator is untouched."""
    x = torch.from_numpy(reference_data("noise"))
    before = torch.get_rng_state()
    first, again, other = (kmeans(x, 12, seed=s, n_init=1) for s in (3, 3, 4))
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


def test_kmeans_ends_in_a_fixed_point_of_plain_lloyd():
    """The skipped points do no harm: all are with their nearest center, centers are the means."""
    x = torch.from_numpy(reference_data("noise"))
    centers, assignment = prompts.lloyd(x, x.square().sum(1), x[:12].clone(), 1000, 0.0, 100)
    assert torch.equal(assignment, nearest(x, centers))
    means = torch.stack([x[assignment == i].mean(0) for i in range(12)])
    assert torch.allclose(centers, means, atol=1e-5)  # float32 sums of about 125 numbers below 1


def test_lloyd_takes_the_same_steps_as_plain_lloyd():
    """After 5 steps from the same start, the centers are those of a slow loop in float64."""
    x = torch.from_numpy(reference_data("noise"))
    slow = x[:12].double()
    for _ in range(5):
        assignment = nearest(x, slow)
        slow = torch.stack([x[assignment == i].double().mean(0) for i in range(12)])
    centers, _ = prompts.lloyd(x, x.square().sum(1), x[:12].clone(), 5, 0.0, 1500)
    assert torch.allclose(centers.double(), slow, atol=1e-5)  # float32 rounding of numbers below 1


def test_chunked_equals_unchunked():
    """The chunk length bounds the memory and does not change the result beyond rounding."""
    x = torch.from_numpy(reference_data("blobs"))
    whole, small = kmeans(x, 12, n_init=2, chunk=5000), kmeans(x, 12, n_init=2, chunk=7)
    assert torch.equal(whole[1], small[1])
    assert torch.allclose(whole[0], small[0], atol=1e-4)  # order of float32 sums


def test_empty_clusters_are_reseeded():
    """Starts that nobody is near get the farthest points: no NaN, no empty cluster, blobs found."""
    x, _ = blobs(5)
    far_off = 1e4 + torch.arange(5.0)[:, None].expand(5, 4)
    centers, assignment = prompts.lloyd(x, x.square().sum(1), far_off, 300, 0.0, 64)
    assert centers.isfinite().all()
    assert (torch.bincount(assignment, minlength=5) == 40).all()


def test_reseeding_does_not_empty_another_cluster():
    """The farthest point stays when it is alone in its cluster; the next farthest moves."""
    x = torch.tensor([[0.0], [1.0], [3.0], [50.0]])
    assignment = torch.tensor([0, 0, 0, 1])
    sums = torch.tensor([[4.0], [50.0], [0.0]], dtype=torch.float64)
    counts = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    centers = torch.tensor([[1.0], [20.0], [-99.0]])
    prompts.fill_empty(x, centers, assignment, sums, counts)
    assert assignment.tolist() == [0, 0, 2, 1] and counts.tolist() == [2, 1, 1]
    assert sums[:, 0].tolist() == [1, 50, 3]


def test_duplicates_never_give_nan():
    """k = number of distinct points, each many times: every one becomes a center exactly once."""
    distinct = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [9.0, -3.0]])
    x = distinct.repeat(50, 1)
    for seed in range(5):
        centers, assignment = kmeans(x, 4, seed=seed, n_init=1)
        assert inertia(x, centers, assignment) < 1e-9  # squares of float32 rounding at 9
        assert len(assignment.unique()) == 4
        # All starts on one spot: three empty clusters at once, among twins.
        centers, assignment = prompts.lloyd(x, x.square().sum(1), x[[0, 4, 8, 12]], 300, 0.0, 99)
        assert centers.isfinite().all() and len(assignment.unique()) == 4


def test_kmeans_with_one_cluster_and_with_one_per_point():
    """k = 1 gives the mean, k = N gives inertia 0; integers and half floats are taken."""
    x = torch.arange(12).reshape(6, 2)
    centers, assignment = kmeans(x, 1)
    assert torch.equal(centers, x.float().mean(0, keepdim=True)) and not assignment.any()
    assert inertia(x.half().float(), *kmeans(x.half(), 6)) < 1e-9  # rounding of numbers below 12


@pytest.mark.parametrize("x, k, words", [
    (torch.zeros(5, 2), 2, "1 distinct points for k = 2.*needs at least k.*lower k"),
    (torch.eye(3).repeat(9, 1), 4, "3 distinct points"),
    (torch.zeros(0, 2), 1, "0 distinct points"),
    (torch.tensor([[0.0], [math.nan], [1.0]]), 1, "1 of 3 points hold NaN or infinity.*drop"),
    (torch.tensor([[0.0], [math.inf], [-math.inf]]), 1, "2 of 3 points hold NaN"),
    (torch.eye(3), 0, "k is 0.*at least 1.*pass"),
    (torch.eye(3), -2, "k is -2 and n_init 10"),
    (torch.zeros(2, 3, 4), 1, r"\(2, 3, 4\).*needs \(N, D\).*flatten"),
    (torch.zeros(4), 1, r"shape \(4,\)"),
])
def test_kmeans_refuses(x, k, words):
    """Too few distinct points, NaN, infinity, k < 1 and a wrong rank: got, need, do."""
    with pytest.raises(ValueError, match=words):
        kmeans(x, k)


def test_inertia_by_hand():
    """Two points at squared distances 1 and 4 from their centers: 5."""
    x = torch.tensor([[0.0, 0.0], [5.0, 2.0]])
    assert inertia(x, torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])) == 5.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    """The draws are made on the CPU, so both devices find the same clusters of separate blobs."""
    x, _ = blobs(7)
    (centers, assignment), (centers_gpu, assignment_gpu) = kmeans(x, 7), kmeans(x.cuda(), 7)
    assert torch.equal(assignment, assignment_gpu.cpu())
    assert torch.allclose(centers, centers_gpu.cpu(), atol=1e-4)  # order of float32 sums


def test_standardise():
    """Mean 0 and standard deviation 1 a column; a constant column becomes 0, not NaN."""
    z = standardise(torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0]]))
    assert torch.allclose(z[:, 0], torch.tensor([-1.0, 0.0, 1.0]) * 1.5 ** 0.5)
    assert torch.equal(z[:, 1], torch.zeros(3))


# ---- Words

@pytest.mark.parametrize("n, word", [
    (0, "zero"), (3, "three"), (13, "thirteen"), (17, "seventeen"), (20, "twenty"),
    (32, "thirty-two"), (40, "forty"), (99, "ninety-nine"), (100, "one hundred"),
    (101, "one hundred and one"), (342, "three hundred and forty-two"),
    (910, "nine hundred and ten"),
    (999, "nine hundred and ninety-nine"),
])
def test_number_word(n, word):
    """English words, with a hyphen between tens and ones."""
    assert number_word(n) == word


def test_number_words_are_distinct_and_bounded():
    """A thousand different words; -1 and 1000 are refused."""
    assert len({number_word(n) for n in range(1000)}) == 1000
    for n in (-1, 1000):
        with pytest.raises(ValueError, match=f"got number {n}.*0 to 999.*fewer clusters"):
            number_word(n)


def test_prompts_word_for_word():
    """The three templates of the paper, label in lower case, index as a number word."""
    index = torch.tensor([17, 0])
    assert build_prompts(index, ["Cancer", "healthy "], ENRICHED) == [
        "Histology image of cancer tissue, morphology type seventeen",
        "Histology image of healthy tissue, morphology type zero"]
    assert build_prompts(None, ["cancer"], BASELINE) == ["Histology image of cancer tissue"]
    assert build_prompts(index, ["CANCER", "healthy"], BASELINE) == [
        "Histology image of cancer tissue", "Histology image of healthy tissue"]
    assert build_prompts([3], None, UNLABELLED) == [
        "Chest X-Ray image with morphology type three"]


@pytest.mark.parametrize("assignment, labels, template, words", [
    ([0, 1], None, ENRICHED, "<label> is missing.*needs one.*another template"),
    (None, ["a"], UNLABELLED, "<index> is missing"),
    ([0, 1], ["a", " "], ENRICHED, r"<label> is missing \(image 1\)"),
    ([0, 1], ["a"], ENRICHED, r"\[2, 1\] indices and labels"),
    ([0, 1000], None, UNLABELLED, "got number 1000"),
])
def test_build_prompts_refuses(assignment, labels, template, words):
    """A missing or empty label, a missing index, unequal lengths, an index without a word."""
    with pytest.raises(ValueError, match=words):
        build_prompts(assignment, labels, template)


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
    assert not torch.equal(order, balance(texts, 300, seed=2))
    assert len(balance(texts, 7)) == 7


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


def test_encoder_shapes_and_mask(encoder):
    """One begin token and the words are attended; padding has context 0."""
    context, mask = encode(encoder, LONG, SHORT, "")
    assert context.shape == (3, 13, 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [9, 3, 1]
    assert mask[1].tolist() == [True] * 3 + [False] * 10
    assert not context[~mask].any() and context[mask].abs().sum(1).all()


def test_padding_does_not_change_outputs(encoder):
    """A prompt beside a longer one has the context that it has alone, without padding."""
    together, mask = encode(encoder, LONG, SHORT, "")
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


def test_case_and_punctuation_do_not_matter(encoder):
    """Commas, full stops, capitals and spaces: the same tokens; a number is one word."""
    plain = encoder.tokenize(["cancer tissue morphology type thirty-two"])
    noisy = encoder.tokenize(["  CANCER tissue, Morphology type: thirty-two. "])
    assert torch.equal(plain, noisy)


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
    with pytest.raises(ValueError, match="unknown in the prompt: benign, melanoma;") as caught:
        encoder.tokenize(["melanoma tissue, benign", "cancer"])
    assert " ".join(encoder.vocabulary) in str(caught.value) and "seventeen" in encoder.vocabulary
    with pytest.raises(ValueError, match="40 words.*at most 12.*shorten"):
        encoder.tokenize(["cancer " * 40])
    with pytest.raises(ValueError, match="context_dim is 10.*multiple of its 4 heads.*pass"):
        PromptEncoder(["cancer"], context_dim=10)


def test_every_parameter_gets_a_gradient(encoder):
    """No dead weight; the rows of the words in use, and only those, move."""
    context, _ = encode(encoder, LONG, SHORT, "")
    direction = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
    (context * direction).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    moved = encoder.word_embed.weight.grad.abs().sum(1) > 0
    used = {encoder.index[word] for word in prompts.words_of(LONG)} | {prompts.BEGIN}
    assert set(moved.nonzero()[:, 0].tolist()) == used


def test_encoder_comes_back_from_its_checkpoint(encoder, tmp_path):
    """Vocabulary (a plain list) and weights are enough, and weights_only reads them."""
    path = tmp_path / "encoder.pt"
    torch.save({"vocabulary": encoder.vocabulary, "weights": encoder.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    again = PromptEncoder(saved["vocabulary"], context_dim=16, max_words=12)
    again.load_state_dict(saved["weights"])
    assert torch.equal(encode(again, LONG)[0], encode(encoder, LONG)[0])
