"""The ranges within which a mechanism can be asked for and accounted for: the same for every path that leads to a number.

A scenario, a signed job, the planner, a site's policy, its account and the accountant itself all read them here, so that none
of them starts a computation that another would have refused.
"""

from __future__ import annotations

MAX_STEPS = 1 << 24
"""Noisy steps of one plan: rounds times local steps. About 17 million, far beyond any plan with a budget."""
MAX_EPSILON = 1000.0
"""Beyond it an epsilon says nothing, and the accountant would need gigabytes to find it."""
MIN_EPSILON = 1e-6
"""Below it no noise that is allowed would do, whatever the plan."""
MIN_DELTA = 1e-30
"""Smallest failure probability for which the accountant's bound on its own rounding is tested."""
MIN_NOISE_MULTIPLIER = 0.2
"""Below it the claim is without meaning; more noise than asked for is never wrong."""
MAX_NOISE_MULTIPLIER = 1e4
"""Above it nothing is learned."""
MIN_GRAD_NORM, MAX_GRAD_NORM = 1e-12, 1e12
"""Clipping bounds. Near the smallest numbers of double precision a clipped vector would be longer than its bound."""
MIN_SAMPLE_RATE = 1e-9
"""Smallest probability with which a record enters a step; of a billion records less than one would."""
MAX_SITES = 10_000_000
"""Sites of one federation, declared or waited for."""
MAX_SUMMED_SITES = 1000
"""Sites of one secure sum: every one agrees with every other on a key, and one that drops out late voids the attempt."""
MAX_RECORDS = 1_000_000_000
"""Records, or persons, that one site can declare."""
MAX_TABLE_LABELS = 100
"""Labels up to which whatever has a number for each pair of labels is kept and released whole."""
MAX_LEARNING_RATE = 1000.0
"""Of sites and of the server, and what multiplies one: hundreds of times what helps. Beyond, numbers overflow."""
MAX_LORA_ALPHA = 1e5
"""Scale of an adapter, times its rank."""
MAX_VALUE = 1e15
"""Numbers of data, scores and metrics: up to here double precision tells whole numbers apart."""
MAX_LOSS = 1e6
"""Loss of one record, where it is cut."""
MAX_TIMEOUT_SECONDS = 366 * 86_400.0
"""Longest that a round waits: a year."""
MAX_LABELS = 10_000
"""Labels of one task: the head, the confusion matrix and the report grow with them."""
MAX_ADAPTER_VALUE = 1e4
"""Largest value of any adapter under privacy: sites refuse one beyond. Heads that were trained have values below 100."""
