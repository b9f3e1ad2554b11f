"""Tests of prompts.py: K-means, S_Dbw, words, balancing, the encoder, the command line."""
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import prompts
from prompts import (BASELINE, ENRICHED, UNLABELLED, PromptEncoder, balance, build_prompts,
                     choose_k, inertia, kmeans, number_word, sdbw, standardise, vocabulary_of)

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


# ---- K-means -----------------------------------------------------------------------------------

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
    centers, assignment = prompts._lloyd(x, x.square().sum(1), x[:12].clone(), 1000, 0.0, 100)
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
    centers, _ = prompts._lloyd(x, x.square().sum(1), x[:12].clone(), 5, 0.0, 1500)
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
    centers, assignment = prompts._lloyd(x, x.square().sum(1), far_off, 300, 0.0, 64)
    assert centers.isfinite().all()
    assert (torch.bincount(assignment, minlength=5) == 40).all()


def test_reseeding_does_not_empty_another_cluster():
    """The farthest point stays when it is alone in its cluster; the next farthest moves."""
    x = torch.tensor([[0.0], [1.0], [3.0], [50.0]])
    assignment = torch.tensor([0, 0, 0, 1])
    sums = torch.tensor([[4.0], [50.0], [0.0]], dtype=torch.float64)
    counts = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    centers = torch.tensor([[1.0], [20.0], [-99.0]])
    prompts._fill_empty(x, centers, assignment, sums, counts)
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
        centers, assignment = prompts._lloyd(x, x.square().sum(1), x[[0, 4, 8, 12]], 300, 0.0, 99)
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


# ---- How many clusters -------------------------------------------------------------------------

def slow_sdbw(x, centers, assignment, radius):
    """S_Dbw pair by pair and point by point, as its definition reads."""
    x, centers, k = x.double().numpy(), centers.double().numpy(), len(centers)
    members = [x[assignment.numpy() == i] for i in range(k)]
    spread = [((m - v) ** 2).mean(0) for m, v in zip(members, centers)]
    norms = [np.linalg.norm(s) for s in spread]
    scat = np.mean(norms) / np.linalg.norm(x.var(0))
    r = math.sqrt(sum(norms)) / k if radius == "paper" else math.sqrt(np.mean(np.sum(spread, 1)))
    total = 0.0
    for i in range(k):
        for j in range(k):
            if i != j:
                both = np.concatenate([members[i], members[j]])
                at, left, right = (sum(np.linalg.norm(p - u) <= r for p in both) for u in
                                   ((centers[i] + centers[j]) / 2, centers[i], centers[j]))
                total += at / max(left, right, 1)
    return scat + total / (k * (k - 1))


@pytest.mark.parametrize("radius", ["paper", "rms"])
def test_sdbw_matches_its_definition(radius):
    """Equal to the slow form to float64 rounding, where the space between clusters is not empty."""
    x = torch.from_numpy(reference_data("noise")[:300, :2]) + 50
    fit = kmeans(x, 5, n_init=1)
    expected = slow_sdbw(x, *fit, radius)
    # float32 mean taken off at 50
    assert sdbw(x, *fit, radius) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.5  # else the density term was not exercised


@pytest.mark.parametrize("dim, radius", [(2, "paper"), (2, "rms"), (100, "rms")])
def test_choose_k_finds_the_number_of_blobs(dim, radius):
    """Nine well separated blobs: the least S_Dbw is at 9, in many dimensions too with "rms"."""
    generator = torch.Generator().manual_seed(1)
    if dim == 2:
        x, _ = blobs(9, dim=2)
    else:
        x = 3 * torch.randn(9, dim, generator=generator).repeat(40, 1)
        x += torch.randn(360, dim, generator=generator)
    table, best = choose_k(x, range(5, 14), seed=0, n_init=5, radius=radius)
    assert best == 9 and [k for k, _ in table] == list(range(5, 14))
    assert dict(table)[9] == min(score for _, score in table)


def test_choose_k_uses_the_standardised_features_of_the_final_fit():
    """Its score is S_Dbw of kmeans(standardise(x)), whatever the units of the columns."""
    x, _ = blobs(4)
    z = standardise(x)
    (row,), best = choose_k(x, [4], seed=2, n_init=3)
    assert best == 4 and row == (4, sdbw(z, *kmeans(z, 4, seed=2, n_init=3), "rms"))
    scaled = choose_k(x * torch.tensor([1.0, 1e3, 1.0, 1e-3]), [4], seed=2, n_init=3)[0][0][1]
    assert scaled == pytest.approx(row[1], rel=1e-4)  # float32 rounding of the columns


def test_choose_k_and_sdbw_refuse():
    """One cluster, an unknown radius, an empty range, a k above the number of points."""
    x, _ = blobs(2)
    with pytest.raises(ValueError, match="1 clusters.*at least 2.*pass"):
        sdbw(x, *kmeans(x, 1))
    with pytest.raises(ValueError, match='radius "wide"'):
        sdbw(x, *kmeans(x, 2), radius="wide")
    with pytest.raises(ValueError, match="no k to choose from"):
        choose_k(x, [])
    with pytest.raises(ValueError, match="80 distinct points for k = 81"):
        choose_k(x, [2, 81])


def test_standardise():
    """Mean 0 and standard deviation 1 a column; a constant column becomes 0, not NaN."""
    z = standardise(torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0]]))
    assert torch.allclose(z[:, 0], torch.tensor([-1.0, 0.0, 1.0]) * 1.5 ** 0.5)
    assert torch.equal(z[:, 1], torch.zeros(3))


# ---- Words -------------------------------------------------------------------------------------

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


