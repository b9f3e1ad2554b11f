"""support/command.py: one-line errors."""
import pytest
import torch

from support import command
from support.command import UserError


@pytest.mark.parametrize("error,code,words", [
    (UserError("side 250", "64", "pass 256"), 2, "error: side 250: 64: pass 256\n"),
    (UserError("Caught in worker\nTraceback\nsupport.command.UserError: bad file"), 2,
     "error: bad file\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed"), 2, "--batch"),
    (PermissionError(13, "Permission denied", "/x"), 2, "writable"),
    (KeyboardInterrupt(), 130, "")])
def test_errors_of_users_and_machines_are_one_line(capsys, error, code, words):
    """User errors, a full memory or disk are one line and code 2; Ctrl-C is 130."""
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        command.run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == code and words in text and text.count("\n") == (code == 2)


def test_bugs_keep_their_traceback():
    """Other errors keep theirs, unless user_errors() converts them."""
    with pytest.raises(ValueError):
        command.run_script(lambda: int("x"))
    with pytest.raises(RuntimeError, match="shape"):
        command.run_script(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(UserError, match="invalid literal.*pass a number"):
        with command.user_errors("pass a number"):
            int("x")
