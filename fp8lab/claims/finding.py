"""What the records say of a claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["confirmed", "contradicted", "untested"]


@dataclass(frozen=True)
class Finding:
    """A claim, what the records say of it, and where to see it."""

    claim: str
    verdict: Verdict
    why: str
    """The numbers behind the verdict, as a sentence: Markdown."""
    rule: str
    """What decides, whatever the records say: Markdown."""
    reference: str
    """Where to see it: '@fig-gaps', or a link to the chapter where there is nothing to draw yet."""
    scope: str = ""
    """What the verdict is about and how far it reaches: '`fused` at 7M'."""
    aside: str = ""
    """What is worth knowing beside it and decides nothing: sentences, Markdown."""
