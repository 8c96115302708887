"""A site that masks its records as it reads them: what it trains on, what it says, and that nothing changes where it is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.check import check_site
from client.site.home import SiteHome
from client.site.site import Site
from shared.data.datasets import DataSource, dataset_fingerprint, read_records
from shared.errors import ConfigError, DataError
from shared.job.job import Job
from shared.wire.messages import TrainReply, TrainRequest
from tests.conftest import Outcome

MakeHome = Callable[..., Path]
MakeJob = Callable[..., Job]
MakeRequest = Callable[..., TrainRequest]
Command = Callable[..., Outcome]

COLUMNS = {"text": "text", "label": "label"}
ROWS = [
    {
        "text": f"Mr Fezziwig{'x' * (i % 7)} said it was a warm film on {i % 28 + 1} May 2020",
        "label": ["bad", "good"][i % 2],
    }
    for i in range(40)
]


def source(**fields: Any) -> dict[str, Any]:
    return {"path": "data.jsonl", "columns": COLUMNS, **fields}


def data_finding(home: Path) -> tuple[str, str]:
    found = {finding.name: finding for finding in check_site(SiteHome(home), passphrase=None, connect=False)}
    return found["data"].outcome, found["data"].text


def test_the_site_trains_on_what_the_command_would_have_written(
    site_home: MakeHome, private_job: MakeJob, request_for: MakeRequest, silotune: Command
) -> None:
    job = private_job()
    home = site_home(rows=ROWS, data=source(deidentify={"engine": "rules"}))
    before = (home / "data.jsonl").read_bytes()
    masking = Site(home)
    out = home / "masked.jsonl"
    arguments = (home / "data.jsonl", "--out", out, "--column", "text", "--engine", "rules")
    assert silotune("deidentify", *arguments).status == 0
    other = site_home("south", rows=[json.loads(line) for line in out.read_text().splitlines()])
    plain = Site(other)
    mine, theirs = (site.usable(site.prepare(job), job).examples for site in (masking, plain))
    assert [example.input_ids.tolist() for example in mine] == [example.input_ids.tolist() for example in theirs]
    unmasked = Site(site_home("east", rows=ROWS))
    assert [e.input_ids.tolist() for e in unmasked.usable(unmasked.prepare(job), job).examples] != [
        e.input_ids.tolist() for e in mine
    ]
    assert isinstance(masking.answer(request_for(job)), TrainReply)
    assert (home / "data.jsonl").read_bytes() == before
    records = [
        read_records(DataSource.model_validate(asked), base=home)
        for asked in (source(deidentify={"engine": "rules"}), source(path="masked.jsonl"))
    ]
    assert dataset_fingerprint(records[0]) == dataset_fingerprint(records[1])
    assert "Fezziwig" not in json.dumps(records[0])


def test_check_tells_counts_and_the_engine_and_no_text(site_home: MakeHome) -> None:
    home = site_home(
        rows=[*ROWS, {"text": "nothing of note", "label": "bad"}], data=source(deidentify={"engine": "rules"})
    )
    outcome, text = data_finding(home)
    assert outcome == "ok"
    assert text.endswith("de-identified by rules: 40 date, 40 name masked, in 40 of 41 records")
    assert "Fezziwig" not in text


def test_check_of_a_site_that_does_not_mask_says_what_it_always_said(site_home: MakeHome) -> None:
    longest = max(len(row["text"]) for row in ROWS)
    row = next(i for i, row in enumerate(ROWS, start=1) if len(row["text"]) == longest)
    assert data_finding(site_home(rows=ROWS)) == (
        "ok",
        f"40 records, columns text as text, label as label, longest text {longest} characters (row {row} (line {row}))",
    )


def test_a_value_that_is_no_text_keeps_a_site_from_opening_before_any_job(site_home: MakeHome) -> None:
    home = site_home(rows=[*ROWS, {"text": {"nested": "Mr Fezziwig"}, "label": "bad"}])
    with pytest.raises(
        DataError, match=r"'text' holds an object where text is expected at row 41 \(line 41\)"
    ) as caught:
        Site(home)
    assert "Fezziwig" not in str(caught.value)


def test_only_the_kinds_that_were_chosen(site_home: MakeHome) -> None:
    home = site_home(rows=ROWS, data=source(deidentify=["date"]))
    asked = SiteHome(home).load_config().data
    assert all("Mr Fezziwig" in row["text"] and "[DATE]" in row["text"] for row in read_records(asked, base=home))


def test_the_description_does_not_tell_whether_a_site_masks(site_home: MakeHome) -> None:
    on, off = (Site(site_home(rows=ROWS, data=asked)).describe() for asked in (source(deidentify=True), source()))
    assert on == off


def test_words_and_tags_stay_in_step(site_home: MakeHome) -> None:
    rows = [{"words": ["Mr", "Fezziwig", "has", "gout", "."], "tags": ["O", "O", "O", "B-Disease", "O"]}]
    asked = {"path": "data.jsonl", "columns": {"tokens": "words", "tags": "tags"}, "deidentify": True}
    home = site_home(rows=rows, data=asked)
    (record,) = read_records(SiteHome(home).load_config().data, base=home)
    assert record["tokens"] == ["Mr", "[NAME]", "has", "gout", "."]
    assert record["tags"] == rows[0]["tags"]


def test_ids_of_persons_are_not_masked(site_home: MakeHome) -> None:
    rows = [row | {"patient": "Mr Fezziwig"} for row in ROWS]
    asked = {"path": "data.jsonl", "columns": COLUMNS | {"person": "patient"}, "deidentify": True}
    home = site_home(rows=rows, data=asked)
    assert {row["person"] for row in read_records(SiteHome(home).load_config().data, base=home)} == {"Mr Fezziwig"}


def test_a_number_where_text_should_be_is_named_by_its_row_alone(site_home: MakeHome) -> None:
    home = site_home(rows=[ROWS[0], {"text": 5550132, "label": "bad"}], data=source(deidentify=True))
    with pytest.raises(DataError, match="row 2") as caught:
        Site(home)
    assert "5550132" not in str(caught.value)
    outcome, text = data_finding(home)
    assert (outcome, "5550132" in text) == ("failed", False)


def test_a_site_without_text_to_mask_is_refused_when_it_is_opened(site_home: MakeHome) -> None:
    home = site_home(rows=ROWS, data={"path": "data.jsonl", "columns": {"label": "label"}, "deidentify": True})
    with pytest.raises(ConfigError, match="columns names none of them"):
        Site(home)
