"""support/speed.py: threads that earn their place, compiled blocks, attention."""
import json
import time

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import train
from conftest import TINY
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from make_diffusers import inputs
from small_run import SMALL
from support import speed
from support.command import UserError
from support.files import read_jsonl
from support.run import Progress, Run
from support.speed import (ThreadWatch, attention, compile_blocks, compile_where_it_pays, rehearse,
                           repeated_blocks, set_threads)
from unet import UNet, UNetConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def default_of_two(monkeypatch):
    """Two threads, as on a machine of two cores whose user has set nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def never():
    raise AssertionError("measured")


def step_of(seconds):
    """A step that takes seconds[threads]."""
    return lambda: time.sleep(seconds[torch.get_num_threads()])


@pytest.mark.parametrize("seconds, chosen", (
    ({1: 0.01, 2: 0.1}, 1), ({1: 0.1, 2: 0.01}, 2), ({1: 0.1, 2: 0.095}, 1)))
def test_the_faster_number_is_set(seconds, chosen):
    threads, gain = set_threads(0, CPU, 1000, step_of(seconds))
    assert threads == chosen == torch.get_num_threads()
    assert gain == pytest.approx(seconds[1] / seconds[2], rel=0.5)


def test_nothing_is_measured_without_need(monkeypatch):
    """A number is given, the run is short, there are ranks or one core, or OMP_NUM_THREADS is set;
    on a GPU the number stays as it is."""
    assert set_threads(3, CPU, 1000, never) == (3, 0)
    assert torch.get_num_threads() == 3
    assert set_threads(0, CPU, 99, never) == (3, 0)
    assert set_threads(0, torch.device("cuda"), 1000, never) == (0, 0)
    assert torch.get_num_threads() == 3
    with monkeypatch.context() as patch:
        patch.setattr(speed, "ranks", lambda: 2)
        assert set_threads(0, CPU, 1000, never) == (3, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set_threads(0, CPU, 1000, never) == (3, 0)
    torch.set_num_threads(1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(0, CPU, 1000, never) == (1, 0)  # one core


def test_a_run_falls_back_to_one_thread():
    """Where several are slower than one was, twice in succession; not before, and not where their
    gain is unknown."""
    for gain, looks, left in ((1.6, (3.0, 1.0, 1.9, 2.1, 1.9), 2), (0.0, (1.0, 9.0, 9.0), 2),
                              (1.6, (1.0, 2.1, 2.1), 1)):
        watch = ThreadWatch(gain)
        for seconds in looks:
            watch.look("unet", 10, 10 * seconds)
        assert torch.get_num_threads() == left

    # Fast steps of the stage before say nothing about this one's.
    torch.set_num_threads(2)
    watch = ThreadWatch(1.3)
    for stage, seconds in [("unet", 0.045)] * 100 + [("refiner", 0.2)] * 100:
        watch.look(stage, 1, seconds)
    assert torch.get_num_threads() == 2


def test_a_resumed_run_stays_with_one_thread(tmp_path, monkeypatch):
    """If it had fallen back before its state was saved."""
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    monkeypatch.setattr(speed, "WINDOW", 0.01)
    run = Run(tmp_path, {"threads": 2}, thread_gain=1.6)
    progress = Progress(run, "unet", 30, 30, net, optimizer, None)
    for step in range(30):
        time.sleep(0.002 if step < 10 else 0.02)
        progress.after_step(torch.tensor(1.0), torch.tensor(1.0), 1e-3, 1, {})
    run.close()
    assert [row["threads"] for row in read_jsonl(tmp_path / "log.jsonl")][::29] == [2, 1]

    torch.set_num_threads(2)
    again = Run(tmp_path, {"threads": 2}, resume=True)
    again.close()
    assert torch.get_num_threads() == 1 and again.thread_watch.gain == 1.6


@pytest.mark.parametrize("condition", ("dino", "labels"))
def test_a_rehearsal_leaves_no_trace(condition):
    """Neither in the random state, nor in weights, gradients or buffers; every weight of the U-Net
    has its part in it."""
    labels = ("clear", "sick") if condition == "labels" else ()
    model = DinoDiffusion(DinoDiffusionConfig(
        **SMALL, condition=condition, labels=labels,
        template="a <label> chest" if labels else ""))
    gradients = set()
    for name, p in model.unet.named_parameters():
        p.register_hook(lambda gradient, name=name: gradients.add(name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    set_threads(0, CPU, 1000, lambda: rehearse(model, 2, torch.bfloat16, backward=False))
    assert not gradients
    torch.set_num_threads(2)
    set_threads(0, CPU, 1000, lambda: rehearse(model, 2, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), state)
    assert gradients == {name for name, _ in model.unet.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("small_networks")
def test_a_resumed_run_takes_the_same_number(tmp_path, monkeypatch):
    """Measured once, on the model itself; then read from config.json."""
    monkeypatch.setattr(speed, "MIN_STEPS", 1)
    counts = []

    def shortest(step):
        step()
        counts.append(torch.get_num_threads())
        return 0.1 * len(counts)  # two threads are slower

    monkeypatch.setattr(speed, "shortest", shortest)
    flags = [*TINY, "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["threads"] == 1
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert train.main([*flags, "--resume"]) == 0
    assert torch.get_num_threads() == 1 and counts == [1, 2]
    with pytest.raises(UserError, match="--threads 2 differs from the run's 1"):
        train.main([*flags, "--resume", "--threads", "2"])


# ---- compiling ---------------------------------------------------------------------------------

UNET = UNetConfig(4, 4, 8, (1,), 1, (True,), 12, 2)  # one level: tracing takes long


@pytest.fixture
def counter():
    """A backend that counts graphs and runs them eagerly."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def steps(unet, count, batch=2):
    for _ in range(count):
        xt, context = inputs(1, (batch, 4, 4, 4), (batch, 3, 12))
        unet(xt, torch.arange(batch), context).square().mean().backward()


