"""What users of other tools call a setting, and what they look for that is not here yet."""

# Other tools' names -> the setting here; with a space in it, a sentence that says what to do.
ELSEWHERE = {
    # model
    "model_name_or_path": "model.path", "base_model": "model.path", "model_id": "model.path", "model_name": "model.path",
    "tokenizer_name": "model.tokenizer", "tokenizer_name_or_path": "model.tokenizer", "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention", "flash_attention": "model.attention", "use_flash_attention_2": "model.attention",
    "flash_attn": "model.attention", "special_tokens": "model.new_tokens", "additional_special_tokens": "model.new_tokens",
    # adapters
    "use_peft": "adapter.kind", "use_lora": "adapter.kind", "peft": "adapter.kind", "peft_type": "adapter.kind", "lora": "adapter.kind",
    "finetuning_type": "adapter.kind", "load_in_4bit": "adapter.kind", "load_in_8bit": "adapter.kind", "qlora": "adapter.kind",
    "quantization_bit": "adapter.quantization", "bnb_4bit_quant_type": "adapter.quantization",
    "bnb_4bit_use_double_quant": "adapter.double_quantization", "bnb_4bit_compute_dtype": "adapter.compute_dtype",
    "lora_r": "adapter.r", "lora_rank": "adapter.r", "rank": "adapter.r", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules", "lora_target": "adapter.target_modules", "target_module": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules", "lora_modules_to_save": "adapter.modules_to_save", "use_rslora": "adapter.rslora",
    "use_dora": "adapter.dora", "init_lora_weights": "adapter.init", "lora_bias": "adapter.bias",
    "lora_model_dir": "adapter.path",
    "adapter_name_or_path": "adapter.path", "unfrozen_parameters": "adapter.freeze", "loraplus_lr_ratio": "optimizer.lora_plus_ratio",
    # data
    "dataset": "data.train", "datasets": "data.train", "dataset_name": "data.train", "data_path": "data.train", "train_file": "data.train",
    "train_data": "data.train", "training_data": "data.train", "data_files": "data.train", "train_dataset": "data.train",
    "validation_file": "data.eval", "eval_dataset": "data.eval", "test_datasets": "data.eval", "eval_data": "data.eval",
    "eval_split": "data.eval_fraction", "val_set_size": "data.eval_fraction", "val_size": "data.eval_fraction", "val_split": "data.eval_fraction", "test_size": "data.eval_fraction",
    "validation_split_percentage": "data.eval_fraction", "max_samples": "data.max_rows", "max_train_samples": "data.max_rows",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "sequence_len": "data.max_length", "seq_length": "data.max_length",
    "cutoff_len": "data.max_length", "model_max_length": "data.max_length", "block_size": "data.max_length", "context_length": "data.max_length",
    "sample_packing": "data.packing", "pack": "data.packing", "system": "data.system_prompt", "system_message": "data.system_prompt",
    "default_system": "data.system_prompt", "chat_template": "data.template", "prompt_template": "data.template", "prompt_style": "data.template",
    "train_on_inputs": "data.loss_on", "train_on_prompt": "data.loss_on", "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on", "mask_prompt": "data.loss_on", "dataset_text_field": "data.columns", "field_mapping": "data.columns",
    "truncation_side": "data.truncation", "group_by_len": "data.group_by_length", "dataset_prepared_path": "data.cache_dir",
    # objective, optimizer, schedule
    "stage": "objective.kind", "task": "objective.kind", "label_smoothing_factor": "objective.label_smoothing",
    "learning_rate": "optimizer.lr", "optim": "optimizer.kind", "adam_beta1": "optimizer.betas", "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps", "embedding_learning_rate": "optimizer.embedding_lr",
    "lr_scheduler_type": "schedule.kind", "lr_scheduler": "schedule.kind", "scheduler": "schedule.kind",
    "warmup_ratio": "schedule.warmup_steps", "warmup": "schedule.warmup_steps", "num_warmup_steps": "schedule.warmup_steps",
    "lr_min_ratio": "schedule.min_lr_fraction", "min_lr": "schedule.min_lr_fraction", "min_lr_rate": "schedule.min_lr_fraction",
    # train
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "n_epochs": "train.epochs", "num_steps": "train.max_steps",
    "iters": "train.max_steps", "max_iters": "train.max_steps", "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size", "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluation.micro_batch_size", "eval_batch_size": "evaluation.micro_batch_size",
    "gradient_accumulation_steps": "set train.global_batch_size, the sequences of a step; what exceeds train.micro_batch_size is accumulated",
    "auto_find_batch_size": "train.micro_batch_size",
    "bf16": "train.precision", "fp16": "train.precision", "tf32": "train.precision", "mixed_precision": "train.precision",
    "use_bf16": "train.precision", "use_fp16": "train.precision", "activation_checkpointing": "train.gradient_checkpointing",
    "grad_checkpoint": "train.gradient_checkpointing", "torch_compile": "train.compile", "gradient_clipping": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm", "clip_grad_norm": "train.max_grad_norm", "neftune_noise_alpha": "train.neftune_alpha",
    # run, checkpoint, evaluation, tracking
    "output_dir": "run.dir", "output": "run.dir", "save_dir": "run.dir", "run_name": "run.name", "data_seed": "run.seed",
    "save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep_last", "resume_from_checkpoint": "checkpoint.resume",
    "auto_resume_from_checkpoints": "checkpoint.resume", "eval_steps": "evaluation.every_steps",
    "early_stopping_patience": "evaluation.patience", "load_best_model_at_end": "evaluation.export_best",
    "logging_steps": "tracking.log_every_steps", "report_to": "tracking.trackers", "use_wandb": "tracking.trackers",
    "wandb_project": "tracking.project", "project_name": "tracking.project",
    "eval_strategy": "evaluation.every_steps", "evaluation_strategy": "evaluation.every_steps", "save_strategy": "checkpoint.every_steps",
    # not settings of the run config
    "deepspeed": "the topology file decides: accelerate launch --config_file accelerate_configs/zero3.yaml train.py ...",
    "fsdp": "the topology file decides: accelerate launch --config_file accelerate_configs/fsdp2.yaml train.py ...",
    "fsdp_config": "the topology file decides: accelerate launch --config_file accelerate_configs/fsdp2.yaml train.py ...",
    "num_processes": "the launcher decides: accelerate launch --num_processes N train.py ...",
    "num_gpus": "the launcher decides: accelerate launch --num_processes N train.py ...",
    "device": "the topology file and the GPUs there are decide; on a Mac it is the CPU, as Apple GPUs (mps) are not yet used",
    "device_map": "the topology file and the GPUs there are decide; see accelerate_configs/",
    "use_mps_device": "Apple GPUs (mps) are not yet used; on a Mac a run is on the CPU",
    "use_cpu": "without a GPU the CPU is taken; to hide GPUs set CUDA_VISIBLE_DEVICES= in the environment",
    "no_cuda": "without a GPU the CPU is taken; to hide GPUs set CUDA_VISIBLE_DEVICES= in the environment",
    "push_to_hub": "the model stays here; upload runs/<name>/model yourself: hf upload OWNER/NAME runs/<name>/model",
    "hub_model_id": "the model stays here; upload runs/<name>/model yourself: hf upload OWNER/NAME runs/<name>/model",
    "gpu": "CUDA_VISIBLE_DEVICES in the environment chooses GPUs; accelerate launch --num_processes N takes several",
    "dataloader_num_workers": "nothing to set: rows are tokenised once, before the first step, and read from a cache",
    "preprocessing_num_workers": "nothing to set: rows are tokenised once, before the first step, and read from a cache",
    "overwrite_cache": "nothing to set: a change of the rows, the tokenizer or the template makes a new cache",
    "remove_unused_columns": "nothing to set: the summary names the columns that are not read",
    "streaming": "not yet supported; rows are tokenised into a cache before the first step",
    "logging_dir": "logs are in the run directory, run.dir/run.name",
    "hub_token": "set HF_TOKEN in the environment, or call `hf auth login` once",
    "do_train": "a run always trains, and evaluates where there are evaluation rows",
    "do_eval": "a run always trains, and evaluates where there are evaluation rows",
    "overwrite_output_dir": "a run never overwrites another; choose another run.name, or remove the directory",
    "reward_model": "reward models are not yet supported; objective.kind is clm or sft",
    "beta": "preference tuning (DPO, KTO) is not yet supported; objective.kind is clm or sft",
    "ref_model": "preference tuning (DPO, KTO) is not yet supported; objective.kind is clm or sft",
    "rl": "preference tuning and reinforcement learning are not yet supported; objective.kind is clm or sft",
}  # fmt: skip

