"""What other tools call a setting, settings that were removed, and values not yet supported."""


def _by_name(names: dict[str, str]) -> dict[str, str]:
    """{"text": "a b"} -> {"a": "text", "b": "text"}"""
    return {name: text for text, listed in names.items() for name in listed.split()}


# Setting here -> what other tools call it.
_CALLED = {
    "model.path": "model_name_or_path base_model model_id model_name",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "model.dtype": "torch_dtype",
    "model.attention": "attn_implementation flash_attention use_flash_attention_2 flash_attn",
    "model.new_tokens": "special_tokens additional_special_tokens",
    "adapter.kind": (
        "use_peft use_lora peft peft_type lora finetuning_type load_in_4bit load_in_8bit qlora"
    ),
    "adapter.quantization": "quantization_bit bnb_4bit_quant_type",
    "adapter.double_quantization": "bnb_4bit_use_double_quant",
    "adapter.compute_dtype": "bnb_4bit_compute_dtype",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "lora_target_modules lora_target target_module lora_target_linear",
    "adapter.modules_to_save": "lora_modules_to_save",
    "adapter.rslora": "use_rslora",
    "adapter.dora": "use_dora",
    "adapter.init": "init_lora_weights",
    "adapter.bias": "lora_bias",
    "adapter.path": "lora_model_dir adapter_name_or_path",
    "adapter.freeze": "unfrozen_parameters",
    "data.train": (
        "dataset datasets dataset_name data_path train_file train_data training_data data_files "
        "train_dataset"
    ),
    "data.eval": "validation_file eval_dataset test_datasets eval_data",
    "data.eval_fraction": (
        "eval_split val_set_size val_size val_split test_size validation_split_percentage"
    ),
    "data.max_rows": "max_samples max_train_samples",
    "data.max_length": (
        "max_seq_length max_seq_len sequence_len seq_length cutoff_len model_max_length block_size "
        "context_length"
    ),
    "data.packing": "sample_packing pack",
    "data.system_prompt": "system system_message default_system",
    "data.template": "chat_template prompt_template prompt_style",
    "data.template_arguments": "chat_template_kwargs enable_thinking",
    "data.thinking": "split_thinking",
    "data.loss_on": (
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss mask_prompt"
    ),
    "data.columns": (
        "dataset_text_field field_mapping field_messages message_field_role message_field_content "
        "message_property_mappings"
    ),
    "data.truncation": "truncation_side",
    "data.weights": "dataset_weights interleave_probs data_weights mixing_weights",
    "data.special_tokens_in_text": "split_special_tokens",
    "data.on_bad_row": "skip_invalid skip_bad_rows",
    "data.group_by_length": "group_by_len",
    "data.cache_dir": "dataset_prepared_path",
    "objective.kind": "stage task",
    "objective.label_smoothing": "label_smoothing_factor",
    "objective.rollouts.group_size": (
        "num_generations num_return_sequences n_samples_per_prompt rollout_n"
    ),
    "objective.rollouts.max_new_tokens": (
        "max_completion_length response_length max_response_length generate_max_len"
    ),
    "objective.rollouts.passes": "num_iterations ppo_epochs num_ppo_epochs",
    "objective.rewards": "reward_funcs reward_functions",
    "objective.stop_kl": "target_kl",
    "objective.clip_low": "epsilon cliprange clip_ratio eps_clip",
    "objective.clip_high": "epsilon_high clip_ratio_high",
    "objective.gae_lambda": "lam",
    "objective.loss": "loss_type pref_loss",
    "objective.swap_probability": "dpo_label_smoothing",
    "objective.sft_weight": "rpo_alpha cpo_alpha pref_ftx",
    "objective.teacher": "teacher_model teacher_model_name_or_path",
    "optimizer.lora_plus_ratio": "loraplus_lr_ratio",
    "optimizer.lr": "learning_rate actor_learning_rate",
    "optimizer.kind": "optim",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.embedding_lr": "embedding_learning_rate",
    "schedule.kind": "lr_scheduler_type lr_scheduler scheduler",
    "schedule.warmup_steps": "warmup num_warmup_steps",
    "schedule.min_lr_fraction": "lr_min_ratio min_lr min_lr_rate",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.max_steps": "num_steps iters max_iters",
    "train.global_batch_size": "batch_size train_batch_size",
    "train.micro_batch_size": "per_device_train_batch_size auto_find_batch_size",
    "train.precision": "bf16 fp16 tf32 mixed_precision use_bf16 use_fp16",
    "train.gradient_checkpointing": "activation_checkpointing grad_checkpoint",
    "train.activation_offload": "activation_offloading offload_activations",
    "train.compile": "torch_compile",
    "train.float8": "fp8 use_fp8 enable_fp8",
    "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm",
    "train.neftune_alpha": "neftune_noise_alpha",
    "run.dir": "output_dir output save_dir",
    "run.name": "run_name",
    "run.seed": "data_seed",
    "checkpoint.every_steps": "save_steps save_strategy",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "evaluation.micro_batch_size": "per_device_eval_batch_size eval_batch_size",
    "evaluation.every_steps": "eval_steps eval_strategy evaluation_strategy",
    "evaluation.patience": "early_stopping_patience",
    "evaluation.export_best": "load_best_model_at_end",
    "tracking.log_every_steps": "logging_steps",
    "tracking.trackers": "report_to use_wandb",
    "tracking.project": "wandb_project project_name",
}
# What to do -> other tools' settings that have none here.
_ADVICE = {
    "set train.global_batch_size, the sequences of a step; what exceeds train.micro_batch_size is "
    "accumulated": "gradient_accumulation_steps",
    "the topology file decides: accelerate launch --config_file accelerate_configs/zero3.yaml "
    "train.py ...": "deepspeed",
    "the topology file decides: accelerate launch --config_file accelerate_configs/fsdp2.yaml "
    "train.py ...": "fsdp fsdp_config",
    "the launcher decides: accelerate launch --num_processes N train.py ...": (
        "num_processes num_gpus"
    ),
    "the topology file and the available GPUs decide; Apple GPUs (mps) are not yet supported, so a "
    "run on a Mac uses the CPU": "device",
    "the topology file and the available GPUs decide; see accelerate_configs/": "device_map",
    "Apple GPUs (mps) are not yet supported; a run on a Mac uses the CPU": "use_mps_device",
    "without a GPU a run uses the CPU; to hide GPUs set CUDA_VISIBLE_DEVICES= in the environment": (
        "use_cpu no_cuda"
    ),
    "the model stays here; upload runs/<name>/model yourself: hf upload OWNER/NAME "
    "runs/<name>/model": "push_to_hub hub_model_id",
    "CUDA_VISIBLE_DEVICES in the environment chooses GPUs; accelerate launch --num_processes N "
    "uses several": "gpu",
    "nothing to set: rows are tokenised once, before the first step, and read from a cache": (
        "dataloader_num_workers preprocessing_num_workers"
    ),
    "nothing to set: a change of the rows, the tokenizer or the template makes a new cache": (
        "overwrite_cache"
    ),
    "nothing to set: the summary names the columns that are not read": "remove_unused_columns",
    "logs are in the run directory, run.dir/run.name": "logging_dir",
    "set HF_TOKEN in the environment, or call `hf auth login` once": "hub_token",
    "a run always trains, and evaluates where there are evaluation rows": "do_train do_eval",
    "a run never overwrites another; choose another run.name, or remove the directory": (
        "overwrite_output_dir"
    ),
    "objective.kind: reward trains a reward model": "reward_model",
    "it is objective.beta, a setting of dpo, kto, cpo, simpo, orpo, grpo, rloo, ppo and distill": (
        "beta kl_coef init_kl_coef kl_loss_coef"
    ),
    "the reference of objective.kind: dpo and kto is the model as it was before the first step": (
        "ref_model"
    ),
    "reinforcement learning is objective.kind: grpo, rloo or ppo here": "rl",
}
ELSEWHERE = _by_name(_CALLED | _ADVICE)
"""Other tools' names -> the setting here or, if it contains a space, what to do instead."""

