"""Every key of the JSON lines of `silotune simulate` and `silotune federation` is explained in docs/simulation.md."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import simulations.federation.processes as processes
import simulations.simulating as simulating
from tests.loading import ROOT

OF_OTHER_JOBS = {"epsilon_max_site"}
"""What the federation's line has where sites add no shares of the noise."""
PRINTED = {
    "simulate": [simulating.summary, simulating._calibration],
    "federation": [processes.summary, processes._of_sites, processes._of_shares],
}
"""What makes the figures of each command."""


def explained(command: str) -> set[str]:
    section = (ROOT / "docs" / "simulation.md").read_text().partition("\n## The JSON line\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {key for keys, of in rows if of.strip() in ("both", command) for key in re.findall(r"`([^`]+)`", keys)}


def keys_in(function: Callable[..., Any]) -> Iterator[ast.expr]:
    """Yield what the code of `function` uses as a key of what it returns."""
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield node.slice


def as_pattern(key: ast.expr) -> str | None:
    """Return what matches the key as the table has it; None of one that is a variable."""
    if isinstance(key, ast.Constant):
        return re.escape(str(key.value))
    if isinstance(key, ast.JoinedStr):
        return "".join(re.escape(p.value) if isinstance(p, ast.Constant) else r"\w*" for p in key.values)
    return None


# Names of arms, by which figures are looked up and no key is called.
ARMS = {"federated", "federated_dp"}


@pytest.mark.parametrize("command", list(PRINTED))
def test_every_key_that_the_code_can_print_is_explained(command: str) -> None:
    table = explained(command)
    patterns = {
        found for function in PRINTED[command] for key in keys_in(function) if (found := as_pattern(key))
    } - ARMS
    assert len(patterns) > 8
    for pattern in sorted(patterns):
        assert any(re.fullmatch(pattern, key) for key in table), f"{command}: nothing explains {pattern}"
    for key in sorted(table):
        assert any(re.fullmatch(pattern, key) for pattern in patterns), f"{command} prints no {key}"


def test_the_line_s_keys_of_issue_16_keep_their_names() -> None:
    names = (
        "METRIC_federated_dp rounds sites round_overhead_seconds_median epsilon epsilon_alone max_colluding honest_min"
    )
    names += " attempts dropped bytes_up_per_round tls_version alpn run_dir delta"
    assert {*names.split()} <= explained("federation")
