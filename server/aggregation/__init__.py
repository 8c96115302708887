"""Aggregation: updates in, one by one and in any order; next global adapter out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from server.aggregation.exact import ExactLoraMean
from server.aggregation.mean import LARGEST_VALUE, WeightedMean
from server.aggregation.optimizers import apply_update
from server.aggregation.robust import RobustMean
from shared.job.federation import AggregationConfig
from shared.site_weights import SiteWeights
from shared.tensors.adapters import Shapes

Adapter = dict[str, Tensor]


class Aggregation:
    """One round's aggregation. The order in which sites answer changes no bit. Of an update nothing stays but its part of the
    sums, so memory does not grow with the sites; only a robust rule keeps all of them (`server.aggregation.robust`).
    """

    def __init__(
        self,
        current: Mapping[str, Tensor],
        server_state: Mapping[str, Tensor],
        shapes: Shapes,
        asked_records: Sequence[int],
        *,
        config: AggregationConfig,
        exact_scaling: float | None,
    ) -> None:
        """Begin a round.

        Raises ConfigError if a robust rule would have to keep too much.

        Args:
            current: the global adapter that the sites started from.
            server_state: state of the server optimiser, empty before the first round.
            shapes: names and shapes of every update.
            asked_records: public size of each site that is asked.
            config: weights and server optimiser of the job.
            exact_scaling: alpha / rank if both LoRA factors were trained and the mean of their products must be kept.
        """
        self._current, self._server_state, self._config = current, server_state, config
        self._exact: ExactLoraMean | None = None
        self._mean: WeightedMean | RobustMean
        self._weights = SiteWeights(asked_records, config)
        asked_weight = max(self._weights.total, 1)  # nobody may have been asked
        if exact_scaling is not None:
            self._exact = ExactLoraMean(current, shapes, asked_weight, exact_scaling)
        elif config.robust != "none":
            self._mean = RobustMean(config.robust, shapes, asked_weight, num_sites=len(asked_records), trim=config.trim)
        else:
            self._mean = WeightedMean(shapes, asked_weight)

    def add(self, update: Mapping[str, Tensor], declared_records: int) -> None:
        """Add one site's checked delta; `declared_records` is its public size, from which its weight follows.

        Raises:
            AdapterError: if a value is too large; nothing was added.
        """
        (self._exact or self._mean).add(update, self._weights.of(declared_records))

    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next state of the server optimiser) of what was added, at least one update."""
        if self._exact is not None:
            return self._exact.result(), {}
        mean = {name: value.float() for name, value in self._mean.result().items()}
        return apply_update(self._current, mean, self._server_state, self._config)


__all__ = ["LARGEST_VALUE", "Adapter", "Aggregation", "ExactLoraMean", "WeightedMean", "apply_update"]
