"""DeepSpeed's `deepspeed.utils.zero_to_fp32`; also a script: python -m minispeed.utils.zero_to_fp32 DIR OUT."""

import sys

from minispeed.deepspeed.fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    convert_zero_checkpoint_to_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
    main,
)

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]

if __name__ == "__main__":
    sys.exit(main())
