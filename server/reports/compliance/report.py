"""Writes the compliance report of a run: facts, words, layout, and the signature beside the file.

Formal guarantees (tests: tests/server/reports/test_compliance_report.py)
    * The file is there in full or not at all, and the same run, time and signer give the same bytes
      (test_the_same_facts_give_the_same_bytes).
    * What is signed is what was written: the signature is made of the bytes of the file
      (test_a_changed_byte_is_detected).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from server.reports.compliance.content import compose_document
from server.reports.compliance.document import Document
from server.reports.compliance.ledgers import Account
from server.reports.compliance.reading import read_facts
from shared.errors import RunError
from shared.files.atomic import write_bytes
from shared.files.outputs import HTML_MARK, JSON_MARK, PDF_MARK, check_file
from shared.job.job_file import check_run_folder
from shared.trust.signed_file import Signer, sign_file, signature_file

Format = Literal["html", "pdf"]
FILE_STEM = "compliance-report"


def write_compliance_report(
    run_dir: Path,
    format: Format,  # noqa: A002 - the field's word, as the command line has it
    *,
    out: Path | None = None,
    accounts: Sequence[Account] = (),
    signer: Signer | None = None,
    now: datetime | None = None,
) -> Path:
    """Write the report and, with a signer, the signature beside it; return the path of the report.

    Args:
        run_dir: the run folder.
        format: "html" or "pdf"; both say the same.
        out: the file; by default `compliance-report.html` or `.pdf` in the run folder.
        accounts: ledgers of sites, for what they held before and after the job.
        signer: who signs; without one, an older signature of the file is removed.
        now: the time in the report, with a time zone.

    Raises:
        RunError: if the run folder is malformed, or the file cannot be written or is somebody else's.
    """
    path = out or run_dir / f"{FILE_STEM}.{format}"
    check_run_folder(run_dir)
    check_file(path, HTML_MARK if format == "html" else PDF_MARK, way_out="choose another file with --out")
    check_file(signature_file(path), JSON_MARK, way_out="choose another file with --out")
    moment = now or datetime.now(UTC)
    facts = read_facts(run_dir, accounts)
    document = compose_document(facts, now=moment, signer=signer, file_name=path.name)
    content = _layout(format)(document, moment)
    # An old signature must not stand beside a new file, not even for a moment.
    try:
        signature_file(path).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"could not write {path}: {error.strerror}; choose another file with --out.") from None
    write_bytes(path, content)
    if signer is not None:
        sign_file(path, signer, now=moment)
    return path


def _layout(name: Format) -> Callable[[Document, datetime], bytes]:
    if name == "pdf":
        from server.reports.compliance.pdf import render_pdf

        return render_pdf
    from server.reports.compliance.html import render_html

    return render_html
