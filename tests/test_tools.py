"""tools/gpu_check.py without a GPU."""
import re

import pytest
import torch

import gpu_check


@pytest.fixture
def precision():
    """gpu_check sets it, as train.py does."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_smoke_runs_every_kind_of_section(precision, capsys):
    """In the main process, without a failure: each row has a time and as many cells as the head."""
    assert gpu_check.main(["--smoke"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert {len(row) for row in rows} == {len(gpu_check.COLUMNS)}
    works = {re.split("[,.]| of | there|'s", row[0].strip("| "))[0] for row in rows[2:]}
    assert works >= {"training step", "2 steps", "VAE", "refiner"}
    assert all(float(row[2]) > 0 for row in rows[2:])
    assert {"ours", "ours, compiled"} <= {row[1] for row in rows}
