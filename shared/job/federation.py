"""How updates become one model: weights, server optimiser, number of sites, bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from shared.job.parsing import Section
from shared.limits import MAX_LEARNING_RATE, MAX_RECORDS, MAX_SITES, MAX_TIMEOUT_SECONDS

RobustRule = Literal["none", "trimmed_mean", "geometric_median", "centred_clipping"]


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
    # Not written out where they are not set: jobs of older versions keep their hash.
    robust: RobustRule = Field(default="none", exclude_if=lambda value: value == "none")
    """What stands in for the mean of the updates where a site may poison its own: `trimmed_mean` (Yin et al. 2018),
    `geometric_median` (Pillutla et al. 2022) or `centred_clipping` (Karimireddy et al. 2021), all by the same weights. All
    updates of a round are then kept until the last came. docs/robust-aggregation.md says what they can do under noise."""
    trim: float = Field(default=0.2, gt=0, lt=0.5, exclude_if=lambda value: value == 0.2)
    """Of `trimmed_mean`: the share of the weight that is left out at each end, of every value by itself."""
    server_optimizer: Literal["none", "momentum", "adam"] = "none"
    """Reddi et al. 2021 (FedAvgM, FedAdam); `none` is plain averaging."""
    server_learning_rate: float = Field(default=1.0, gt=0, le=MAX_LEARNING_RATE)
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
    # Not written out where it is not set: jobs of older versions keep their hash.
    max_declared_records: int = Field(
        default=1_000_000, ge=1, le=MAX_RECORDS, exclude_if=lambda value: value == 1_000_000
    )
    """Most records (or patients, customers) that a site may declare; one that declares more takes no part. Weights follow from
    these sizes, which nobody can check: set it to about what your largest site has."""
    round_timeout_seconds: float = Field(default=3600.0, gt=0, le=MAX_TIMEOUT_SECONDS)
    """After this long a round goes on without the sites that have not answered."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    update_dtype: UpdateDtype = Field(default="float32", exclude_if=lambda value: value == "float32")
    """Numbers in which a site sends its update. `bfloat16` halves, `int8` quarters the bytes; a site adds what rounding lost to
    its next update. See `shared.wire.updates`."""