# Settings that the last version had: the default that its config.yaml holds, which asks for
# nothing, and what to use instead.
REMOVED: dict[str, tuple[object, str]] = {
    "run.replay_of": (None, "finetune replay RUN repeats a run and compares the two"),
    "adapter.layers": (
        None,
        r"name the layers in adapter.target_modules, as '.*\.layers\.(30|31)\..*_proj'",
    ),
    "adapter.rank_pattern": (
        {},
        "adapter.r is the rank of all modules; name those to adapt in adapter.target_modules",
    ),
    "adapter.alpha_pattern": (
        {},
        "adapter.alpha is that of all modules; name those to adapt in adapter.target_modules",
    ),
}

_PREFERENCE = "preference tuning ({}) is not yet supported; use sft on the preferred answers alone"
_REWARD = "reward models are not yet supported; train the reward model elsewhere"
_REINFORCE = "reinforcement learning ({}) is not yet supported; sample answers, keep the good ones, and use sft on them"
# Values that a setting does not take yet.
NOT_YET = {
    "objective.kind": {
        **dict.fromkeys(("dpo", "kto", "orpo", "simpo", "ipo", "cpo", "bco", "preference", "rlhf"), _PREFERENCE),
        **dict.fromkeys(("reward", "rm", "reward_model", "reward_modeling", "prm"), _REWARD),
        **dict.fromkeys(("ppo", "grpo", "rloo", "reinforce", "rl", "gspo", "dapo", "policy_gradient"), _REINFORCE),
        **dict.fromkeys(("distill", "distillation", "gkd", "kd"), "distillation is not yet supported; use sft on the teacher's answers"),
        **dict.fromkeys(("mlm", "masked"), "masked language models are not yet supported; use clm with a model that continues text"),
        **dict.fromkeys(("seq2seq", "classification"), "{} is not yet supported; write it as questions and answers, and use sft"),
        **dict.fromkeys(("pt", "pretrain", "pretraining", "causal"), "continued pre-training is called clm here"),
    },
    "tracking.trackers": {
        "mlflow": "MLflow is not yet supported; take tensorboard, or log metrics.jsonl and eval.jsonl of the run directory to it: "
        "mlflow.log_metrics(line, step=line['step'])",
        **dict.fromkeys(("comet_ml", "clearml", "neptune", "aim", "dvclive", "swanlab"), "{} is not yet supported; take wandb, "
        "tensorboard or trackio, or send it the lines of metrics.jsonl and eval.jsonl of the run "
        "directory"),
        "none": "write [] for none", "all": "name those that you want: wandb, tensorboard, trackio",
    },
    "adapter.kind": {
        "none": "write full: all weights train", "dora": "DoRA is kind: lora with adapter.dora: true",
        **dict.fromkeys(("freeze", "bitfit"), "{} is kind: full with adapter.freeze, which names what does not train"),
        **dict.fromkeys(("prefix_tuning", "prompt_tuning", "p_tuning", "ia3", "adalora", "loha", "lokr", "vera", "oft", "boft"),
        "{} is not supported; use lora"),
    },
    "train.precision": {
        "mps": "Apple GPUs (mps) are not yet used; on a Mac a run is on the CPU", "float16": "write fp16", "bfloat16": "write bf16",
        "float32": "write fp32", "no": "write fp32", "fp8": "fp8 is not yet supported; use bf16",
        "int8": "weights in 8 bits are adapter.kind: qlora with adapter.quantization: int8",
    },
    "model.dtype": {
        "float16": "weights in float16 are not supported; use bfloat16, or train.precision: fp16", "fp16": "weights in float16 are not supported; use bfloat16, or train.precision: fp16",
        "fp32": "write float32", "bf16": "write bfloat16",
    },
}  # fmt: skip


def not_yet(key: str, value: object) -> str | None:
    """What to do for a value that is not yet supported; None for others."""
    text = NOT_YET.get(key, {}).get(value.lower()) if isinstance(value, str) else None
    return text and text.format(value)
