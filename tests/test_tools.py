"""tools/gpu_check.py without a GPU."""
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import gpu_check


@pytest.fixture
def precision():
    """gpu_check changes it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_smoke_runs_every_kind_of_section(precision, capsys):
    """No section fails; each row has a time and as many cells as the head."""
    assert gpu_check.main(["--smoke", "--only", "base", "sampling", "vae"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert {len(row) for row in rows} == {len(gpu_check.COLUMNS)}
    works = {re.split("[,.]| of | there|'s", row[0].strip("| "))[0] for row in rows[2:]}
    assert works == {"training step", "2 steps", "VAE"}
    assert all(float(row[2]) > 0 for row in rows[2:])
    assert {"ours", "ours, compiled"} <= {row[1] for row in rows}
