"""The same ServerApp and ClientApp in Flower's simulation runtime on Ray, for a machine or cluster of many.

Every Ray actor holds one backbone: `shared.runtime` keeps it at module level, so a client pays no load after the first.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flwr.clientapp import ClientApp

from server.app import Run, make_server_app
from server.checkpoint import Checkpoint
from shared.errors import ConfigError, RunError
from simulations.scenario import SimulationConfig

if TYPE_CHECKING:
    from flwr.serverapp import ServerApp


def run_on_ray(run: Run, client_app: ClientApp, num_sites: int, config: SimulationConfig, *, seed: int) -> Checkpoint:
    """Execute `run` with `num_sites` simulated nodes and return the last checkpoint.

    Raises:
        ConfigError: if Ray is not installed.
        RunError: if the runtime ended without a result.
    """
    # Set before Flower and Ray read them: nothing is reported home, nothing is installed.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("simulation.backend 'ray' needs Ray: pip install 'silotune[ray]'.") from None
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=_server_app(run, config, seed),
        client_app=client_app,
        num_supernodes=num_sites,
        backend_config={
            "init_args": {"num_cpus": config.num_actors, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if run.finished is None:
        raise RunError("Flower's simulation runtime ended without a result; its log above says why.")
    return run.finished


def _server_app(run: Run, config: SimulationConfig, seed: int) -> ServerApp:
    if not config.dropout_probability:
        return make_server_app(run)
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from server.app import execute
    from simulations.grid import DropoutGrid

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        execute(DropoutGrid(grid, config.dropout_probability, seed), run)

    return app