# Settings that the last version had: the default, which a config.yaml of that version may hold, and
# what to use instead.
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

_PREFERENCE = "{} is a loss of dpo here: objective.kind: dpo, objective.loss; or orpo, simpo, cpo"
_REWARD = "{} is called reward here"
_REINFORCE = "reinforcement learning is objective.kind: grpo, rloo or ppo here"
_GRPO = "{} is a loss of grpo here: objective.kind: grpo, objective.loss: {}"
_DISTILL = "{} is called distill here"
_LABELS = "{} is sequence_classification (a label for each row) or token_classification here"
_TRACKER = (
    "{} is not yet supported; use wandb, tensorboard or trackio, or send it the lines of "
    "metrics.jsonl and eval.jsonl of the run directory"
)
_FLOAT16 = "weights in float16 are not supported; use bfloat16, or train.precision: fp16"
# Setting -> advice -> values that it does not take (yet).
_NOT_YET = {
    "objective.kind": {
        _PREFERENCE: "preference rlhf ipo bco apo robust hinge",
        _REWARD: "rm reward_model reward_modeling",
        "{} is called process_reward here": "prm",
        _REINFORCE: "reinforce rl rft policy_gradient",
        _GRPO: "gspo dapo dr_grpo cispo bnpo",
        _DISTILL: "distillation gkd kd minillm",
        "{} is called mlm here": "masked masked_lm",
        "{} is called seq2seq here": "s2s seq2seq_lm translation summarization",
        _LABELS: "classification classifier text_classification",
        "{} is called token_classification here": "ner tagging",
        "continued pre-training is called clm here": "pt pretrain pretraining causal",
    },
    "tracking.trackers": {
        "MLflow is not yet supported; use tensorboard, or log metrics.jsonl and eval.jsonl of the "
        "run directory to it: mlflow.log_metrics(line, step=line['step'])": "mlflow",
        _TRACKER: "comet_ml clearml neptune aim dvclive swanlab",
        "write [] for none": "none",
        "name those that you want: wandb, tensorboard, trackio": "all",
    },
    "adapter.kind": {
        "write full: all weights train": "none",
        "DoRA is kind: lora with adapter.dora: true": "dora",
        "{} is kind: full with adapter.freeze, which names what does not train": "freeze bitfit",
        "{} is not supported; use lora": (
            "prefix_tuning prompt_tuning p_tuning ia3 adalora loha lokr vera oft boft"
        ),
    },
    "train.precision": {
        "Apple GPUs (mps) are not yet supported; a run on a Mac uses the CPU": "mps",
        "write fp16": "float16",
        "write bf16": "bfloat16",
        "write fp32": "float32 no",
        "float8 products are train.float8: true; write bf16": "fp8 float8",
        "weights in 8 bits are adapter.kind: qlora with adapter.quantization: int8": "int8",
    },
    "model.dtype": {
        _FLOAT16: "float16 fp16",
        "write float32": "fp32",
        "write bfloat16": "bf16",
    },
}
NOT_YET = {key: _by_name(texts) for key, texts in _NOT_YET.items()}


def not_yet(key: str, value: object) -> str | None:
    """Return what to do about a value that is not yet supported; None for other values."""
    text = NOT_YET.get(key, {}).get(value.lower()) if isinstance(value, str) else None
    return text and text.replace("{}", str(value))
