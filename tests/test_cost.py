"""A sample costs the same however many there are: what 10,000 of them do, counted on fewer."""
import sys
from collections import Counter

import torch

from support.sample_folder import Request, SampleFolder


def test_a_round_of_samples_costs_the_same_first_and_last(tmp_path):
    """Calls of functions, and bytes added to the table, of each round of ten among 400 samples."""
    requests = [Request("random", i // 8, 10_000 + i) for i in range(400)]
    folder = SampleFolder(tmp_path / "out", requests, {"steps": 1})
    images = torch.zeros(10, 3, 8, 8)
    calls = Counter()
    sizes = []
    for first in range(0, 400, 10):
        numbers = range(first, first + 10)

        def count(frame, event, value):
            calls[numbers.start] += event in ("call", "c_call")  # noqa: B023
        sys.setprofile(count)  # of this thread: those that write PNGs are as many each time
        folder.add(numbers, images, numbers)
        sys.setprofile(None)
        sizes.append((tmp_path / "out" / "samples.csv").stat().st_size)
    later = [calls[first] for first in range(200, 400, 10)]
    early = [calls[first] for first in range(130, 200, 10)]  # the grid's 128 samples are kept
    assert max(later) < 1.2 * min(early)  # waiting for threads takes a few calls more or less
    assert len({b - a for a, b in zip(sizes[1:], sizes[2:])}) == 1
    assert len(list((tmp_path / "out" / "images").iterdir())) == 400
