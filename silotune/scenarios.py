"""`silotune.Scenario`: what is simulated; the settings of `silotune new` and `silotune simulate` as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from pydantic import PrivateAttr

from shared import terminal
from shared.epsilons import as_set, noise_rounded_down
from silotune.arguments import number_of, path_of, path_or_none
from silotune.showing import Shown, quietly
from simulations import scenario as scenario_files
from simulations.new_scenario.question import (
    SITE_ROLE,
    USUAL_EPSILON,
    DataKind,
    Question,
    Unit,
    kind_named,
    scenario_name,
    usual_unit,
)

if TYPE_CHECKING:
    from rich.console import Console


class Scenario(Shown, scenario_files.Scenario):
    """A simulated federation: model, task, training, privacy, data and sites; docs/settings.md lists every key.

    Frozen; `with_settings` returns a changed one. `scenario.job` is what a coordinator would ask of real sites.
    """

    _remarks: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def from_csv(
        cls,
        path: str | PathLike[str],
        *,
        text: str | None = None,
        label: str | None = None,
        score: str | None = None,
        pair: str | None = None,
        tokens: str | None = None,
        tags: str | None = None,
        prompt: str | None = None,
        response: str | None = None,
        pixels: str | None = None,
        site: str | None = None,
        person: str | None = None,
        task: str | None = None,
        test: str | PathLike[str] | None = None,
        epsilon: float = USUAL_EPSILON,
        delta: float | None = None,
        unit: Unit | None = None,
        sites: int | None = None,
        backbone: str | None = None,
        revision: str | None = None,
        data_kind: DataKind = "private",
        delimiter: str | None = None,
        quoting: str | None = None,
        encoding: str | None = None,
        declared: bool = False,
        labels: Sequence[str] = (),
        value_range: tuple[float, float] | None = None,
        max_length: int | None = None,
        records: int | None = None,
        shape: tuple[int, int, int] | None = None,
        out: str | PathLike[str] | None = None,
        force: bool = False,
    ) -> Self:
        """Look at a file of records on this machine and return a scenario for it that works, by the rules of `silotune new`.

        Args:
            path: CSV, TSV, JSONL, Parquet, or tagged words (IOB; needs `out`).
            text, label, score, pair, tokens, tags, prompt, response, pixels: the columns of the task.
            site: column that says at which site a record is.
            person: column that says whose record it is; persons are protected then.
            task: kind of task, where the columns leave a choice.
            test: public evaluation records with the same columns; by default some records are held out.
            epsilon, delta: what each site promises for the whole run; `delta` by default below a tenth of 1 / number of records.
            unit: what is protected; by default each record, with `person` each patient.
            sites: number of sites, where no column says it.
            backbone, revision: as in `model`: `embedded:NAME`, a folder, or a hub id with its commit.
            data_kind: what the records are.
            delimiter, quoting, encoding: how the files are written.
            declared: read no record; `labels`, `value_range`, `max_length`, `records` and `shape` (channels, height, width) say
                what would be looked up.
            out: also write the scenario file, with every setting explained; by default nothing is written.
            force: replace `out` if it is there.

        Raises:
            ConfigError: if the question contradicts itself.
            DataError: if the records will not do.
            ModelError: if the backbone cannot be had.
            PrivacyError: if nothing can be promised at this epsilon or delta.
        """
        from simulations.new_scenario.writing import new_scenario, unwritten_scenario

        data = path_of(path, "path")
        given = {
            "text": text, "label": label, "score": score, "pair": pair, "tokens": tokens, "tags": tags, "prompt": prompt,
            "response": response, "pixels": pixels, SITE_ROLE: site, "person": person,
        }  # fmt: skip
        columns = {role: column for role, column in given.items() if column is not None}
        file_format = {"delimiter": delimiter, "quoting": quoting, "encoding": encoding}
        question = Question(
            data=data,
            out=data.with_name(f"{scenario_name(data)}.toml") if out is None else path_of(out, "out"),
            columns=columns,
            test=path_or_none(test, "test"),
            kind=kind_named(task),
            backbone=backbone,
            revision=revision,
            epsilon=number_of(epsilon, "epsilon"),
            delta=delta,
            unit=unit or usual_unit(columns),
            sites=sites,
            data_kind=data_kind,
            file_format={key: value for key, value in file_format.items() if value is not None},
            labels=tuple(labels),
            value_range=value_range,
            max_length=max_length,
            num_records=records,
            image_shape=shape,
            declared_only=declared,
        )
        with quietly():
            if out is None:
                draft, made = unwritten_scenario(question)
            else:
                draft = new_scenario(question, force=force, console=terminal.console(quiet=True))
                made = scenario_files.load_scenario(question.out)
        return cls._of(made, draft.found.remarks)

    @classmethod
    def load(cls, path: str | PathLike[str], settings: Mapping[str, Any] | None = None) -> Self:
        """Read a scenario file (TOML), with some settings changed; see `with_settings`.

        Raises:
            ConfigError: naming every bad key.
        """
        found = cls._of(scenario_files.load_scenario(path_of(path, "path")))
        return found.with_settings(settings) if settings else found

    @classmethod
    def builtin(cls, name: str, settings: Mapping[str, Any] | None = None) -> Self:
        """Return a scenario that comes with Silotune, such as "demo"; `ConfigError` names those that there are."""
        found = cls._of(scenario_files.builtin_scenario(name))
        return found.with_settings(settings) if settings else found

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """Return this scenario with settings changed, such as `{"training.rounds": 10, "privacy.epsilon": 1}`.

        None unsets what can be unset. What `from_csv` chose for its epsilon, such as the learning rate, stays: for another
        epsilon ask it again.

        Raises:
            ConfigError: if a key is unknown, a value out of range, or settings do not go together.
        """
        return self._of(scenario_files.changed_scenario(self, settings), self._remarks)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What `from_csv` wants to be known, such as too few records for this epsilon; one sentence each."""
        return self._remarks

    @classmethod
    def _of(cls, found: scenario_files.Scenario, remarks: Sequence[str] = ()) -> Self:
        """Return what was parsed and checked as this class."""
        values = {name: getattr(found, name) for name in scenario_files.Scenario.model_fields}
        made = cls.model_construct(_fields_set=found.model_fields_set, **values)
        made._remarks = tuple(remarks)
        return made

    def _show(self, console: Console) -> None:
        job, privacy = self.job, self.job.privacy
        where = "sites by a column" if self.partition.kind == "column" else f"{self.partition.num_sites} sites"
        promise = f"epsilon {as_set(privacy.epsilon)}"
        if privacy.mechanism == "none":
            promise = "no noise"
        elif privacy.noise_multiplier is not None:
            promise = f"noise multiplier {noise_rounded_down(privacy.noise_multiplier)}"
        console.print(f"{self.name}: {job.task.kind}, {where}, {promise} for each {privacy.unit}")
        console.print(
            f"{job.model.backbone}, {job.training.rounds} rounds of {job.training.local_steps} steps, "
            f"learning rate {job.training.learning_rate:g}"
        )
        for remark in self._remarks:
            console.print(f"note: {remark}")

    def __repr__(self) -> str:
        return f"Scenario({self.name!r}, job={self.job.sha256[:12]!r})"
