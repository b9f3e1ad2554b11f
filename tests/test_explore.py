"""Tests of experiments/explore.py: the page of a small run, and its script in a real browser."""
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from small_run import write_run

from experiments import __main__ as experiments
from support.command import UserError
from support.files import load_checkpoint, save_atomic, write_csv

BROWSERS = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>
const press = key => find("map").dispatchEvent(new KeyboardEvent("keydown", {key}));
const seen = [];
for (const key of [null, "ArrowRight", "ArrowRight", "ArrowUp", "x"]) {
  if (key) press(key);
  seen.push([column, row, find("sample").style.backgroundPosition]);
}
const box = find("map").getBoundingClientRect();
const pointer = {clientX: box.left + 1, clientY: box.bottom - 1};
find("map").dispatchEvent(new PointerEvent("pointerdown", pointer));
seen.push([column, row, find("sample").style.backgroundPosition]);
find("step").value = 0;
find("step").dispatchEvent(new Event("input"));
seen.push([find("now").textContent, find("noisy").style.backgroundPosition, box.width > 300]);
document.title = JSON.stringify(seen);
</script>"""


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
    """No other host, an alt text for each picture, small; the training part alone is plotted."""
    text = page.read_text()
    assert len(text) < 200_000 and "http" not in re.sub("base64,[^)\"]*", "", text)
    assert set(re.findall(r"url\((.{11})", text)) == {"data:image/"}
    pictures = re.findall("<img[^>]*>", text)
    assert len(pictures) == 2 + 5 + 1
    assert all(re.search('alt="[^"]+"', picture) for picture in pictures)
    assert all('src="data:image/' in picture for picture in pictures)
    assert text.count("aria-label=") == text.count("role=") + 1  # the slider
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


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_page_in_a_browser(page, tmp_path):
    """Keys and pointer move over the cells, the slider over the steps, and nothing raises."""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text() + PROBE)
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-quic", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         probe.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    right = [2, 1, "100% 50%"]
    above = [2, 0, "100% 0%"]
    assert seen == [[1, 1, "50% 50%"], right, right, above, above, [0, 2, "0% 100%"],
                    ["step 1 of 2", "0% 0%", True]]
