"""training_set.py: who is held out, and which images a run trains on."""
from types import SimpleNamespace

import pytest
import torch

from pictures_on_disk import folder_of, write_phantoms
from support.command import UserError
from support.datasets import ImageSet, open_dataset
from support.pictures import save_png
from support.training_set import (open_training_set, read_split, split_holdout, write_choice,
                                  write_split)


def patients(folder, count=60, **options):
    """`count` images, three a patient."""
    folder_of(folder, [f"{i:03d}.png" for i in range(count)], side=2)
    rows = [f"{i:03d}.png,p{i // 3},{i % 2},one" for i in range(count)]
    (folder / "labels.csv").write_text("\n".join(["file,patient,sex,same"] + rows))
    return open_dataset(folder, 8, **options)


def test_split_keeps_patients_together(tmp_path):
    """Every image is on one side, no patient on both, near the share, the same each time."""
    images = patients(tmp_path)
    train, test = split_holdout(images, 0.3, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(60)) and test.dtype == torch.int64
    assert not {i // 3 for i in train.tolist()} & {i // 3 for i in test.tolist()}
    assert 6 <= len(test) <= 33  # 20 patients at 0.3: two standard deviations are 12 images
    assert torch.equal(test, split_holdout(images, 0.3, seed=1)[1])
    assert not torch.equal(test, split_holdout(images, 0.3, seed=2)[1])
    assert len(split_holdout(images, 0, 0)[1]) == 0 and len(split_holdout(images, 1e-9, 0)[1]) == 3
    later = split_holdout(patients(tmp_path, 120), 0.3, seed=1)[1]
    assert later[later < 60].tolist() == test.tolist()  # added images move no other


def test_split_file_comes_back(tmp_path):
    """write_split then read_split is the same split, also of a folder that moved or is opened one
    level higher; a name that the set lacks is an error."""
    images = patients(tmp_path / "a/set", 12)
    train, test = split_holdout(images, 0.3, 0)
    path = tmp_path / "split.csv"
    write_split(path, images, train, test)
    assert path.read_text().startswith("file,split,group\n")
    (tmp_path / "a").rename(tmp_path / "b")
    for folder in (tmp_path / "b/set", tmp_path / "b"):
        back = read_split(path, open_dataset(folder, 8))
        assert torch.equal(back[0], train) and torch.equal(back[1], test)
    with pytest.raises(UserError, match="split.csv names"):
        read_split(path, patients(tmp_path / "c", 3))


def test_a_split_without_a_test_part_holds_out_a_share():
    """A table that says train for every image is no reason to hold out none."""
    images = ImageSet("x", "", 8, [f"{i}.png" for i in range(20)], {}, official=["train"] * 20)
    assert len(split_holdout(images, 0.2, 0)[1]) > 0


def test_the_official_test_part_is_held_out(tmp_path):
    """By a column or by folders; a patient on both sides is named, and held out whole; a share of 0
    holds out nothing."""
    names = [f"{part}/{label}/{i}.png" for part in ("train", "val", "test")
             for label in ("NORMAL", "PNEUMONIA") for i in range(2)]
    images = open_dataset(folder_of(tmp_path / "folders", names), 8)
    assert images.columns["label"][:3] == ["NORMAL", "NORMAL", "PNEUMONIA"]
    assert "the official test part has 4" in images.note
    train, test = split_holdout(images, 0.15, 0)
    assert [images.files[i] for i in test] == [name for name in sorted(names) if "test" in name]
    assert len(split_holdout(images, 0, 0)[1]) == 0

    folder_of(tmp_path / "table", [f"{i}.png" for i in range(6)])
    (tmp_path / "table/labels.csv").write_text("file,patient,split\n" + "".join(
        f"{i}.png,p{i // 2},{'test' if i > 2 else 'train'}\n" for i in range(6)))
    images = open_dataset(tmp_path / "table", 8)
    assert any("both sides of the official split, held out whole: 1 (p1)" in line
               for line in images.problems)
    assert split_holdout(images, 0.15, 0)[1].tolist() == [2, 3, 4, 5]


# ---- a run

@pytest.fixture
def folder(tmp_path):
    """Twelve chests of 16 pixels with labels a and b."""
    write_phantoms(tmp_path / "in", size=16)
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

    content = (folder / "in/03.png").read_bytes()
    (folder / "in/03.png").write_bytes(content[:len(content) // 2])
    training_set = opened(folder)
    indices = torch.cat([training_set.train, training_set.test]).tolist()
    assert sorted(indices) == [0, 1, 2, *range(4, 12)]
    assert [*training_set.images.unreadable] == ["03.png"]
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
