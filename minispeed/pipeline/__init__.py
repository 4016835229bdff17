"""Pipeline parallelism: each rank holds some stages of the model, and micro-batches pass through them one by one."""
