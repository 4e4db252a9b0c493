"""fp8lab: what happens when you train an LLM in FP8, answered with measurements.

Data flows one way, left to right::

    text sources -> data -> token shards -> trainer -> run record -> chapters -> article
                                              ^
                     plan (YAML) -> papermill-+

README.md names the modules in that order.
Nothing right of a run record imports the trainer, and nothing left of it knows that a chapter
exists: if a figure is wrong, the fault is left of the record or right of it, never both.
"""

__version__ = "0.1.0"
