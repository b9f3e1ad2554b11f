"""More judges than evaluate.py has: TorchXRayVision's network, and the embedder of a model.

    name, extract = judge_of(args, device)     # by --features, --weights and --checkpoint
    features, _ = describe(batches, extract, device)
"""
import torch.nn.functional as F

from dinodiff import DinoDiffusion
from evaluate import feature_extractor, load_judge, name_judge
from support.command import UserError, user_errors
from support.files import load_checkpoint, resolve_checkpoint

JUDGES = ("random", "inception", "dino", "xrv")


def xray_extractor(weights, device):
    """(name, function: images -> features) of TorchXRayVision's DenseNet, from a file or else the
    package's own download."""
    try:  # without a file the package unpickles its download, which can run code
        from torchxrayvision.models import DenseNet
        net = DenseNet(weights=None if weights else "densenet121-res224-all")
    except (ImportError, OSError) as error:
        raise UserError(f"--features xrv cannot start ({error})", "torchxrayvision and its "
                        "weights are needed", "pip install torchxrayvision; without network "
                        "pass --weights FILE, a state dict of its DenseNet") from error
    if weights:
        net = load_judge(net, weights)
    net = net.eval().to(device)

    def extract(x):
        grey = x.mean(dim=1, keepdim=True)
        grey = F.interpolate(grey, (224, 224), mode="bilinear", antialias=True)
        return net.features2(1024 * grey)  # the range it was trained with

    return name_judge("xrv", net, "antialiased bilinear to 224 px"), extract


def embedder_extractor(model):
    """(name, function: images -> features) of a DinoDiffusion's own embedder."""
    print("note: the tokens that conditioned samples do not judge them fairly")
    rule = f"{model.config.tokens} tokens, antialiased bicubic to {model.embedder.input_side} px"
    return name_judge("dino", model.embedder, rule), model.embed


def judge_of(args, device):
    """(name, function: images (B, 3, H, W) in [-1, 1] -> features) of --features and --weights.

    Without weights, "dino" is the embedder of --checkpoint.
    """
    if args.features == "xrv":
        return xray_extractor(args.weights, device)
    if args.features == "dino" and not args.weights:
        checkpoint = load_checkpoint(resolve_checkpoint(args.checkpoint))
        with user_errors():
            return embedder_extractor(DinoDiffusion.from_checkpoint(checkpoint).to(device))
    return feature_extractor(args.features, args.weights, device)
