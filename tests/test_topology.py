"""What the launcher asks for is done, or is an error before anything loads."""

import json
import os
import re

import pytest
import torch
from conftest import ROOT, TINY_LLAMA

from finetune import config as configs
from finetune.engine.topology import launch, support
from finetune.engine.topology.sharing import without_hooks
from finetune.errors import ConfigError

FSDP = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE_2 = {"zero_optimization": {"stage": 2}}


def deepspeed(folder, **values):
    file = folder / "zero.json"
    file.write_text(json.dumps(values))
    return {**ZERO, "WORLD_SIZE": "4", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "asks for FSDP 1; set fsdp_version: 2"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing decides"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "set TRANSFORMER_BASED_WRAP"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "2"}, "forward: 2; it must be true or false"),
        (
            {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"},
            "keeps whole layers on the device",
        ),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, "every weight is sharded"),
        ({**PARALLEL, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}, "is 2, but there are 4 processes"),
        ({**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "4"}, "tp_size: 4 is not supported"),
        ({**PARALLEL, "PARALLELISM_CONFIG_SP_SIZE": "4"}, "use parallelism_config_cp_size"),
        (
            {"WORLD_SIZE": "4", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            "needs distributed_type: FSDP",
        ),
        (ZERO, "has no deepspeed_config_file"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no.json"}, "no.json cannot be read"),
        (
            {**FSDP, "FSDP_OFFLOAD_PARAMS": "cpu"},
            "fsdp_offload_params: cpu; it must be true or false",
        ),
        (
            {**PARALLEL, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "-1"},
            "dp_replicate_size: -1; it must be a whole number",
        ),
        ({**ZERO, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "needs distributed_type: FSDP"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.1"}, "train.max_grad_norm decides"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: INDUCTOR"),
        ({"ACCELERATE_USE_CPU": "true"}, "one process and ignores num_processes"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "accumulation follows from"),
        (
            {"WORLD_SIZE": "2", "RANK": ""},
            "RANK: '' in the environment; it must be a whole number from 0",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' in the environment"),
        (
            {"WORLD_SIZE": "0"},
            "WORLD_SIZE: '0' in the environment; it must be a whole number from 1",
        ),
    ],
)
def test_settings_that_would_be_dropped_are_errors(environment, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        launch.read(environment)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage is 0; take 1, 2 or 3"),
        ({}, "stage is 0"),
        ({"zero_optimization": None}, "stage is None"),
        ({"zero_optimization": {"stage": True}}, "stage is True"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": True}},
            "offload_param.device is True",
        ),
        ({**STAGE_2, "data_types": {}}, "data_types is untested"),
        (
            {**STAGE_2, "gradient_clipping": 1.0},
            "gradient_clipping is decided by train.max_grad_norm",
        ),
        (
            {**STAGE_2, "gradient_accumulation_steps": 4},
            "decided by train.global_batch_size and",
        ),
        ({**STAGE_2, "optimizer": {"type": "AdamW"}}, "optimizer is decided by optimizer.kind"),
        ({**STAGE_2, "bf16": {"enabled": True}}, "bf16 is decided by train.precision"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device is nvme",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "with stage 2 is untested",
        ),
        ({**STAGE_2, "prescale_gradients": True}, "prescale_gradients is untested"),
    ],
)  # fmt: skip
def test_a_deepspeed_file_may_not_decide_what_the_run_config_does(tmp_path, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        launch.read(deepspeed(tmp_path, **values))


def test_parallel_settings_are_read(tmp_path):
    assert launch.read({}).name == "single"
    assert launch.read({"MASTER_PORT": "tcp://10.0.0.1:80", "LOCAL_RANK": "-1"}).name == "single", (
        "not ours to read"
    )
    assert launch.read({"WORLD_SIZE": "2"}).name == "ddp"
    assert launch.read({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}) == launch.ParallelConfig(
        "fsdp2", 4, offload=True
    )
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    hybrid = launch.read({**PARALLEL, **sizes})
    assert (hybrid.name, hybrid.num_replicas) == ("fsdp2_hybrid", 2)
    stage = {"stage": 3, "offload_param": {"device": "cpu"}}
    parallel = launch.read(deepspeed(tmp_path, zero_optimization=stage, gradient_clipping="auto"))
    assert (parallel.name, parallel.deepspeed) == ("zero3_offload", {"zero_optimization": stage})


def run_config(**changes):
    values = {"run": {"name": "x"}, "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
    for key, value in changes.items():
        section, field = key.split("__")
        values.setdefault(section, {})[field] = value
    return configs.from_dict(values)


USES = {
    "all weights, some frozen": {"adapter__freeze": ["embed"]},
    "the same, on a base set to 16 bits": {
        "adapter__kind": "lora",
        "adapter__modules_to_save": ["input_layernorm", "norm", "post_attention_layernorm"],
        "model__dtype": "bfloat16",
    },
    "all weights, in 16 bits": {"model__dtype": "bfloat16"},
    "QLoRA, 8 bits": {"adapter__kind": "qlora", "adapter__quantization": "int8"},
    "lion": {"optimizer__kind": "lion"},
    "paged_adamw_32bit": {"optimizer__kind": "paged_adamw_32bit"},
    "8-bit optimizers": {"optimizer__kind": "adamw_8bit"},
    "adafactor": {"optimizer__kind": "adafactor", "optimizer__lr": 1e-3},
    "muon": {"optimizer__kind": "muon"},
    "average of weights": {"train__ema_decay": 0.9},
    "noise on embeddings": {"train__neftune_alpha": 5},
    "largest micro-batch that fits": {"train__micro_batch_size": "auto"},
    "compiled layers": {"train__compile": True},
    "float8 products": {"train__float8": True},
    "fp16": {"train__precision": "fp16"},
}


COLUMNS = ("single", "ddp", "fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3", "zero3_offload")


@pytest.mark.parametrize(
    "feature", [f for f in support.FEATURES if f.refused], ids=lambda f: f.name
)
def test_impossible_combinations_are_errors_with_advice(feature):
    for topology in COLUMNS:
        parallel = launch.ParallelConfig(
            topology.removesuffix("_offload"), 2, offload=topology.endswith("_offload")
        )
        found = list(support.conflicts(run_config(**USES[feature.name]), parallel))
        why = feature.reason(topology)
        assert found == ([f"{feature.setting}: not with {topology}: {why}"] if why else [])
        assert why is None or re.search("take|leave", why)


def test_the_table_of_the_docs_is_that_of_the_errors():
    rows = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for feature in support.FEATURES:
        name = f"{feature.name} (`{feature.setting}`)" if feature.refused else feature.name
        rows.append([name, *("no" if feature.reason(column) else "yes" for column in COLUMNS)])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    text = (ROOT / "docs/topologies.md").read_text()
    assert f"<!-- support: begin -->\n{table}<!-- support: end -->" in text, (
        f"the table should be:\n{table}"
    )


def test_the_launcher_and_the_run_config_must_agree_on_precision(workshop, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="mixed_precision: bf16, but train.precision is fp32"):
        workshop.train(train__precision="fp32")


def test_a_topology_on_a_gpu_has_what_a_gpu_needs(monkeypatch):
    """Gradients in DDP's buckets, one broadcast of buffers, NCCL timeouts, and an indexed device:
    `torch.cuda.set_device` in the saver thread refuses "cuda", as Accelerate calls it.
    """
    import torch
    from accelerate import Accelerator

    from finetune.engine.topology import Topology

    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    made = Topology("fp32", check_only=False)
    assert made.device == made.processes.device == torch.device("cuda", 3)
    arguments = made.accelerator.ddp_handler.to_kwargs()
    assert arguments == {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


@pytest.fixture
def group_of_one():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fsdp2_gathers_layers_and_an_untied_head_in_16_bits_and_the_embedding_in_float32(
    group_of_one, tied
):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.engine.topology.fsdp import Fsdp2

    described = AutoConfig.for_model(**TINY_LLAMA, vocab_size=64, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(described)
    sharing = Fsdp2(
        launch.ParallelConfig("fsdp2", 1),
        torch.device("cpu"),
        torch.bfloat16,
        lambda action: action(),
    )
    sharing.prepare(model, lambda shared: None)

    def policy(module):
        return module._get_fsdp_state()._fsdp_param_group.mp_policy

    assert {policy(layer).param_dtype for layer in model.model.layers} == {torch.bfloat16}
    if tied:  # with the embedding, in the root
        assert policy(model).param_dtype is None
    else:
        assert policy(model.lm_head).param_dtype == torch.bfloat16
        assert policy(model.get_input_embeddings()).param_dtype is None
    assert policy(model).reduce_dtype == torch.float32


def test_fsdp2_keeps_the_bits_of_weights_in_4_bits_under_a_float_dtype():
    import bitsandbytes
    import torch

    from finetune.engine.topology.fsdp import Fsdp2

    layer = bitsandbytes.nn.Linear4bit(
        64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(32, 64), requires_grad=False, quant_type="nf4"
    ).to("cpu")
    layer.quant_state = layer.weight.quant_state
    packed = layer.weight.detach().reshape(-1).view(torch.uint8).clone()
    for dtype in (torch.bfloat16, None):
        sharing = Fsdp2.__new__(Fsdp2)
        sharing.dtype = dtype
        sharing._store_as_floats(torch.nn.Sequential(layer))
        assert layer.weight.is_floating_point()
        assert torch.equal(layer.weight.detach().reshape(-1).view(torch.uint8), packed)


@pytest.mark.parametrize(
    ("kind", "processes", "together"),
    [("ddp", 2, False), ("fsdp2", 2, True), ("zero3", 2, True), ("fsdp2", 1, False)],
)
def test_processes_that_share_a_model_stop_generating_together(kind, processes, together):
    """Otherwise one leaves `generate` early and the others wait for its part of the weights."""
    assert launch.ParallelConfig(kind, processes).generates_together is together


def test_each_process_selects_its_gpu_before_querying_it(monkeypatch):
    import torch

    from finetune.engine.topology import start

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in ("0", "1", "2"):  # the third has none, which is refused elsewhere
        monkeypatch.setenv("LOCAL_RANK", rank)
        start.take_own_gpu()
    assert taken == [0, 1]


def test_attention_with_a_mask_never_takes_the_kernel_of_cudnn():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from finetune.engine.topology import start

    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        start.let_masks_have_gradients()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):  # as for documents, which have no mask
            assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_gradients_of_ddp_stay_in_its_buckets_from_step_to_step(group_of_one):
    """New gradients would sit next to the buckets until the last backward pass of each step."""
    import torch
    from accelerate import Accelerator

    from finetune.engine.topology.replicated import Replicated

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    shared = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replicated = Replicated(Accelerator(cpu=True), lambda action: action())
    replicated.num_processes = 2
    for _ in range(2):
        with shared.no_sync():
            shared(torch.ones(2, 4)).sum().backward()
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        shared(torch.ones(2, 4)).sum().backward()
        norm = replicated.clip(shared, 1.0)
        replicated.step(shared, optimizer, float(norm))
    assert len(storages) == 1


def test_hooks_come_back_in_their_order():
    """Those that others add or remove meanwhile count."""
    module, called = torch.nn.Linear(1, 1), list[str]()

    def register(name, package):
        def hook(*_):
            called.append(name)

        hook.__module__ = package
        return module.register_forward_hook(hook)

    def passed():
        called.clear()
        module(torch.ones(1))
        return "".join(called)

    for name, package in zip("abcd", ["fsdp", "ours", "fsdp.of", "ours"]):
        handle = register(name, package)
    with without_hooks(module, "fsdp"):
        assert passed() == "bd"
        register("e", "fsdp")
        handle.remove()
        assert passed() == "be"
    assert passed() == "abce"
