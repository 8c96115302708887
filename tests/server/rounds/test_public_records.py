"""What decides is not what is reported."""

from __future__ import annotations

from typing import Any

import pytest

from server.rounds.public_records import FEWEST, hold_back


def records(count: int) -> list[dict[str, Any]]:
    return [{"text": f"note {number}", "label": "ab"[number % 2]} for number in range(count)]


def test_every_record_is_in_one_part_and_about_a_fifth_decides() -> None:
    public = records(4000)
    parts = hold_back(public, "text")
    assert sorted([*parts.reported, *parts.deciding], key=str) == sorted(public, key=str)
    assert 700 < len(parts.deciding) < 900
    assert parts.counts == {"reported": len(parts.reported), "deciding": len(parts.deciding)}


def test_equal_texts_are_in_one_part_and_order_moves_nothing() -> None:
    public = [*records(1000), *records(1000)]
    parts = hold_back(public, "text")
    assert not {record["text"] for record in parts.reported} & {record["text"] for record in parts.deciding}
    again = hold_back(public[::-1], "text")
    assert sorted(again.deciding, key=str) == sorted(parts.deciding, key=str)


@pytest.mark.parametrize("public", [[], records(1), records(FEWEST - 1), [{"text": "the same"}] * 1000])
def test_of_few_records_or_one_text_none_is_held_back(public: list[dict[str, Any]]) -> None:
    parts = hold_back(public, "text")
    assert list(parts.reported) == public
    assert list(parts.deciding) == []


def test_images_and_odd_text_can_be_held_back() -> None:
    public = [{"pixels": [number, 1.5]} for number in range(300)]
    assert hold_back(public, "pixels").deciding
    assert hold_back([{"text": f"\ud800{number}"} for number in range(300)], "text").deciding
