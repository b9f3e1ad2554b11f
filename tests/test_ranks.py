"""Several processes: two gloo ranks on the CPU share a batch, stop and go on together.

Ranks are forks, which have torch already; one test starts torchrun itself. Means of parts are
rounded in another order than the whole's; what no sum crosses (the cache, samples) must agree bit
for bit.
"""
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import sample
import train
from support import cache, command, settings
from support.command import UserError, run_script
from support.files import read_jsonl
from support.run import Run

pytestmark = pytest.mark.usefixtures("small_networks")
ROOT = Path(__file__).parent.parent
TINY = ["--data", "phantoms", "--count", "30", "--size", "32", "--batch", "8", "--vae-batch", "2",
        "--embedder-batch", "4", "--steps", "3", "--grids", "1", "--device", "cpu",
        "--dtype", "float32"]


def on_two_ranks(work, seconds=100):
    """Fork two processes that join and call work(rank); their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if not ranks[-1]:
            code = 99
            try:
                torch.set_num_threads(1)  # makes PyTorch's pool anew, before several threads ask
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                code = work(rank)
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < 2:
        for process in set(ranks) - set(codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until or 99 in codes.values():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[process] for process in ranks]


def stop_at(stage, step):
    """In this process, from now on: a stop signal comes when that step is logged."""
    log = Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == (stage, step):
            self.stop_signal = signal.SIGINT
    Run.log = log_and_stop


def losses(folder, *stages):
    rows = read_jsonl(folder / "log.jsonl")
    assert [(r["stage"], r["step"]) for r in rows if r["stage"] in stages] == [
        (stage, step) for stage in stages for step in (1, 2, 3)]
    return torch.tensor([row["loss"] for row in rows if row["stage"] in stages])


def weights(folder):
    """All trained numbers of model.pt, as one vector for each part."""
    model = torch.load(folder / "model.pt", weights_only=True)
    parts = {**{n: model[n] for n in ("vae", "unet", "projection")},
             "vit": model["embedder"]["model"]}
    return {name: torch.cat([t.flatten() for t in part.values()]) for name, part in parts.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All stages in one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
    """All stages on two ranks, forked when one process has compiled and drawn what they need."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    assert on_two_ranks(lambda rank: train.main([*TINY, "--out", str(folder)])) == [0, 0]
    return folder


def given(alone):
    return [*TINY, "--vae", str(alone / "model.pt"), "--embedder", str(alone / "model.pt")]


@pytest.mark.parametrize("stage", ["embedder", "unet"])
def test_resumed_on_as_many_ranks_a_run_goes_on_exactly(together, tmp_path, stage):
    """Rank 0 alone gets the stop signal; both stop, and after a resume on two ranks the losses and
    the weights are bit for bit those of two ranks that were never stopped."""
    out = tmp_path / "run"

    def begin(rank):
        if rank == 0:
            stop_at(stage, 2)
        return train.main([*TINY, "--out", str(out)])
    assert on_two_ranks(begin) == [130, 130]
    assert on_two_ranks(lambda rank: train.main(["--resume", "--out", str(out)])) == [0, 0]
    assert torch.equal(losses(out, *train.STAGES), losses(together, *train.STAGES))
    mine, theirs = weights(out), weights(together)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_resumed_on_one_process_it_goes_on(together, tmp_path):
    """Two steps on two ranks, the third on one process: all rows of the log, those of the first two
    equal, finite weights."""
    out = tmp_path / "run"

    def begin(rank):
        stop_at("unet", 2)
        return train.main([*TINY, "--out", str(out)])
    assert on_two_ranks(begin) == [130, 130]
    assert train.main(["--resume", "--out", str(out)]) == 0
    mine, theirs = losses(out, *train.STAGES), losses(together, *train.STAGES)
    assert torch.equal(mine[:8], theirs[:8]) and mine.isfinite().all()
    assert all(vector.isfinite().all() for vector in weights(out).values())


class Points:
    """Eight points and their values."""

    def __len__(self):
        return 8

    def __getitems__(self, rows):
        x = torch.linspace(-1, 1, 8)[rows, None]
        return x, 3 * x + 1


