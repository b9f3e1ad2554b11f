"""Compiled blocks in every stage: no graph break, no recompilation, other batches as they were."""
import pytest
import torch
import torch._dynamo

import train
from dino import DINO, DINOConfig, ViTConfig
from dinodiff import DinoDiffusion, DinoDiffusionConfig
from support import compiling
from support.compiling import Compiler, compile_pays
from unet import UNetConfig
from vae import VAEConfig, vae_loss

LATENTS = (4, 8, 8), (4, 8, 8), (5, 12)  # mean, std, tokens
IMAGES = [(3, 16, 16)]


class Rows(torch.utils.data.TensorDataset):
    def __getitems__(self, rows):
        return tuple(x[rows] for x in self.tensors)


class Counter:
    """A backend that counts graphs and their calls, and runs them as they are."""
    graphs = calls = 0

    def __call__(self, graph, _):
        self.graphs += 1

        def call(*inputs):
            self.calls += 1
            return graph(*inputs)
        return call


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()
    torch.compiler.set_stance("default")


def stage(name):
    """What fit trains, its loss and the shapes of its data; one level each: tracing takes long."""
    torch.manual_seed(0)
    model = DinoDiffusion(DinoDiffusionConfig(
        image_size=16, vae=VAEConfig(3, 4, 8, (1, 1), 1), vit=ViTConfig(8, 12, 2, 3, 16),
        unet=UNetConfig(4, 4, 8, (1,), 1, (True,), 8, 2), token_shape=(5, 12),
        refiner=UNetConfig(24, 12, 8, (1,), 1, (False,), 8, 2)))
    model.unet.checkpointing = name == "unet, checkpointing"
    if name.startswith("unet"):
        return model, model.trained, lambda rows, step, g: model.loss(*rows, g), LATENTS
    if name == "vae":
        vae = model.vae.requires_grad_(True)
        return model, vae, lambda rows, step, g: vae_loss(vae, rows[0], g), IMAGES
    if name == "embedder":
        dino = DINO(model.config.vit, DINOConfig(32, 8, 16))
        return model, dino, lambda rows, step, g: dino.loss(rows[0], g), IMAGES
    return model, model.refiner, lambda rows, step, g: model.refiner.loss(
        rows[0], rows[0].flip(3), model.schedule, g), IMAGES


@pytest.mark.parametrize("name, dtype", [
    ("unet, checkpointing", torch.bfloat16), ("vae", torch.bfloat16),
    ("embedder", torch.float32), ("refiner", torch.bfloat16)])
def test_a_stage_compiles_in_its_first_step_alone(counter, name, dtype):
    """Steps add no graph; a batch of another size and, during training, a sample run eagerly."""
    model, trained, loss, shapes = stage(name)
    data = Rows(*(torch.rand(8, *shape) for shape in shapes))
    compiler = Compiler(trained, torch.device("cpu"), True, backend=counter, fullgraph=True)

    def fit(upto, batch=4):
        train.fit(name, trained, loss, data, steps=9, upto=upto, batch=batch, lr=1e-3,
                  device=torch.device("cpu"), dtype=dtype)
    fit(1)
    compiler.after_step(8)
    first, calls = counter.graphs, counter.calls
    assert 0 < first <= calls
    fit(2)
    assert (counter.graphs, counter.calls) == (first, 3 * calls)  # each step in all its graphs
    fit(1, batch=3)
    model.sample(torch.randn(2, 5, 12), [0, 1], steps=2)
    assert (counter.graphs, counter.calls) == (first, 3 * calls)


def test_sampling_adds_one_graph_at_most_to_each_of_training(counter):
    """Then any number of steps and images uses them; the last, smaller batch runs eagerly."""
    model, trained, loss, shapes = stage("unet")
    compiler = Compiler(trained, torch.device("cpu"), True, backend=counter, fullgraph=True)
    rows = [torch.rand(4, *shape) for shape in shapes]
    loss(rows, 0, torch.Generator()).backward()
    first = counter.graphs
    tokens = torch.randn(10, 5, 12)
    model.sample(tokens[:4], range(4), steps=2, refine=False)
    compiler.after_step(1)
    both, calls = counter.graphs, counter.calls
    assert first < both <= 2 * first
    model.sample(tokens, range(10), steps=3, batch=4, refine=False)
    assert counter.graphs == both and counter.calls > calls


@pytest.mark.parametrize("steps, seconds, pays", [(1000, 0.2, True), (700, 0.2, False)])
def test_compiling_is_on_where_it_pays(monkeypatch, capsys, steps, seconds, pays):
    """A quarter of the steps left against 40 s; on CUDA by itself, after timing ten steps."""
    assert compile_pays(steps, seconds)[0] == pays
    clock = iter([0.0, 10 * seconds])
    compiled = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(compiling, "compile_blocks", lambda model, **_: compiled.append(model))
    model = torch.nn.Identity()
    for device, wanted in (("cpu", None), ("cuda", False), ("cuda", None)):
        compiler = Compiler(model, torch.device(device), wanted)
        for step in range(15):
            assert not compiled
            compiler.after_step(steps + 14 - step)
    assert compiled == [model] * pays
    assert f"torch.compile {'on' if pays else 'off'}: it would save" in capsys.readouterr().out
