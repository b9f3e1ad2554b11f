"""experiments/readers.py: the page does not know the truth, and the scores are right."""
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from evaluate import cohen_kappa
from experiments.__main__ import main as experiments
from support.command import UserError
from support.files import read_csv
from support.images import load_image
from support.phantoms import chest_phantoms
from support.pictures import save_png


@pytest.fixture
def folders(tmp_path):
    """Real images with metadata, of two file types; synthetic ones in RGB with a tint."""
    images, _, _ = chest_phantoms(20, size=32, seed=0)
    (tmp_path / "real").mkdir()
    note = PngImagePlugin.PngInfo()
    note.add_text("Patient", "REAL PERSON")
    for i, image in enumerate(images[:12, 0]):
        picture = Image.fromarray(((image + 1) * 127.5).round().byte().numpy())
        name = tmp_path / "real" / f"person_{i}"
        if i % 2:
            picture.save(f"{name}.png", pnginfo=note)
        else:
            picture.save(f"{name}.jpg", quality=95)
    tint = torch.tensor([0.02, 0, -0.02]).view(3, 1, 1)
    for i, image in enumerate(images[12:]):
        save_png(tmp_path / "fake" / f"sampled_{i}.png", image + tint)
    return tmp_path


def make(folder, *flags, out="test"):
    """(page, {name: PNG}, {name: row of the key})."""
    experiments(["readers", "--make", str(folder / "real"), str(folder / "fake"), "--out",
                 str(folder / out), *flags])
    page = (folder / out / "readers.html").read_text()
    pictures = re.findall(r"base64,([\w+/=]+)", page)
    names = re.findall(r'name="(\w+)" value="real"', page)
    assert names == re.findall(r'name="(\w+)" value="synthetic"', page)
    key = {row["file"]: row for row in read_csv(folder / out / "key" / "key.csv")}
    return page, dict(zip(names, map(base64.b64decode, pictures), strict=True)), key


def test_page_does_not_know_the_truth(folders):
    """Equal counts, one size, mode and length, no metadata, no names; pictures are the key's, in
    the order of names that are random."""
    page, pictures, key = make(folders, "--count", "30")
    assert set(pictures) == set(key) and len(key) == 16 and list(pictures) == sorted(pictures)
    assert [row["truth"] for row in key.values()].count("real") == 8
    assert len({len(picture) for picture in pictures.values()}) == 1
    for name, picture in pictures.items():
        assert re.findall(rb"IHDR|IDAT|IEND|tEXt|pHYs|eXIf", picture) == [b"IHDR", b"IDAT", b"IEND"]
        opened = Image.open(io.BytesIO(picture))
        assert opened.mode == "L"  # without the tint: the real ones are grey
        folder = {"real": "real", "synthetic": "fake"}[key[name]["truth"]]
        image = load_image(folders / folder / key[name]["source"], None)
        wanted = ((image.mean(dim=0) + 1) * 127.5).numpy()
        assert np.abs(np.asarray(opened) - wanted).max() <= 0.5 + 1e-3
    assert not re.search(r"person|sampled|https?:|fetch|import", page, re.IGNORECASE)
    assert "default-src 'none'" in page and "form-action 'none'" in page
    with pytest.raises(UserError, match="key.csv exists: a key must not be lost"):
        make(folders)


ANSWERS = {  # the first four images are real, the others synthetic; 1: "synthetic"
    "Ann": [0, 0, 0, 1, 1, 1, 1, 1], "Bob": [0, 0, 1, 1, 1, 0, 0, 0],
    "Cy": [1, 0, 0, 0, 1, 1, 0, 0]}


def write_study(folder, edit=lambda text: text):
    """key/key.csv and a file of answers for each reader; Bob's is edited."""
    words = ["real", "synthetic"]
    (folder / "key").mkdir()
    (folder / "key" / "key.csv").write_text("file,truth,source\n" + "".join(
        f"n{i},{words[i // 4]},x{i}.png\n" for i in range(8)))
    for reader, said in ANSWERS.items():
        text = "file,answer\n" + "".join(f"n{i},{words[s]}\n" for i, s in enumerate(said))
        (folder / f"{reader}.csv").write_text(edit(text) if reader == "Bob" else text)
    return ["readers", "--out", str(folder), "--score",
            *(str(folder / f"{reader}.csv") for reader in ANSWERS)]


def test_scores_are_those_counted_by_hand(tmp_path):
    experiments(write_study(tmp_path))
    table = json.loads((tmp_path / "key" / "readers.json").read_text())
    assert [table[reader]["sensitivity"] for reader in ANSWERS] == [1, 0.25, 0.5]
    assert [table[reader]["specificity"] for reader in ANSWERS] == [0.75, 0.5, 0.75]
    low, high = table["Bob"]["95 %"]
    assert 0 <= low < table["Bob"]["accuracy"] == 3 / 8 < high <= 1
    said = np.array(list(ANSWERS.values()))
    pairs = [cohen_kappa(said[i], said[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert table["mean of pairs"]["kappa"] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("edit, words", [
    (lambda text: text[:text.index("n7")], "do not name the same images"),
    (lambda text: text.replace("n7,real", "n7,fake"), "real or synthetic")])
def test_answers_that_cannot_be_scored(tmp_path, edit, words):
    """One error that names the file; nothing is written."""
    with pytest.raises(UserError, match=words) as error:
        experiments(write_study(tmp_path, edit))
    assert "Bob.csv" in str(error.value) and not (tmp_path / "key" / "readers.json").exists()
