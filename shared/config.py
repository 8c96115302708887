"""Configuration: frozen, typed, checked at construction; TOML in, canonical JSON and a SHA-256 out.

A `Job` is everything that a coordinator may ask of a site. It is data, never code: a site runs only the training
code that it installed. Settings that change privacy stand in `PrivacyConfig`; settings that only change speed
stand in `ComputeConfig`, belong to each site, and are not part of the job.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared.epsilons import delta_rounded_up
from shared.errors import ConfigError, excerpt
from shared.limits import (
    MAX_EPSILON,
    MAX_GRAD_NORM,
    MAX_LABELS,
    MAX_NOISE_MULTIPLIER,
    MAX_SITES,
    MAX_STEPS,
    MAX_TABLE_LABELS,
    MIN_DELTA,
    MIN_EPSILON,
    MIN_GRAD_NORM,
    MIN_NOISE_MULTIPLIER,
    MIN_SAMPLE_RATE,
)

Probability = Annotated[float, Field(gt=0, le=1)]
SampleRate = Annotated[float, Field(ge=MIN_SAMPLE_RATE, le=1)]
NoiseMultiplier = Annotated[float, Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)]
Epsilon = Annotated[float, Field(ge=MIN_EPSILON, le=MAX_EPSILON)]
Delta = Annotated[float, Field(ge=MIN_DELTA, lt=1)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Unit = Literal["record", "patient", "customer"]
PERSON_UNITS: tuple[Unit, ...] = ("patient", "customer")
"""Units that are a person with all their records: one mechanism, and the word that the statement uses."""
IMAGE_NETWORK_PREFIX = "cnn:"
"""Of `model.backbone`, where it names a network for images instead of a pre-trained backbone."""
MAX_PIXELS = 65_536
"""Most pixel values of one image, over all its channels."""
ImageSide = Annotated[int, Field(ge=4, le=1024)]


class Section(BaseModel):
    """Base of all configuration sections: frozen, finite numbers only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, raw: Any) -> Any:
        """TOML has no null, so the word "none" stands for None wherever a setting can be None."""
        if not isinstance(raw, Mapping):
            return raw
        fields = cls.model_fields
        return {
            key: None if key in fields and says_none(value) and takes_none(fields[key].annotation) else value
            for key, value in raw.items()
        }

    def set_keys(self) -> set[str]:
        """Return the keys whose value is not the default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.get_default()}


def says_none(value: object) -> bool:
    """Return whether this is the word for None, in whatever case."""
    return isinstance(value, str) and value.strip().casefold() == "none"


def takes_none(annotation: Any) -> bool:
    """Return whether a setting of this type can be None, and has no choice that is called "none" itself."""
    if not isinstance(annotation, types.UnionType) and get_origin(annotation) is not Union:
        return False
    options = get_args(annotation)
    names = {name for option in options if get_origin(option) is Literal for name in get_args(option)}
    return types.NoneType in options and "none" not in names


class ModelConfig(Section):
    """The frozen backbone."""

    backbone: str = "embedded:all-minilm-l6-v2"
    """`embedded:NAME` (ships in a Python package), the path of a local folder, or a hub id with `revision`; of
    `image_classification` `cnn:small`, a network without a backbone, all of whose weights are trained."""
    revision: str | None = None
    """Commit of a hub id (40 hexadecimal digits): a branch name could change under a signed job."""
    max_length: int = Field(default=64, ge=2, le=8192)
    """Tokens per example; longer texts are cut."""
    pooling: Literal["mean", "first"] = "mean"
    """How a classifier reduces token vectors to one vector: mean over the tokens, or the first token's vector."""

    @property
    def is_image_network(self) -> bool:
        """True if `backbone` names a network of `shared.image_models`, which has no weights to load."""
        return self.backbone.startswith(IMAGE_NETWORK_PREFIX)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1, le=256)
    """r, the inner dimension of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field(default=("query", "value"), min_length=1)
    """Last name components of the linear modules to adapt."""
    last_layers: int | None = Field(default=1, ge=1)
    """Adapt only the last k layers; everything below is frozen and can be cached. None adapts all layers."""
    train: Literal["b", "both"] = "b"
    """`b`: FFA-LoRA (Sun et al. 2024), A is fixed and orthonormal, averaging is exact. `both`: train A and B."""


TaskKind = Literal[
    "sequence_classification",
    "token_classification",
    "pair_matching",
    "regression",
    "causal_lm",
    "replies",
    "image_classification",
]


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
    target_range: tuple[float, float] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Lowest and highest number of `regression`, public: a site clips what lies outside, so that one record's label cannot pull
    further than the range is wide, and the scale that is learned tells nothing of the data."""
    image_shape: tuple[Annotated[int, Field(ge=1, le=16)], ImageSide, ImageSide] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Channels, height and width of every image of `image_classification`; together at most 65,536 pixel values."""
    pixel_range: tuple[float, float] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Lowest and highest pixel value, such as [0, 255], public: images are scaled by it and by nothing that is computed from
    them. An image with a value outside is refused."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)
    """Share of each target that is spread evenly over all labels while training (Szegedy et al. 2016); of one record's loss at a
    time, so it changes nothing about privacy. Only for kinds with labels."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.kind in ("causal_lm", "replies", "regression"):
            raise ValueError(f"label_smoothing is for kinds with labels, and {self.kind} has none; remove it")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("task.labels holds a name twice; every label must be unique")
        if self.kind in ("causal_lm", "replies", "regression"):
            if self.labels:
                raise ValueError(f"{self.kind} takes no labels; remove task.labels")
        elif self.kind == "pair_matching" and len(self.labels) != 2:
            raise ValueError(
                f"pair_matching has {len(self.labels)} labels; name two, the second for a match, such as other and match"
            )
        elif len(self.labels) < 2:
            raise ValueError(f"{self.kind} has {len(self.labels)} labels; name at least two")
        if self.kind == "token_classification":
            self._check_tags()
        return self

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if (self.kind == "regression") != (self.target_range is not None):
            raise ValueError(
                "task.target_range, the lowest and the highest number, belongs to regression and to no other kind; "
                f"kind is {self.kind!r} and it is {'missing' if self.target_range is None else 'there'}"
            )
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError("task.target_range must rise, such as [1, 5]")
        return self

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        for name in ("image_shape", "pixel_range"):
            if (self.kind == "image_classification") != (getattr(self, name) is not None):
                raise ValueError(
                    f"task.{name} belongs to image_classification and to no other kind; kind is {self.kind!r} and it is "
                    f"{'missing' if getattr(self, name) is None else 'there'}"
                )
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError("task.pixel_range must rise, such as [0, 255]")
        if self.image_shape is not None and self.num_pixels > MAX_PIXELS:
            raise ValueError(
                f"task.image_shape has {self.num_pixels:,} pixel values; {MAX_PIXELS:,} are the most. Scale the images down"
            )
        return self

    def _check_tags(self) -> None:
        if "O" not in self.labels:
            raise ValueError('task.labels of token_classification must hold "O", the tag of words outside any entity')
        for tag in self.labels:
            mark, _, entity = tag.partition("-")
            if tag != "O" and (mark not in ("B", "I") or not entity):
                raise ValueError(
                    f'task.labels holds {tag!r}; tags of token_classification are "O", "B-NAME" for the first word of an entity '
                    'and "I-NAME" for its further words'
                )
            if mark == "I" and f"B-{entity}" not in self.labels:
                raise ValueError(f"task.labels holds {tag!r} but not {f'B-{entity}'!r}, with which every entity begins")

    @property
    def has_classes(self) -> bool:
        """True if each record has one of `labels`."""
        return self.kind in ("sequence_classification", "pair_matching", "image_classification")

    @property
    def num_pixels(self) -> int:
        """Pixel values of one image over all channels; 0 if the task has none."""
        return math.prod(self.image_shape) if self.image_shape is not None else 0


