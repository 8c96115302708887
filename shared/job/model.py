"""What is trained: the frozen backbone, its adapters, the task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.job.kinds import RULES, Rules, TaskKind
from shared.job.parsing import Section
from shared.job.values import ImageSide, Value
from shared.limits import MAX_LABELS, MAX_LORA_ALPHA, MAX_TABLE_LABELS

IMAGE_NETWORK_PREFIX = "cnn:"
"""Of `model.backbone`, where it names a network for images instead of a pre-trained backbone."""
MAX_PIXELS = 65_536
"""Most pixel values of one image, over all its channels."""


def told_backbone(backbone: str) -> str:
    """Return what readers elsewhere are told of `model.backbone`: of a folder on this machine only its name."""
    return Path(backbone).name if Path(backbone).is_absolute() else backbone


class ModelConfig(Section):
    """The frozen backbone."""

    backbone: str = "embedded:all-minilm-l6-v2"
    """`embedded:NAME` (ships in a Python package), the path of a local folder, or a hub id with `revision`; of
    `image_classification` `cnn:small`, a network without a backbone, all of whose weights are trained."""
    revision: str | None = None
    """Commit of a hub id (40 hexadecimal digits): a branch name could change under a signed job."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    backbone_bits: Literal[32, 8] = Field(default=32, exclude_if=lambda value: value == 32)
    """Bits of a frozen weight. 8 holds linear layers and token embeddings as whole numbers with a scale for each row, in 0.3
    of the memory; what is computed in is for `compute.precision` to say. The backbone's function changes a little, so this is of
    the job and not of a site: all compute the same one."""
    max_length: int = Field(default=64, ge=2, le=8192)
    """Tokens per example; longer texts are cut."""
    pooling: Literal["mean", "first"] = "mean"
    """How a classifier reduces token vectors to one vector: mean over the tokens, or the first token's vector."""

    @model_validator(mode="after")
    def _check_bits(self) -> Self:
        if self.backbone_bits != 32 and self.is_image_network:
            raise ValueError("backbone_bits is for a frozen backbone, and a network for images has none; remove it")
        return self

    @property
    def is_image_network(self) -> bool:
        """True if `backbone` names a network of `shared.models.images`, which has no weights to load."""
        return self.backbone.startswith(IMAGE_NETWORK_PREFIX)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1, le=256)
    """r, the inner dimension of the two factors."""
    alpha: float = Field(default=16.0, gt=0, le=MAX_LORA_ALPHA)
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    """Last name components of the linear modules to adapt."""
    last_layers: int | None = Field(default=1, ge=1)
    """Adapt only the last k layers; everything below is frozen and can be cached. None adapts all layers."""
    train: Literal["b", "both", "none"] = "b"
    """`b`: FFA-LoRA (Sun et al. 2024), A is fixed and orthonormal, averaging is exact. `both`: train A and B. `none`: the head
    alone; the whole backbone is computed once per text, so that a step takes a fraction of the time, also without a GPU."""


