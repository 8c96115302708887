"""`silotune serve`: a tuned model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.options import CertificateOption, KeyOption, PolicyOption, PortOption, RegistryOption

TokensOption = Annotated[
    Path | None,
    typer.Option(
        "--tokens", envvar="SILOTUNE_TOKENS", help="File of API tokens; without it only this machine may ask."
    ),
]


def serve(
    reference: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="NAME, NAME@ALIAS, NAME:N, or the path of a run or model folder."),
    ],
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only with --certificate and --tokens.")
    ] = "127.0.0.1",
    port: PortOption = 8460,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    tokens: TokensOption = None,
    engine: Annotated[
        Literal["auto", "onnx", "torch"],
        typer.Option(help="auto: ONNX Runtime where it is installed, on a GPU PyTorch."),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "int8"] | None, typer.Option(help="Of the weights; int8 is faster on processors with VNNI.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of the engine; 0: one for each core.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a batch.")] = 200,
    batch_wait_ms: Annotated[
        float, typer.Option(help="Milliseconds for which an idle engine waits for a batch to fill.")
    ] = 2.0,
    queue: Annotated[int, typer.Option(help="Texts that may wait; beyond them requests get 503.")] = 2048,
    cache_tokens: Annotated[int, typer.Option(help="Places in the caches of continued texts.")] = 8192,
    body_bytes: Annotated[int, typer.Option(help="Of a request, at most.")] = 4 << 20,
    texts: Annotated[int, typer.Option(help="Texts of a request, or continuations, at most.")] = 256,
    characters: Annotated[int, typer.Option(help="Characters of a text, at most.")] = 100_000,
    connections: Annotated[int, typer.Option(help="Open at a time; one address may have a quarter.")] = 1024,
    request_seconds: Annotated[
        float, typer.Option(help="In which a whole request must come, and an answer be read on.")
    ] = 20.0,
    answer_seconds: Annotated[float, typer.Option(help="In which an answer must be complete.")] = 120.0,
    drift_window: Annotated[
        int | None, typer.Option(help="Compare the labels of so many texts with a baseline, for /metrics.")
    ] = None,
    drift_baseline: Annotated[
        str, typer.Option(metavar="auto|FILE", help="auto: a version's first window; or monitor.json of `monitor`.")
    ] = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Answer /v1/explain, for tokens of that scope.")] = False,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Of the log, on standard error.")] = "text",
) -> None:
    """Serve a tuned model over HTTP: /v1/predict for labels, entities and scores, /v1/completions for GPT-2.

    A version of a registry is verified before it is loaded, and NAME and NAME@ALIAS follow the alias while it runs.
    """
    from server.registry.registry import registry_folder
    from shared.errors import ConfigError
    from shared.service.logs import set_up

    try:
        from server.serving.limits import Limits
        from server.serving.models import Plan
        from server.serving.monitoring.drift import DriftPlan
        from server.serving.serving import Start, place_of_service, run
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(f"serving needs the package {error.name}: pip install 'silotune[serve]'") from None

    if drift_window is None and drift_baseline != "auto":
        raise ConfigError("--drift-baseline goes with --drift-window, the texts that are compared with it at a time.")
    limits = Limits(
        batch_tokens=batch_tokens,
        batch_wait_ms=batch_wait_ms,
        queue=queue,
        cache_tokens=cache_tokens,
        body_bytes=body_bytes,
        texts=texts,
        characters=characters,
        connections=connections,
        request_seconds=request_seconds,
        answer_seconds=answer_seconds,
    )
    start = Start(
        reference=reference,
        registry=registry_folder(registry),
        policy=policy,
        place=place_of_service(host, port, certificate, key, tokens),
        plan=Plan(engine, precision, threads, explain),
        limits=limits,
        tokens=tokens,
        drift=None if drift_window is None else DriftPlan(drift_window, drift_baseline),
    )
    set_up(log_format)
    run(start, typer.echo)