class EarlyStoppingConfig(Section):
    """When a run ends before its planned rounds, decided by a metric on a part of the coordinator's public records, of which no
    figure is (`server.public_records`)."""

    patience: int = Field(ge=1, le=100_000)
    """The run ends after so many evaluations in a row (one before training, then one every `evaluate_every` rounds) without
    an improvement. A number that is never reached only picks the adapter (`keep`)."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as an improvement: the metric is better than at the last one by more than this, in the metric's own unit."""
    keep: Literal["last", "best"] = "last"
    """The adapter that the run hands out: the `last` round's, or that of the evaluation with the `best` metric. Both were
    released anyway, and the records that choose are public, so neither costs privacy."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    metric: Literal["primary", "loss"] = Field(default="primary", exclude_if=lambda value: value == "primary")
    """What decides: the task's `primary` metric, or the `loss`, which also tells when a model becomes too sure of itself."""


class TrainingConfig(Section):
    """Rounds and the local optimiser. The schedule is public: it reads only the step number."""

    rounds: int = Field(ge=1, le=100_000)
    """Times that the adapter goes out to the sites and back."""
    local_steps: int = Field(default=4, ge=1, le=100_000)
    """Logical (noisy) optimiser steps that a site takes in one round."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of the sites. Under noise `sgd` averages better over many sites; see docs/decisions/0004."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """About 1e-3 to 1e-2 for `adamw`, 0.1 to 3 for `sgd` (clipped gradients are short)."""
    head_learning_rate_factor: float = Field(default=1.0, gt=0)
    """The head's learning rate is `learning_rate` times this."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Shrinks the trained weights in every step; reads no data, so it costs no privacy."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `sgd`, beta1 of `adamw`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Factor on the learning rate over all planned steps: 1, or falling to 0 at the last step."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    warmup_steps: int = Field(default=0, ge=0, le=100_000, exclude_if=lambda value: value == 0)
    """The learning rate rises over so many of the planned steps, in equal parts, before it is `schedule` times its full value."""
    early_stopping: EarlyStoppingConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.planned_steps > MAX_STEPS:
            raise ValueError(
                f"rounds x local_steps is {self.planned_steps:,} ({self.rounds:,} x {self.local_steps:,}); at most {MAX_STEPS:,} "
                "steps can be planned and accounted for. Lower one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.planned_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but only {self.planned_steps} steps are planned (rounds x local_steps); "
                "the full learning rate would never be reached"
            )
        return self

    @property
    def planned_steps(self) -> int:
        """Steps of a site that takes part in every round."""
        return self.rounds * self.local_steps


