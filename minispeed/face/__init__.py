"""DeepSpeed's dotted names, as modules of names only: what each name does stands in `minispeed/deepspeed/`.

`minispeed` counts this folder to its own path, so that `deepspeed.ops.adam` is found as `minispeed.ops.adam`. A room
of `minispeed/` that has the name of one of DeepSpeed's modules comes first: `zero`, which passes DeepSpeed's names on,
and `optim`, which DeepSpeed does not have.
"""
