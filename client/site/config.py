"""`site.toml`: everything that a site decides for itself, except what it accepts (`client.policy.policy`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from shared.data.datasets import PERSON_ROLE, DataSource
from shared.epsilons import as_set
from shared.job.compute import ComputeConfig
from shared.job.parsing import Section
from shared.job.values import PERSON_UNITS, Delta, Name, Unit
from shared.limits import MAX_RECORDS
from shared.service.logs import LogFormat
from shared.service.page import Listen

if TYPE_CHECKING:
    from client.ledger.account import Budget


class BudgetConfig(Section):
    """The site's caps for its data set, counted by one unit of privacy."""

    unit: Unit = "record"
    """What the cap protects: each `record`, or each `patient` or `customer` with all their records. Only jobs of the same
    `privacy.unit` are accepted. It cannot change once something was charged; see docs/decisions/0010."""
    epsilon: float = Field(gt=0)
    """All releases from this data set together stay below this. Of jobs of the mechanism `distributed` it counts the sums that
    this site's masked inputs go into: against the coordinator and up to the job's `max_colluding` sites."""
    epsilon_alone: float | None = Field(default=None, gt=0)
    """The same where each masked input counts by itself, as if secure aggregation failed completely and all other sites colluded.
    From `epsilon` up; None: as much as `epsilon`, so that such jobs weaken nothing."""
    delta: Delta = 1e-5
    """At this failure probability; a job with a weaker one is refused."""
    composition: Literal["adaptive", "fixed"] = "fixed"
    """`adaptive`: holds also if a run is planned after seeing the results of earlier ones, and allows fewer steps.
    `fixed`: holds only if the plans of all runs were fixed before the first one. `silotune site init` writes `adaptive`."""

    @model_validator(mode="after")
    def _check_caps(self) -> Self:
        if self.epsilon_alone is not None and self.epsilon_alone < self.epsilon:
            raise ValueError(
                f"epsilon_alone is {as_set(self.epsilon_alone)}, below epsilon {as_set(self.epsilon)}; what is released counts "
                "at least as much by itself, so epsilon could never be reached. Lower epsilon, or raise epsilon_alone"
            )
        return self

    def caps(self) -> Budget:
        """Return them as the ledger takes them."""
        # Imported here: whoever reads the settings alone must not wait for the accountant.
        from client.ledger.account import Budget

        return Budget(
            epsilon=self.epsilon, delta=self.delta, composition=self.composition, epsilon_alone=self.epsilon_alone
        )


class AnswersConfig(Section):
    """When answers leave."""

    slot_seconds: float = Field(default=0.0, ge=0, le=86_400)
    """Replies and refusals leave a multiple of so many seconds after their request came, so that the time to answer does not
    tell how many records there are or how long. Choose it above the longest round, and below the job's
    `federation.round_timeout_seconds`; the node's log warns of an answer that took longer. 0: as soon as they are ready."""


class SiteCompute(ComputeConfig):
    """Settings of a site's machine; they change speed, never privacy."""

    processes: int = Field(default=1, ge=1, le=64)
    """Processes that compute a step together, to the last bit what one computes. Each has the backbone, its part of the records
    and a cache of its own; they share the processors, and take the GPUs in turn. 1: the site's own process by itself."""

    @property
    def of_each(self) -> ComputeConfig:
        """The settings of every single process."""
        return ComputeConfig(**self.model_dump(exclude={"processes"}))


class SiteConfig(Section):
    """`site.toml`: everything a site decides for itself."""

    name: Name
    """Name of the site, unique in the federation."""
    dataset: Name
    """Name under which the ledger keeps this data's budget. Adding records does not make a new data set."""
    data: DataSource
    budget: BudgetConfig
    declared_records: int | None = Field(default=None, ge=1, le=MAX_RECORDS)
    """The public size of the data set, in records, or in patients or customers where they are `budget.unit`; None declares
    the largest power of two that was not above it at first use, which then stays (`declared.json`)."""
    evaluation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the records (or of the patients or customers, with all their records) that no job trains on, for
    `site_metrics`: 0.1 holds about a tenth out. Once set, keep it."""
    allow_non_private: bool = False
    """Accept jobs that release unprotected updates. Only for public or synthetic data."""
    allow_trusted_coordinator: bool = False
    """Accept jobs whose coordinator adds the noise (`privacy.mechanism = "central"`): it sees this site's updates unprotected.
    Only if everything that the data holds may be known to whoever runs it."""
    labels: tuple[str, ...] = ()
    """Labels (or tags) that the records may have, a public word of the site's own: a job whose `task.labels` lack one of them is
    refused with that reason. Without it such a job is accepted and trains without the records that it cannot use."""
    answers: AnswersConfig = AnswersConfig()
    compute: SiteCompute = SiteCompute()
    coordinator: str | None = None
    """Address of the coordinator, host:port; only a real site has one."""
    proxy: str | None = Field(default=None, repr=False)  # may hold a password, so no error shows it
    """`http://host:port` or `http://user:password@host:port` of an HTTP proxy to reach it through (CONNECT); the encrypted
    connection goes through it to the coordinator. A proxy of the environment is never used."""
    metrics_listen: Listen = "127.0.0.1:9493"
    """Where `/metrics` and `/healthz` are served on this machine, by plain HTTP: an address and a port, or `off`. Another site on
    the machine needs another port. With an address that is no loopback address, everybody who reaches it can read them."""
    log_format: LogFormat = "text"
    """`text`: the node's log is lines for people. `json`: one JSON object a line, with `time` (UTC), `level`, `logger`,
    `message`, `site`, and `job` and `round` where it is about one."""

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, proxy: str | None) -> str | None:
        if proxy is not None:
            try:
                named = urlsplit(proxy)
                complete = named.scheme == "http" and bool(named.hostname) and bool(named.port)
            except ValueError:
                complete = False
            if not complete or not proxy.isascii() or not proxy.isprintable() or " " in proxy:
                raise ValueError('the proxy must be of the form "http://host:port" or "http://user:password@host:port"')
        return proxy

    @model_validator(mode="after")
    def _check_id_column(self) -> Self:
        if self.budget.unit in PERSON_UNITS and PERSON_ROLE not in self.data.columns:
            raise ValueError(
                f"budget.unit is {self.budget.unit!r}, but data.columns names no id column; add {PERSON_ROLE} = "
                f'"NAME OF THE COLUMN WITH THE {self.budget.unit.upper()} ID"'
            )
        return self
