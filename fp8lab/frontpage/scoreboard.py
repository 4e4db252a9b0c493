"""The claims in a table."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lab.claims import Finding
from fp8lab.units import unique

VERDICTS = ("contradicted", "confirmed", "untested")
"""In the order of the scoreboard."""


def scoreboard(findings: Sequence[Finding]) -> str:
    """The claims as a Markdown table, contradictions first: verdict, numbers, where to see them; then the rules."""
    rows = "\n".join(
        f"| {finding.claim} | **{finding.verdict}** {finding.scope} | "
        f"{' '.join(part for part in (finding.why, finding.aside) if part)} ({finding.reference}) |"
        for finding in sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict))
    )
    rules = "\n".join(unique(f"- *{finding.claim}* {finding.rule}." for finding in findings))
    return (
        "::: {.table-text}\n\n"
        "| the report says | here | because |\n"
        "|:----------------|:-----------|:---------------------------|\n"
        f"{rows}\n\n"
        ": The claims of the report that prompted this project, held against our records by the rules below. "
        "*Untested*: not measured, or not enough to tell. "
        "{#tbl-scoreboard}\n\n:::\n\n"
        f"A verdict follows from the records by these rules:\n\n{rules}"
    )
