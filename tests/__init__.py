"""The tests. Where there is no GPU, Triton interprets the kernels.

Triton's own functions are decorated when it is imported, which much of torch does; so this is said first of all.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
