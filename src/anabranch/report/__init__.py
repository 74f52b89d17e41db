"""One self-contained page from the artifacts of a run, and the same story for the terminal."""

from __future__ import annotations

from pathlib import Path

from anabranch.artifacts import write_atomically
from anabranch.report.contents import read_contents
from anabranch.report.figures import summary_picture
from anabranch.report.markdown import comparison_markdown, markdown
from anabranch.report.page import html_page

__all__ = ["comparison_markdown", "markdown_report", "summary_picture", "write_report"]


def write_report(run: Path) -> Path:
    """Write RUN/report.html and RUN/report.md from whatever the run (or comparison) folder has so far.

    The page needs no network, no script and no other file; same artifacts, same bytes.

    Returns:
        The path of report.html.
    Raises:
        OutputError: no run folder there, or it cannot be written.
        CorruptedError: an artifact is damaged.
    """
    contents = read_contents(run)
    write_atomically(run / "report.md", markdown(contents).encode())
    write_atomically(run / "report.html", html_page(contents).encode())
    return run / "report.html"


def markdown_report(run: Path) -> str:
    """The report as Markdown of about 100 columns, for a terminal. Raises as `write_report`; writes nothing."""
    return markdown(read_contents(run))
