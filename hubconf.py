"""What torch.hub finds here.

    model = torch.hub.load(REPO, "dinodiff", checkpoint="runs/cxr")      # the bundle of a model.pt
    vit = torch.hub.load(REPO, "dino_vit", name_or_path="dino_vits16")   # a frozen DiNO ViT
"""
dependencies = ["torch", "torchvision", "numpy", "scipy", "PIL"]


def dinodiff(checkpoint):
    """The DinoDiffusion of a run's folder or model.pt, on the CPU: .embed, .sample, .encode ..."""
    from dinodiff import DinoDiffusion
    from support.files import load_checkpoint, resolve_checkpoint
    return DinoDiffusion.from_checkpoint(load_checkpoint(resolve_checkpoint(checkpoint)))


def dino_vit(name_or_path):
    """The VisionTransformer of a published name, a file of weights or a run: see dino.load_dino."""
    from dino import load_dino
    return load_dino(name_or_path)
