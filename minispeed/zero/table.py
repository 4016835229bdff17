"""When each verb is called: the whole difference between the stages of ZeRO.

Stage 0 keeps everything everywhere. Stage 1 cuts the optimizer states: a rank updates its shard, gathers the others'.
Stage 2 cuts the gradients too: summed as soon as a unit has them, only my shard stays. Stage 3 cuts the parameters too:
a unit exists only while it runs.

ZeRO, Rajbhandari et al. 2020, section 5 (stages 1 to 3 are its P_os, P_os+g, P_os+g+p).
https://arxiv.org/abs/1910.02054
"""

from minispeed.errors import UserError

STAGES = (0, 1, 2, 3)

TABLE: dict[str, tuple[str, str, str, str]] = {
    # moment               0          1          2          3
    "before forward": ("", "", "", "unshard"),
    "after forward": ("", "", "", "reshard"),
    "before backward": ("", "", "", "unshard"),
    "gradients complete": ("", "", "reduce", "reduce"),
    "after backward": ("", "", "", "reshard"),
    "last gradients complete": ("reduce", "", "reduce", "reduce"),
    "last backward over": ("", "reduce", "", ""),
    "after step": ("", "unshard", "unshard", ""),
}


def check_stage(stage: int) -> int:
    """Return the stage.  Raises UserError if there is no such one"""
    if stage not in STAGES:
        raise UserError(f"there is no ZeRO stage {stage}", fix="0, 1, 2 or 3")
    return stage
