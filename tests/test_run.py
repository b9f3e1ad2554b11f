"""support/run.py: the state of a run, its log, flags, signals, losses that are not finite."""
import argparse
import json
import signal

import pytest
import torch

from support.command import Stopped, UserError
from support.files import read_jsonl
from support.run import Progress, Run, resume_flags

ONE = torch.tensor(1.0)


def network(layout=torch.contiguous_format):
    """A small convolution, always the same, and its optimizer."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 4, 3, padding=1).to(memory_format=layout)
    return conv, torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)


def step(conv, optimizer, seed):
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(seed))
    loss = (conv(x) - x[:, :4]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_a_saved_state_comes_back(tmp_path):
    """Model, optimizer and EMA of a stage, and results of finished stages; log rows after the saved
    step are dropped."""
    run = Run(tmp_path / "run", {"size": 1})
    conv, optimizer = network()
    run.finish("vae", {"w": torch.ones(2)})
    run.log(stage="vae", step=9, loss=0.5)
    step(conv, optimizer, 0)
    ema = {"w": torch.full((3,), 7.0)}
    run.log(stage="unet", step=1, loss=1.0)
    run.save("unet", 1, conv, optimizer, ema)
    run.log(stage="unet", step=2, loss=2.0)
    run.close()

    again = Run(tmp_path / "run", {"size": 1}, resume=True)
    assert again.finished["vae"]["w"].tolist() == [1, 1]
    assert again.steps_done("unet") == 1 and again.steps_done("vae") == 0
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("vae", 9), ("unet", 1)]
    other, its_optimizer = network()
    loaded = {"w": torch.zeros(3)}
    assert again.restore("unet", other, its_optimizer, loaded) == 1
    assert torch.equal(other.weight, conv.weight) and loaded["w"].tolist() == [7, 7, 7]
    assert torch.equal(step(conv, optimizer, 1), step(other, its_optimizer, 1))
    again.close()


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    for name in ("--data", "--out", "--device"):
        parser.add_argument(name, default="cxr")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--resume", action="store_true")
    return parser


def test_flags_of_a_resumed_run(parser, tmp_path):
    """Flags that are left out keep their values; the device may change, and the place of the
    images; anything else is refused, and so is a folder with a run without --resume."""
    out = str(tmp_path)
    assert resume_flags(parser, ["--lr", "0.2"], out).lr == 0.2  # no run yet
    saved = {"data": "old", "lr": 0.3, "device": "cuda", "out": "runs/a", "settings": {"lr": 9}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="already contains a run.*--resume"):
        resume_flags(parser, [], out)
    assert vars(resume_flags(parser, ["--resume", "--lr", "3e-1"], out)) == {
        "data": "old", "lr": 0.3, "device": "cuda", "out": out, "resume": True}
    args = resume_flags(parser, ["--resume", "--data", out, "--device", "cpu"], out)
    assert (args.data, args.device) == (out, "cpu")
    for flags in (["--lr", "0.1"], ["--data", "elsewhere"]):
        with pytest.raises(UserError, match=f"{flags[0]} {flags[1]} differs from the run's"):
            resume_flags(parser, ["--resume", *flags], out)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        resume_flags(parser, ["--resume"], out)


def test_a_state_of_another_memory_layout_resumes(tmp_path):
    """Moments take the strides of their parameters: a run saved in channels_last and resumed in the
    contiguous layout makes the same steps (rounding: 1e-5)."""
    conv, optimizer = network(torch.channels_last)
    for seed in range(3):
        step(conv, optimizer, seed)
    run = Run(tmp_path / "run", {})
    run.save("vae", 3, conv, optimizer, None)
    run.close()
    other, its_optimizer = network()
    again = Run(tmp_path / "run", {}, resume=True)
    assert again.restore("vae", other, its_optimizer, None) == 3
    for seed in (3, 4):
        step(conv, optimizer, seed)
        step(other, its_optimizer, seed)
    assert (conv.weight - other.weight).abs().max() < 1e-5


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    """`fit` may be called without a run: losses are still watched."""
    monkeypatch.chdir(tmp_path)
    conv, optimizer = network()
    progress = Progress(Run(), "test", 3, 3, conv, optimizer, None)
    progress.after_step(ONE, ONE, 0.1, 4, {})
    with pytest.raises(UserError, match="test: the loss .* is nan at step .*learning rate"):
        progress.after_step(torch.tensor(float("nan")), ONE, 0.1, 4, {})
    assert not list(tmp_path.iterdir())


def test_a_signal_saves_and_stops_after_the_step(tmp_path):
    """The first signal saves the step and raises Stopped with its number; a second one would kill.
    After the last step nothing is raised. The handlers of before are restored."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path / "run", {})
    progress = Progress(run, "vae", 2, 2, *network(), None)
    with run.signals_caught():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(Stopped) as stopped:
            progress.after_step(ONE, ONE, 0.1, 4, {"kl": ONE})
        assert stopped.value.args == (signal.SIGTERM,)
        state = torch.load(tmp_path / "run/state.pt", weights_only=True)["state"]
        assert (state["stage"], state["step"]) == ("vae", 1)
        progress.after_step(ONE, ONE, 0.1, 4, {"kl": ONE})
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [(row["step"], row["loss"], row["lr"], row["kl"]) for row in rows] == [
        (1, 1.0, 0.1, 1.0), (2, 1.0, 0.1, 1.0)]
