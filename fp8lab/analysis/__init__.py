"""From records to numbers: what a set of runs can tell, and what it cannot.

- Records of one kind, ready to be asked: training `runs` in sets that may be compared, the `occasions` on which speed
  was measured, the `composition` of the text, and what `operation` costs and survives (benchmarks, faults).
- The arithmetic, of plain numbers: `comparison` of groups of seeds, `rounds` of speeds that alternate, `straightness`
  of a line, `matched` loss, the `laws` of scaling and their fits (`scaling`), and the `roofline`.
- The same applied to records: `losses`, the `starts` of larger models, the `selection` of runs that follow a law, their
  `slopes`, `timings`, `scores`, the `variance` study, `numerics` of our recipe, signs of `trouble`, and the `diagnosis`
  of FP8 health.
- `decision` asks what follows of it for who wonders whether to switch FP8 on.

`fp8lab.tables` and `fp8lab.figures` show what comes out. Nothing here imports what trains or times.
"""
