"""The networks whose features compare images: --features and --weights.

    name, extract = feature_extractor("inception", None, device)
    features, _ = describe(batches, extract, device)    # (N, D)

The name identifies the weights (by their hash) and the way of resizing. Distances under different
names cannot be compared.
"""
import hashlib
from functools import partial

import torch

from dino import conditioning_tokens, load_dino
from evaluate import FIDInception, RandomFeatures
from support.command import UserError, user_errors

JUDGES = ("random", "inception", "dino")
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")


def load_judge(net, source):
    """Load a network's weights from a file, or from a URL whose file name ends in its hash."""
    options = {"map_location": "cpu", "weights_only": True}  # execute nothing in the file
    try:
        if source.startswith("https:"):
            state = torch.hub.load_state_dict_from_url(source, check_hash=True, **options)
        else:
            state = torch.load(source, **options)
        net.load_state_dict(state)
    except Exception as error:  # a malformed file can raise anything
        raise UserError(f"cannot load {source} ({' '.join(str(error).split())[:160]})", "a state "
                        f"dict of {type(net).__name__} is needed", "pass --weights FILE, or delete "
                        f"a damaged download in {torch.hub.get_dir()}/checkpoints") from None
    return net


def feature_extractor(kind, weights, device, model=None):
    """(name, function: images (B, 3, H, W) in [-1, 1] -> features) of a judge.

    kind: one of JUDGES. weights: a file, for dino also a published name, or None. Without weights,
    dino is the embedder of `model`, a DinoDiffusion.
    """
    if kind == "random":
        return RandomFeatures.NAME, RandomFeatures().to(device)

    if kind == "inception":
        net = load_judge(FIDInception(), weights or FID_WEIGHTS)
        rule = "plain bilinear to 299 px"

        def extract(x):
            return net((x + 1) / 2)

    elif weights:
        with user_errors():
            net = load_dino(weights)
        rule = f"CLS, antialiased bicubic to {net.input_side} px"
        extract = partial(conditioning_tokens, net, kind="cls")

    else:
        if model.config.vit is None:
            raise UserError("this model was trained on a file of vectors", "a judge needs a ViT",
                            "pass --weights")
        print("note: the features that conditioned the samples are a biased judge of them")
        net = model.embedder.vit
        rule = f"{model.config.tokens} tokens, antialiased bicubic to {net.input_side} px"
        extract = model.embed

    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    net.eval().to(device)
    return f"{kind} {digest.hexdigest()[:8]}, {rule}", extract
