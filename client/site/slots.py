"""When answers leave a site: as soon as they are ready, or in slots, a public number of seconds after the request.

How long an answer takes follows from the records: how many there are, how long, how many were drawn. In slots that does not
show as long as every answer is ready within the first one.

Guarantee (tests: tests/client/site/test_slots.py): with slots of N seconds an answer leaves N, 2 N, 3 N, ... seconds after its
request came, whether it is a release, a refusal or an error; the first of these for every answer that takes less than N.

Not guaranteed: an answer that takes longer than N tells in which slot it fell, and the node's log warns of it. Work for the
network and the scheduler, milliseconds, comes after the slot; it sees an answer of one size.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("silotune.site")


class Slots:
    """Waits for the slot of an answer.

    Args:
        clock: seconds that never go back.
        pause: waits for so many seconds; may end early when the node is told to stop.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, pause: Callable[[float], object] = time.sleep
    ) -> None:
        self._clock, self._pause = clock, pause

    @contextmanager
    def next_after_now(self, slot_seconds: Callable[[], float]) -> Iterator[None]:
        """Do what stands in the block, then wait for the end of a slot that began now, also after an error.

        Args:
            slot_seconds: N, asked for at the end of the block; 0: do not wait.
        """
        began = self._clock()
        try:
            yield
        finally:
            seconds = slot_seconds()
            if seconds > 0:
                taken = self._clock() - began
                slots = max(1, math.ceil(taken / seconds))
                if slots > 1:
                    log.warning(
                        "an answer took %d slots of %g s, which tells roughly how long the work was; choose a larger "
                        "answers.slot_seconds in site.toml.",
                        slots,
                        seconds,
                    )
                self._pause(max(0.0, began + slots * seconds - self._clock()))