MIN_CENTRAL_SITES = 100
"""Sites below which the noise that hides one of them buries what they have in common."""


class CentralConfig(Section):
    """Noise that a trusted coordinator adds over many sites; see `shared.privacy.central`."""

    num_sites: int = Field(ge=1, le=MAX_SITES)
    """N: declared (public) number of sites, at least 100. The noisy sum is divided by `site_sample_rate` times this."""
    site_sample_rate: SampleRate = 0.5
    """q: probability with which each site enters a round, by a secret coin of the coordinator (Poisson sampling)."""
    clip_norm: float = Field(default=0.1, gt=0, le=1e6)
    """S: the largest L2 norm of one site's update over adapter and head together, in the first round."""
    target_quantile: float | None = Field(default=0.5, gt=0, lt=1)
    """Share of the updates that S is moved to leave unclipped (Andrew et al. 2021); None keeps S as it is."""
    clip_learning_rate: float = Field(default=0.2, gt=0, le=2)
    """S is multiplied by exp(-rate * (noised share of unclipped updates - `target_quantile`)) after every round."""
    count_noise: float | None = Field(default=None, gt=0, le=1e6)
    """Standard deviation of the noise on the count of unclipped updates, above half the noise multiplier; None takes
    q N / 20, or the noise multiplier if that is larger. The updates get as much more noise as the count costs."""

    @model_validator(mode="after")
    def _check_sites(self) -> Self:
        if self.num_sites < MIN_CENTRAL_SITES:
            raise ValueError(
                f"num_sites is {self.num_sites}; with fewer than {MIN_CENTRAL_SITES} sites the noise that hides one of them "
                "buries what they have in common. Use the mechanism 'dp-sgd', where every site protects its own records"
            )
        return self


