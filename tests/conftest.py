"""One thread for all tests: their tensors are tiny, and two threads on a busy machine wait for each
other, which once made these tests thirty times slower."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
