"""Several processes compute a site's round: to the last bit what one computes, or nothing. Workers are real processes."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import client.training.processes as processes_module
import client.training.ranks as ranks_module
from client.training.gradient import noisy_sums
from client.training.independence import keep_settled
from client.training.processes import Processes
from client.training.ranks import Begin, Group, Join, Prepare, Step
from client.training.trainer import LocalRound, LocalWork, SiteRecords, clipped_sums, train_local_rounds
from shared.errors import ComputeError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.mechanism import ClippedSum
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.views import views_of
from tests.client.training.test_many_sites import away_from_zero, middling_norm

CPU = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=90)
FAULTY = ("-m", "tests.client.training.faulty_worker")

Build = Callable[..., Job]


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2, CPU)
    yield processes
    processes.close()


@pytest.fixture
def runtime(classification_job: Build) -> Runtime:
    found = load_runtime(classification_job(), CPU)
    keep_settled(found)
    return found


def job_of(classification_job: Build, kind: str) -> Job:
    training: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "local_steps": 4}
    if kind == "views":
        training["augmentation"] = {"views": 3, "token_dropout": 0.3}
    return classification_job(training=training)


def work_of(runtime: Runtime, job: Job, records: list[dict[str, Any]], *, persons: bool = False) -> LocalWork:
    examples = runtime.encode(records)
    return LocalWork(
        examples=examples,
        declared_records=32,
        randomness=SiteRandomness.injected("site"),
        persons=Persons.from_ids([number % 11 for number in range(len(examples))]) if persons else None,
        views=views_of(examples, job, runtime.tokenizer),
    )


def train(runtime: Runtime, work: LocalWork, job: Job, plan: PrivacyPlan, processes: Processes | None) -> LocalRound:
    start = away_from_zero(runtime)
    if processes is not None:
        processes.prepare(runtime, job, work)
        processes.begin(runtime, start)
    sums = None if processes is None else processes.sums
    fresh = replace(work, randomness=SiteRandomness.injected("site"))
    return train_local_rounds(runtime, [fresh], start, training=job.training, plan=plan, round_number=1, sums=sums)[0]


def are_gone(pids: list[int]) -> bool:
    """Whether no process has these ids, but for dead ones whom nobody waited for."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states)


@pytest.mark.parametrize("kind", ["records", "persons", "views", "not private"])
def test_several_processes_compute_what_one_does(
    two: Processes, runtime: Runtime, classification_job: Build, records: list[dict[str, Any]], kind: str
) -> None:
    job = job_of(classification_job, kind)
    work = work_of(runtime, job, records, persons=kind == "persons")
    bound = middling_norm(runtime, list(work.examples))
    plan = replace(PrivacyPlan.from_job(job), sample_rate=0.5, max_grad_norm=bound, private=kind != "not private")
    if kind == "persons":
        plan = replace(plan, unit="patient", records_per_person=3)
    alone, together = (train(runtime, work, job, plan, processes) for processes in (None, two))
    exact = plan.private  # without clipping there is no grid either
    for name, value in alone.delta.items():
        assert torch.equal(together.delta[name], value) or not exact, name
        torch.testing.assert_close(together.delta[name], value, rtol=1e-5, atol=1e-7)
    for name, value in alone.optimizer_state.items():
        torch.testing.assert_close(together.optimizer_state[name], value, rtol=1e-5, atol=1e-12)
    seen = together.observations
    for attribute in ("num_examples", "num_clipped", "num_non_finite"):
        assert getattr(seen, attribute) == getattr(alone.observations, attribute)
    assert seen.losses == pytest.approx(alone.observations.losses)
    assert seen.num_examples > 10
    assert not private_and_all_or_none_clipped(plan, alone)


def private_and_all_or_none_clipped(plan: PrivacyPlan, found: LocalRound) -> bool:
    return plan.private and found.observations.num_clipped in (0, found.observations.num_examples)


def test_fewer_units_than_processes_and_none_at_all_while_the_site_is_told_to_stop(
    two: Processes, runtime: Runtime, classification_job: Build, records: list[dict[str, Any]]
) -> None:
    """Whatever a terminal or systemd tells all processes of a service that is to stop: the round at hand is finished."""
    job = job_of(classification_job, "records")
    for some in (records[:1], []):
        work, plan = work_of(runtime, job, some), PrivacyPlan.from_job(job)
        two.prepare(runtime, job, work)
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            os.kill(two.pids[0], signal_number)
        alone, together = (train(runtime, work, job, plan, processes) for processes in (None, two))
        assert all(torch.equal(together.delta[name], value) for name, value in alone.delta.items())


