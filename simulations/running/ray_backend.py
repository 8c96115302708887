"""The same ServerApp and ClientApp in Flower's simulation runtime on Ray, for a machine or cluster of many.

Every Ray actor holds one backbone: `shared.runtime.runtime` keeps it at module level, so a client pays no load after the first.
"""

from __future__ import annotations

import os

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from shared.errors import ConfigError
from simulations.scenario import SimulationConfig


def run_on_ray(server_app: ServerApp, client_app: ClientApp, num_sites: int, config: SimulationConfig) -> None:
    """Execute `server_app` with `num_sites` simulated nodes that answer with `client_app`.

    Raises:
        ConfigError: if Ray is not installed.
        SilotuneError: whatever the ServerApp raised.
    """
    # Set before Flower and Ray read them: nothing is reported home, nothing is installed.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of a worker that has not started within this time, a minute by default, Ray waits for the registration for ever.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("simulation.backend 'ray' needs Ray: pip install 'silotune[ray]'.") from None
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=num_sites,
        backend_config={
            "init_args": {"num_cpus": config.num_actors, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
