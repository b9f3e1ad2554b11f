"""On a pretend GPU: scripts run from end to end, nothing of a step waits, MPS gets no float64."""
import copy
import re
import signal

import numpy as np
import pytest
import torch

import evaluate
import experiments.__main__ as experiments
import mil
import sample
import train
from dinodiff import NoiseSchedule
from experiments.segment import diffseg
from pretend_cuda import OnDevice, pretend
from prompts import kmeans
from small_run import SMALL, write_run
from support import slides
from support.command import MEMORY_FLAGS
from support.files import load_checkpoint, read_jsonl
from support.run import Run, load_optimizer
from support.settings import train_flags
from test_sample import WORDS
from test_slides import write_features
from train import fit

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: see gpu_check.py"),
    pytest.mark.filterwarnings("ignore:.*pin_memory")]
FEW = ["--data", "phantoms", "--count", "6", "--size", "16", "--batch", "2", "--vae-batch", "2",
       "--embedder-batch", "2", "--steps", "2", "--grids", "1", "--workers", "0"]


@pytest.fixture
def smallest_networks(monkeypatch):
    """train.py with the networks of small_run, and previews of two steps."""
    monkeypatch.setitem(train.VAES, "tiny", SMALL["vae"])
    monkeypatch.setitem(train.UNETS, "tiny", SMALL["unet"])
    monkeypatch.setitem(train.VISION_TRANSFORMERS, "tiny", SMALL["vit"])
    timesteps = NoiseSchedule.sampling_timesteps
    monkeypatch.setattr(NoiseSchedule, "sampling_timesteps", lambda self, steps, power=1: timesteps(
        self, min(steps, 2), power))


# ---- the device itself

def test_it_refuses_what_a_gpu_refuses():
    """NumPy, two devices in one call, foreign indices and generators; a number of the CPU may come
    along, and float64 is refused on MPS alone."""
    with pretend("cuda"):
        x = torch.ones(3, 2, device="cuda")
        assert x.device == torch.device("cuda:0") and x.double().cpu().numpy().sum() == 6
        assert type((x * torch.tensor(2.0)).sum()) is OnDevice and type(x.cpu()) is torch.Tensor
        refused = [
            (TypeError, lambda: x.numpy()), (TypeError, lambda: np.asarray(x)),
            (RuntimeError, lambda: x + torch.ones(2)), (RuntimeError, lambda: x @ torch.ones(2)),
            (RuntimeError, lambda: torch.cat([x, torch.ones(3, 2)])),
            (RuntimeError, lambda: torch.ones(3)[x[:, 0].long()]),
            (RuntimeError, lambda: torch.nn.Linear(2, 1)(x)),
            (RuntimeError, lambda: torch.rand(3, device="cuda", generator=torch.Generator()))]
        for error, call in refused:
            with pytest.raises(error):
                call()
    with pretend("mps"), pytest.raises(TypeError, match="float64"):
        torch.ones(3, device="mps").double()


def test_it_counts_what_waits():
    """Numbers read, masks, lists and CPU tensors as an index, copies; arithmetic waits for nothing,
    and copies out of pinned memory neither."""
    with pretend("cuda") as waits:
        x = torch.ones(4, device="cuda")
        (x * 2 + 1).relu_().add_(x[:2].sum())
        x[torch.arange(2, device="cuda")] = 0.0
        torch.ones(4).pin_memory()[:2].to("cuda", non_blocking=True)
        assert not waits
        calls = [lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x.any()), x.cpu,
                 lambda: x[x > 0], lambda: x[[0, 1]], lambda: x[torch.arange(2)],
                 lambda: torch.ones(4).to("cuda"), lambda: torch.tensor([1.0], device="cuda"),
                 lambda: x.copy_(torch.ones(4)), lambda: x.nonzero(), lambda: x.unique()]
        for number, call in enumerate(calls, 1):
            call()
            assert sum(waits.values()) == number
        assert all(place.startswith("tests/test_pretend_cuda.py:") for _, place in waits)


def test_gradients_autocast_and_files():
    """A step of AdamW on the device equals that on the CPU; products are bf16 under autocast, norms
    float32; a copy stays on the device, and what is saved is read on the CPU."""
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    with pretend("cuda"):
        there = copy.deepcopy(here).to("cuda")
        assert all(type(p) is OnDevice and isinstance(p, torch.nn.Parameter)
                   for p in copy.deepcopy(there).parameters())
        for net in (here, there):
            optimizer = torch.optim.AdamW(net.parameters(), fused=True)
            net(torch.ones(2, 3).to(net[0].weight.device))[:, 0].sum().backward()
            optimizer.step()
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.parameters(), there.parameters()))
        with torch.autocast("cuda", torch.bfloat16):
            x = torch.ones(2, 3, device="cuda")
            assert there[0](x).dtype == torch.bfloat16 and there(x).dtype == torch.float32


