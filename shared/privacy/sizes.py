"""Public numbers that follow from how many records (or persons) a site has; free of PyTorch, which planning does not need."""

from __future__ import annotations

from decimal import ROUND_DOWN, Context, Decimal


def default_delta(num_units: int) -> float:
    """Return min(1e-5, 1/(10 n)), rounded down to one digit: 1/n^1.1 is too weak for small n.

    All digits would tell n to whoever gets the job; and a delta that a message shows must be one that its check takes.
    """
    most = Context(prec=1, rounding=ROUND_DOWN).divide(Decimal(1), 10 * max(num_units, 1))
    return float(min(Decimal("1e-5"), most))


def declared_size(num_units: int) -> int:
    """Return the public size bucket of a data set: the largest power of two not above its number of records or persons.

    A site may declare any other constant; whatever it declares is public and not protected.
    """
    return 1 << (num_units.bit_length() - 1) if num_units > 0 else 0


def least_delta_refused(declared: int) -> float:
    """Return the delta from which on everything about one record of a site might be published: 1 / its largest size.

    By the declared size alone, which may stand for up to twice as many records or persons: an answer that followed the
    number that a site really has would tell it to whoever may choose a delta.
    """
    return 1 / (2 * max(declared, 1))
