"""Plans at work: which runs are missing, in which process and on which GPUs each executes, and how far it is.

`plans` executes a plan, and `stage` one notebook of it; `gpus` hands out devices, and `workspace` says where inputs and
results lie. A run tells how far it is through `progress`, which `status` shows in a terminal and `live` in a notebook.
Nothing here imports the trainer: runs are processes of their own.
"""
