"""Training: a validated configuration in, a run record and trained weights out.

`trainer` is the loop, and `series` the same for many small runs in one process; `session` is a run on its device, and
advances it by one optimizer step. What they lean on has a module each:

- the device and what compiles for it: `device`, `compilation`;
- several GPUs: `distributed`; `launch` starts a run's processes, and `failures` tells whose error ended them;
- a step that must not be taken: `guard`, and a run that takes none any more: `divergence`;
- what is measured on the way: `metrics`, `validation`, `health`, and `averaging` of the weights;
- what outlives the process: `checkpoint`, `recorder`, `events`; and `signals`, which ask it to end.

`fp8lab.speed` and `fp8lab.benchmark` time what is here; nothing that reads records imports it.
"""
