"""training_set.py: which images a run trains on."""
from types import SimpleNamespace

import pytest
import torch

from support.command import UserError
from support.datasets import open_dataset
from support.pictures import save_png
from support.training_set import open_training_set, write_choice


@pytest.fixture
def folder(tmp_path):
    """Twelve chests of 16 pixels with labels a and b."""
    images = open_dataset("phantoms", 16, count=12)
    for i in range(12):
        save_png(tmp_path / f"in/{i:02d}.png", images[i])
    rows = "".join(f"{i:02d}.png,{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "in/labels.csv").write_text("file,label\n" + rows)
    return tmp_path


def opened(folder, resume=False):
    return open_training_set(folder / "run", resume, 16, folder / "in", 0.25)


def written(folder, training_set):
    """As a run writes it down."""
    run = SimpleNamespace(folder=folder / "run", writes=True, config={"resume": False})
    run.folder.mkdir()
    (run.folder / "config.json").write_text('{"depth": {"white": 4095.0}}')
    write_choice(run, training_set)


def test_a_new_run_splits_what_can_be_decoded(folder, capsys):
    """Twelve images on two sides, in memory; one that is cut is left out and named."""
    training_set = opened(folder)
    images = training_set.images
    indices = torch.cat([training_set.train, training_set.test])
    assert sorted(indices.tolist()) == list(range(12)) == sorted(images.cache)
    assert len(training_set.test) and torch.equal(training_set.examples, training_set.test[:8])

    third = images[4]
    content = (folder / "in/03.png").read_bytes()
    (folder / "in/03.png").write_bytes(content[:len(content) // 2])
    images = opened(folder).images
    assert len(images) == 11 and images.files[3] == "04.png" and torch.equal(images[3], third)
    assert images.columns["label"][3] == "a" and images.unreadable[0][0] == "03.png"
    assert "left out as unreadable" in capsys.readouterr().out
    (folder / "in/05.png").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="2 .03.png, 05.png.*90 %"):
        opened(folder)


def test_a_resumed_run_goes_by_its_files(folder):
    """The same split, unreadable images left out without reading them, the recorded depth; images
    that were added or are gone are refused."""
    content = (folder / "in/03.png").read_bytes()
    (folder / "in/03.png").write_bytes(content[:len(content) // 2])
    new = opened(folder)
    written(folder, new)
    resumed = opened(folder, resume=True)
    assert torch.equal(resumed.test, new.test) and resumed.images.files == new.images.files
    assert resumed.images.depth == {"white": 4095.0} and not resumed.images.cache
    save_png(folder / "in/99.png", new.images[0])
    with pytest.raises(UserError, match="new: 99.png"):
        opened(folder, resume=True)
    (folder / "in/99.png").unlink()
    (folder / "in/00.png").unlink()
    with pytest.raises(UserError, match="00.png"):
        opened(folder, resume=True)
