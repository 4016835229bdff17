"""The keys that are refused, by the reason and by what to write instead.

Each with the value that asks for what is so anyway. A block that is refused whole is one key. What DeepSpeed has
removed is still named, for configurations are older than it.
"""

from collections.abc import Mapping
from typing import Any

from minispeed.config.no_effect import ZERO

GONE = "DeepSpeed has removed it, and it is not here either"
EXPERTS = "there are no experts here"
HALF_MASTERS = "masters and moments are fp32 here"
ZEROPP = "the quantised and hierarchical messages of ZeRO++ are not here"
BF16, OFFLOAD = '"bf16": {"enabled": true}', f'"{ZERO[:-1]}": {{"offload_optimizer": {{"device": "cpu"}}}}'

REFUSED_WHY: dict[tuple[str, str], Mapping[str, Any]] = {  # (reason, what to write instead): key, harmless value
    (GONE, ""): {
        "compression_training": None,
        "curriculum_learning": None,
        "eigenvalue": None,
        "elasticity": None,
        "graph_harvesting": False,
        "nebula": None,
        "progressive_layer_drop": None,
        "quantize_training": None,
        "sparse_attention": None,
        "sparse_gradients": False,
        f"{ZERO}legacy_stage1": False,
        f"{ZERO}mics_shard_size": -1,
        f"{ZERO}mics_hierarchical_params_gather": False,
        f"{ZERO}zeropp_loco_param": None,
    },
    ("apex's mixed precision is not here", BF16): {"amp": None},
    ("torch.autocast keeps parameters in fp32; here they are in the compute dtype", BF16): {"torch_autocast": None},
    (HALF_MASTERS, "leaving it out, with offload_optimizer for memory"): {
        "fp16.fp16_master_weights_and_grads": False,
        "bf16.bf16_master_weights_and_grads": False,
        "bf16.bf16_optimizer_states": False,
    },
    ("the compute dtype is the parameters' and the buffers'", BF16): {
        "data_types.param_dtype": None,
        "data_types.buffer_dtype": None,
        "data_types.keep_in_fp32_modules": None,
    },
    ("gradients are averaged over ranks", '"gradient_allreduce_op": "mean"'): {"gradient_allreduce_op": "mean"},
    ("the engine counts the micro-batches of a step", '"managed_gradient_accumulation": true'): {
        "managed_gradient_accumulation": True
    },
    (ZEROPP, ""): {
        f"{ZERO}zero_hpz_partition_size": 1,
        f"{ZERO}zero_quantized_weights": False,
        f"{ZERO}zero_quantized_nontrainable_weights": False,
        f"{ZERO}zero_quantized_gradients": False,
    },
    ("optimizer states are offloaded whole, and step after the backward", OFFLOAD): {
        f"{ZERO}zenflow": None,
        f"{ZERO}offload_optimizer.ratio": 1.0,
        f"{ZERO}offload_optimizer.super_offload": False,
    },
    ("layers are cut by the names of their modules, with no rules beside", ""): {
        "tensor_parallel.partition_config": None,
        "tensor_parallel.injection_policy_tuple": None,
    },
    ("the vocabulary is whole on every rank", ""): {"tensor_parallel.vocab_parallel_lm_head": None},
    ("there are no kernels to put in", ""): {
        "tensor_parallel.replace_with_kernel_inject": False,
        "tensor_parallel.kernel_inject": False,
    },
    ("groups are no JSON", "initialize(mpu=...)"): {
        f"tensor_parallel.{block}.{name}": None for block in ("tp", "tensor_parallel") for name in ("mpu", "tp_group")
    },
    ("sequence parallelism takes no configuration yet", '"sequence_parallel_size": 1'): {"sequence_parallel_size": 1},
    ("PipelineModule says how many stages there are", "PipelineModule(num_stages=...)"): {"pipeline.stages": "auto"},
    (EXPERTS, ""): {"expert_parallel": None, "use_data_before_expert_parallelism": False},
    ("nothing is generated while training, and nothing is quantised", ""): {
        "hybrid_engine": None,
        "weight_quantization": None,
    },
    ("DeepSpeed's compiler passes are not here", ""): {"compile": None},
    ("no sizes are searched for", "sizes of your own"): {"autotuning": None},
    ("rows are drawn by the caller's data loader", ""): {"data_efficiency": None},
    ("all ranks write a checkpoint to one file system, and wait for it", ""): {
        "checkpoint.use_node_local_storage": False,
        "datastates_ckpt": None,
    },
    ("nothing here sends figures to a service", '"csv_monitor": {"enabled": true}'): {"wandb": None, "comet": None},
}
