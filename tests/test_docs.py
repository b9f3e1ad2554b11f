"""README and docs: commands use flags that exist, the README's run, links resolve, pages stay
short, and the walkthrough's blocks run in sequence, as a reader types them."""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import experiments.__main__ as experiments
import train

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "weights" / "README.md", *DOCS]
SCRIPTS = ("train", "sample", "evaluate", "mil", "prepare")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """The code of each fenced block in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The arguments after `python` (or torchrun's flags) of every command on a page, in fenced
    blocks and in `inline code`."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks(page, "bash")
             for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", prose)]
    for line in lines:
        words = shlex.split(line.split("  #")[0].split(" # ")[0].replace("...", ""))
        program = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if "-m" in words and "experiments" in words:
            yield ["experiments", *words[words.index("experiments") + 1:]]
        elif program is not None:
            yield [words[program].removesuffix(".py"), *words[program + 1:]]


class ParsedAlready(Exception):
    """The flags were understood, which is enough."""


@each_page
def test_every_command_has_flags_that_exist(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise ParsedAlready(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for script, *arguments in commands(page):
        if script == "experiments" and not arguments or script.startswith("tools/"):
            assert script == "experiments" or (ROOT / f"{script}.py").is_file(), script
            continue
        assert script in (*SCRIPTS, "experiments"), script
        main = experiments.main if script == "experiments" else importlib.import_module(script).main
        with pytest.raises(ParsedAlready):
            main(["1" if word in "SG" and len(word) == 1 else word for word in arguments])


@each_page
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@each_page
def test_code_is_fenced(page):
    """Indented code would escape the tests of commands."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for line in prose.splitlines():
        assert not line.startswith(("    ", "\t")), line


def test_pages_stay_short():
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(readme) <= 130
    assert all(len(line) <= 120 for line in readme if not line.startswith(("|", "![")))
    assert len(DOCS) <= 9
    assert sum(len(page.read_text().split()) for page in DOCS) <= 9000
    assert len((ROOT / "weights" / "README.md").read_text().split()) <= 700


def test_readme_counts_lines():
    """The table "Read it" is within a tenth of the files' lengths."""
    rows = re.findall(r"^\| \d+ \| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 10
    for name, lines in rows:
        length = len((ROOT / name).read_text().splitlines())
        assert int(lines) == pytest.approx(length, rel=0.1), name


@pytest.mark.usefixtures("small_networks")
def test_readme_commands_run(tmp_path, monkeypatch):
    """Every sampling command makes images, every training command is accepted, on a small run."""
    import sample
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "2", "--count", "48", "--batch", "4", "--device", "cpu"]
    assert train.main(["--data", "phantoms", "--out", "runs/cxr", *few]) == 0
    sources = sorted(Path("runs/cxr/held_out").glob("*.png"))
    shutil.copy(sources[0], "A.png")
    shutil.copy(sources[1], "B.png")
    files = [path.name for path in sources]
    np.savez("vectors.npz", files=np.array(files), tokens=np.zeros((len(files), 1, 48), "float32"))

    scripts = set()
    for number, (script, *arguments) in enumerate(commands(ROOT / "README.md")):
        arguments = [str(sources[0].parent) if word == "/path/to/xrays" else word
                     for word in arguments]
        if script == "sample":
            assert sample.main([*arguments, "--steps", "2", "--out", f"out{number}"]) == 0
            assert list(Path(f"out{number}/images").glob("*.png"))
        elif script == "train" and "--resume" not in arguments:
            assert train.main([*arguments, "--dry-run"]) == 0
        scripts.add(script)
    assert scripts == {"sample", "train", "mil", "experiments"}  # test_mil.py runs mil.py


def test_notebook_is_the_page():
    """walkthrough.ipynb has the page's blocks in order, each picture, and what the blocks print."""
    path = ROOT / "walkthrough.ipynb"
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells[1:] if cell["cell_type"] == "code"]  # the first one installs
    sources = ["".join(cell["source"]) for cell in code]
    page = ROOT / "docs" / "walkthrough.md"
    assert [source for source in sources if not source.startswith("Image(")] == [
        block.rstrip() for block in blocks(page, "python")]

    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 11
    assert sum(output["output_type"] == "stream" for output in outputs) == 2
    assert path.stat().st_size < 1_500_000


def test_walkthrough_runs(tmp_path, monkeypatch):
    """Its blocks, in one session, write all pictures; shapes are those in the comments."""
    for folder in "assets", "weights":
        os.symlink(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "walkthrough.md"
    session = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), session)
        for name, shape in re.findall(r"^(\w+)(?:, \w+)? = .*# \((\d+(?:, \d+)+)\)", block, re.M):
            assert tuple(session[name].shape) == tuple(map(int, shape.split(", "))), name
    pictures = re.findall(r"assets/(walk_\w+\.png)", page.read_text())
    assert len(pictures) == 11 and all(Path(name).is_file() for name in pictures)