def test_a_rank_that_computes_other_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    two: Processes,
    runtime: Runtime,
    classification_job: Build,
    records: list[dict[str, Any]],
) -> None:
    """Rank 0's frozen weights differ in the last bit from the worker's."""
    job = job_of(classification_job, "records")
    work, plan = work_of(runtime, job, records), PrivacyPlan.from_job(job)
    weight = max((p for p in runtime.model.parameters() if not p.requires_grad and p.ndim == 2), key=torch.numel)
    saved = weight.detach().clone()
    try:
        weight.data.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
        with pytest.raises(ComputeError, match="the same gradients to the last bit"):
            train(runtime, work, job, plan, two)
        assert two.pids == []
    finally:
        weight.data.copy_(saved)


def test_nothing_that_a_worker_is_sent_can_draw(
    monkeypatch: pytest.MonkeyPatch,
    two: Processes,
    runtime: Runtime,
    classification_job: Build,
    records: list[dict[str, Any]],
) -> None:
    sent: list[object] = []
    send = processes_module.send

    def noted(connection: Any, message: object) -> None:
        sent.append(message)
        send(connection, message)

    monkeypatch.setattr(processes_module, "send", noted)
    job = job_of(classification_job, "persons")
    work = work_of(runtime, job, records, persons=True)
    plan = replace(PrivacyPlan.from_job(job), unit="patient", records_per_person=3)
    train(runtime, work, job, plan, two)
    kinds = [type(message) for message in sent if not isinstance(message, Join)]
    assert kinds == [Prepare, Begin, *[Step] * 4]
    for message in sent:
        assert b"randomness" not in pickle.dumps(message)
    assert b"randomness" in pickle.dumps(work)
    (held,) = (message.records for message in sent if isinstance(message, Prepare))
    assert type(held) is SiteRecords
    assert [example.key for example in held.examples] == [
        example.key for number, example in enumerate(work.examples) if number % 11 % 2
    ]


