"""Several processes: two gloo ranks on the CPU compute what one process computes.

Ranks are forks, which have torch already; one test starts torchrun itself. Sums of parts are
rounded in another order than the whole's, so losses agree to 1e-4 and not bit for bit; what no sum
crosses (the cache, samples) must agree bit for bit.
"""
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from dino import random_crops
from vae import vae_loss

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
    log = train.Run.log

    def log_and_stop(self, **row):
        log(self, **row)
        if (row["stage"], row["step"]) == (stage, step):
            self.stop_signal = signal.SIGINT
    train.Run.log = log_and_stop


def losses(folder, *stages):
    rows = data.read_jsonl(folder / "log.jsonl")
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


def given(alone):
    return [*TINY, "--vae", str(alone / "model.pt"), "--embedder", str(alone / "model.pt")]


def test_two_ranks_then_one_equal_one_process(alone, tmp_path):
    """Embedder, VAE, cache and half of the U-Net on two ranks, the rest on one: the losses of every
    step and the weights are those of one process. Rank 0 alone gets the stop signal; both stop."""
    out = tmp_path / "run"

    def work(rank):
        if rank == 0:
            stop_at("unet", 2)
        return train.main([*TINY, "--out", str(out)])
    assert on_two_ranks(work) == [130, 130]
    assert train.main(["--resume", "--out", str(out)]) == 0
    for stage in train.STAGES:  # the U-Net's latents and tokens come from nets a rounding apart
        gap = (losses(out, stage) - losses(alone, stage)).abs().max()
        print(f"{stage}: largest gap between losses {gap:.1e}")
        assert gap < (1e-3 if stage == "unet" else 1e-4)
    mine, theirs = weights(out), weights(alone)
    for name in mine:  # moved by 1e-3; where gradients are 0, AdamW makes steps of their rounding
        gap = (mine[name] - theirs[name]).abs()
        print(f"weights of {name}: {gap.mean():.1e} apart on average, {gap.max():.1e} at most")
        assert gap.mean() < 1e-4


def test_cache_and_unet_whoever_computes_them(alone, tmp_path):
    """With --accumulate 2 two ranks begin the cache, one goes on, two end: the cache is that of one
    process bit for bit, the losses are those of one process without --accumulate."""
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
        patch.setattr(train.Run, "log", train.Run.log)  # put back what half() changes
        assert half(0) == 130
    assert on_two_ranks(lambda rank: train.main(["--resume", "--out", str(out)])) == [0, 0]
    for name in ("latents.npy", "tokens.npy", "index.csv"):
        assert (out / "cache" / name).read_bytes() == (alone / "cache" / name).read_bytes()
    gap = (losses(out, "unet") - losses(alone, "unet")).abs().max()
    print(f"largest gap between losses {gap:.1e}")
    assert gap < 1e-4
    assert not (out / "lock").exists() and not list(out.glob(".*.tmp"))


def test_a_rank_that_fails_ends_the_others(tmp_path, capfd):
    """An image is damaged while two ranks train: both exit with code 2, without a traceback."""
    def work(rank):
        if rank == 1:
            def damaged(self, rows):
                raise data.UserError("x.png cannot be read", "a whole image", "replace it")
            train.Pictures.__getitems__ = damaged
        return data.run_script(lambda: train.main([*TINY, "--out", str(tmp_path / "run")]))
    assert on_two_ranks(work) == [2, 2]
    said = capfd.readouterr().err
    assert "x.png" in said and "another process" in said and "Traceback" not in said


def test_torchrun_trains(alone, tmp_path):
    """The command of the README: a finished run, everything is said once, no warning."""
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


@pytest.mark.parametrize("count", [2, 6])
def test_a_cut_batch_gets_the_noise_of_the_whole(alone, count):
    """The mean loss of the parts is the loss of the whole (rounding: 1e-6), and the DINO views of
    the parts are those of the whole, bit for bit."""
    model, _ = sample.load_model(alone, torch.device("cpu"))
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, tokens = model.vae.encode(x), model.embed(x)

    def share(index, count):
        generator = train.Share().manual_seed(3)
        generator.share = index, count
        return slice(index, None, count), generator

    def unet(index=0, count=1):
        own, g = share(index, count)
        return model.loss(posterior.mean[own], posterior.std[own], tokens[own], g)[0].item()

    def vae(index=0, count=1):
        own, g = share(index, count)
        return vae_loss(model.vae, x[own], g)[0].item()

    def views(index=0, count=1):
        own, g = share(index, count)
        return random_crops(x[own], 2, 16, (0.5, 1.0), 0.1, g).unflatten(0, (2, -1))
    for loss in (unet, vae):
        parts = [loss(index, count) for index in range(count)]
        assert abs(sum(parts) / count - loss()) < 1e-6 < max(parts) - min(parts)
    for index in range(count):
        assert torch.equal(views(index, count), views()[:, index::count])


@pytest.mark.parametrize("flags,says", [
    (["--batch", "3"], "--batch 3"), (["--vae-batch", "1"], "--vae-batch 1"),
    (["--accumulate", "8"], "--batch 8 cannot be cut into 2 x 8 equal parts")])
def test_batches_that_ranks_cannot_share_are_refused(monkeypatch, flags, says):
    """Every rank needs equally many images: the means of the parts must be the whole's."""
    monkeypatch.setattr(data, "ranks", lambda: 2)
    with pytest.raises(data.UserError, match=says):
        train.parse([*TINY, *flags])


def test_each_rank_takes_its_own_gpu(monkeypatch):
    """Process 1 of a machine takes its GPU 1, if there is one, unless the CPU is asked for."""
    monkeypatch.setattr(data, "ranks", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert data.pick_device("auto") == data.pick_device("cuda") == torch.device("cuda:1")
    assert data.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(data.UserError, match="cuda:1.*fewer processes"):
        data.pick_device("auto")


def test_dry_run_forecasts_the_cache(alone, tmp_path, monkeypatch):
    """Bytes an image times images is the size of the files (headers: 128 bytes); nothing is
    written; a folder that is not there gives settings without a forecast."""
    monkeypatch.chdir(tmp_path)

    def forecast(*flags):
        args = train.parse([*TINY, "--dry-run", *flags])
        return train.forecast_cache(args)
    told, rows = forecast(), sum(1 for _ in open(alone / "cache/index.csv")) - 1
    size = sum((alone / "cache" / name).stat().st_size - 128
               for name in ("latents.npy", "tokens.npy"))
    assert told["bytes_an_image"] * rows == size and told["images"] == 30
    assert 0 < told["hours"] < 1
    shutil.copytree(alone / "held_out", "mine/images")
    assert forecast("--data", "mine")["images"] == len(list(Path("mine").rglob("*.png")))
    assert set(forecast("--data", "nowhere")) == {"note"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
