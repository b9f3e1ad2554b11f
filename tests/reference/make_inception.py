"""Makes inception.npz: features of two pictures by pytorch-fid's Inception, with seeded weights.

    pip install --no-deps pytorch-fid==0.3.0 && PYTHONPATH=.:tests python \
        tests/reference/make_inception.py

Made with torch 2.15.0, torchvision 0.29.2, numpy 2.4.6. Weights and pictures are test_evaluate's.
"""
from pathlib import Path

import numpy as np
import pytorch_fid.inception
import torch

from test_evaluate import inception_case

weights, pictures = inception_case()
pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: weights
with torch.no_grad():
    features = pytorch_fid.inception.InceptionV3().eval()(pictures)[0]
np.savez_compressed(Path(__file__).with_name("inception.npz"), features=features[:, :, 0, 0])
