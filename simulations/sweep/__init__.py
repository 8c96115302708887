"""Sweeps: one scenario under many settings, budgets among them, and what the best setting reaches at each budget."""

FORMAT = "silotune-sweep/1"
SWEEP, TRIALS, RUNS = "sweep.json", "trials.jsonl", "trials"
"""In the folder of a sweep: its settings and what came out, a line for each trial, the trials' run folders."""
OUTCOME = "outcome.json"
"""In that of a sweep whose tuning is accounted for, which releases one trial alone."""
