"""Small networks for images, all of whose weights are trained: there is no backbone, so nothing has to be loaded.

Guarantees (tests: tests/shared/models/test_images.py)
    * Whoever builds a network from the same job gets the same weights, drawn from the job's public seed.
    * No layer keeps statistics of the images that it saw, and none mixes the images of a batch: GroupNorm (Wu and He 2018),
      never BatchNorm. Images are scaled by the public range of a pixel alone.
    * Everything that is trained is of a kind whose per-example gradients `client.training.per_example` takes itself, so
      simulated sites are trained side by side as with adapters (tests: tests/client/training/test_image_training.py).

`tanh`, because bounded activations learn better from clipped gradients than ReLU (Papernot et al. 2021); few weights, because
noise grows with their number (Tramer and Boneh 2021).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import ModelError
from shared.job.model import IMAGE_NETWORK_PREFIX, ModelConfig, TaskConfig
from shared.job.parsing import nearest
from shared.models.batches import Batch
from shared.models.seeds import derived_seed
from shared.models.tunable import TrainedModel

PIXEL_STEPS = 65_536
"""Steps from the lowest to the highest pixel value: an example holds whole numbers from 0 to this, int64."""

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ImageNetwork:
    """One row of `IMAGE_NETWORKS`.

    Attributes:
        identity: what is computed, in words. A site's policy lists its SHA-256, so a change of the layers must change the words.
        features: function of (channels, height, width) -> layers from images [B, channels, height, width] to vectors
            [B, num_features].
        num_features: function of the same.
    """

    identity: str
    features: Callable[[Shape], nn.Sequential]
    num_features: Callable[[Shape], int]


_FIRST, _SECOND, _GROUPS, _LARGEST_GRID = 16, 32, 4, 4


def _small_grid(shape: Shape) -> tuple[int, int]:
    return min(shape[1] // 4, _LARGEST_GRID), min(shape[2] // 4, _LARGEST_GRID)


def _small_features(shape: Shape) -> nn.Sequential:
    return nn.Sequential(
        # Without bias: the normalisation that follows has one.
        nn.Conv2d(shape[0], _FIRST, 3, padding=1, bias=False),
        nn.GroupNorm(_GROUPS, _FIRST),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(_FIRST, _SECOND, 3, padding=1, bias=False),
        nn.GroupNorm(_GROUPS, _SECOND),
        nn.Tanh(),
        # Of a large image a coarse grid, so that the number of weights does not grow with it.
        nn.AdaptiveAvgPool2d(_small_grid(shape)),
        nn.Flatten(),
    )


IMAGE_NETWORKS: Mapping[str, ImageNetwork] = {
    "small": ImageNetwork(
        identity="silotune cnn:small, version 1: pixels from -1 to 1; conv 3x3 of 16, GroupNorm of 4, tanh, mean 2x2; conv 3x3 "
        "of 32, GroupNorm of 4, tanh, mean over a grid of at most 4x4; linear",
        features=_small_features,
        num_features=lambda shape: _SECOND * math.prod(_small_grid(shape)),
    ),
}


class ImageModel(TrainedModel):
    """Layers from pixels to a vector, and a linear head; every weight is trained.

    Attributes:
        shape: channels, height and width.
        features, head: the layers.
    """

    def __init__(self, features: nn.Sequential, head: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.features, self.head, self.shape = features, head, shape
        self.train_mode()

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [B, labels]; `input_ids` holds the steps of every pixel value, int64 [B, channels * height * width]."""
        pixels = batch.input_ids.to(torch.float32) * (2 / PIXEL_STEPS) - 1
        return self.head(self.features(pixels.view(-1, *self.shape)))  # type: ignore[no-any-return]


def image_network(config: ModelConfig) -> ImageNetwork:
    """Return the network that a job names.

    Raises:
        ModelError: if there is none of this name.
    """
    name = config.backbone.removeprefix(IMAGE_NETWORK_PREFIX)
    if name not in IMAGE_NETWORKS:
        raise ModelError(f"no network for images is called {config.backbone!r}; {nearest(name, list(IMAGE_NETWORKS))}")
    return IMAGE_NETWORKS[name]


def image_network_sha256(config: ModelConfig) -> str:
    """Return what stands for the hash of a backbone's files in a site's policy: SHA-256 of the network's identity."""
    return hashlib.sha256(image_network(config).identity.encode()).hexdigest()


def build_features(config: ModelConfig, task: TaskConfig, *, seed: int) -> tuple[nn.Sequential, int]:
    """Return the layers below the head and the length of the vectors that leave them; drawn from the public `seed`.

    Convolutions are N(0, 1 / inputs) (LeCun et al. 1998); normalisations begin as the identity.
    """
    assert task.image_shape is not None  # noqa: S101 (checked by Job)
    network = image_network(config)
    features = network.features(task.image_shape)
    for name, module in features.named_modules():
        if isinstance(module, nn.Conv2d):
            generator = torch.Generator().manual_seed(derived_seed(seed, f"features.{name}"))
            with torch.no_grad():
                drawn = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(drawn / math.sqrt(module.weight[0].numel()))
    return features, network.num_features(task.image_shape)
