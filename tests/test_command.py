"""support/command.py: one-line errors, number flags, a closed output."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import command
from support.command import UserError, number

ROOT = Path(__file__).parent.parent
PRINTING = """
import sys
from support.command import run_script

def main():
    for i in range(20_000):
        print("step", i)
    open(sys.argv[1], "w").write("done")

sys.exit(run_script(main))
"""


@pytest.mark.parametrize("error,code,words", [
    (UserError("side 250", "64", "pass 256"), 2, "error: side 250: 64: pass 256\n"),
    (UserError("Caught in worker\nTraceback\nsupport.command.UserError: bad file"), 2,
     "error: bad file\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch"),
    (RuntimeError("can't allocate memory: you tried"), 2, "--batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"), 2, "--batch"),
    (PermissionError(13, "Permission denied", "/x"), 2, "writable"),
    (KeyboardInterrupt(), 130, "")])
def test_errors_of_users_and_machines_are_one_line(monkeypatch, capsys, error, code, words):
    """User errors, a full memory or disk are one line and code 2; Ctrl-C is 130."""
    def main():
        raise error
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as end:
        command.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == code and words in text and text.count("\n") == (code == 2)


def test_bugs_keep_their_traceback(monkeypatch):
    """Other errors keep theirs, unless user_errors() converts them."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(ValueError):
        command.run_script(lambda: int("x"))
    with pytest.raises(RuntimeError, match="shape"):
        command.run_script(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(UserError, match="invalid literal.*pass a number"):
        with command.user_errors("pass a number"):
            int("x")


@pytest.mark.skipif(os.name == "nt", reason="uses sh")
def test_a_closed_output_does_not_end_a_script(tmp_path):
    """`| head` closes the pipe, and the script finishes its work."""
    done = tmp_path / "done"
    work = f'"{sys.executable}" -c \'{PRINTING}\' "{done}"'
    shell = f'{{ {work}; echo $? > "{tmp_path}/code"; }} | head -1'
    ended = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "code").read_text() == "0\n" and done.read_text() == "done", ended.stderr
    assert "rror" not in ended.stderr


@pytest.mark.parametrize("kind,good,bad,words", [
    (number(int, 1), "3", ("0", "-1", "x", "1.5", ""), "whole number from 1"),
    (number(float, 0, 1), "0.15", ("1.1", "-0.1", "nan"), "number from 0 to 1"),
    (number(float), "1e-4", ("-1", "nan", "inf"), "number from 0")])
def test_number_flags(kind, good, bad, words):
    """The argparse type accepts its range and names it otherwise."""
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            kind(text)
