"""`silotune monitor`: texts that arrive, labelled by a tuned model; shares over time, and alerts when they shift."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from shared import terminal
from shared.errors import ConfigError, DataError
from shared.files.atomic import write_bytes, write_json
from shared.files.bounded import read_named_text
from shared.files.json_files import parse_object
from shared.files.outputs import JSON_MARK, PNG_MARK, check_file
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.options import DelimiterOption, ModelArgument, PolicyOption, QuotingOption, RegistryOption

if TYPE_CHECKING:
    from shared.data.text_stream import Item, Skipped, TextFormat
    from shared.runtime.export.exported import Exported
    from shared.runtime.monitoring import Monitor, Window
    from shared.runtime.runtime import Runtime
    from shared.tools.monitor.quantification import AdjustedCount

_T = TypeVar("_T")
ALERT_STATUS = 4
_AT_ONCE = 256  # texts
_SECONDS_BETWEEN_WRITES = 5.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def monitor(
    model: ModelArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files (one text a line, CSV, JSONL, Parquet) or folders of such; - or nothing is standard input."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--once", help="Go on with new files and appended lines until Ctrl-C; or read what is there."
        ),
    ] = False,
    text: Annotated[
        str, typer.Option("--text", metavar="COLUMN", help="Column of the texts, of CSV and JSONL.")
    ] = "text",
    times: Annotated[
        str | None, typer.Option("--time", metavar="COLUMN", help="Column of times: ISO 8601, or seconds since 1970.")
    ] = None,
    text_format: Annotated[
        Literal["auto", "text", "csv", "jsonl", "parquet"],
        typer.Option("--format", help="auto goes by the name's ending."),
    ] = "auto",
    delimiter: DelimiterOption = None,
    quoting: QuotingOption = "checked",
    encoding: Annotated[str, typer.Option(help="Of the files.")] = "utf-8",
    window: Annotated[int, typer.Option(help="Texts of a window.")] = 500,
    every: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Windows of time instead, such as 30m, 1h, 1d, 1w (UTC); needs --time."),
    ] = None,
    baseline_windows: Annotated[int, typer.Option(help="So many windows at the start are the baseline.")] = 1,
    baseline_period: Annotated[
        str | None, typer.Option(metavar="FROM/TO", help="Or the windows that begin then: 2026-01-01/2026-02-01.")
    ] = None,
    baseline_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Or the texts of another file.")] = None,
    alpha: Annotated[float, typer.Option(help="Chance of any false alarm in --horizon windows.")] = 0.05,
    horizon: Annotated[int, typer.Option(help="Windows over which --alpha is spread.")] = 100,
    min_shift: Annotated[float, typer.Option(help="Smaller changes of a share are no alert: 0.05 is 5 points.")] = 0.0,
    poll: Annotated[float, typer.Option(metavar="SECONDS", help="Of --follow: how often to look.")] = 1.0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write monitor.json and monitor.png.")] = None,
    fail_on_alert: Annotated[bool, typer.Option(help="End with status 4 if there was an alert.")] = False,
    registry: RegistryOption = None,
    policy: PolicyOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line for each window, alert and the summary.")
    ] = False,
) -> None:
    """Watch a stream of texts: the share of each label over time, and an alert when it shifts from the baseline.

    INPUTS are files (one text a line, CSV, JSONL or Parquet) or folders of such; without any, or with -, standard input is read.
    """

    from shared.data.known_texts import KnownTexts
    from shared.data.text_stream import Files, Skipped, TextFormat
    from shared.job.job_file import load_job
    from shared.named_models import model_folder
    from shared.runtime.inference import load_model
    from shared.runtime.monitoring import Monitor, MonitorSettings

    how = TextFormat(format=text_format, text=text, time=times, delimiter=delimiter, encoding=encoding, quoting=quoting)
    sources = [] if inputs in (None, [], ["-"]) else [Path(place) for place in inputs or []]
    _check_options(sources, how, follow=follow, every=every, period=baseline_period, file=baseline_file, poll=poll)
    run = model_folder(model, registry, policy)
    job = load_job(run)
    if job.task.kind != "sequence_classification":
        raise ConfigError(
            f"the run's task is {job.task.kind!r}; monitor counts the labels of texts, so give a sequence_classification run."
        )
    length = None if every is None else _duration(every)
    settings = MonitorSettings(
        labels=job.task.labels,
        window=window,
        every=length,
        baseline_windows=baseline_windows,
        baseline_period=None if baseline_period is None else _period(baseline_period),
        alpha=alpha,
        horizon=horizon,
        min_shift=min_shift,
        grace=length if follow or not sources else None,
    )
    if out is not None:
        check_file(out / "monitor.json", JSON_MARK, way_out="choose another folder")
        check_file(out / "monitor.png", PNG_MARK, way_out="choose another folder")
    skipped = Skipped()
    files = Files(sources, how, skipped) if sources else None
    label = _labeller(load_model(run, ComputeConfig()), job)
    reference = None
    if baseline_file is not None:
        reference = _count(label, Files([baseline_file], how, skipped), len(job.task.labels))
    watched, known = Monitor(settings, reference=reference), KnownTexts(run)
    console = terminal.console(140)
    reporter = _Reporter(
        watched, skipped, load_adjustment(run, job), out, console, job, as_json=as_json, live=follow or files is None
    )
    with _Stop() as stop:
        pieces = _pieces(files, how, skipped, stop, poll=poll if follow else None)
        for items in _batches(pieces, stop):
            known.add(item.text for item in items)
            reporter.tell(watched.add(label([item.text for item in items]), [item.time for item in items]))
    ignored = files.ignored if files is not None else 0
    reporter.end(watched.finish(), stopped=stop.asked, ignored=ignored, warnings=known.warnings())
    if fail_on_alert and watched.num_alerts:
        raise typer.Exit(ALERT_STATUS)


def load_adjustment(run: Path, job: Job) -> AdjustedCount | None:
    """Return the adjusted count by the confusion matrix of the run's evaluation; None if there is none for every label."""
    from shared.tools.monitor.quantification import AdjustedCount

    try:
        found = parse_object(read_named_text(run / "evaluation.json"))
        if tuple(found["labels"]) != job.task.labels:
            return None
        return AdjustedCount(found["confusion"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# --- what is read ---


def _check_options(
    sources: Sequence[Path],
    how: TextFormat,
    *,
    follow: bool,
    every: str | None,
    period: str | None,
    file: Path | None,
    poll: float,
) -> None:
    if Path("-") in sources:
        raise ConfigError("- is standard input and stands alone; give it, or files and folders.")
    if follow and not sources:
        raise ConfigError("--follow needs files or folders; standard input is followed until it ends anyway.")
    if every is not None and how.time is None:
        raise ConfigError("--every needs the column of times; add --time COLUMN.")
    if not sources and how.time is not None and how.format == "auto":
        raise ConfigError("--time needs columns; say what standard input is by --format csv or --format jsonl.")
    if period is not None and file is not None:
        raise ConfigError("--baseline-period and --baseline-file exclude each other; give one of them.")
    if not 0.01 <= poll <= 3600:
        raise ConfigError(f"--poll is {poll:g} seconds; give 0.01 to 3600.")


def _duration(spec: str) -> float:
    found = re.fullmatch(r"(\d{1,9})\s*([smhdw])", spec.strip())
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"--every is {spec!r}; expected a number with s, m, h, d or w, such as 30m or 1d.")
    return float(int(found[1]) * _UNITS[found[2]])


def _period(spec: str) -> tuple[float, float]:
    from shared.data.text_stream import parse_time

    parts = [parse_time(part) for part in spec.split("/")]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        raise ConfigError(f"--baseline-period is {spec!r}; expected FROM/TO, such as 2026-01-01/2026-02-01.")
    return parts[0], parts[1]


def _labeller(runtime: Runtime | Exported, job: Job) -> Callable[[Sequence[str]], list[int]]:
    """Return the function from texts to their classes."""
    from shared.runtime.inference import predict

    index = {label: number for number, label in enumerate(job.task.labels)}

    def label(texts: Sequence[str]) -> list[int]:
        return [index[prediction["label"]] for prediction in predict(runtime, texts)]

    return label


def _count(label: Callable[[Sequence[str]], list[int]], files: Any, size: int) -> list[int]:
    counts = [0] * size
    for batch in _batches(_all(files), None):
        for found in label([item.text for item in batch]):
            counts[found] += 1
    if not sum(counts):
        raise DataError("--baseline-file holds no text that can be read; give one with texts.")
    return counts


def _all(files: Any) -> Iterator[list[Item]]:
    yield from files.read()
    yield from files.finish()


def _pieces(
    files: Any, how: TextFormat, skipped: Skipped, stop: _Stop, *, poll: float | None
) -> Iterator[list[Item] | None]:
    """Yield texts as they are read, and None where nothing more is there for now."""
    from shared.data.text_stream import read_stream

    if files is None:
        for items in read_stream(_reader(stop), how, skipped):
            yield items
            yield None
        return
    yield from files.read()
    while poll is not None and not stop.asked:
        yield None
        stop.unless_asked(lambda: time.sleep(poll), None)
        yield from files.read()
    if not stop.asked:
        yield from files.finish()


def _reader(stop: _Stop) -> Callable[[int], bytes]:
    stream: Any = sys.stdin.buffer
    # read1 returns what is there; read would wait for a full piece.
    inner: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    return lambda size: stop.unless_asked(lambda: inner(size), b"")


def _batches(pieces: Iterator[list[Item] | None] | Iterator[list[Item]], stop: _Stop | None) -> Iterator[list[Item]]:
    """Yield texts in the numbers that the model takes at once; what there is, where the stream pauses."""
    held: list[Item] = []
    for piece in pieces:
        if stop is not None and stop.asked:
            return
        held += piece or []
        while len(held) >= _AT_ONCE or (piece is None and held):
            yield held[:_AT_ONCE]
            held = held[_AT_ONCE:]
            if stop is not None and stop.asked:
                return
    if held:
        yield held


class _StopNow(Exception):
    """Raised where the command waits."""


class _Stop:
    """Ctrl-C and SIGTERM end reading at the next safe place; a second one ends the command at once.

    Attributes:
        asked: whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is _StopNow  # it came in the instant in which a wait ended

    def unless_asked(self, wait: Callable[[], _T], otherwise: _T) -> _T:
        """Return what `wait` returns; `otherwise` as soon as the end is asked for."""
        try:
            self._waiting = True
            return otherwise if self.asked else wait()
        except _StopNow:
            return otherwise
        finally:
            self._waiting = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._waiting:
            raise _StopNow


# --- what is said ---


class _Reporter:
    """Prints windows as they are complete and the summary, and writes the folder."""

    def __init__(
        self,
        watched: Monitor,
        skipped: Skipped,
        adjust: AdjustedCount | None,
        out: Path | None,
        console: Console,
        job: Job,
        *,
        as_json: bool,
        live: bool,
    ) -> None:
        self._monitor, self._skipped, self._adjust, self._out = watched, skipped, adjust, out
        self._console, self._job, self._as_json, self._live = console, job, as_json, live
        self._events: deque[dict[str, Any]] = deque(maxlen=watched.windows.maxlen)
        self._written = time.monotonic()

    def tell(self, windows: Sequence[Window]) -> None:
        """Say what these windows show."""
        from shared.tools.monitor import report

        labels = self._monitor.settings.labels
        for window in windows:
            if self._as_json or self._out is not None:
                self._events.append(report.window_event(window, labels, self._adjust))
            if self._as_json:
                self._line(self._events[-1])
                for event in report.alert_events(window):
                    self._line(event)
            elif self._live:
                line = report.window_line(window, labels, report.shown_labels(self._monitor, report.MOST_LABELS))
                self._console.print(line, style="bold red" if window.alerts else None, soft_wrap=True)
        if windows and self._out is not None and time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write(stopped=False)
            self._written = time.monotonic()

    def end(self, windows: Sequence[Window], *, stopped: bool, ignored: int, warnings: Sequence[str]) -> None:
        """Say what the last windows show, and the summary.

        Raises:
            DataError: if there was no text.
        """
        from shared.data.text_stream import left_out
        from shared.tools.monitor import report

        self.tell(windows)
        if not self._monitor.windows:
            left = "; ".join(left_out(self._skipped))
            raise DataError(
                f"there is no text to label{f' ({left})' if left else ''}; look at the input and its columns."
            )
        if self._out is not None:
            self._write(stopped=stopped, warnings=warnings)
        if self._as_json:
            found = report.summary(self._monitor, self._skipped, self._adjust, stopped=stopped, warnings=warnings)
            self._line(found)
            return
        self._console.print(report.window_table(self._monitor))
        self._console.print(report.label_table(self._monitor, self._adjust))
        for note in report.notes(self._monitor, self._skipped, self._adjust, ignored):
            self._console.print(note)
        for warning in warnings:
            self._console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
        if self._out is not None:
            from shared.fonts import HOW_TO_GET_FONTS, readable_figures

            with readable_figures() as readable:
                if any(readable(label) != label for label in self._monitor.settings.labels):
                    self._console.print(HOW_TO_GET_FONTS, soft_wrap=True)
            self._console.print(f"written: {self._out / 'monitor.json'}, {self._out / 'monitor.png'}", soft_wrap=True)

    def _line(self, event: dict[str, Any]) -> None:
        terminal.print_json(event)
        sys.stdout.flush()

    def _write(self, *, stopped: bool, warnings: Sequence[str] = ()) -> None:
        from shared.tools.monitor import report
        from shared.tools.monitor.figure import draw_monitor

        assert self._out is not None  # noqa: S101 (only called with a folder)
        if not sum(self._monitor.baseline):
            return  # nothing to draw yet
        document = report.document(
            self._monitor,
            self._skipped,
            self._adjust,
            run={"name": self._job.name, "job_sha256": self._job.sha256},
            windows=self._events,
            stopped=stopped,
            warnings=warnings,
        )
        write_json(self._out / "monitor.json", document)
        shown = report.shown_labels(self._monitor, 6)
        # Of two labels the second's share is what the first one leaves.
        shown = shown[-1:] if len(self._monitor.totals) == 2 else shown
        figure = draw_monitor(self._monitor, shown, name=self._job.name, adjust=self._adjust)
        write_bytes(self._out / "monitor.png", figure)
