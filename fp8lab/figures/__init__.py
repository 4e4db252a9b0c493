"""Records in, figure out: a module a subject, and the style that all share."""

from fp8lab.figures import data, health, loss, scaling, scores, speed, style

__all__ = ["data", "health", "loss", "scaling", "scores", "speed", "style"]