class PrivacyConfig(Section):
    """Everything that changes what is protected and how much; see `shared.privacy.plan`."""

    mechanism: Literal["dp-sgd", "central", "none"] = "dp-sgd"
    """`dp-sgd`: every site adds noise. `central`: a trusted coordinator does, over 100 sites or more; sites send it unprotected
    updates. `none` releases unprotected updates. A site accepts either of the last two only if its own settings say so."""
    unit: Unit | Literal["site"] = "record"
    """What the neighbouring data sets differ in, added or removed: one `record`; one `patient` or `customer` with all their
    records, for which each site's data must have an id column; or (with `central`, and only there) one `site`."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    records_per_person: int | None = Field(default=None, ge=1, le=1000, exclude_if=lambda value: value is None)
    """G: at most so many records of each patient or customer enter a step, drawn anew each time; their mean gradient is
    clipped. It bounds time and memory; epsilon does not depend on it. Only, and always, with these units."""
    epsilon: Epsilon = 8.0
    """Target for a site that executes every planned step and releases all of `site_metrics`."""
    delta: Delta = 1e-5
    """Failure probability; must be far below 1 / number of records (or patients, customers)."""
    sample_rate: SampleRate = 0.05
    """q: probability with which each record (or patient, customer) enters a step (Poisson sampling)."""
    max_grad_norm: float = Field(default=1.0, ge=MIN_GRAD_NORM, le=MAX_GRAD_NORM)
    """C: the largest L2 norm of the gradient of one record (or patient, customer) over adapter and head together."""
    noise_multiplier: NoiseMultiplier | None = None
    """sigma; None calibrates it from epsilon, delta, sample_rate and the planned steps (`central`: site_sample_rate, rounds)."""
    central: CentralConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        if self.unit in PERSON_UNITS and self.records_per_person is None:
            raise ValueError(
                f"unit is {self.unit!r}, so records_per_person must say how many records of each {self.unit} enter a step, "
                "for example 4"
            )
        if self.unit not in PERSON_UNITS and self.records_per_person is not None:
            raise ValueError("records_per_person is for the units 'patient' and 'customer'; remove it or set the unit")
        return self

    @model_validator(mode="after")
    def _check_central(self) -> Self:
        central = self.mechanism == "central"
        if central != (self.unit == "site") or central != (self.central is not None):
            raise ValueError(
                "mechanism 'central', unit 'site' and the section privacy.central belong together: give all three or none "
                f"(mechanism is {self.mechanism!r}, unit {self.unit!r}, privacy.central is "
                f"{'missing' if self.central is None else 'there'})"
            )
        if self.central is not None and self.delta >= 1 / self.central.num_sites:
            raise ValueError(
                f"delta is {delta_rounded_up(self.delta)}, but with {self.central.num_sites:,} sites it must be below 1/N = "
                f"{1 / self.central.num_sites:.1e}, best a tenth of it"
            )
        return self


class SiteMetricsConfig(Section):
    """Metrics of the sites' own held-out records, released once, after the last round; see `shared.site_metrics`."""

    names: tuple[Literal["accuracy", "confusion", "loss"], ...] = ()
    """What is asked for; none: nothing but updates leaves a site. A site's policy may forbid any of them."""
    noise_multiplier: NoiseMultiplier = 10.0
    """Standard deviation of the noise on every count, where one record is one vote. Part of the job's epsilon."""
    largest_loss: float = Field(default=5.0, gt=0)
    """Of `loss`: a record's loss is cut here, so that one record cannot move the mean by more."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("site_metrics.names holds a name twice; every release costs budget, so name each once")
        return self


class AggregationConfig(Section):
    """How the coordinator turns site updates into the next global adapter."""

    weights: Literal["equal", "declared", "inverse-variance"] = "declared"
    """What a site counts in the mean of the updates. `declared`: by its public size bucket; exact record counts are never used.
    `inverse-variance`: by that size squared, the least noise, but the largest sites rule. `equal`: all the same, so that under
    noise the smallest site's noise rules. Of `privacy.mechanism` `central` it is `equal`, and nothing else is accepted."""
    # Not written out where it is not set: jobs that older versions wrote name their weights, and keep their hash and meaning.
    largest_share: float | None = Field(default=0.5, ge=0.5, le=1, exclude_if=lambda value: value is None)
    """Largest share of the weight that one of three or more sites can have, whatever size it declares. A job that names `weights`
    and not this one has no such limit."""
    server_optimizer: Literal["none", "momentum", "adam"] = "none"
    """Reddi et al. 2021 (FedAvgM, FedAdam); `none` is plain averaging."""
    server_learning_rate: float = Field(default=1.0, gt=0)
    """Factor on the mean update."""
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `momentum`; beta1 of `adam`."""

    @model_validator(mode="before")
    @classmethod
    def _named_weights_have_no_limit(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "weights" in raw and "largest_share" not in raw:
            return {**raw, "largest_share": None}
        return raw


UpdateDtype = Literal["float32", "bfloat16", "int8"]


class FederationConfig(Section):
    """Who takes part in a round, how long the coordinator waits, and in which form updates come."""

    min_sites: int = Field(default=1, ge=1, le=MAX_SITES)
    """A round with fewer valid replies is not aggregated and the run stops."""
    sites_per_round: int | None = Field(default=None, ge=1, le=MAX_SITES)
    """Number of sites drawn for each round; None asks all of them."""
    round_timeout_seconds: float = Field(default=3600.0, gt=0)
    """After this long a round goes on without the sites that have not answered."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    update_dtype: UpdateDtype = Field(default="float32", exclude_if=lambda value: value == "float32")
    """Numbers in which a site sends its update. `bfloat16` halves, `int8` quarters the bytes; a site adds what rounding lost to
    its next update. See `shared.updates`."""


