"""Make walkthrough.ipynb from docs/walkthrough.md: run its blocks in order and store the outputs.

    python tools/make_notebook.py

Text becomes text cells, and each ```python block a code cell, followed by a cell for its picture.
Pictures also go to assets/, for the page.
"""
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

START = """# On Colab: paste the address of this repository, then choose "Run all".
ADDRESS = ""
if ADDRESS:
    !git clone $ADDRESS dino-diffusion
    %cd dino-diffusion
    !pip install -q -r requirements.txt
from IPython.display import Image"""


def cell(kind, text, *outputs):
    fields = {"execution_count": None, "outputs": list(outputs)} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True), **fields}


def picture_cell(name):
    """A cell that shows the picture written by the cell before. The picture moves to assets/, in
    grey if its colours are faint, which takes a third of the bytes."""
    picture = Image.open(name)
    if np.ptp(np.asarray(picture.convert("RGB")), axis=2).mean() < 10:
        picture = picture.convert("L")
    picture.save(ROOT / "assets" / name, optimize=True)
    Path(name).unlink()
    data = base64.b64encode((ROOT / "assets" / name).read_bytes()).decode()
    return cell("code", f'Image("{name}")', {
        "output_type": "display_data", "metadata": {}, "data": {"image/png": data}})


def main():
    page = (ROOT / "docs" / "walkthrough.md").read_text()
    cells = [cell("code", START)]
    session = {}
    for i, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.M | re.S)):
        if i % 2 == 0:  # text and code alternate
            text = re.sub(r"^!\[.*\n", "", part, flags=re.M).replace("](../", "](")
            cells.append(cell("markdown", text.strip()))
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(part, "walkthrough.md", "exec"), session)
        text = printed.getvalue()
        cells.append(cell("code", part.rstrip(), *[
            {"output_type": "stream", "name": "stdout", "text": text}] * bool(text)))
        cells += [picture_cell(name) for name in re.findall(r'"(walk_\w+\.png)"', part)]
    notebook = {"nbformat": 4, "nbformat_minor": 4, "cells": cells, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}}
    (ROOT / "walkthrough.ipynb").write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main()
