"""The coordinator's part of central DP: secret coins, a durable account of the noise, one release per round.

Guarantees (tests: tests/server/rounds/test_central.py; planted faults: tests/server/rounds/test_central_faults.py)
    * A round's noise is charged, durably, before it is drawn, so before a new global adapter can exist. A crash keeps the
      charge, and a round that is computed again draws fresh noise and is charged again.
    * No more noise events are executed than the job declares, so epsilon never exceeds what the sites agreed to.
    * The next adapter, the next clipping bound and the state of the server optimiser read the noisy sums and public numbers
      only. What is written about a round does not tell who was drawn (`CentralPrivacy.published`).

The clipping bound lies in the checkpoint beside the adapter that it was released with; the account lies in a file of its own,
because it must not go back when a round does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.aggregation import Adapter, apply_update
from server.records.rounds import RoundRecord
from server.rounds.earlier_requests import EarlierRequests
from server.rounds.releases import Made, Releases
from server.rounds.roster import Authority
from server.rounds.updates import AtHand, Updates, collect_updates
from server.store.checkpoint import Checkpoint
from shared.errors import PrivacyError, RunError
from shared.files.atomic import write_json
from shared.files.json_files import canonical_json, finite_or_none
from shared.job.federation import AggregationConfig
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, compose_epsilon, merged
from shared.privacy.central import CentralPlan, CentralRound, SitesSum
from shared.privacy.central_statement import CentralRelease
from shared.privacy.randomness import Origin, SiteRandomness
from shared.privacy.statement import SiteRelease
from shared.tensors.adapters import Shapes
from shared.wire.messages import SiteDescription

LEDGER_FILE = "central_ledger.json"
_CLIP_NORM = "|clip_norm"  # in the checkpoint's server state, as "|step" of the server optimiser
_BEGINNING = "0" * 64


class CentralLedger:
    """The account of one run's noise events, unit "site", in one file that is replaced atomically.

    Each entry names the SHA-256 of the one before it, so an entry that was changed or lost is noticed; whoever may write the
    file can make another one that fits, which is within the trust in the coordinator.
    """

    def __init__(self, path: Path, job: Job, plan: CentralPlan) -> None:
        """Open the account or begin it.

        Raises:
            RunError: if the file cannot be read, was changed, or belongs to another job.
        """
        self._path, self._plan = path, plan
        self._head = {"unit": plan.plan.unit, "job_sha256": job.sha256}
        self._charges: list[dict[str, Any]] = self._read() if path.exists() else []

    @property
    def rounds(self) -> tuple[int, ...]:
        """The round of every charge, oldest first."""
        return tuple(charge["round"] for charge in self._charges)

    @property
    def events(self) -> tuple[GaussianSteps, ...]:
        """Everything charged, equal mechanisms added up."""
        return merged(_one_step(charge) for charge in self._charges)

    @property
    def randomness(self) -> Origin:
        """ "os" unless any charge was made under injected randomness."""
        return "os" if all(charge["randomness"] == "os" for charge in self._charges) else "injected"

    def charge(self, round_number: int, origin: Origin) -> None:
        """Charge one noise event, durably.

        Raises:
            PrivacyError: if the job declares no further event; nothing was charged.
            RunError: if the charge cannot be written; then no noise may be drawn.
        """
        plan = self._plan.plan
        if len(self._charges) >= plan.planned_steps:
            repeated = len(self._charges) - len(set(self.rounds))
            raise PrivacyError(
                f"round {round_number} cannot be executed: the job declares {plan.planned_steps} noisy rounds to its sites, and "
                f"as many were executed ({repeated} of them again, after an interruption). Another one would exceed the epsilon "
                "that they agreed to. The adapter of the last complete round stands in the checkpoint; plan a new run for more."
            )
        # No time: how long rounds took would tell who was drawn.
        entry = {
            "round": round_number,
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": plan.sample_rate,
            "randomness": origin,
            "previous": self._charges[-1]["sha256"] if self._charges else _BEGINNING,
        }
        charges = [*self._charges, entry | {"sha256": _sha256(entry)}]
        write_json(self._path, self._head | {"charges": charges})
        self._charges = charges

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `RunError` unless every round that is complete was charged: else the file was lost or put back."""
        if missing := sorted(set(range(1, checkpoint.round_number + 1)) - set(self.rounds)):
            raise RunError(
                f"{self._path} does not hold the charge of round {missing[0]}, but the checkpoint has completed "
                f"{checkpoint.round_number} rounds. Without the account no epsilon is true: restore the file, or start a new run."
            )

    def _read(self) -> list[dict[str, Any]]:
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            charges: list[dict[str, Any]] = content.pop("charges")
            previous = _BEGINNING
            for charge in charges:
                plain = {key: value for key, value in charge.items() if key != "sha256"}
                if charge["previous"] != previous or charge["sha256"] != _sha256(plain):
                    raise ValueError("broken chain")
                if charge["round"] < 1:
                    raise ValueError(f"round {charge['round']}")
                _one_step(charge)  # refuses what could not be accounted for
                previous = charge["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, PrivacyError) as error:
            raise RunError(
                f"{self._path} cannot be trusted ({type(error).__name__}: {error}); it is the account of the noise that was "
                "executed. Restore it from a backup, or start a new run."
            ) from None
        if content != self._head:
            raise RunError(f"{self._path} belongs to another job; choose another run folder.")
        return charges


class CentralPrivacy:
    """What a coordinator needs for central DP over one run; the interface of `LocalPrivacy`.

    Attributes:
        plan: what is executed.
        ledger: what was executed.
    """

    least_updates = 0  # how many sites answered must not show in anything

    def __init__(
        self, job: Job, folder: Path, *, new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os
    ) -> None:
        self.plan = CentralPlan.from_job(job)
        self.ledger = CentralLedger(folder / LEDGER_FILE, job, self.plan)
        self.earlier = EarlierRequests()  # none count: the sites keep no account
        self._config, self._new_randomness = job.aggregation, new_randomness

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `RunError` unless every round that is complete was charged."""
        self.ledger.check(checkpoint)

    def resume(self, checkpoint: Checkpoint, authority: Authority | None) -> Checkpoint:
        """Return `checkpoint`, checked: what came after it is in the account."""
        self.check(checkpoint)
        return checkpoint

    def with_open_requests(self, checkpoint: Checkpoint, asked: EarlierRequests) -> Checkpoint:
        """Return `checkpoint`: a round that was given up is in the account from when its noise was drawn, and before released
        nothing."""
        return checkpoint

    def begin(self, round_number: int) -> SitesRound:
        """Return one attempt at a round, with randomness of its own."""
        return SitesRound(self.plan, self.ledger, self._config, self._new_randomness(), round_number)

    def account_ahead(self, releases: Releases) -> None:
        """Compose what will be spent after the next round: the accountant remembers it."""
        compose_epsilon([*self.ledger.events, self.plan.plan.mechanism(1)], self.plan.plan.delta)

    def epsilon(self, releases: Releases) -> float | None:
        """Return epsilon of everything charged; None if there is none to state."""
        release = self.release()
        return release.epsilon if release.protected and release.steps else None

    def published(self, record: RoundRecord) -> RoundRecord:
        """Return `record` without names, traffic and time, which would tell who was drawn."""
        return replace(record, sites=[], failed={}, bytes_up=None, bytes_down=None, seconds=None)

    def release(self) -> CentralRelease:
        """Return what the statement speaks of."""
        plan = self.plan.plan
        return CentralRelease(
            num_sites_declared=self.plan.num_sites,
            delta=plan.delta,
            clip_norm_first=plan.max_grad_norm,
            update_noise_multiplier=self.plan.update_noise_multiplier,
            count_noise=self.plan.count_noise if self.plan.adaptive else None,
            steps_planned=plan.planned_steps,
            rounds=self.ledger.rounds,
            events=self.ledger.events,
            randomness=self.ledger.randomness,
            epsilon_budget=finite_or_none(plan.epsilon()),
        )


class SitesRound:
    """One attempt at one round: its coins and its noise come from one key, which is used once.

    Attributes:
        plan: what is executed.
        config: the server optimiser.
    """

    def __init__(
        self,
        plan: CentralPlan,
        ledger: CentralLedger,
        config: AggregationConfig,
        randomness: SiteRandomness,
        round_number: int,
    ) -> None:
        self.plan, self.config, self._ledger = plan, config, ledger
        self._randomness, self._round_number = randomness, round_number
        self._released = False

    def draw(self, sites: Mapping[int, SiteDescription]) -> list[int]:
        """Return the node ids to ask: each by its own secret coin, maybe none. A declared site that is away counts as silent.

        Raises:
            RunError: if more sites take part than the job declares.
        """
        if len(sites) > self.plan.num_sites:
            raise RunError(
                f"{len(sites)} sites take part, but privacy.central.num_sites declares {self.plan.num_sites} to all of them. "
                "Submit a job that declares them all, or remove sites."
            )
        nodes = list(sites)
        coins = self._randomness.stream("sampling", round_number=self._round_number, step=0)
        return [nodes[index] for index in self.plan.plan.sample(len(nodes), coins).tolist()]

    def collect(self, at_hand: AtHand) -> Updates:
        """Ask the sites that were drawn, and return what came."""
        return collect_updates(at_hand, self.aggregation)

    def aggregation(
        self,
        current: Mapping[str, Tensor],
        server_state: Mapping[str, Tensor],
        shapes: Shapes,
        asked_records: Sequence[int] = (),
    ) -> SitesAggregation:
        """Return the round's aggregation, with the clipping bound that the last round left.

        Args:
            current: the global adapter that the sites started from.
            server_state: of the server optimiser, and the clipping bound; empty before the first round.
            shapes: of every update.
            asked_records: not read; what sites declare weighs nothing.
        """
        return SitesAggregation(self, current, server_state, shapes)

    def account(
        self, releases: Releases, made: Mapping[str, Made], unknown: Sequence[SiteDescription], adapter_sha256: str
    ) -> dict[str, SiteRelease]:
        """Return `releases`: the coordinator's own counts, charged before its noise is drawn."""
        return dict(releases)

    def release(self, total: SitesSum, clip_norm: float, shapes: Shapes) -> CentralRound:
        """Return the release of a pair under this round's noise.

        Raises:
            PrivacyError: if the job declares no further noisy round.
            RunError: if the charge cannot be written.
        """
        if self._released:
            raise RuntimeError("a second release would share its noise with the first")
        self._released = True
        # Charge first.
        self._ledger.charge(self._round_number, self._randomness.origin)
        # One noise event, also when nobody answered. From here on all is post-processing.
        noisy = self.plan.add_noise(total, clip_norm, self._randomness, self._round_number)
        # Divide by the expected number of sites, never by the drawn one; move the bound.
        return self.plan.finish(noisy, shapes, clip_norm)


class SitesAggregation:
    """One round's aggregation under central DP, added to like `server.aggregation.Aggregation`."""

    def __init__(
        self,
        attempt: SitesRound,
        current: Mapping[str, Tensor],
        server_state: Mapping[str, Tensor],
        shapes: Shapes,
    ) -> None:
        self._attempt, self._current, self._server_state, self._shapes = attempt, current, server_state, shapes
        self._clip_norm = float(server_state.get(_CLIP_NORM, attempt.plan.plan.max_grad_norm))
        self._sum = attempt.plan.new_sum(shapes, self._clip_norm)

    def add(self, update: Mapping[str, Tensor], declared_records: int) -> None:
        """Clip one site's checked delta as one vector and add it. What a site declares weighs nothing."""
        self._sum.add(update)

    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next server state), released under the round's noise; nobody may have answered.

        Raises:
            PrivacyError: if the job declares no further noisy round.
            RunError: if the charge cannot be written.
        """
        released = self._attempt.release(self._sum.total(), self._clip_norm, self._shapes)
        following, state = apply_update(self._current, released.mean, self._server_state, self._attempt.config)
        return following, state | {_CLIP_NORM: torch.tensor(released.clip_norm, dtype=torch.float64)}


def _one_step(charge: Mapping[str, Any]) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=charge["noise_multiplier"], sample_rate=charge["sample_rate"], steps=1)


def _sha256(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entry).encode()).hexdigest()
