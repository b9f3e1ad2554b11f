"""A run's folder and its watch: state, log, moments in the layout of their parameters."""
import json
import signal

import pytest
import torch

from support.command import UserError
from support.files import read_jsonl
from support.run import Progress, Run, Stopped, load_optimizer


def network(layout=torch.contiguous_format):
    """A small convolution with its optimizer, always the same."""
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


@pytest.mark.parametrize("written,read", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_a_state_of_another_memory_layout_goes_on_as_it_would_have(tmp_path, written, read):
    """AdamW's moments take the strides of their parameters: the next steps are those of the run
    that went on (rounding: 1e-5), from channels_last to contiguous and back."""
    conv, optimizer = network(written)
    for seed in range(3):
        step(conv, optimizer, seed)
    torch.save([conv.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt")

    other, its_optimizer = network(read)
    other.load_state_dict(weights)
    load_optimizer(its_optimizer, state)
    for p, moments in its_optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
    for seed in (3, 4):
        step(conv, optimizer, seed)
        step(other, its_optimizer, seed)
    assert (conv.weight - other.weight).abs().max() < 1e-5


def test_what_is_saved_comes_back(tmp_path):
    """Model, optimizer and EMA of a stage, the results of finished ones; log rows after the saved
    step are dropped, those of finished stages stay."""
    run = Run(tmp_path / "run", {"size": 1})
    conv, optimizer = network()
    run.finish("vae", {"w": torch.ones(2)})
    run.log(stage="vae", step=9, loss=0.5)
    step(conv, optimizer, 0)
    ema = {"w": torch.full((3,), 7.0)}
    run.log(stage="unet", step=1, loss=1.0)
    run.save("unet", 1, conv, optimizer, ema)
    run.log(stage="unet", step=2, loss=2.0)
    run.lock.close()

    again = Run(tmp_path / "run", {"size": 1}, resume=True)
    assert again.finished["vae"]["w"].tolist() == [1, 1] and again.steps_done("unet") == 1
    assert again.steps_done("vae") == 0
    assert [(row["stage"], row["step"]) for row in again.rows()] == [("vae", 9), ("unet", 1)]
    other, its_optimizer = network()
    back = {"w": torch.zeros(3)}
    assert again.restore("unet", other, its_optimizer, back) == 1
    assert torch.equal(other.weight, conv.weight) and back["w"].tolist() == [7, 7, 7]
    assert torch.equal(step(conv, optimizer, 1), step(other, its_optimizer, 1))
    again.lock.close()

    with pytest.raises(UserError, match="made with size 1, not 2"):
        Run(tmp_path / "run", {"size": 2}, resume=True)


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    """`fit` may be called without a run: losses are still watched."""
    monkeypatch.chdir(tmp_path)
    conv, optimizer = network()
    progress = Run().begin("test", 2, 2, conv, optimizer, None)
    progress.after_step(torch.tensor(1.0), torch.tensor(1.0), 0.1, 4, {})
    with pytest.raises(UserError, match="test: the loss .* is nan at step 2 .*lower --lr"):
        progress.after_step(torch.tensor(float("nan")), torch.tensor(1.0), 0.1, 4, {})
    assert not list(tmp_path.iterdir())


def test_a_signal_stops_after_the_step_and_saves(tmp_path):
    """The mark of a signal: the state is on the disk, Stopped carries the number; after the last
    step nothing is stopped."""
    run = Run(tmp_path / "run", {})
    conv, optimizer = network()
    progress = Progress(run, "vae", 2, 2, conv, optimizer, None)
    one = torch.tensor(1.0)
    with run.signals_caught():
        signal.raise_signal(signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            progress.after_step(one, one, 0.1, 4, {"kl": one})
        assert stopped.value.args == (signal.SIGTERM,)
        progress.after_step(one, one, 0.1, 4, {"kl": one})
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    rows = read_jsonl(tmp_path / "run/log.jsonl")
    assert [(row["step"], row["loss"], row["lr"], row["kl"]) for row in rows] == [
        (1, 1.0, 0.1, 1.0), (2, 1.0, 0.1, 1.0)]
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["state"]["step"] == 2


def test_losses_are_looked_at_every_ten_steps():
    """Of 5,000 steps a row is the mean of ten losses; looking waits for the GPU."""
    rows = []
    run = Run()
    run.log = lambda **row: rows.append((row["step"], row["loss"]))
    conv, optimizer = network()
    progress = run.begin("vae", 5000, 5000, conv, optimizer, None)
    for value in range(20):
        progress.after_step(torch.tensor(float(value)), torch.tensor(1.0), 0.1, 1, {})
    assert rows == [(10, 4.5), (20, 14.5)]


def test_a_model_says_how_it_was_trained(tmp_path):
    """model.pt: version, checkpoint and settings; config.json holds the same settings."""
    run = Run(tmp_path / "run", {"seed": 3, "depth": None})
    run.write_model({"vae": {}})
    run.close()
    model = torch.load(tmp_path / "run/model.pt", weights_only=True)
    assert model["training"] == {"seed": 3, "depth": None} and model["version"] and "vae" in model
    assert json.loads((tmp_path / "run/config.json").read_text()) == model["training"]
    assert not (tmp_path / "run/lock").exists()
