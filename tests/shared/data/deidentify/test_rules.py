"""Each rule on what it must find, on what it must leave, and on texts made to be slow."""

from __future__ import annotations

import random

import pytest

from shared.data.deidentify.config import DeidentifyConfig
from shared.data.deidentify.engine import open_deidentifier
from shared.data.deidentify.identifiers import iban_is_valid, luhn_is_valid, nhs_is_valid, resident_id_is_valid
from tests.shared.data.deidentify.synthetic_notes import card, iban, nhs, resident

MASK = open_deidentifier(DeidentifyConfig(engine="rules"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # names
        ("Dr. O'Brien and Mrs Anna van der Berg came.", "Dr. [NAME] and Mrs [NAME] came."),
        ("seen by John A. Smith. Smith agreed.", "seen by [NAME]. [NAME] agreed."),
        ("Patient: SMITH, John A; ward 4", "Patient: [NAME]; ward 4"),
        ("Kind regards,\nSarah Connor, MD", "Kind regards,\n[NAME], MD"),
        ("Met Robert Fenwick there.", "Met [NAME] there."),
        ("i am peter kowalczyk and", "i am [NAME] and"),
        ("患者张伟因发热入院，张伟诉头痛。", "患者[NAME]因发热入院，[NAME]诉头痛。"),
        ("请李主任和欧阳娜娜女士签字", "请[NAME]主任和[NAME]女士签字"),
        ("姓名：阿依古丽　性别：女", "姓名：[NAME]　性别：女"),
        ("《哈利·波特》的读者", "《[NAME]》的读者"),
        # dates
        ("on 2024-03-05, 5/3/2024, 3/25/24 and 05.03.2024", "on [DATE], [DATE], [DATE] and [DATE]"),
        ("5th of March, 2024; March 5, 2024; 05-Mar-24", "[DATE]; [DATE]; [DATE]"),
        ("since March 2024, until Sept. 11, in July", "since [DATE], until [DATE], in [DATE]"),
        ("on 3/15 and 20240305", "on [DATE] and [DATE]"),
        ("2024年3月5日至二〇二四年三月，3月5号", "[DATE]至[DATE]，[DATE]"),
        # ages over 89
        ("a 92-year-old, aged 101, age: 90", "a [AGE]-year-old, aged [AGE], age: [AGE]"),
        ("老人九十二岁，其弟95岁", "老人[AGE]岁，其弟[AGE]岁"),
        # contacts
        ("+44 20 7946 0958, (415) 555-0132 ext. 12", "[PHONE], [PHONE]"),
        ("电话13800138000或010-62345678", "电话[PHONE]或[PHONE]"),
        ("tel: 555 0132", "tel: [PHONE]"),
        ("mail a.b+c@ex-ample.co.uk.", "mail [EMAIL]."),
        ("见https://a.example.com/b?c=1。以及www.example.cn，", "见[URL]。以及[URL]，"),
        ("from 10.0.0.1, 2001:db8::1:2 at", "from [IP], [IP] at"),
        # identifiers
        ("card 4111-1111-1111-1111 ends", "card [ACCOUNT] ends"),
        ("to GB82 WEST 1234 5698 7654 32 PAID", "to [ACCOUNT] PAID"),
        ("MRN: A12-3456, passport no. X1234567", "MRN: [ID], passport no. [ID]"),
        ("SSN 078-05-1120, NHS 943 476 5919", "SSN [ID], NHS [ID]"),
        ("身份证号11010519491231002X，住院号：0012345", "身份证号[ID]，住院号：[ID]"),
        ("ticket 123456789 and AB1234567", "ticket [NUMBER] and [NUMBER]"),
    ],
)
def test_found(text: str, expected: str) -> None:
    assert MASK.mask(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "BP 120/80, 4/5 strength, GCS 15, score 7/10, T2N0M0, 2.5 mg twice daily, HbA1c 7.9 %.",
        "Patient Denies pain. The patient Has COPD. Wife Reports fever. Doctor Who is a series.",
        "It may march on; the august house of 2019; version 1.2.3; ratio 1:2:3 at 12:30:45.",
        "An 89-year-old with 100 years of data, 101 F, 95 % saturation, 250,000 platelets.",
        "She paid 1,250.00 EUR, 123456 steps, 1998-2004, GRIN2A and IL-6 at 10:45.",
        "患者高血压病史10年，白细胞9.8×10^9/L，黄疸消退，方便时复诊，余无特殊，可任意活动。",
        "对方经理未到，主任医师查房，责任护士宣教，历史老师。",
        "",
    ],
)
def test_left_alone(text: str) -> None:
    assert MASK.mask(text)[0] == text


def test_only_the_chosen_kinds_are_masked() -> None:
    only_dates = open_deidentifier(DeidentifyConfig(engine="rules", kinds=("date",)))
    assert only_dates.mask("Mr Smith, 5 May 2020, a@b.com")[0] == "Mr Smith, [DATE], a@b.com"


def test_check_digits_tell_a_changed_digit() -> None:
    rng = random.Random(1)
    cases = [(luhn_is_valid, card), (iban_is_valid, iban), (nhs_is_valid, nhs), (resident_id_is_valid, resident)]
    for is_valid, make in cases:
        for _ in range(50):
            number = make(rng)
            assert is_valid(number)
            # These codes all find a change of one digit (those of the date may make it no date, also invalid).
            place = rng.choice([i for i, letter in enumerate(number) if letter.isdigit()])
            other = rng.choice([digit for digit in "0123456789" if digit != number[place]])
            assert not is_valid(number[:place] + other + number[place + 1 :])


def test_published_examples_of_the_codes() -> None:
    assert iban_is_valid("DE89370400440532013000")
    assert nhs_is_valid("9434765919")
    assert resident_id_is_valid("11010519491231002X")
    assert luhn_is_valid("79927398713000") is False  # shorter than a card after its own digit, then wrong
    assert luhn_is_valid("378282246310005")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "piece",
    [
        "Aa-",
        "1 ",
        "1-",
        "1",
        "A",
        "A ",
        "Aa ",
        "a.",
        "a@",
        "Mr ",
        "1.",
        "12:",
        "March ",
        "张",
        "王主任",
        "a1",
        "(",
        "\n",
        "to A ",
    ],
)
def test_no_text_makes_a_rule_run_away(piece: str) -> None:
    """A loop that runs away takes hours: the time limit of the test ends it."""
    assert MASK.mask(piece * (40_000 // len(piece))) is not None
