"""Questions to ask of a trained model, one file each; each answer is a number.

    python -m experiments                    # the list
    python -m experiments resemble --help    # what one of them does, and its flags
    python -m experiments resemble           # ask it of the newest run

An experiment is a file of this folder whose docstring starts with its question, with two functions:
`add_flags(parser)` and `main(args)`. It is imported only when it is run.
"""
import argparse
import ast
import importlib
import sys
from pathlib import Path

import torch

from support.command import Help, UserError, run_script


class ExperimentHelp(Help, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of a docstring."""


def find_experiments():
    """{name: first line of its docstring} of every experiment, read without importing any."""
    questions = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(getattr(node, "name", "") == "add_flags" for node in tree.body):
            questions[path.stem] = ast.get_docstring(tree).splitlines()[0]
    return questions


def main(argv=None):
    """Run the experiment that the first argument names; without arguments list them all."""
    questions = find_experiments()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("python -m experiments NAME [--help]\n")
        for name, question in questions.items():
            print(f"  {name:12}  {question}")
        return
    if name not in questions:
        raise UserError(f"there is no experiment {name!r}", "the name of one is needed",
                        f"pass one of {', '.join(questions)}")

    experiment = importlib.import_module(f"experiments.{name}")
    parser = argparse.ArgumentParser(f"python -m experiments {name}", None, experiment.__doc__,
                                     formatter_class=ExperimentHelp)
    experiment.add_flags(parser)
    torch.backends.cudnn.allow_tf32 = False  # figures of a GPU equal those of a CPU
    experiment.main(parser.parse_args(rest))


if __name__ == "__main__":
    run_script(main)
