"""The Python on docs/state-space.md runs as it stands there."""

import re
from pathlib import Path

import torch


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/state-space.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["mixed"].shape == (8, 200, 64)
    assert names["now"].shape == (8, 64)
    assert torch.isfinite(names["now"]).all()
