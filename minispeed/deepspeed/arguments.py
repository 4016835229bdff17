"""The command-line flags that DeepSpeed adds to a script's own parser.

`--local_rank`, which launchers pass, gives way to one that the script declares itself, before or after.

https://deepspeed.readthedocs.io/en/latest/initialize.html#argument-parsing
"""

from argparse import ArgumentParser

TUNING: dict[str, float | int | str | bool | None] = {  # flag -> default; False: given or not
    "lr_schedule": None,
    "lr_range_test_min_lr": 0.001,
    "lr_range_test_step_rate": 1.0,
    "lr_range_test_step_size": 1000,
    "lr_range_test_staircase": False,
    "cycle_first_step_size": 1000,
    "cycle_first_stair_count": -1,
    "cycle_second_step_size": -1,
    "cycle_second_stair_count": -1,
    "decay_step_size": 1000,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "decay_lr_rate": 0.0,
    "cycle_momentum": False,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9,
    "decay_mom_rate": 0.0,
    "warmup_min_lr": 0.0,
    "warmup_max_lr": 0.001,
    "warmup_num_steps": 1000,
    "warmup_type": "log",
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
}


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add `--deepspeed`, `--deepspeed_config FILE`, both by an older name, and `--local_rank`; return the parser."""
    group = parser.add_argument_group("DeepSpeed", "what minispeed.initialize(args, ...) reads")
    for name, age in (("deepspeed", ""), ("deepscale", ", by its older name")):
        group.add_argument(f"--{name}", action="store_true", help=f"for the script's own use{age}")
        group.add_argument(f"--{name}_config", metavar="FILE", help=f"DeepSpeed's configuration, JSON{age}")
    if "--local_rank" not in parser._option_string_actions:
        parser._optionals.conflict_handler = "resolve"  # the script's own takes its place
        group.add_argument("--local_rank", type=int, default=-1, help="this rank's number on its machine")
    return parser


def add_tuning_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add a flag for each setting of the learning-rate schedules, for the script's own use; return the parser."""
    group = parser.add_argument_group("Convergence tuning", "settings of learning-rate schedules")
    for name, default in TUNING.items():
        if default is False:
            group.add_argument(f"--{name}", action="store_true", help="switch it on")
        else:
            kind = str if default is None else type(default)
            group.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    return parser
