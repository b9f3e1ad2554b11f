"""Two gloo ranks on the CPU share batches, stop and resume together.

torchrun's own launcher forks them. Sums over ranks are rounded differently; caches and samples,
which need none, must agree bit for bit.
"""
import csv
import os
import signal

import numpy as np
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import sample
import train
from conftest import TINY
from support.cache import Arrays, build_cache
from support.files import read_jsonl
from support.ranks import join_ranks, rank
from support.run import Run

pytestmark = [pytest.mark.usefixtures("small_networks"),
              pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]
SHARED = [*TINY[:6], "--batch", "8", *TINY[8:], "--holdout", "0"]


def on_two_ranks(work):
    """Call work() in two processes, as torchrun does; a list of what each returns."""
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork",
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    results = elastic_launch(config, work)()
    return [results[0], results[1]]


@pytest.fixture(scope="module")
def together(tmp_path_factory, small_networks):
    """A training on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    assert on_two_ranks(lambda: train.main([*SHARED, "--out", str(folder)])) == [0, 0]
    return folder


def test_two_ranks_resume_exactly(together, tmp_path):
    """Only rank 0 gets the signal; both stop, and after a resume losses and weights are equal, bit
    for bit, to those of a run that was never stopped."""
    out = tmp_path / "run"

    def stop():
        log = Run.log

        def log_and_stop(self, **row):
            log(self, **row)
            if (row["stage"], row["step"]) == ("unet", 2) and not rank():
                self.stop_signal = signal.SIGINT
        Run.log = log_and_stop
        return train.main([*SHARED, "--out", str(out)])
    assert on_two_ranks(stop) == [130, 130]
    assert on_two_ranks(lambda: train.main(["--resume", "--out", str(out)])) == [0, 0]
    rows, expected = ([(row["stage"], row["step"], row["loss"]) for row in
                       read_jsonl(folder / "log.jsonl")] for folder in (out, together))
    assert rows == expected
    mine, theirs = (torch.load(folder / "model.pt", weights_only=True)["unet"]
                    for folder in (out, together))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


class Points:
    """Eight points."""

    def __len__(self):
        return 8

    def __getitems__(self, rows):
        return (torch.linspace(-1, 1, 8)[rows, None],)


def fitted(accumulate=1):
    """Weights of a line after five steps of `fit`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)

    def loss_fn(batch, step, generator):
        x, = batch
        return (model(x) - (3 * x + 1)).square().mean(), {}
    train.fit("line", model, loss_fn, Points(), steps=5, batch=8, lr=0.1, clip=0.5,
              device=torch.device("cpu"), accumulate=accumulate)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_a_batch_cut_in_parts_gives_the_step_of_the_whole(tmp_path):
    """Two ranks, --accumulate, and both: the weights after five clipped steps equal those of one
    process (rounding: 1e-6), and those of the other rank exactly. A cache is equal bit for bit."""
    def cached(folder):
        build_cache(folder, {"x": ((1,), np.float32)}, Points(), lambda x, rows: {"x": x.exp()},
                    "a", Run(), batch=3)
        return Arrays(folder, ["x"]).__getitems__(list(range(8)))[0].tolist()

    def work():
        join_ranks()
        return fitted(), fitted(accumulate=2), cached(tmp_path / "two")
    first, second = on_two_ranks(work)
    assert first == second
    for weights in (*first[:2], fitted(accumulate=2), fitted(accumulate=4)):
        assert weights == pytest.approx(fitted(), abs=1e-6)
    assert first[2] == cached(tmp_path / "one")


def test_samples_are_those_of_one_process(together, tmp_path):
    """Five images in batches of two, the last one not full: all files are equal bit for bit."""
    def work(name="one"):
        return sample.main(["--random", "--count", "5", "--steps", "3", "--batch", "2", "--device",
                            "cpu", "--checkpoint", str(together), "--out", str(tmp_path / name)])
    assert work() == 0
    assert on_two_ranks(lambda: work("two")) == [0, 0]
    one, two = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
                for folder in (tmp_path / "one", tmp_path / "two"))
    assert len(one) == 7 and one == two
    assert len(list(csv.DictReader(open(tmp_path / "two" / "samples.csv")))) == 5
