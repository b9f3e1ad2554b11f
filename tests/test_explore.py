"""Tests of experiments/explore.py: the page of a small run."""
import json
import re

import numpy as np
import pytest
import torch
from small_run import write_run

from experiments import __main__ as experiments
from support.command import UserError
from support.files import load_checkpoint, save_atomic, write_csv


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """explore.html of a small run that was trained on six of eight phantoms."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "small")
    (folder / "curves.png").write_bytes(b"a picture")
    sides = [[f"phantom_{i:06d}", "test" if i < 2 else "train"] for i in range(8)]
    write_csv(folder / "split.csv", [["file", "split"], *sides])
    out = folder / "explore.html"
    experiments.main(["explore", str(folder), "--grid", "3", "--steps", "2", "--device", "cpu",
                      "--out", str(out)])
    return out


def test_page_is_self_contained(page):
    """No other host, small; the training part alone is plotted."""
    text = page.read_text()
    assert len(text) < 200_000 and "http" not in re.sub("base64,[^)\"]*", "", text)
    assert set(re.findall(r"url\((.{11})", text)) == {"data:image/"}
    pictures = re.findall("<img[^>]*>", text)
    assert pictures and all('src="data:image/' in picture for picture in pictures)
    data = json.loads(re.search("const data = (.*);", text)[1])
    assert sorted(data["names"]) == [f"phantom_{i:06d}" for i in range(2, 8)]
    assert np.array(data["dots"]).min() == 0 and np.array(data["dots"]).max() == 1000
    assert text.count("<path") == 6 + len(set(data["groups"]))


def test_any_folder(page, tmp_path, monkeypatch):
    """--data plots any folder, by its most telling column; names are escaped."""
    monkeypatch.chdir(tmp_path)
    folder = page.parent
    names = "</script>", "b"
    write_csv(folder / "held_out" / "labels.csv", [["file", "source"], *(
        [f"{i}.png", names[i % 2]] for i in range(8))])
    experiments.main(["explore", str(folder), "--data", str(folder / "held_out"), "--grid", "2",
                      "--steps", "1", "--device", "cpu"])
    text = (tmp_path / "explore.html").read_text()
    assert text.count("</script>") == 1 and "source &lt;/script&gt;&nbsp;(4)" in text


def test_packed_model_and_refusals(page, tmp_path):
    """A packed model without data shows its centres; without tokens of images: one line."""
    checkpoint = load_checkpoint(page.parent / "model.pt")
    checkpoint["prototypes"] = torch.randn(7, 5, 12)
    save_atomic(tmp_path / "box.pt", checkpoint)
    experiments.main(["explore", str(tmp_path / "box.pt"), "--grid", "2", "--steps", "1",
                      "--device", "cpu", "--out", str(tmp_path / "box.html")])
    text = (tmp_path / "box.html").read_text()
    for word in "Explore box", "typical sample&nbsp;(7)", "K-means centre 7":
        assert word in text

    with pytest.raises(UserError, match="does not follow the tokens"):
        run = write_run(tmp_path / "unconditional", condition="none")
        experiments.main(["explore", str(run), "--out", str(tmp_path / "none.html")])
    assert not (tmp_path / "none.html").exists()
