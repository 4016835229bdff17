"""What our options are called elsewhere: a name learnt from another tool is answered with ours.

The names are those of transformers' TrainingArguments, TRL's SFTConfig, DeepSpeed's JSON and DeepSpeed-Chat's
scripts, nanoGPT's train.py and litgpt's `finetune`. A line counts only for the commands that have its option.
"""

FOREIGN = {  # ours, with the value to give it where that is not the same: theirs
    "model": "model_name_or_path model_name pretrained_model_name_or_path checkpoint_dir init_from model_id",
    "data": "data_path dataset dataset_name train_file train_data dataset_path training_data",
    "eval_data": "eval_file validation_file valid_data test_file eval_dataset",
    "out": "output_dir out_dir save_dir output_path",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "seq": "max_seq_len max_seq_length max_length block_size model_max_length context_length seq_len n_ctx",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs train_epochs",
    "steps": "max_steps max_iters num_train_steps total_steps num_steps train_steps",
    "batch": "train_batch_size global_batch_size total_batch_size batch_size",
    "micro_batch": "per_device_train_batch_size train_micro_batch_size_per_gpu micro_batch_size device_batch_size",
    "micro_batch batch/(ranks*accumulation)": "gradient_accumulation_steps grad_accum_steps",
    "lr": "learning_rate max_lr peak_lr",
    "lr_schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup": "warmup_steps num_warmup_steps warmup_iters lr_warmup_steps warmup_num_steps",
    "warmup ratio*steps": "warmup_ratio warmup_proportion",
    "clip": "max_grad_norm gradient_clipping grad_clip clip_grad gradient_clip_val",
    "dtype": "precision torch_dtype mixed_precision",
    "dtype bf16": "bf16",
    "attention": "attn_implementation attention_type",
    "ranks": "nproc_per_node num_processes num_gpus world_size",
    "eval_every": "eval_steps eval_interval",
    "save_every": "save_steps save_interval checkpoint_interval",
    "resume": "resume_from_checkpoint resume_from",
    "max_new": "max_new_tokens max_tokens max_gen_len max_answer_seq_len",
    "workers": "dataloader_num_workers num_workers preprocessing_num_workers dataset_num_proc",
    "seed": "data_seed random_seed manual_seed",
}
