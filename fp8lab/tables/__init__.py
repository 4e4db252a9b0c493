"""Records in, table out: pandas frames, ready to print.

A module a subject, named as the module whose numbers it shows where there is one (`fp8lab.analysis.losses`,
`fp8lab.analysis.scaling`, `fp8lab.analysis.timings`, `fp8lab.analysis.scores`). Headings have units, and values are
rounded to what the data can carry.
"""

from fp8lab.tables import data, health, losses, operation, runs, scaling, scores, speed

__all__ = ["data", "health", "losses", "operation", "runs", "scaling", "scores", "speed"]