class TaskConfig(Section):
    """What the model learns; `kind` names a row of `shared.tasks.TASKS`."""

    kind: TaskKind
    """`sequence_classification` (a label for a text), `token_classification` (a tag for each word), `pair_matching` (whether two
    texts belong together), `regression` (a number for a text), `causal_lm` (the next token; GPT-2), `replies` (a response to a
    prompt; GPT-2), `image_classification` (a label for an image)."""
    labels: tuple[str, ...] = Field(default=(), max_length=MAX_LABELS)
    """Names in the order of the logits: classes of `sequence_classification` and `image_classification`; IOB tags of
    `token_classification`, "O" among them; of `pair_matching` two, the second for a match. The other kinds have none."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    target_range: tuple[Value, Value] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Lowest and highest number of `regression`, public: a site clips what lies outside, so that one record's label cannot pull
    further than the range is wide, and the scale that is learned tells nothing of the data."""
    image_shape: tuple[Annotated[int, Field(ge=1, le=16)], ImageSide, ImageSide] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Channels, height and width of every image of `image_classification`; together at most 65,536 pixel values."""
    pixel_range: tuple[Value, Value] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Lowest and highest pixel value, such as [0, 255], public: images are scaled by it and by nothing that is computed from
    them. An image with a value outside is refused."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)
    """Share of each target that is spread evenly over all labels while training (Szegedy et al. 2016); of one record's loss at a
    time, so it changes nothing about privacy. Only for kinds with labels."""

    class_weights: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(), exclude_if=lambda value: not value
    )
    """Factor on the loss of each label's records (words of `token_classification`), in the order of `labels`, at most 1: what
    is rare has 1, what is frequent less. Public numbers, declared and never counted, inside one record's own loss: it changes
    nothing about privacy. A gradient that is clipped anyway keeps its length unless the factor brings it below
    `max_grad_norm`; see docs/tasks.md. Only for kinds with labels."""

    thresholds: Literal["none", "public"] = Field(default="none", exclude_if=lambda value: value == "none")
    """How a label is chosen: the most probable one, or with `public` after a number was added to each label's logit for which
    macro F1 is highest on the public records that decide (of 200 and more a fifth, of which no figure is). The numbers go into
    the bias of the model that is handed out, at the run's end; for kinds whose records have one label each, up to 100 labels."""

    # Not written out where it is not set: jobs of older versions keep their hash.
    head_start: Literal["random", "label-names"] = Field(default="random", exclude_if=lambda value: value == "random")
    """Where the head of `sequence_classification` starts: `random` small weights from the seed, or `label-names`, the directions
    in which the backbone sees the labels' names. Names that say what texts are about help most with many labels and little
    budget; names are public, so it costs nothing."""

    head_centre: Literal["none", "label-names"] = Field(default="none", exclude_if=lambda value: value == "none")
    """What the head of `sequence_classification` takes off the vector of every text: nothing, or with `label-names` the mean of
    what the backbone sees in the labels' names. All texts of a field have much in common, which tells no label from another
    and takes its share of each clipped gradient. It helps with many labels and little budget; names are public, so it costs
    nothing."""

    head_offset: float = Field(default=0.0, ge=0, le=1, exclude_if=lambda value: value == 0)
    """Added to every value of the vector that the head of `regression` sees. Those vectors have mean 0 and variance 1, so it does
    what a larger bias does: clipped steps get to the scores' own mean sooner where that is not the middle of `target_range`.
    `silotune new` takes 0.25; public, so it costs nothing."""

    @model_validator(mode="after")
    def _check_offset(self) -> Self:
        if self.head_offset and self.kind != "regression":
            raise ValueError(f"head_offset is for regression, and kind is {self.kind!r}; remove it")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for key in ("head_start", "head_centre"):
            if getattr(self, key) == "label-names" and self.kind != "sequence_classification":
                raise ValueError(f"{key} is for sequence_classification, and kind is {self.kind!r}; remove it")
        return self

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        for key in ("label_smoothing", "class_weights"):
            if getattr(self, key) and self.rules.check_labels is None:
                raise ValueError(f"{key} is for kinds with labels, and {self.kind} has none; remove it")
        return self

    @model_validator(mode="after")
    def _check_thresholds(self) -> Self:
        if self.thresholds == "none":
            return self
        if not self.has_classes:
            raise ValueError(
                f"thresholds is for kinds whose records have one label each, not for {self.kind}; remove it"
            )
        if len(self.labels) > MAX_TABLE_LABELS:
            raise ValueError(
                f"thresholds is 'public', and there are {len(self.labels):,} labels; it is for at most {MAX_TABLE_LABELS}. "
                "Public records that decide would be too few for each. Remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise ValueError(
                f"class_weights has {len(self.class_weights)} numbers, and there are {len(self.labels)} labels; give one for "
                "each, in their order"
            )
        if self.class_weights and max(self.class_weights) < 1:
            raise ValueError(
                f"the largest of class_weights is {max(self.class_weights):g}; divide all by it, so that the largest is 1. A "
                "common factor is the learning rate's affair"
            )
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("task.labels holds a name twice; every label must be unique")
        if self.rules.check_labels is not None:
            self.rules.check_labels(self.kind, self.labels)
        elif self.labels:
            raise ValueError(f"{self.kind} takes no labels; remove task.labels")
        return self

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        self._check_belongs("target_range", ", the lowest and the highest number,")
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError("task.target_range must rise, such as [1, 5]")
        return self

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        for key in ("image_shape", "pixel_range"):
            self._check_belongs(key)
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError("task.pixel_range must rise, such as [0, 255]")
        if self.image_shape is not None and self.num_pixels > MAX_PIXELS:
            raise ValueError(
                f"task.image_shape has {self.num_pixels:,} pixel values; {MAX_PIXELS:,} are the most. Scale the images down"
            )
        return self

    def _check_belongs(self, key: str, meaning: str = "") -> None:
        """Refuse a key that the kind does not take, and a kind without a key that it needs."""
        given = getattr(self, key) is not None
        if given != (key in self.rules.keys):
            owners = " and ".join(kind for kind, rules in RULES.items() if key in rules.keys)
            raise ValueError(
                f"task.{key}{meaning} belongs to {owners} and to no other kind; kind is {self.kind!r} and it is "
                f"{'there' if given else 'missing'}"
            )

    @property
    def rules(self) -> Rules:
        """Which settings this kind takes."""
        return RULES[self.kind]

    @property
    def has_classes(self) -> bool:
        """True if each record has one of `labels`."""
        return self.rules.has_classes

    @property
    def num_pixels(self) -> int:
        """Pixel values of one image over all channels; 0 if the task has none."""
        return math.prod(self.image_shape) if self.image_shape is not None else 0
