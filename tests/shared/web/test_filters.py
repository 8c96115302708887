"""What pages make of times, whatever a file's clock says."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from shared.web.filters import clock, minute


@pytest.mark.parametrize("time", ["2026-03-01T12:00:30Z", datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC), 1772366430.0])
def test_times_are_shown_in_one_form(time: str | datetime | float) -> None:
    assert (clock(time), minute(time)) == ("2026-03-01 12:00:30", "2026-03-01 12:00")


@pytest.mark.parametrize("time", [1e12, -1e12, 1e300, float("nan"), "soon"])
def test_what_is_in_no_calendar_stands_as_it_is(time: float | str) -> None:
    """A file's time of change can be that of the year 33658."""
    assert clock(time) == str(time)
