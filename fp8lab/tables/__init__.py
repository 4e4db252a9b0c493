"""Records in, table out: pandas frames, ready to print.

A module a subject, named as the module whose numbers it shows where there is one (`fp8lab.losses`, `fp8lab.scaling`,
`fp8lab.timings`, `fp8lab.scores`). Headings have units, and values are rounded to what the data can carry.
"""

from fp8lab.tables import data, health, losses, operation, runs, scaling, scores, speed

__all__ = ["data", "health", "losses", "operation", "runs", "scaling", "scores", "speed"]