def fitted(accumulate=1):
    """Weights of a line after five steps of `fit`, in half precision nowhere."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)

    def loss_fn(batch, step, generator):
        x, y = batch
        return (model(x) - y).square().mean(), {}
    train.fit("line", model, loss_fn, Points(), steps=5, batch=8, lr=0.1, clip=0.5,
              device=torch.device("cpu"), accumulate=accumulate)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_batch_cut_in_parts_gives_the_step_of_the_whole(tmp_path):
    """Two ranks, --accumulate and both: the weights after five clipped steps are those of one
    process (rounding: 1e-6), and both ranks hold the same ones."""
    whole = fitted()

    def work(rank):
        from support.ranks import join_ranks
        join_ranks()
        torch.save([fitted(), fitted(accumulate=2)], tmp_path / f"{rank}.pt")
        return 0
    assert on_two_ranks(work) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mine, theirs in zip(first, second):
        assert torch.equal(mine, theirs)
    for vector in (*first, fitted(accumulate=2), fitted(accumulate=4)):
        assert (vector - whole).abs().max() < 1e-6


def test_ranks_and_parts_draw_noise_of_their_own():
    """Two parts of one step, and two steps, get different random numbers; the same twice."""
    drawn = []

    def loss_fn(batch, step, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return model(batch[0]).mean(), {}
    model = torch.nn.Linear(1, 1)
    for _ in range(2):
        train.fit("line", model, loss_fn, Points(), steps=2, batch=4, lr=0.1, accumulate=2,
                  device=torch.device("cpu"))
    assert drawn[:4] == drawn[4:] and len(set(drawn)) == 4


def test_the_cache_whoever_computes_it(alone, tmp_path):
    """Two ranks begin the cache, one goes on, two end: it is that of one process bit for bit."""
    out, tokens = tmp_path / "run", train.conditioning_tokens
    calls = []

    def interrupted_once(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 1 else None)
        return tokens(*arguments)

    def begin(rank):
        if rank == 1:  # its first call is in build_model: the second, in the first round
            train.conditioning_tokens = interrupted_once
        return train.main([*given(alone), "--accumulate", "2", "--out", str(out)])

    def half(rank):
        stop_at("unet", 2)
        return train.main(["--resume", "--out", str(out)])
    assert on_two_ranks(begin) == [130, 130]
    assert json.loads((out / "cache/progress.json").read_text())["rows"] == 16  # 2 ranks x 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", Run.log)  # put back what half() changes
        assert half(0) == 130
    assert on_two_ranks(lambda rank: train.main(["--resume", "--out", str(out)])) == [0, 0]
    for name in ("latents.npy", "tokens.npy", "index.csv"):
        assert (out / "cache" / name).read_bytes() == (alone / "cache" / name).read_bytes()
    assert losses(out, "unet").isfinite().all()
    assert not (out / "lock").exists() and not list(out.glob(".*.tmp"))


def test_a_rank_that_fails_ends_the_others(tmp_path, capfd):
    """An image is damaged while two ranks train: both exit with code 2, without a traceback."""
    def work(rank):
        if rank == 1:
            def damaged(self, rows):
                raise UserError("x.png cannot be read", "a whole image", "replace it")
            cache.Pictures.__getitems__ = damaged
        return run_script(lambda: train.main([*TINY, "--out", str(tmp_path / "run")]))
    assert on_two_ranks(work) == [2, 2]
    said = capfd.readouterr().err
    assert "x.png" in said and "another process" in said and "Traceback" not in said


def test_torchruns_launcher_trains(alone, tmp_path, capfd):
    """Two ranks that torchrun's own launcher forks: a finished run, everything is said once, no
    warning."""
    out = tmp_path / "run"
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork",
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    codes = elastic_launch(config, train.main)(
        [*given(alone), "--steps", "1", "--out", str(out)])
    said = capfd.readouterr()
    assert codes == {0: 0, 1: 0}, said.err
    assert "Warning" not in said.err and said.out.count("done in") == 1
    assert (out / "model.pt").exists() and not (out / "lock").exists()


@pytest.mark.slow
def test_torchrun_trains(alone, tmp_path):
    """The command of the README: the same from new processes."""
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(ROOT / "train.py"), *given(alone), "--steps", "1", "--out", str(out)],
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and done.stdout.count("done in") == 1
    assert (out / "model.pt").exists() and not (out / "lock").exists()


def test_samples_are_those_of_one_process(alone, tmp_path):
    """Five images in batches of two, the last round not full: pictures, grid and table are equal
    bit for bit."""
    def work(rank=0, name="one"):
        return sample.main(["--random", "--count", "5", "--steps", "3", "--batch", "2", "--device",
                            "cpu", "--checkpoint", str(alone), "--out", str(tmp_path / name)])
    assert work() == 0
    assert on_two_ranks(lambda rank: work(rank, "two")) == [0, 0]
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 7
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(list(csv.DictReader(open(tmp_path / "two/samples.csv")))) == 5


@pytest.mark.parametrize("flags,says", [
    (["--batch", "3"], "--batch 3"), (["--vae-batch", "1"], "--vae-batch 1"),
    (["--accumulate", "8"], "--batch 8 cannot be cut into 2 x 8 equal parts")])
def test_batches_that_ranks_cannot_share_are_refused(monkeypatch, flags, says):
    """Every rank needs equally many images: the means of the parts must be the whole's."""
    monkeypatch.setattr(settings, "ranks", lambda: 2)
    with pytest.raises(UserError, match=says):
        train.parse([*TINY, *flags])


def test_each_rank_takes_its_own_gpu(monkeypatch):
    """Process 1 of a machine takes its GPU 1, if there is one, unless the CPU is asked for."""
    monkeypatch.setattr(command, "ranks", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.pick_device("auto") == command.pick_device("cuda") == torch.device("cuda:1")
    assert command.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="cuda:1.*fewer processes"):
        command.pick_device("auto")
