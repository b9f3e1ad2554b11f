"""Questions to ask of a trained model, one file each; every answer ends with a number.

    python -m experiments                    # the list
    python -m experiments resemble --help    # what one of them does, and its flags
    python -m experiments resemble           # ask it of the newest run

An experiment is a file of this folder with a docstring, whose first line is its question, and two
functions: `add_flags(parser)` and `main(args)`. It is imported only when it is asked for.
"""
import argparse
import ast
import importlib
import sys
from pathlib import Path

import torch

from support.command import Help, UserError, run_script


class ExperimentHelp(Help, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of a docstring."""


def find_experiments():
    """{name: first line of its docstring} of every experiment, read without importing any."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {"add_flags", "main"} <= functions:
            found[path.stem] = ast.get_docstring(tree).splitlines()[0]
    return found


def print_list(experiments):
    print("python -m experiments NAME [--help]\n")
    width = max(map(len, experiments))
    for name, question in experiments.items():
        print(f"  {name:{width}}  {question}")


def main(argv=None):
    """Run the experiment that the first argument names; without arguments list them all."""
    experiments = find_experiments()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print_list(experiments)
        return
    if name not in experiments:
        raise UserError(f"there is no experiment {name!r}", f"here are {', '.join(experiments)}",
                        "pass one of these names")

    experiment = importlib.import_module(f"experiments.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m experiments {name}",
                                     description=experiment.__doc__,
                                     formatter_class=ExperimentHelp)
    experiment.add_flags(parser)
    args = parser.parse_args(rest)
    torch.backends.cudnn.allow_tf32 = False  # figures of a GPU equal those of a CPU
    experiment.main(args)


if __name__ == "__main__":
    run_script(main)
