"""DeepSpeed's configuration, read: a dict or a JSON file becomes one frozen, typed `Config`, or one sentence.

    check       what a value must be; the sentence about one that is not
    key         a key of the table: its type, its default, and whether it is honoured, without effect, or refused
    schema      the honoured keys, each declared once as a field of the `Config`
    no_effect   the keys that change nothing here, with the reason of each
    refused     the keys that are refused, with the reason of each
    table       all of them by their dotted names
    optimizers  what optimizers and schedules may be given
    flat        the flat dialect: train_lr, train_fp16, ...
    load        dict, file and flat names -> each given value under its one name
    read        given values -> Config
    page        docs/config.md

No torch is imported: dtypes are names, "fp32", "bf16", "fp16", "fp64". The keys and what they mean are DeepSpeed
0.19.8's, https://www.deepspeed.ai/docs/config-json/
"""

from minispeed.config.check import DeepSpeedConfigError
from minispeed.config.key import values_of
from minispeed.config.read import read_config
from minispeed.config.schema import Config

__all__ = ["Config", "DeepSpeedConfigError", "read_config", "values_of"]
