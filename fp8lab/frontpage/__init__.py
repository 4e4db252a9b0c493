"""The first page's sentences: the answer, the setting, the conclusions, each from records.

Every clause has its condition: other records, other words. What the records cannot carry is said to be untested.
"""

from fp8lab.frontpage.conclusions import conclusions
from fp8lab.frontpage.evidence import Evidence
from fp8lab.frontpage.lead import costs, lead, setting
from fp8lab.frontpage.scoreboard import VERDICTS, scoreboard

__all__ = ["VERDICTS", "Evidence", "conclusions", "costs", "lead", "scoreboard", "setting"]
