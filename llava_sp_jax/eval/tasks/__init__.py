"""One benchmark a file; TASKS names them."""

from __future__ import annotations

from llava_sp_jax.eval.tasks.easy_vqa import EasyVqa

# name -> class, called with the folder of the data and options (protocol, split, judge, ...).
TASKS: dict[str, type] = {task.name: task for task in (EasyVqa,)}