def test_moments_in_another_layout_are_refused_unless_they_are_laid_out_anew():
    """The fused AdamW of CUDA walks through a parameter and its moments side by side."""
    def network(layout):
        net = torch.nn.Conv2d(4, 4, 3).to("cuda", memory_format=layout)
        return net, torch.optim.AdamW(net.parameters(), fused=True)

    def step(net, optimizer):
        net(torch.ones(1, 4, 3, 3, device="cuda")).sum().backward()
        optimizer.step()
    with pretend("cuda"):
        net, optimizer = network(torch.contiguous_format)
        step(net, optimizer)
        for load in (lambda optimizer, state: optimizer.load_state_dict(state), load_optimizer):
            other, its_optimizer = network(torch.channels_last)
            load(its_optimizer, copy.deepcopy(optimizer.state_dict()))
            if load is load_optimizer:
                step(other, its_optimizer)
            else:
                with pytest.raises(RuntimeError, match="layout"):
                    step(other, its_optimizer)


# ---- scripts

def train_on_device(folder, *flags, device="cuda"):
    with pretend(device):
        return train.main([*FEW, *flags, "--device", device, "--out", str(folder)])


def test_training_stops_and_resumes_on_a_gpu_as_on_a_cpu(smallest_networks, tmp_path, monkeypatch):
    """All stages, stopped in the VAE and in the U-Net: the losses are those of a CPU that was never
    stopped, for the pretended device computes there; the model is read and sampled on the CPU."""
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) in (("vae", 1), ("unet", 1)):
            self.stop_signal = signal.SIGINT
    monkeypatch.setattr(Run, "log", log_and_stop)
    flags = ["--dtype", "float32"]
    assert train_on_device(tmp_path / "gpu", *flags) == 130
    assert train_on_device(tmp_path / "gpu", *flags, "--resume") == 130
    monkeypatch.setattr(Run, "log", log)
    assert train_on_device(tmp_path / "gpu", *flags, "--resume") == 0
    assert train.main([*FEW, *flags, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0

    def losses(folder):
        return [row["loss"] for row in read_jsonl(folder / "log.jsonl")]
    # float32 sums in another order: layers of tokens take another path on a CPU
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    assert load_checkpoint(tmp_path / "gpu" / "model.pt")["embedding_sampler"]


@pytest.mark.parametrize("flags", [
    ["--data", "histology", "--condition", "prompts", "--clusters", "2", "--checkpointing",
     "--accumulate", "2"],
    pytest.param(["--condition", "none"], marks=pytest.mark.slow)])
def test_other_conditions_train_in_bf16_on_a_gpu(smallest_networks, tmp_path, flags):
    """Prompts from clusters, checkpointed and in parts; no condition; both under autocast."""
    assert train_on_device(tmp_path / "run", *flags, "--embedder", "random") == 0


def test_all_ways_to_sample_run_on_a_gpu(small_run, tmp_path):
    """Sources, strips, prototypes, random tokens, img2img, prompts; every sampler; bf16 is auto."""
    image, other = (str(small_run / "held_out" / f"{i}.png") for i in (0, 1))
    prompted = write_run(tmp_path / "prompted", condition="prompts", labels=("cancer", "healthy"),
                         clusters=2, template="Histology image of <label> tissue, morphology type "
                         "<index>")
    ways = [(small_run, "--from-image", image, "--perturb", "0.5", "--guidance", "2"),
            (small_run, "--from-image", image, "--strength", "0.5"),
            (small_run, "--interpolate", image, other, "--frames", "2", "--sampler", "dpm"),
            (small_run, "--prototypes", "2"),
            (small_run, "--random", "--sampler", "ddpm", "--dtype", "float32"),
            (prompted, "--prompt", f"{WORDS} one", "--guidance", "2"),
            (prompted, "--each-prompt", "1")]
    with pretend("cuda"):
        for number, (run, *way) in enumerate(ways):
            assert sample.main([*way, "--steps", "2", "--checkpoint", str(run), "--device", "cuda",
                                "--out", str(tmp_path / f"out{number}")]) == 0
    assert ",bfloat16," in (tmp_path / "out0" / "samples.csv").read_text()


@pytest.mark.parametrize("device", ["cuda", pytest.param("mps", marks=pytest.mark.slow)])
def test_evaluation_and_experiments_run_on_a_gpu(labelled_run, device):
    """Two folders compared; resemblance, clusters."""
    images = str(labelled_run.parent / "images")
    common = ["--checkpoint", str(labelled_run), "--device", device, "--count", "8",
              "--train-limit", "16"]
    with pretend(device):
        evaluate.main([images, images, "--device", device])
        experiments.main(["resemble", *common, "--steps", "2"])


def test_slides_train_on_a_gpu(tmp_path):
    """Both kinds of models on features, with the second pass and heat maps."""
    folder = write_features(tmp_path / "slides", [f"s{i}" for i in range(8)])
    with pretend("cuda"):
        mil.main(["--data", str(folder), "--models", "abmil", "2x2", "--steps", "1", "--patches",
                  "8", "--batch", "4", "--folds", "2", "--device", "cuda", "--out",
                  str(tmp_path / "out")])
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.slow
def test_generated_slides_are_embedded_on_a_gpu(tmp_path, monkeypatch):
    """From pixels, by a ViT on the device."""
    monkeypatch.setattr(slides, "BANK", 64)
    with pretend("cuda"):
        mil.main(["--count", "20", "--models", "mean", "--steps", "2", "--patches", "16",
                  "--batch", "4", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "metrics.json").is_file()


# ---- waits

def test_a_training_step_waits_for_nothing_but_looks(smallest_networks, tmp_path, monkeypatch):
    """Of each stage: one wait from look to look at the losses, however many steps lie between. A
    training of 5,000 steps looks at every tenth (test_run.py): 0.1 waits a step, 0.2 are allowed.
    """
    seen = {}

    def fit_four(stage, *args, steps, upto=None, **options):
        fit(stage, *args, steps=1000, upto=4, **options)  # looks at every second

    def log(self, stage, step, **row):
        seen.setdefault(stage, []).append(sum(waits.values()))
    monkeypatch.setattr(train, "fit", fit_four)
    monkeypatch.setattr(train, "preview", lambda *args: None)
    monkeypatch.setattr(Run, "log", log)
    flags = ["--data", "histology", "--condition", "prompts", "--clusters", "2"]
    with pretend("cuda") as waits:
        assert train.main([*FEW, *flags, "--device", "cuda", "--out", str(tmp_path / "run")]) == 0
    looks = {stage: second - first for stage, (first, second) in seen.items()}
    assert looks == dict.fromkeys(train.STAGES, 1), waits


@pytest.mark.parametrize("options", [
    {"sampler": "ddim", "eta": 0.5, "guidance_scale": 2.0}, {"sampler": "ddpm"},
    {"sampler": "dpm"}])
def test_a_step_of_sampling_waits_for_nothing(small_run, options):
    """Two steps and six of a batch wait equally often."""
    with pretend("cuda") as waits:
        model = sample.load_model(small_run / "model.pt", torch.device("cuda"))[0]
        condition = torch.zeros(2, *model.config.token_shape, device="cuda")
        counts = []
        for steps in (2, 6):
            waits.clear()
            model.sample(condition, [0, 1], steps=steps, **options)
            counts.append(sum(waits.values()))
    assert counts[0] == counts[1] <= 2, waits


# ---- memory

def test_a_full_memory_names_flags_that_exist():
    """Each of them is one of train.py's."""
    parser = train_flags(train.PRESETS, train.VISION_TRANSFORMERS, train.TOKEN_KINDS)
    named = re.findall(r"--[\w-]+", MEMORY_FLAGS)
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert "--checkpointing" in named and set(named) <= known


# ---- MPS

def test_mps_is_spared_float64():
    """K-means and DiffSeg need it: they go to the CPU, and come back with the same results."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    centers, assignment = kmeans(x, 3)
    labels = diffseg([maps.softmax(-1)], 8, threshold=0.01)
    with pretend("mps"):
        there, numbers = kmeans(x.to("mps"), 3)
        assert type(there) is type(numbers) is OnDevice
        assert torch.equal(there.cpu(), centers) and torch.equal(numbers.cpu(), assignment)
        segments = diffseg([maps.to("mps").softmax(-1)], 8, threshold=0.01)
    assert torch.equal(segments.cpu(), labels)


@pytest.mark.slow
def test_training_with_clusters_runs_on_mps(smallest_networks, tmp_path):
    """Statistics, K-means and the mixture of tokens, which sum in float64, on the CPU."""
    flags = ["--data", "histology", "--condition", "prompts", "--clusters", "2"]
    assert train_on_device(tmp_path / "run", *flags, "--embedder", "random", device="mps") == 0
