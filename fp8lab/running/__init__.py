"""Plans at work: which runs are missing, in which process and on which GPUs each executes, and how far it is.

`plans` executes a plan, and `stage` one notebook of it; `gpus` hands out devices, and `workspace` says where inputs and
results lie. What a run tells of its progress, `status` shows in a terminal and `live` in its notebook. Nothing here
imports the trainer, nor the trainer anything of this: runs are processes of their own.
"""