# ---- The encoder -------------------------------------------------------------------------------

@pytest.fixture
def encoder():
    """A small encoder of the words of 66 prompts."""
    texts = build_prompts(list(range(33)) * 2, ["healthy"] * 33 + ["cancer"] * 33, ENRICHED)
    torch.manual_seed(0)
    return PromptEncoder(vocabulary_of(texts), context_dim=16).eval()


LONG = "Histology image of cancer tissue, morphology type thirty-two"
SHORT = "cancer tissue"


def test_encoder_shapes_and_mask(encoder):
    """One begin token and the words are attended; padding has context 0."""
    context, mask = encoder([LONG, SHORT, ""])
    assert context.shape == (3, 10, 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [10, 3, 1]
    assert mask[1].tolist() == [True] * 3 + [False] * 7
    assert not context[~mask].any() and context[mask].abs().sum(1).all()


def test_padding_does_not_change_outputs(encoder):
    """A prompt beside a longer one has the context that it has alone."""
    together, mask = encoder([LONG, SHORT, ""])
    for i, prompt in enumerate([LONG, SHORT, ""]):
        alone, _ = encoder([prompt])
        # other matmul shapes: float32 rounding of numbers of order 1
        assert torch.allclose(together[i][mask[i]], alone[0], atol=1e-5)


def test_context_tells_prompts_and_word_orders_apart(encoder):
    """Another type, another order of words and the null condition give another context."""
    a, _ = encoder(["cancer type two"])
    b, _ = encoder(["cancer type three"])
    c, _ = encoder(["type two cancer"])
    null, mask = encoder(["", ""])
    assert (a - b).abs().max() > 0.1 and (a - c).abs().max() > 0.1  # entries are of order 1
    assert null.shape == (2, 1, 16) and mask.all() and torch.equal(null[0], null[1])
    assert (null[0, 0] - a[0, 0]).abs().max() > 1e-3  # the begin token hears the other words


def test_case_and_punctuation_do_not_matter(encoder):
    """Commas, full stops, hyphens, capitals and spaces: the same tokens."""
    plain, _ = encoder.tokenize(["cancer tissue morphology type thirty two"])
    noisy, _ = encoder.tokenize(["  CANCER tissue, Morphology type: thirty-two. "])
    assert torch.equal(plain, noisy)


def test_unknown_words_and_long_prompts_are_refused(encoder):
    """The error names the unknown words and lists all the known ones."""
    with pytest.raises(ValueError, match="unknown in the prompt: benign, melanoma;") as caught:
        encoder(["melanoma tissue, benign", "cancer"])
    assert " ".join(encoder.vocabulary) in str(caught.value) and "seventeen" in encoder.vocabulary
    with pytest.raises(ValueError, match="40 words.*at most 32.*shorten"):
        encoder(["cancer " * 40])
    with pytest.raises(ValueError, match="context_dim is 10.*multiple of its 4 heads.*pass"):
        PromptEncoder(["cancer"], context_dim=10)


def test_every_parameter_gets_a_gradient(encoder):
    """No dead weight; the rows of the words in use, and only those, move."""
    context, _ = encoder([LONG, SHORT, ""])
    direction = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
    (context * direction).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    moved = encoder.word_embed.weight.grad.abs().sum(1) > 0
    used = {encoder.index[word] for word in prompts.words_of(LONG)} | {0}
    assert set(moved.nonzero()[:, 0].tolist()) == used


def test_encoder_comes_back_from_its_checkpoint(encoder, tmp_path):
    """Vocabulary (a plain list) and weights are enough, and weights_only reads them."""
    path = tmp_path / "encoder.pt"
    torch.save({"vocabulary": encoder.vocabulary, "weights": encoder.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    again = PromptEncoder(saved["vocabulary"], context_dim=16)
    again.load_state_dict(saved["weights"])
    assert torch.equal(again([LONG])[0], encoder([LONG])[0])


# ---- Command line ------------------------------------------------------------------------------

def run_main(monkeypatch, *arguments):
    """Calls main() with a command line."""
    monkeypatch.setattr(sys, "argv", ["prompts.py", *map(str, arguments)])
    prompts.main()


def test_choose_k_on_a_run(tmp_path, monkeypatch, capsys):
    """The table names the true K of the cached tokens, and the chart is a PNG."""
    x, _ = blobs(6, dim=2)
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "tokens.npy", x.reshape(240, 2, 1).numpy())
    run_main(monkeypatch, tmp_path, "--choose-k", "4:8", "--step", 2)
    printed = capsys.readouterr().out
    assert "240 images" in printed and "at K = 6" in printed
    rows = [line.split()[1] for line in printed.splitlines() if line.startswith("K ")]
    assert rows == ["4", "6", "8"]
    with Image.open(tmp_path / "choose_k.png") as chart:
        assert chart.format == "PNG" and len(chart.convert("RGB").getcolors()) > 3


@pytest.mark.parametrize("arguments, words", [
    (["--choose-k", "4:8"], "tokens.npy is missing.*train.py"),
    (["--choose-k", "4-8"], "got --choose-k 4-8"),
    (["--choose-k", "8:4"], "2 <= FIRST <= LAST"),
    (["--choose-k", "4:500"], "240 distinct points for k = 500"),
])
def test_command_line_errors(tmp_path, monkeypatch, capsys, arguments, words):
    """One line, exit code 2, nothing written."""
    (tmp_path / "cache").mkdir()
    if "missing" not in words:
        np.save(tmp_path / "cache" / "tokens.npy", blobs(6)[0].numpy()[:, None])
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, tmp_path, *arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert re.search(words, message)
    assert not (tmp_path / "choose_k.png").exists()