def test_words_of_a_secure_sum_are_equal(
    two: Processes, runtime: Runtime, classification_job: Build, records: list[dict[str, Any]]
) -> None:
    """Also with a worker that is new, after the one before was ended."""
    job = classification_job(
        training={"local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.5},
        federation={"min_sites": 2},
    )
    work, plan, start = work_of(runtime, job, records), PrivacyPlan.from_job(job), away_from_zero(runtime)
    two.prepare(runtime, job, work)
    two.begin(runtime, start)
    alone, together = (
        noisy_sums(
            runtime,
            [replace(work, randomness=SiteRandomness.injected("site"))],
            start,
            plan=plan,
            round_number=1,
            attempt=2,
            sums=sums,
        )[0]
        for sums in (None, two.sums)
    )
    assert np.array_equal(alone.words, together.words)
    assert alone.observations.num_examples == together.observations.num_examples > 10


def test_a_worker_that_is_killed_ends_the_round(
    monkeypatch: pytest.MonkeyPatch,
    two: Processes,
    runtime: Runtime,
    classification_job: Build,
    records: list[dict[str, Any]],
) -> None:
    job = job_of(classification_job, "records")
    work, plan = work_of(runtime, job, records), PrivacyPlan.from_job(job)
    noised: list[object] = []
    monkeypatch.setattr(PrivacyPlan, "add_noise", lambda self, sums, stream: noised.append(sums) or sums)
    two.prepare(runtime, job, work)
    pids = two.pids

    def killing(*arguments: Any) -> Any:
        """While rank 0 computes its part, before the worker's came or just after."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return clipped_sums(*arguments)

    monkeypatch.setattr(processes_module, "clipped_sums", killing)
    with pytest.raises(ComputeError, match="nothing was released"):
        train(runtime, work, job, plan, two)
    assert not noised
    assert len(pids) == 1
    assert are_gone(pids)
    assert two.pids == []


def test_workers_wait_for_rank_0_and_know_no_passphrase(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, classification_job: Build, records: list[dict[str, Any]]
) -> None:
    """A step was charged before; it must not fail because rank 0 takes longer than the others."""

    def slow(*arguments: Any) -> Any:
        time.sleep(1.5)
        return clipped_sums(*arguments)

    monkeypatch.setattr(processes_module, "clipped_sums", slow)
    for name in ("SILOTUNE_PASSPHRASE", "SILOTUNE_NEW_PASSPHRASE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "a-secret-of-rank-0")
    job = job_of(classification_job, "records")
    impatient = Processes(2, CPU, program=(*FAULTY, "impatient"))
    try:
        train(runtime, work_of(runtime, job, records), job, PrivacyPlan.from_job(job), impatient)
        (pid,) = impatient.pids
        assert b"a-secret-of-rank-0" not in Path(f"/proc/{pid}/environ").read_bytes()
    finally:
        impatient.close()


@pytest.mark.parametrize(
    ("fault", "text"),
    [("noise_twice", "off their grid"), ("drawn_twice", "was given"), ("drop_a_batch", "gradients came to its sum")],
)
def test_fault_in_a_worker(
    runtime: Runtime, classification_job: Build, records: list[dict[str, Any]], fault: str, text: str
) -> None:
    job = job_of(classification_job, "records")
    work, plan = work_of(runtime, job, records), replace(PrivacyPlan.from_job(job), sample_rate=0.5)
    processes = Processes(2, CPU, program=(*FAULTY, fault))
    try:
        processes.prepare(runtime, job, work)
        pids = processes.pids
        with pytest.raises(PrivacyError, match=text):
            train(runtime, work, job, plan, processes)
        assert are_gone(pids)
    finally:
        processes.close()


@pytest.mark.parametrize("change", [-1, 1])
def test_fault_a_unit_missing_or_twice_on_the_sites_own_rank(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    classification_job: Build,
    records: list[dict[str, Any]],
    change: int,
) -> None:
    """Also where there is one process: what is executed is what was drawn."""
    batches = Runtime.grouped_batches

    def faulty(self: Runtime, *arguments: Any) -> Iterator[Any]:
        found = list(batches(self, *arguments))
        yield from found[:-1] if change < 0 else [*found, found[-1]]

    monkeypatch.setattr(Runtime, "grouped_batches", faulty)
    job = job_of(classification_job, "records")
    with pytest.raises(PrivacyError, match="not one of each"):
        train(runtime, work_of(runtime, job, records), job, PrivacyPlan.from_job(job), None)


def test_workers_end_with_the_site() -> None:
    """The site's process is killed while its worker is in the middle of something."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy does not need
        site = os.fork()
    if not site:
        try:
            worker = processes_module._Process((*FAULTY, "busy"))
            worker.send("anything")
            worker.receive(60)
            with pytest.raises(ComputeError, match="has not answered"):  # whatever else it does
                worker.receive(0.1)
            os.write(theirs, str(worker.pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    pid = int(os.read(ours, 99))
    assert not are_gone([pid])
    os.kill(site, signal.SIGKILL)
    os.waitpid(site, 0)
    deadline = time.monotonic() + 10
    while not are_gone([pid]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert are_gone([pid])


def meet(folder: Path, secrets: list[bytes], act: Callable[[Group, int], None]) -> list[BaseException | None]:
    """Let members meet in threads; what each one ended with."""
    found: list[BaseException | None] = [None] * len(secrets)

    def member(rank: int) -> None:
        try:
            act(Group(rank=rank, size=len(secrets), store=folder / "store", secret=secrets[rank]), rank)
        except ComputeError as error:
            found[rank] = error

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(len(secrets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_a_group_gives_out_values_and_adds_up(tmp_path: Path) -> None:
    values = [torch.full((2, 3), float(rank)) for rank in range(3)]
    whole = [torch.tensor([2**62, rank]) for rank in range(3)]  # wraps, as words of a secure sum may

    def act(group: Group, rank: int) -> None:
        group.broadcast([values[rank]])
        group.reduce(whole[rank])

    assert meet(tmp_path, [b"same"] * 3, act) == [None] * 3
    assert all(torch.equal(value, torch.zeros(2, 3)) for value in values)
    assert whole[0].tolist() == [3 * 2**62 - 2**64, 3]


def test_a_group_listens_on_loopback_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def act(group: Group, rank: int) -> None:
        own = set()
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # of the other member, which is about to leave
                own.add(os.readlink(path))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in own:
                    seen.append(local.partition(":")[0])

    assert meet(tmp_path, [b"same"] * 2, act) == [None] * 2
    assert seen
    assert set(seen) == {"0100007F"}


def test_a_stranger_in_the_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_PATIENCE", ranks_module.timedelta(seconds=5))
    reached: list[int] = []
    found = meet(tmp_path, [b"secret", b"guessed"], lambda group, rank: reached.append(rank))
    assert "somebody else connected" in str(found[0])
    assert not reached


def test_a_member_that_does_not_come_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_PATIENCE", ranks_module.timedelta(seconds=1))
    with pytest.raises(ComputeError, match="is gone"):
        Group(rank=0, size=2, store=tmp_path / "store", secret=b"secret")


def test_a_sum_that_is_none_is_refused() -> None:
    total = ClippedSum([torch.Size([3])], 0.3)
    total.add([torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.0, 0.0]])])
    total.check()
    assert float(torch.cat(total.sums).norm()) > 0.3
    total.num_examples = 1
    with pytest.raises(PrivacyError, match="longer"):
        total.check()
    total.num_examples = 2
    total.flat[0] += 1e-12
    with pytest.raises(PrivacyError, match="grid"):
        total.check()
