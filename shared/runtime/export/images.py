"""A trained network for images as files that PyTorch alone can use: its weights, and a README that builds the layers.

Test: tests/integration/test_images.py runs the README's lines in a process that has no Silotune.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from shared.job.job import Job
from shared.models.images import ImageModel

NETWORK_FILE = "model.safetensors"

_README = """# Trained network

Load it with PyTorch and safetensors alone:

```python
import torch
from safetensors.torch import load_file
from torch import nn

network = nn.Sequential(
{layers}
)
network.load_state_dict(load_file(ADAPTER + "/{file}"))
network.eval()
# One image a row: {num_pixels} numbers from {low:g} to {high:g}, channel by channel and row by row.
pixels = torch.tensor(PIXELS, dtype=torch.float32)
images = (pixels - {low!r}) / ({high!r} - {low!r}) * 2 - 1
with torch.no_grad():
    logits = network(images.view(-1, {channels}, {height}, {width}))
labels = {labels}
```
"""


def write_network(folder: Path, model: ImageModel, job: Job) -> None:
    """Write the weights that `model` holds, under the names of one sequence of layers, and the README."""
    layers = [*model.features, model.head]
    sequence = nn.Sequential(*layers)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sequence.state_dict().items()}
    save_file(weights, folder / NETWORK_FILE, metadata={"format": "pt"})
    assert job.task.pixel_range is not None  # noqa: S101 (checked by TaskConfig)
    (low, high), (channels, height, width) = job.task.pixel_range, model.shape
    text = _README.format(
        # A layer shows itself as the call that makes it.
        layers="\n".join(f"    nn.{_constructor(layer)}," for layer in layers),
        file=NETWORK_FILE,
        num_pixels=job.task.num_pixels,
        low=low,
        high=high,
        channels=channels,
        height=height,
        width=width,
        labels=list(job.task.labels),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _constructor(layer: nn.Module) -> str:
    # The default, which older versions of PyTorch do not know of GroupNorm.
    return repr(layer).replace(", bias=True)", ")")