def test_compiled_blocks_keep_their_graphs(counter):
    """Blocks compile without a break; steps add no graph, another batch at most one per block."""
    unet = UNet(UNET)
    compile_blocks(unet, backend=counter, fullgraph=True)
    steps(unet, 1)
    first = counter.frame_count
    blocks = sum(isinstance(module, UNet.repeated_blocks) for module in unet.modules())
    assert 0 < first <= blocks
    steps(unet, 2)
    assert counter.frame_count == first
    steps(unet, 1, batch=3)
    assert counter.frame_count <= 2 * first


@pytest.mark.parametrize("wanted, device, steps, seconds, compiled", (
    (None, "cuda", 1000, (2.0, 1.0), True),
    (None, "cuda", 1000, (1.0, 2.0), False),  # slower: undone
    (None, "cuda", 100, (2.0, 1.0), False),   # too short a run to try
    (None, "cpu", 1000, (2.0, 1.0), False),
    (False, "cuda", 1000, (2.0, 1.0), False),
    (None, "cuda", 1000, (2.0, RuntimeError("no compiler")), False),
    (True, "cpu", 1, (), True),
))
def test_blocks_are_compiled_where_it_pays(monkeypatch, counter, wanted, device, steps, seconds,
                                           compiled):
    """By the seconds of a step before and after; blocks that are not faster run as before."""
    timings = iter(seconds)

    def shortest(step):
        seconds = next(timings)
        if isinstance(seconds, Exception):
            raise seconds
        return seconds

    monkeypatch.setattr(speed, "shortest", shortest)
    unet = UNet(UNET)
    chosen = compile_where_it_pays(unet, wanted, torch.device(device), steps, lambda: None,
                                   backend=counter)
    assert chosen == compiled
    assert all((block._compiled_call_impl is not None) == compiled
               for block in repeated_blocks(unet))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03)))
def test_attention_equals_the_fused_kernel(dtype, tolerance):
    """Values and gradients, with a mask, in both formats."""
    q, k, v = inputs(0, (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4))
    mask = torch.tensor([True, True, False, True, True, True, False]).view(1, 1, 1, 7)
    results = []
    for kind, function in ((dtype, attention), (torch.float32, F.scaled_dot_product_attention)):
        parts = [part.to(kind).requires_grad_() for part in (q, k, v)]
        h = function(*parts, mask)
        results.append((h, *torch.autograd.grad(h.float().square().sum(), parts)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)
