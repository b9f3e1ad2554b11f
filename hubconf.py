"""Entry points of torch.hub. REPO is owner/name on GitHub, or, with source="local", a clone's path.

    model = torch.hub.load(REPO, "cxr128")      # the bundled model: chest X-rays at 128 px
    vit = torch.hub.load(REPO, "dino_cxr")      # its frozen DiNO ViT
    model = torch.hub.load(REPO, "dinodiff", checkpoint="runs/cxr")      # the model.pt of a run
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


def cxr128():
    """The bundled DinoDiffusion, of chest X-rays at 128 px: see weights/README.md."""
    return dinodiff("box")


def dino_cxr():
    """The bundled VisionTransformer; dino.conditioning_tokens(vit, x) computes its tokens."""
    return dino_vit("box")
