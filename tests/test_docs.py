"""README and docs: every command has flags that exist, the README's are run, links lead somewhere,
and the walkthrough's blocks run one after the other as a reader types them."""
import argparse
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import evaluate
import experiments.__main__ as experiments
import mil
import sample
import train

pytestmark = pytest.mark.usefixtures("small_networks")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS = "Histology image of cancer tissue, morphology type"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The words behind `python` of each line of the page's shell blocks, once each."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.split("  #")[0].replace("...", ""))
            if "python" in words and words[-1] != "pytest":
                found.append(words[words.index("python") + 1:])
    return found


class ParsedAlready(Exception):
    """Flags were understood: enough."""


def stop_after_parsing(patch):
    """From now on a script that has parsed its flags goes no further."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise ParsedAlready(parse(self, *args, **kwargs))

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_flags_of_every_command_exist(page, monkeypatch):
    """What a reader copies is at least understood by the script that it names."""
    stop_after_parsing(monkeypatch)
    scripts = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "mil.py": mil}
    for script, *rest in commands(page):
        if script == "-m" and rest[0] == "experiments":
            run, rest = experiments.main, rest[1:]
        elif script in scripts:
            run = scripts[script].main
        else:
            assert (ROOT / script).is_file() or script == "-m", script
            continue
        if run is experiments.main and not rest:
            continue
        with pytest.raises(ParsedAlready):
            run(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/cxr at 64 px and runs/histology with prompts, of few steps and images."""
    folder = tmp_path_factory.mktemp("clone")
    few = ["--steps", "2", "--count", "48", "--grids", "1", "--batch", "4", "--device", "cpu"]
    assert train.main(["--data", "phantoms", "--out", str(folder / "runs" / "cxr"), *few]) == 0
    assert train.main(["--data", "histology", "--size", "32", "--condition", "prompts",
                       "--clusters", "3", "--out", str(folder / "runs" / "histology"), *few]) == 0
    return folder


def test_readme_commands_run(runs, tmp_path, monkeypatch):
    """Every command of the README's blocks does what it says, on small runs and their images."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    sources = sorted(Path("runs/cxr/held_out").glob("*.png"))
    for name, source in zip(("A.png", "B.png", "x.png"), sources):
        shutil.copy(source, name)
    done = set()
    for number, (script, *rest) in enumerate(commands(ROOT / "README.md")):
        rest = [str(sources[0]) if word.startswith("runs/cxr/held_out") else word for word in rest]
        if script == "sample.py":
            newest = "histology" if "--prompt" in rest else "cxr"
            os.utime(f"runs/{newest}/model.pt")
            rest = [word.replace(f"{WORDS} seventeen", f"{WORDS} two") for word in rest]
            assert sample.main([*rest, "--steps", "2", "--out", f"out{number}"]) == 0
            assert list(Path(f"out{number}/images").glob("*.png"))
        elif script == "train.py":
            assert train.main([*rest, "--dry-run"]) == 0
        elif rest == ["experiments"]:
            experiments.main([])
        else:
            assert script in ("mil.py", "-m"), script  # test_mil.py runs it
        done.add(script)
    assert {"sample.py", "train.py", "-m", "mil.py"} <= done


def test_walkthrough_runs(runs, tmp_path, monkeypatch):
    """Its ten blocks, in one session, make the ten pictures; the shapes are those it names."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "walkthrough.md"
    session = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), session)
        for name, shape in re.findall(r"^(\w+)(?:, \w+)? = .*# \((\d+(?:, \d+)+)\)", block, re.M):
            if name not in ("tokens", "context", "maps", "path"):  # as wide as the run's embedder
                assert tuple(session[name].shape) == tuple(map(int, shape.split(", "))), name
    pictures = re.findall(r"assets/(walk_\w+\.png)", page.read_text())
    assert len(pictures) == 10 and all(Path(name).is_file() for name in pictures)


def test_every_experiment_stands_in_the_list(capsys):
    """Each has a question that ends with a mark or a colon's end, flags with help, and a main."""
    experiments.main([])
    shown = capsys.readouterr().out
    for name, question in experiments.find_experiments().items():
        module = importlib.import_module(f"experiments.{name}")
        assert name in shown and question in shown
        parser = argparse.ArgumentParser()
        module.add_flags(parser)
        assert all(action.help for action in parser._actions)
