"""support/files.py: checkpoints and tables, complete or damaged."""
import errno
import gzip
import os

import pytest
import torch

from support import files
from support.command import UserError


def test_checkpoints(tmp_path):
    """A saved dict comes back; foreign, truncated and older files are refused."""
    path = tmp_path / "runs" / "a" / "model.pt"
    version = files.CHECKPOINT_VERSION
    files.save_atomic(path, {"version": version, "w": torch.arange(3.0)})
    assert torch.equal(files.load_checkpoint(path)["w"], torch.arange(3.0))
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"version": version - 1}, tmp_path / "old.pt")
    for bad in ("cut", "text", "old", "missing"):
        with pytest.raises(UserError, match=f"{bad}.pt"):
            files.load_checkpoint(tmp_path / f"{bad}.pt")
    with pytest.raises(UserError, match="it lacks state"):
        files.load_checkpoint(path, ("w", "state"))


def test_which_checkpoint(tmp_path, monkeypatch, capsys):
    """The newest run; without one the bundled model, with a note; a file or folder by name."""
    monkeypatch.setattr(files, "BOX", tmp_path / "box.pt")
    for argument in (None, "box", tmp_path):
        with pytest.raises(UserError, match="python train.py --data cxr"):
            files.resolve_checkpoint(argument, root=tmp_path)
    (tmp_path / "box.pt").write_text("x")
    capsys.readouterr()
    assert files.resolve_checkpoint(root=tmp_path) == tmp_path / "box.pt"
    assert "not for clinical use" in capsys.readouterr().out
    new, old = (tmp_path / name / "model.pt" for name in ("new", "old"))
    for path, age in ((new, 0), (old, 1)):
        files.write_text_atomic(path, "x")
        os.utime(path, (1000 - age, 1000 - age))
    assert files.resolve_checkpoint(root=tmp_path) == new
    assert files.resolve_checkpoint(str(old.parent)) == files.resolve_checkpoint(old) == old
    assert files.resolve_checkpoint("box", root=tmp_path) == tmp_path / "box.pt"


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    """If writing fails, or the disk is full, the old file stays and no other is left; next_folder
    avoids existing ones."""
    files.save_atomic(tmp_path / "x.pt", {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        files.save_atomic(tmp_path / "x.pt", {"a": torch.zeros(1000), "b": lambda: 0})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="x.pt cannot be written.*No space.*pass another --out"):
            files.save_atomic(tmp_path / "x.pt", {"a": 2})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    for name in ("x", "x_2", "x_3"):
        assert files.next_folder(tmp_path, "x") == tmp_path / name
        (tmp_path / name).mkdir()
    assert sorted(os.listdir(tmp_path)) == ["x", "x.pt", "x_2", "x_3"]


@pytest.mark.parametrize("text", [
    'file,label,age\na.png,"x, y",4\nb.png,ü,\n',
    "\ufefffile;label;age\r\na.png;x, y;4\r\nb.png;ü\r\n",
    "file\tlabel\tage\na.png\tx, y\t4\t\n\nb.png\tü\t\n",
    'file, label ,age\na.png, "x, y", 4\nb.png, ü,'])
def test_tables(tmp_path, text):
    """Commas, semicolons and tabs; Excel's byte order mark; spaces, short rows and empty lines;
    compressed. Other encodings are refused."""
    rows = [{"file": "a.png", "label": "x, y", "age": "4"},
            {"file": "b.png", "label": "ü", "age": ""}]
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert files.read_csv(tmp_path / "x.csv") == files.read_csv(tmp_path / "x.csv.gz") == rows
    (tmp_path / "x.csv").write_bytes(b"file\n\xff\n")
    with pytest.raises(UserError, match="x.csv cannot be read.*UTF-8"):
        files.read_csv(tmp_path / "x.csv")