class Job(Section):
    """A complete, declarative training job: what the coordinator asks and a site may refuse."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: Name
    """Name of the run: letters, digits, dots, dashes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Public seed of the model's initialisation and the fixed A; it never reaches sampling or noise."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig
    training: TrainingConfig
    privacy: PrivacyConfig = PrivacyConfig()
    aggregation: AggregationConfig = AggregationConfig()
    federation: FederationConfig = FederationConfig()
    # Not written out where it is not set: jobs of older versions keep their hash.
    site_metrics: SiteMetricsConfig = Field(
        default=SiteMetricsConfig(), exclude_if=lambda value: value == SiteMetricsConfig()
    )

    @model_validator(mode="before")
    @classmethod
    def _weigh_sites_of_a_trusted_coordinator_equally(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        privacy, aggregation = raw.get("privacy"), raw.get("aggregation", {})
        central = isinstance(privacy, Mapping) and privacy.get("mechanism") == "central"
        if central and isinstance(aggregation, Mapping) and "weights" not in aggregation:
            return {**raw, "aggregation": {**aggregation, "weights": "equal"}}
        return raw

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.site_metrics.names and self.privacy.mechanism != "dp-sgd":
            raise ValueError(
                f"site_metrics are charged to the sites' ledgers, but privacy.mechanism is {self.privacy.mechanism!r}, which "
                "charges nothing; remove site_metrics.names"
            )
        if {"accuracy", "confusion"} & {*self.site_metrics.names} and not self.task.has_classes:
            raise ValueError(
                f"task.kind {self.task.kind!r} has no classes; of site_metrics.names it can release 'loss'"
            )
        if "confusion" in self.site_metrics.names and len(self.task.labels) > MAX_TABLE_LABELS:
            raise ValueError(
                f"site_metrics.names asks for 'confusion', a noisy count for each pair of {len(self.task.labels):,} labels; it "
                f"can be had for at most {MAX_TABLE_LABELS} labels. Ask for 'accuracy' or 'loss'"
            )
        limit = self.federation.sites_per_round
        if limit is not None and limit < self.federation.min_sites:
            raise ValueError(
                f"federation.sites_per_round is {limit}, below federation.min_sites {self.federation.min_sites}; no "
                "round could succeed"
            )
        if self.lora.train == "both" and self.aggregation.server_optimizer != "none":
            raise ValueError(
                "lora.train 'both' is aggregated exactly (mean of the products B·A), which leaves no place for "
                "aggregation.server_optimizer; set it to 'none' or lora.train to 'b'"
            )
        return self

    @model_validator(mode="after")
    def _check_image_network(self) -> Self:
        """Refuse images without a network for them, such a network without images, and what only a language model has."""
        if (self.task.kind == "image_classification") != self.model.is_image_network:
            raise ValueError(
                f"task.kind is {self.task.kind!r} and model.backbone {self.model.backbone!r}; image_classification and a "
                f"network for images, such as '{IMAGE_NETWORK_PREFIX}small', belong together. Change one of the two"
            )
        if not self.model.is_image_network:
            return self
        foreign = [f"model.{key}" for key in ("revision", "max_length", "pooling") if key in self.model.set_keys()]
        foreign += [f"lora.{key}" for key in LoraConfig.model_fields if key in self.lora.set_keys()]
        if foreign:
            raise ValueError(
                f"{foreign[0]} is for language models; {self.model.backbone!r} is trained as a whole, without adapters, on "
                f"images of one size. Remove {', '.join(foreign)}"
            )
        return self

    @model_validator(mode="after")
    def _check_central(self) -> Self:
        """Refuse what is no bounded sum over sites, or draws them in another way than the accountant assumes."""
        central = self.privacy.central
        if central is None:
            return self
        why = (
            "under privacy.mechanism 'central' the coordinator releases a noisy sum of clipped updates and nothing else"
        )
        if self.lora.train != "b":
            raise ValueError(f"{why}; lora.train 'both' is aggregated by products of updates. Set lora.train to 'b'")
        # Whatever rules of aggregation there are: only what follows after the noise may be chosen.
        after_noise = {"server_optimizer", "server_learning_rate", "server_momentum"}
        equal = AggregationConfig(weights="equal")
        for key in AggregationConfig.model_fields.keys() - after_noise:
            if (value := getattr(self.aggregation, key)) != (wanted := getattr(equal, key)):
                raise ValueError(
                    f"{why}; aggregation.{key} {value!r} would change what one site can add. Leave it at {wanted!r}"
                )
        if self.federation.sites_per_round is not None:
            raise ValueError(
                "federation.sites_per_round draws a fixed number of sites by a public seed, which protects nobody; with "
                "privacy.mechanism 'central' remove it and set privacy.central.site_sample_rate"
            )
        if not MIN_CENTRAL_SITES <= self.federation.min_sites <= central.num_sites:
            raise ValueError(
                f"federation.min_sites is {self.federation.min_sites}; with privacy.mechanism 'central' it is the number of "
                f"sites that must be connected before a round, from {MIN_CENTRAL_SITES} to privacy.central.num_sites "
                f"({central.num_sites})"
            )
        return self

    def canonical_json(self) -> str:
        """Return the one JSON text of this job: sorted keys, no spaces, defaults written out (see `records_per_person`)."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


class ComputeConfig(Section):
    """Settings of the machine at hand; they change speed, never privacy."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 autocast where the processor has it in hardware, else float32."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens per forward pass inside a logical batch."""
    cache_frozen_layers: bool = True
    """Keep the activations below the first adapted layer; exact, costs 4 bytes (2 in bfloat16) x hidden size per token."""
    cache_megabytes: int = Field(default=1024, ge=0)
    """Upper bound of that cache in memory; what has no room here or in the file is computed afresh in every step."""
    cache_file_megabytes: int = Field(default=0, ge=0)
    """Upper bound of a sealed file for what has no room in memory; nothing outlives the process. 0: no file."""
    cache_file_folder: Path | None = None
    """Where that file lies, an absolute path on a disk; None is the system's temporary folder, which may be memory itself."""

    @field_validator("cache_file_folder")
    @classmethod
    def _check_folder(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_absolute():
            raise ValueError("cache_file_folder is relative; give an absolute path, for example /srv/silotune")
        return folder


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


SectionT = TypeVar("SectionT", bound=BaseModel)


def parse(model: type[SectionT], raw: Mapping[str, Any], *, source: str) -> SectionT:
    """Build `model` from plain data.

    Raises:
        ConfigError: naming `source`, every bad key with what was found and, for unknown keys, the nearest known one.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source} is not valid: it holds a {type(raw).__name__}; expected named keys.")
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors()]
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: if it is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as TOML: it is nested too deep.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `raw` with `section.key=value` items set; values are read as TOML, else as plain text.

    Raises:
        ConfigError: if an item has no `=` or runs through something that is not a section.
    """
    try:
        result: dict[str, Any] = copy.deepcopy(dict(raw))
    except RecursionError:
        raise ConfigError("the settings are nested too deep; sections hold values, lists and sections.") from None
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {item!r} is not of the form section.key=value, for example training.rounds=10.")
        *sections, last = key.strip().split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section.")
        place[last] = _toml_value(text.strip())
    return result


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the nearest known one, or the list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, KeyError, RecursionError):
        return text


def _explain(model: type[BaseModel], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location) or "the whole"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(location[-1], _known_keys(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"{where} is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    for limit in detail.get("ctx", {}).values():
        if isinstance(limit, float) and 0 < limit < 1e-3:  # else written with all its zeros
            message = f"{message.rsplit(' ', 1)[0]} {limit:g}"
    found = detail.get("input")
    shown = "" if isinstance(found, dict | BaseModel) or found is None else f" (found {excerpt(found)})"
    return f"{where}: {message}{shown}"


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None
