"""What the trainer costs beyond the step itself, and what a killed run loses, measured where it runs.

    python -m fp8lab.benchmark overhead runs/plans/ladder-h200.yaml 7M-fused-s1
    python -m fp8lab.benchmark checkpoint runs/plans/article.yaml 125M-bf16-s1 --mixture local
    python -m fp8lab.benchmark resume runs/plans/ladder-h200.yaml 7M-fused-s1

Each writes a benchmark record, ``runs/records/benchmarks/trainer-<what>-<model>-<recipe>/``, with every
round's figure. The run measured is the plan's, cut short, with one micro-batch a step: a step of many would
hide the trainer's own time. It is driven by the trainer's own loop, which hands over between steps
(`fp8lab.benchmark.paced`) so that whatever it is compared with takes its turns in the same process, on the same GPU at
the same clock.
"""
