"""Histology patches that show no tissue: black, blank or out of focus.

Source: the idea of arXiv 2312.09792; the limits are ours.
"""
import torch
import torch.nn.functional as F

from support.command import StatusLine


def find_outliers(images):
    """Why each patch (B, 3, H, W) in [-1, 1] shows no tissue: a list of str, "" where it does.

    Measured at 64 pixels a side. Blank patches are bright, pale and have few edges; fat is bright
    and pale too, but has edges.
    """
    x = F.adaptive_avg_pool2d((images + 1) / 2, 64)                    # (B, 3, 64, 64)
    value = x.amax(1)
    brightness = value.mean((1, 2))
    saturation = (1 - x.amin(1) / value.clamp(min=1e-3)).mean((1, 2))
    kernel = x.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    edges = F.conv2d(x.mean(1, keepdim=True) * 255, kernel).flatten(1).var(1)

    reasons = []
    for b, s, e in zip(brightness.tolist(), saturation.tolist(), edges.tolist()):
        if b < 0.2:
            reasons.append("black")
        elif b > 0.9 and s < 0.05 and e < 600:
            reasons.append("blank")
        else:
            reasons.append("out of focus" if e < 150 else "")
    return reasons


def drop_outliers(images, condition):
    """(index, reason) of the patches of an ImageSet that a run with prompts leaves out.

    Only colour images are examined. If more than half would be left out, none is: they are
    probably not histology.
    """
    if condition not in ("prompts", "labels"):
        return []

    # Medians, so that a coloured mark on a grey X-ray does not count.
    rows = torch.tensor([i for i, file in enumerate(images.files) if file not in images.unreadable])
    sample = rows[torch.linspace(0, len(rows) - 1, min(64, len(rows))).long()].tolist()
    colour = torch.stack([(images[i].amax(0) - images[i].amin(0)).median() for i in sample])
    if colour.median() <= 0.1:
        return []

    outliers = []
    status = StatusLine(len(rows), "outliers")
    for k, part in enumerate(rows.split(64), 1):
        reasons = find_outliers(images.batch(part.tolist()))
        outliers += [(i, reason) for i, reason in zip(part.tolist(), reasons) if reason]
        status.update(min(64 * k, len(rows)), images=len(part))
    status.close()
    if 2 * len(outliers) > len(rows):
        print(f"note: {len(outliers)} of {len(rows)} images look empty or out of focus, too many "
              "to be outliers: all are used")
        return []
    return outliers
