"""The keys that are accepted and change nothing here, by the reason.

Each with its type and the default that DeepSpeed 0.19.8 has for it: those of its page
(https://www.deepspeed.ai/docs/config-json/) and what its code takes beyond that.
"""

from typing import Any

from minispeed.config.check import (
    AMOUNT,
    BOOLEAN,
    COUNT,
    FRACTION,
    ONE_OR_MORE,
    TEXT,
    WORDS,
    Type,
    choice,
    maybe,
    whole,
)

Keys = dict[str, tuple[Type, Any]]
ZERO = "zero_optimization."
ANY = whole(None)

NO_EFFECT_WHY: dict[str, Keys] = {
    "gradients always lie in one buffer": {f"{ZERO}contiguous_gradients": (BOOLEAN, True)},
    "from stage 1 on gradients are always reduced and scattered": {
        f"{ZERO}reduce_scatter": (BOOLEAN, True),
        f"{ZERO}use_multi_rank_bucket_allreduce": (BOOLEAN, True),
    },
    "parameters are gathered unit by unit, each in one message": {
        f"{ZERO}allgather_partitions": (BOOLEAN, True),
        f"{ZERO}allgather_bucket_size": (COUNT, 500_000_000),
        f"{ZERO}stage3_module_granularity_threshold": (ANY, 0),
        f"{ZERO}stage3_use_all_reduce_for_fetch_params": (BOOLEAN, False),
        f"{ZERO}stage3_allgather_sequential": (BOOLEAN, False),
        f"{ZERO}leaf_module.classes": (WORDS, []),
        f"{ZERO}leaf_module.names": (WORDS, []),
        f"{ZERO}leaf_module.name_suffixes": (WORDS, []),
        "disable_allgather": (BOOLEAN, False),
    },
    "a unit is released as soon as it has run": {
        f"{ZERO}stage3_max_live_parameters": (COUNT, 1_000_000_000),
        f"{ZERO}stage3_max_reuse_distance": (COUNT, 1_000_000_000),
    },
    "only stage3_param_persistence_threshold says what stays whole": {
        f"{ZERO}stage3_model_persistence_threshold": (COUNT, 2**63 - 1),
    },
    "the optimizer steps unit by unit": {f"{ZERO}sub_group_size": (COUNT, 1_000_000_000)},
    "a parameter without a gradient counts as zeros": {f"{ZERO}ignore_unused_parameters": (BOOLEAN, True)},
    "the norm is always computed": {f"{ZERO}compute_grad_norm": (BOOLEAN, True)},
    "every rank copies its own shard, whole": {f"{ZERO}round_robin_gradients": (BOOLEAN, False)},
    "parameters lie in the buffer without gaps": {f"{ZERO}parameter_alignment": (BOOLEAN, False)},
    "a checkpoint holds the masters, and goes on with any number of ranks": {
        f"{ZERO}elastic_checkpoint": (BOOLEAN, False),
        f"{ZERO}load_from_fp32_weights": (BOOLEAN, True),
        f"{ZERO}pipeline_loading_checkpoint": (BOOLEAN, False),
        "checkpoint.load_universal": (BOOLEAN, False),
    },
    "each rank writes its own file of a checkpoint": {
        "checkpoint.parallel_write.pipeline_stage": (BOOLEAN, False),
        "checkpoint.checkpoint_serialization": (BOOLEAN, True),
        "checkpoint.writer.type": (choice("mock", "python", "fast"), "fast"),
        "checkpoint.writer.io_buffer_size": (COUNT, 67_108_864),
        "checkpoint.writer.io_buffer_double": (BOOLEAN, True),
        "checkpoint.writer.io_multiplier": (ONE_OR_MORE, 1),
        "checkpoint.writer.show_statistics": (BOOLEAN, False),
        "checkpoint.writer.data_parallel": (maybe(choice("replica", "socket", "machine")), None),
        "checkpoint.writer.decoupled": (BOOLEAN, False),
    },
    "it chooses between ways of DeepSpeed's own code": {
        f"{ZERO}memory_efficient_linear": (BOOLEAN, True),
        f"{ZERO}override_module_apply": (BOOLEAN, True),
        f"{ZERO}log_trace_cache_warnings": (BOOLEAN, False),
        f"{ZERO}enable_sanity_checks": (BOOLEAN, False),
        "optimizer.legacy_fusion": (BOOLEAN, False),
    },
    "what is offloaded lies in ordinary memory": {
        f"{ZERO}offload_optimizer.pin_memory": (BOOLEAN, True),
        f"{ZERO}offload_param.pin_memory": (BOOLEAN, True),
        f"{ZERO}cpu_offload_use_pin_memory": (BOOLEAN, False),
    },
    "nothing is offloaded to NVMe": {
        f"{ZERO}offload_param.nvme_path": (maybe(TEXT), None),
        f"{ZERO}offload_param.buffer_count": (COUNT, 5),
        f"{ZERO}offload_param.buffer_size": (COUNT, 100_000_000),
        f"{ZERO}offload_param.max_in_cpu": (COUNT, 1_000_000_000),
        f"{ZERO}offload_optimizer.nvme_path": (maybe(TEXT), None),
        f"{ZERO}offload_optimizer.buffer_count": (COUNT, 4),
        f"{ZERO}offload_optimizer.pipeline_read": (BOOLEAN, False),
        f"{ZERO}offload_optimizer.pipeline_write": (BOOLEAN, False),
        f"{ZERO}offload_optimizer.fast_init": (BOOLEAN, False),
        f"{ZERO}save_muon_momentum_buffer_in_memory": (BOOLEAN, False),
        "aio.block_size": (ONE_OR_MORE, 1_048_576),
        "aio.queue_depth": (ONE_OR_MORE, 8),
        "aio.thread_count": (ONE_OR_MORE, 1),
        "aio.intra_op_parallelism": (ONE_OR_MORE, 1),
        "aio.single_submit": (BOOLEAN, False),
        "aio.overlap_events": (BOOLEAN, True),
        "aio.use_gds": (BOOLEAN, False),
    },
    "it goes with offload_optimizer.super_offload, which is refused": {
        f"{ZERO}offload_optimizer.cpuadam_cores_perc": (FRACTION, 0.8),
    },
    "any optimizer that looks at elements one by one may step on the CPU": {
        "zero_force_ds_cpu_optimizer": (BOOLEAN, True)
    },
    "micro-batches' gradients are always added as they come": {"bf16.immediate_grad_update": (BOOLEAN, False)},
    "a step whose gradients are not all finite is always skipped": {"bf16.check_grad_overflow": (BOOLEAN, True)},
    "what is recomputed keeps its inputs whole, and where they are": {
        "activation_checkpointing.cpu_checkpointing": (BOOLEAN, False),
        "activation_checkpointing.partition_activations": (BOOLEAN, False),
        "activation_checkpointing.contiguous_memory_optimization": (BOOLEAN, False),
        "activation_checkpointing.number_checkpoints": (maybe(COUNT), None),
    },
    "recomputation is not timed by itself": {
        "activation_checkpointing.synchronize_checkpoint_boundary": (BOOLEAN, False),
        "activation_checkpointing.profile": (BOOLEAN, False),
    },
    "FLOPs are not counted": {
        "flops_profiler.enabled": (BOOLEAN, False),
        "flops_profiler.profile_step": (COUNT, 1),
        "flops_profiler.module_depth": (ANY, -1),
        "flops_profiler.top_modules": (COUNT, 1),
        "flops_profiler.detailed": (BOOLEAN, True),
        "flops_profiler.output_file": (maybe(TEXT), None),
        "flops_profiler.recompute_fwd_factor": (AMOUNT, 0.0),
    },
    "messages are recorded by minispeed.collective.trace.Traced": {
        "comms_logger.enabled": (BOOLEAN, False),
        "comms_logger.verbose": (BOOLEAN, False),
        "comms_logger.prof_all": (BOOLEAN, True),
        "comms_logger.debug": (BOOLEAN, False),
        "comms_logger.prof_ops": (WORDS, []),
    },
    "wall_clock_breakdown alone says what is timed": {
        "timers.throughput.enabled": (BOOLEAN, True),
        "timers.throughput.synchronized": (BOOLEAN, True),
    },
    "nothing is sent along a sequence axis": {"seq_parallel_communication_data_type": (maybe(TEXT), "fp32")},
    "how a model is cut is found from the names of its modules": {"tensor_parallel.preset_model": (maybe(TEXT), None)},
    "what a layer's ranks have is summed before the next layer begins": {
        "tensor_parallel.tp_overlap_comm": (BOOLEAN, False)
    },
    "the head is whole, and so is its loss": {
        "tensor_parallel.vocab_parallel_ce_backend": (choice("torch", "liger"), "torch"),
    },
    "fp16 and bf16 say the compute dtype": {"tensor_parallel.dtype": (maybe(TEXT), None)},
    "a model is cut on the device that it is moved to": {"tensor_parallel.keep_module_on_host": (BOOLEAN, False)},
    "every rank has as many heads and features": {
        "tensor_parallel.tp.tp_grain_size": (ONE_OR_MORE, 1),
        "tensor_parallel.tensor_parallel.tp_grain_size": (ONE_OR_MORE, 1),
    },
    "PipelineModule says it": {
        "pipeline.partition": (TEXT, "best"),
        "pipeline.seed_layers": (BOOLEAN, False),
    },
    "what goes from stage to stage goes whole": {
        "pipeline.pipe_partitioned": (BOOLEAN, True),
        "pipeline.grad_partitioned": (BOOLEAN, True),
    },
    "recomputation is never re-entrant": {"pipeline.use_reentrant": (BOOLEAN, True)},
    "Python's collector of garbage is left alone": {"disable_python_gc": (BOOLEAN, False)},
    "DeepSpeed only warns of sizes that 8 does not divide": {"vocabulary_size": (maybe(COUNT), None)},
    "there is no log, only what rank 0 prints": {"log_level": (maybe(TEXT), None)},
}
