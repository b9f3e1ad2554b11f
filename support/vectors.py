"""Vectors that another program computed of each image, as a condition instead of our ViT's tokens.

    np.savez("vectors.npz", files=names, tokens=vectors)    # (N,) of str, (N, G, D) or (N, D)
    table = read_vectors("vectors.npz")                     # {name of an image: (G, D) float32}

`files` holds the names of the images in the data set, e.g. "patient1/a.png" below the folder.
`python -m experiments embed` writes such a file with the tokens of a trained model.
"""
import numpy as np
import torch

from support.command import UserError


def read_vectors(path):
    """{name: (G, D) float32} in the file's order. Raises UserError for what is no such file."""
    need = "a .npz with files (N names) and tokens (N, G, D), finite numbers, is needed"
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [str(name) for name in archive["files"]]
            tokens = torch.from_numpy(np.float32(archive["tokens"]))
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"{path} cannot be read ({str(error)[:120]})", need,
                        "write it with numpy.savez(path, files=names, tokens=vectors)") from error

    if tokens.ndim == 2:
        tokens = tokens[:, None]  # (N, D) -> (N, 1, D)
    if tokens.ndim != 3 or len(tokens) != len(names) or not tokens.isfinite().all():
        raise UserError(f"{path} has tokens of shape {tuple(tokens.shape)} for {len(names)} names, "
                        "or numbers that are not finite", need, "write one vector for each name")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names an image twice", need, "keep one row for each image")
    return dict(zip(names, tokens))
