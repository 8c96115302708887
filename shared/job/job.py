"""Configuration: frozen, typed, checked at construction; TOML in, canonical JSON and a SHA-256 out.

A `Job` is everything that a coordinator may ask of a site. It is data, never code: a site runs only the training
code that it installed. Settings that change privacy stand in `PrivacyConfig`; settings that only change speed
stand in `ComputeConfig`, belong to each site, and are not part of the job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shared.files.json_files import canonical_json
from shared.job.federation import AggregationConfig, FederationConfig
from shared.job.model import IMAGE_NETWORK_PREFIX, LoraConfig, ModelConfig, TaskConfig
from shared.job.parsing import Section
from shared.job.privacy import MIN_CENTRAL_SITES, PrivacyConfig, SiteMetricsConfig
from shared.job.training import TrainingConfig
from shared.job.values import Name
from shared.limits import MAX_SUMMED_SITES, MAX_TABLE_LABELS


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
        if self.site_metrics.names and not self.privacy.sites_add_noise:
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
        augmentation = self.training.augmentation
        if augmentation is not None and not self.task.rules.has_views:
            raise ValueError(
                f"training.augmentation is for records whose target holds for all of them, and task.kind is {self.task.kind!r}; "
                "remove it"
            )
        foreign = "token_dropout" if self.task.image_shape is not None else "shift"
        if augmentation is not None and foreign in augmentation.set_keys():
            raise ValueError(f"training.augmentation.{foreign} is not for {self.task.kind}; remove it")
        if self.training.adversarial is not None and self.task.image_shape is not None:
            raise ValueError(
                "training.adversarial moves what enters the trained part of a language model; a network for images is trained as "
                "a whole, in part by samplers that keep the gradients of one pass only. Remove it"
            )
        if self.lora.train == "none" and not self.task.rules.has_head:
            raise ValueError(
                f"lora.train is 'none', and {self.task.kind!r} has no head that is trained, so nothing would be; set it to 'b'"
            )
        if self.lora.train == "both" and self.aggregation.server_optimizer != "none":
            raise ValueError(
                "lora.train 'both' is aggregated exactly (mean of the products B·A), which leaves no place for "
                "aggregation.server_optimizer; set it to 'none' or lora.train to 'b'"
            )
        if self.lora.train == "both" and self.aggregation.robust != "none":
            raise ValueError(
                f"aggregation.robust {self.aggregation.robust!r} acts on updates, but with lora.train 'both' products of them "
                "are averaged; set lora.train to 'b', or aggregation.robust to 'none'"
            )
        return self

    @model_validator(mode="after")
    def _check_image_network(self) -> Self:
        """Refuse images without a network for them, such a network without images, and what only a language model has."""
        if (self.task.image_shape is not None) != self.model.is_image_network:
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
        if self.lora.train == "both":
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

    @model_validator(mode="after")
    def _check_distributed(self) -> Self:
        """Refuse what is more than one noisy sum of clipped gradients a round, or would tell a site's own share of the noise."""
        colluding = self.privacy.max_colluding
        if not self.privacy.shares_noise or colluding is None:
            return self
        if self.training.local_steps != 1:
            raise ValueError(
                f"training.local_steps is {self.training.local_steps}; with privacy.mechanism 'distributed' it must be 1. A "
                "second local step would start from the site's own share of the noise, which the sum over the sites does not "
                "hide, so no epsilon is known for it. Set it to 1, and training.rounds to the number of steps"
            )
        least = colluding + 2
        if self.federation.min_sites < least:
            raise ValueError(
                f"federation.min_sites is {self.federation.min_sites} and privacy.max_colluding {colluding}; besides those who "
                "collude, at least two sites must be in every sum, or one would stand alone in it. Set federation.min_sites to "
                f"{least} or more"
            )
        for key in ("min_sites", "sites_per_round"):
            if (count := getattr(self.federation, key) or 0) > MAX_SUMMED_SITES:
                raise ValueError(
                    f"federation.{key} is {count:,}; with privacy.mechanism 'distributed' one sum is of at most "
                    f"{MAX_SUMMED_SITES:,} sites. Lower it"
                )
        if self.federation.update_dtype != "float32":
            raise ValueError(
                f"federation.update_dtype is {self.federation.update_dtype!r}; with privacy.mechanism 'distributed' sites send "
                "whole numbers of 64 bits, and what rounding loses must not enter a later message. Remove it"
            )
        usual = AggregationConfig()
        for key in AggregationConfig.model_fields:
            if (value := getattr(self.aggregation, key)) != (wanted := getattr(usual, key)):
                raise ValueError(
                    f"aggregation.{key} is {value!r}; with privacy.mechanism 'distributed' the coordinator knows no single "
                    "update, divides the sum by the expected size of the sample and takes the step of [training] itself. Leave "
                    f"it at {wanted!r}, best by leaving out the section [aggregation]"
                )
        return self

    @property
    def averages_products(self) -> bool:
        """Whether the global adapter holds the mean of products of both factors, and so residuals beside them.

        A sum of gradients is taken at one adapter, so there are no products to average.
        """
        return self.lora.train == "both" and not self.privacy.shares_noise

    @property
    def charged_steps(self) -> int:
        """Noisy steps that a site may be charged for if it takes part in every round, spare attempts included."""
        return self.training.planned_steps + self.spare_attempts

    @property
    def spare_attempts(self) -> int:
        """Repetitions of rounds that the plan has room for; 0 unless the mechanism is `distributed`."""
        return self.privacy.spare_attempts_for(self.training.rounds)

    def canonical_json(self) -> str:
        """Return the one JSON text of this job: sorted keys, no spaces, defaults written out (see `records_per_person`)."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()
