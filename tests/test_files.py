"""support/files.py: checkpoints, tables and logs are whole or not there, and hold no code."""
import csv
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support import files
from support.command import UserError


class Payload(str):
    """Unpickling it would create a folder of that name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_checkpoints(tmp_path):
    """A saved dict comes back; foreign, cut, older and malicious files are refused, and not run."""
    path = tmp_path / "runs" / "a" / "model.pt"
    files.save_atomic(path, {"version": files.CHECKPOINT_VERSION, "w": torch.arange(3.0)})
    assert torch.equal(files.load_checkpoint(path)["w"], torch.arange(3.0))
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"version": 0}, tmp_path / "old.pt")
    torch.save({"version": 2, "x": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    for bad in ("cut", "text", "old", "evil", "missing"):
        with pytest.raises(UserError, match=f"{bad}.pt"):
            files.load_checkpoint(tmp_path / f"{bad}.pt")
    assert not (tmp_path / "ran").exists()


def test_newest_checkpoint(tmp_path, monkeypatch):
    """Without an argument the newest run is taken; if neither it nor the box is there, the error
    says what to run."""
    monkeypatch.setattr("support.files.BOX", tmp_path / "none.pt")
    for argument in (None, tmp_path):
        with pytest.raises(UserError, match="python train.py --data cxr"):
            files.resolve_checkpoint(argument, root=tmp_path)
    new, old = (tmp_path / name / "model.pt" for name in ("new", "old"))
    for path, age in ((new, 0), (old, 1)):
        files.write_text_atomic(path, "x")
        os.utime(path, (1000 - age, 1000 - age))
    assert files.resolve_checkpoint(root=tmp_path) == new
    assert files.resolve_checkpoint(str(old.parent)) == files.resolve_checkpoint(old) == old


def test_a_failed_save_keeps_the_old_file(tmp_path):
    """If writing fails half-way the old file stays whole and no temporary file is left;
    next_folder names none that exists."""
    files.save_atomic(tmp_path / "x.pt", {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        files.save_atomic(tmp_path / "x.pt", {"a": torch.zeros(1000), "b": lambda: 0})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}
    for name in ("x", "x_2", "x_3"):
        assert files.next_folder(tmp_path, "x") == tmp_path / name
        files.make_folder(tmp_path / name)
    for place in ("x.pt/below/a.txt", "x"):
        with pytest.raises(UserError, match="pass another --out"):
            files.write_text_atomic(tmp_path / place, "x")
    assert sorted(os.listdir(tmp_path)) == ["x", "x.pt", "x_2", "x_3"]


def test_tables_grow_by_whole_lines(tmp_path):
    """Rows come back in order, with commas, line ends and names that are no UTF-8; a folder that is
    gone is one line of error."""
    path = tmp_path / "samples.csv"
    name = b"latin-\xe9.png".decode("utf-8", "surrogateescape")
    files.append_csv(path, [["file", "label"], ["a.png", "x, y"]])
    files.append_csv(path, [[name, "two\nlines"]])
    files.append_csv(path, [])
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["file", "label"], ["a.png", "x, y"],
                                          [name, "two\nlines"]]
    with pytest.raises(UserError, match="must be writable"):
        files.append_csv(tmp_path / "gone" / "samples.csv", [["file"]])


def test_atomic_files_of_threads_do_not_meet(tmp_path):
    """Two threads write in one folder at the same time: each file has its own bytes, synced or not.
    """
    def write(number):
        for _ in range(20):
            with files.atomic_file(tmp_path / f"{number}", sync=False) as file:
                file.write(bytes([number]) * 1000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3"]
    for number in range(4):
        assert (tmp_path / f"{number}").read_bytes() == bytes([number]) * 1000


def test_jsonl(tmp_path):
    """Rows come back, none of a missing file; a line cut short is left out."""
    path = tmp_path / "log.jsonl"
    assert files.read_jsonl(path) == []
    files.append_jsonl(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert files.read_jsonl(path) == [{"step": 1}]
