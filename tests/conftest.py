"""One thread for all tests: their tensors are tiny, and two threads on a busy machine wait for each
other, which once made these tests thirty times slower."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small_networks():
    """train.py with networks of 0.4 M parameters, for tests of files and not of pictures."""
    import train
    from dino import ViTConfig
    from unet import UNetConfig
    from vae import VAEConfig
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.VAES, "tiny", VAEConfig(3, 4, 8, (1, 2, 4), 1))
        patch.setitem(train.UNETS, "tiny",
                      UNetConfig(4, 4, 16, (1, 2, 2), 1, (False, True, True), 32, 4))
        patch.setitem(train.VISION_TRANSFORMERS, "tiny", ViTConfig(8, 48, 2, 3))
        yield
