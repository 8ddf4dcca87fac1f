"""Every method and optimizer trains only its own weights, exports them and resumes to the bit."""

import functools
import hashlib
import json

import pytest
import torch
from conftest import TINY_LLAMA, Workshop, losses, pretrained, short, tiny_llama
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config import Adapter, Model, Optimizer, QLora
from finetune.engine import optim
from finetune.errors import ConfigError, ModelError
from finetune.export.load import load
from finetune.export.merge import merge
from finetune.models import adapter_init, adapters, parameters
from finetune.models import load as loading

pytestmark = pytest.mark.slow

METHODS = {
    "full": {},
    "full, frozen by pattern": {"adapter__freeze": ["embed_tokens", r"layers\.0\."]},
    "lora": {"adapter__kind": "lora", "adapter__r": 4, "adapter__dropout": 0.1},
    "lora, some layers": {
        "adapter__kind": "lora", "adapter__target_modules": r".*layers\.1\..*(q_proj|up_proj)",
    },
    "lora, rsLoRA": {"adapter__kind": "lora", "adapter__rslora": True},
    "lora, DoRA": {"adapter__kind": "lora", "adapter__dora": True},
    "lora, PiSSA": {"adapter__kind": "lora", "adapter__init": "pissa"},
    "lora, EVA": {"adapter__kind": "lora", "adapter__init": "eva"},
    "lora, gaussian": {"adapter__kind": "lora", "adapter__init": "gaussian"},
    "lora, random": {"adapter__kind": "lora", "adapter__init": "random", "adapter__alpha": 1.0},
    "lora, norms": {"adapter__kind": "lora", "adapter__train_norms": True},
    "lora, biases": {"adapter__kind": "lora", "adapter__bias": "all"},
    "lora, biases of adapted": {"adapter__kind": "lora", "adapter__bias": "lora_only"},
    "lora, whole modules": {
        "adapter__kind": "lora", "adapter__modules_to_save": ["embed_tokens", "lm_head"],
    },
    "qlora, NF4": {"adapter__kind": "qlora"},
    "qlora, FP4": {
        "adapter__kind": "qlora", "adapter__quantization": "fp4",
        "adapter__double_quantization": False,
    },
    "qlora, int8": {"adapter__kind": "qlora", "adapter__quantization": "int8"},
    "qlora, LoftQ": {"adapter__kind": "qlora", "adapter__init": "loftq"},
    "qlora, DoRA": {"adapter__kind": "qlora", "adapter__dora": True},
}  # fmt: skip
OPTIMIZERS = [
    "adamw",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
    "muon",
]
RATES = {
    "lion": 1e-3, "lion_8bit": 1e-3, "adafactor": 3e-2,
    "lora, some layers": 3e-2, "lora, rsLoRA": 3e-3,
}  # fmt: skip
SIX = {
    "train__max_steps": 6, "train__epochs": 9, "train__micro_batch_size": 8,
    "checkpoint__every_steps": 3,
}  # fmt: skip
ONE = {"train__max_steps": 1, "train__micro_batch_size": 8}
# Variants of a method that has its own line, methods that another test here trains and exports, and
# optimizers of other packages on adapters: make proofs.
WIDE = {
    "lora, whole modules",  # merged below
    "qlora, int8",  # the quantised base that stays
    "lora, some layers",
    "lora, gaussian",
    "lora, PiSSA",  # merged below
    "lora, biases of adapted",
    "qlora, FP4",
    "qlora, DoRA",
    "lora, rsLoRA",
    "lora, EVA",
    "qlora, LoftQ",
    "lora, DoRA",
    "lora, random",
    "lora, biases",
    "lora, norms",  # trained beside a base in 16 bits below
}


BASE = TINY_LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_size": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Return a model with biases on its projections, trained a little to have main directions."""
    workshop = Workshop(tmp_path_factory.mktemp("base"))
    return str(workshop.train("base", model__config=BASE) / "model")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> str:
    """Return a model of the same architecture with other weights."""
    workshop = Workshop(tmp_path_factory.mktemp("other"))
    return str(workshop.train("other", run__seed=5, model__config=BASE, **ONE) / "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """Return a function that trains a method for six steps, once for all tests."""

    @functools.cache
    def run(method: str, optimizer: str = "adamw"):
        workshop = Workshop(tmp_path_factory.mktemp("trained"))
        return workshop.train(**six_steps(base, method, optimizer))

    return run


def six_steps(base: str, method: str, optimizer: str) -> dict:
    rate = RATES.get(optimizer) or RATES.get(method, 1e-2)
    chosen = {"optimizer__kind": optimizer, "optimizer__lr": rate}
    return {**pretrained(base), **METHODS[method], **SIX, **chosen}


def pairs_of_method_and_optimizer():
    for method in METHODS:
        for optimizer in OPTIMIZERS if method in ("full", "lora", "qlora, NF4") else OPTIMIZERS[:2]:
            if not (optimizer in ("muon", "adafactor") and "adapter__kind" in METHODS[method]):
                is_wide = method in WIDE or optimizer.startswith("paged")
                is_wide |= optimizer in ("lion", "lion_8bit")  # adamw_8bit has such state, too
                is_wide |= optimizer != "adamw" and method != "full"
                name = f"{method} with {optimizer}"
                yield pytest.param(
                    method, optimizer, id=name, marks=pytest.mark.proof if is_wide else ()
                )


@pytest.mark.parametrize(("method", "optimizer"), list(pairs_of_method_and_optimizer()))
def test_it_learns_exports_and_resumes_to_the_bit(workshop, base, trained, method, optimizer):
    """Every run itself checks that only its own weights moved and that the export agrees."""
    run = trained(method, optimizer)
    curve = losses(run)
    assert sum(curve[-3:]) < 0.99 * sum(curve[:3])
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    final = exported(run)

    workshop.copy_of(run, left_out=("outcome.json", "model", "step-00000006"))
    resumed = workshop.train(**six_steps(base, method, optimizer))
    assert losses(resumed) == curve
    again = exported(resumed)
    assert final.keys() == again.keys()
    assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.parametrize("method", ["lora", "full, frozen by pattern"])
def test_checkpoints_hold_no_frozen_weight(trained, method):
    shards = FileSystemReader(trained(method) / "checkpoints/step-00000006/shards")
    saved = [name for name in shards.read_metadata().state_dict_metadata if "groups" not in name]
    assert any("layers.1" in name for name in saved)
    if method == "lora":
        assert all("lora_" in name for name in saved)
    else:
        assert not any("embed_tokens" in name or "layers.0" in name for name in saved)


def exported(run):
    [path] = (run / "model").glob("*model.safetensors")
    return load_file(path)


MERGED = ["lora, DoRA", "lora, PiSSA", "lora, whole modules", "qlora, NF4"]
MORE_MERGED = ["lora, rsLoRA", "lora, norms", "lora, biases", "qlora, int8", "qlora, LoftQ"]


@pytest.mark.parametrize("method", short([*MERGED, *MORE_MERGED], *MERGED))
def test_merged_is_base_plus_adapter(workshop, trained, method):
    """QLoRA merges into the unquantised base and measures that change; LoftQ into its own base."""
    merged = merge([trained(method) / "model"], workshop.folder / "merged")
    assert merged.rounding < 1e-4
    if method.startswith("qlora"):
        assert merged.quantization < (1e-4 if method == "qlora, LoftQ" else 0.3)
        assert merged.quantization > 0
    else:
        assert merged.quantization is None


def test_several_adapters_of_one_base_are_added_up(workshop, base, trained):
    second = workshop.train("b", **pretrained(base), **METHODS["lora"], **ONE, run__seed=2)
    runs = [trained("lora"), second]
    merge([run / "model" for run in runs], workshop.folder / "merged")
    name = "model.layers.0.self_attn.q_proj"
    wanted = load_file(f"{base}/model.safetensors")[f"{name}.weight"]
    for run in runs:
        adapter = exported(run)
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        wanted = wanted + 8 * b @ a  # alpha 32, r 4
    assert torch.allclose(
        load_file(workshop.folder / "merged/model.safetensors")[f"{name}.weight"], wanted, atol=1e-6
    )


def test_adapters_that_cannot_be_added_are_not_merged(workshop, base, other_base, trained):
    """Of other bases, with whole modules, and those that change the base under the others."""
    plain, merged = trained("lora") / "model", workshop.folder / "merged"
    biases = workshop.train("biases", **pretrained(base), **METHODS["lora, biases"], **ONE)
    elsewhere = workshop.train("elsewhere", **pretrained(other_base), **METHODS["lora"], **ONE)
    for run, why in (
        (elsewhere, "adapters of different bases"),
        (trained("qlora, LoftQ"), "adapters of different bases"),
        (trained("lora, PiSSA"), "initialised from the weights of its base"),
        (trained("lora, norms"), "holds whole modules or biases"),
        (biases, "holds whole modules or biases"),
    ):
        with pytest.raises(ModelError, match=why):
            merge([plain, run / "model"], merged)
    with pytest.raises(ModelError, match="lies inside an adapter"):
        merge([plain], plain / "merged")
    assert not merged.exists()


SIXTEEN = {
    "norms": {"adapter__train_norms": True}, "biases": {"adapter__bias": "all"},
    "head": {"adapter__modules_to_save": ["lm_head"]},
    "new tokens": {"model__new_tokens": ["<a>"]},
}  # fmt: skip


@pytest.mark.parametrize("method", short([*SIXTEEN], "norms"))
@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.proof)])
def test_trained_weights_beside_a_16_bit_base_have_32_bits(
    workshop, base, kind, method, monkeypatch
):
    """A norm is 1.0, and bfloat16's next value below is 1/256 away: steps of 2e-4 would be lost."""
    from finetune import loop

    states, moments, finish = [], [], loop.finish

    def looked_at(run, *more):  # before the export, which lets optimizer and model go
        state = run.state
        states.append({p.dtype for p in state.model.parameters() if not p.requires_grad})
        moments.extend(each["exp_avg"].dtype for each in state.optimizer.optimizer.state.values())
        return finish(run, *more)

    monkeypatch.setattr(loop, "finish", looked_at)
    settings = {
        **pretrained(base),
        **SIXTEEN[method],
        "adapter__kind": kind,
        "train__precision": "bf16",
        "optimizer__lr": 2e-4,
    }
    if (kind, method) == ("qlora", "biases"):
        with pytest.raises(
            ConfigError, match="adapter.bias: adapter.kind is qlora; it belongs to lora"
        ):
            workshop.train(**settings)
        return
    # Ten steps at a rate that does not fall: fewer move a norm by less than bfloat16 shows.
    settings |= {"train__max_steps": 10, "train__epochs": 9, "schedule__kind": "constant"}
    run = workshop.train(
        **settings, evaluation__sample_prompts=["hi"], evaluation__sample_max_new_tokens=3
    )
    assert set(moments) == {torch.float32}
    assert torch.bfloat16 in states[0]
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"
    assert losses(run)[-1] < losses(run)[0]
    model = load(run / "model")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    if method == "norms":
        name = "model.layers.0.input_layernorm"
        now = dict(model.named_parameters())[
            f"base_model.model.{name}.modules_to_save.default.weight"
        ]
        assert not torch.equal(now, before[f"{name}.weight"])


QLORA = {"adapter__kind": "qlora"}


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        ("lora", QLORA, "the base would be nf4, doubly quantised, but .* was not quantised"),
        ("qlora, NF4", {}, "would be not quantised, but .* was nf4, doubly quantised"),
        ("qlora, NF4", QLORA | {"adapter__quantization": "int8"}, "would be int8"),
        (
            "lora", {"model__new_tokens": ["<a>"]},
            r"model.new_tokens: \['<a>'\], but .* was trained with \[\]",
        ),
        (None, {"model__new_tokens": ["<b>"]}, r"was trained with \['<a>'\]"),
    ],
    ids=["to qlora", "from qlora", "to int8", "tokens added", "other tokens"],
)  # fmt: skip
def test_an_adapter_cannot_continue_with_another_shape(workshop, base, trained, first, then, why):
    """Already known before weights load."""
    lora = {"adapter__kind": "lora"}
    with_tokens = {**pretrained(base), **lora, "model__new_tokens": ["<a>"], **ONE}
    run = trained(first) if first else workshop.train("first", **with_tokens)
    with pytest.raises(ModelError, match=why):
        workshop.check(
            "then", **pretrained(base), **(lora | then), adapter__path=str(run / "model")
        )


@pytest.mark.parametrize("precision", short(["fp32", "bf16"], "bf16"))
def test_an_adapter_can_be_trained_further(workshop, base, other_base, trained, precision):
    """In any precision it recognises its base."""
    first = trained("lora")
    further = {
        "adapter__kind": "lora", "adapter__path": str(first / "model"),
        "train__precision": precision, **ONE,
    }  # fmt: skip
    second = workshop.train("second", **pretrained(base), **further)
    assert losses(second)[0] < losses(first)[0], "it begins where the first has ended"
    before, after = exported(first), exported(second)
    assert {name: t.shape for name, t in after.items()} == {n: t.shape for n, t in before.items()}
    with pytest.raises(ModelError, match="has changed since the adapter was trained"):
        workshop.train("third", **pretrained(other_base), **further)


def test_a_loftq_adapter_keeps_its_mark(workshop, base, trained):
    path = str(trained("qlora, LoftQ") / "model")
    second = (
        workshop.train("second", **pretrained(base), **QLORA, **ONE, adapter__path=path) / "model"
    )
    assert merge([second], workshop.folder / "merged").quantization < 1e-4


def test_the_summary_of_a_run_that_goes_on_counts_what_trains(workshop, base, trained, capfd):
    first = trained("lora, PiSSA") / "model"
    capfd.readouterr()
    workshop.check("second", **pretrained(base), adapter__kind="lora", adapter__path=str(first))
    assert " 0 of them train" not in capfd.readouterr().out
    with pytest.raises(
        ConfigError, match=r"is a run directory; its adapter is in .*/model: give that folder"
    ):
        workshop.check(
            "third", **pretrained(base), adapter__kind="lora", adapter__path=str(first.parent)
        )


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        (
            {"adapter__kind": "qlora", "adapter__init": "loftq", "adapter__quantization": "int8"},
            ConfigError, "adapter.init: loftq corrects",
        ),
        ({"optimizer__embedding_lr": 0.1}, ConfigError, "embedding_lr: would be ignored"),
        ({"optimizer__kind": "adafactor"}, ConfigError, "adafactor steps in proportion"),
        ({"optimizer__kind": "muon"}, ConfigError, "optimizer.kind: muon"),
        (
            {"adapter__init": "eva", "adapter__r": 99}, ModelError,
            "adapter.r: 99 is more than the 64 directions",
        ),
        (
            {"model__new_tokens": ["<a>", "<a>"]}, ConfigError,
            "model.new_tokens: '<a>' is empty or repeated",
        ),
        ({"model__new_tokens": [""]}, ConfigError, "model.new_tokens: '' is empty"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused_before_weights_load(
    workshop, base, changes, error, why
):
    with pytest.raises(error, match=why):
        workshop.check(**pretrained(base), **({"adapter__kind": "lora"} | changes))


def test_freezing_new_tokens_and_too_large_rates_are_refused(workshop, base):
    with pytest.raises(ModelError, match=r"model.new_tokens could not be trained"):
        workshop.check(**pretrained(base), model__new_tokens=["<a>"], adapter__freeze=["embed"])
    with pytest.raises(ConfigError, match=r"adafactor never steps by more than 1 / sqrt\(step\)"):
        workshop.check(**pretrained(base), optimizer__kind="adafactor", optimizer__lr=0.9)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_loftq_is_refused_for_layers_that_are_not_linear(workshop, kind):
    config = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "mixtral": TINY_LLAMA | {"num_local_experts": 2},
    }[kind] | {"model_type": kind}
    model = workshop.train("base", model__config=config, **ONE) / "model"
    with pytest.raises(ModelError, match=r"adapter.init: loftq is for linear layers, and .* is"):
        workshop.check(**pretrained(model), adapter__kind="qlora", adapter__init="loftq")


@pytest.mark.parametrize("kind", short(["nf4", "fp4", "int8"], "nf4", "int8"))
def test_the_quantised_base_stays_to_the_last_bit(workshop, base, kind, monkeypatch):
    """Every byte, also after evaluations, which make bitsandbytes repack weights on some CPUs."""
    from finetune import loop

    seen = []
    build = loop.build

    def watched(run):
        build(run)
        seen.extend([run.state.model, sha256(run.state.model)])

    monkeypatch.setattr(loop, "build", watched)
    settings = {"data__eval_fraction": 0.2, "evaluation__every_steps": 1, "train__max_steps": 2}
    run = workshop.train(**pretrained(base), **settings, **QLORA, adapter__quantization=kind)
    assert sha256(seen[0]) == seen[1]
    counts = json.loads((run / "receipt.json").read_text())["parameters"]
    assert counts["total"] - counts["trainable"] == sum(
        t.numel() for t in load_file(f"{base}/model.safetensors").values()
    ), "two 4-bit weights in a byte are two"


def sha256(model) -> str:
    digest = hashlib.sha256()
    for _, weight in sorted((n, p) for n, p in model.named_parameters() if not p.requires_grad):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Arithmetic, on the meta device


def counted(adapter: Adapter, **config) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    return parameters.count(adapters.apply(model, adapter, Model(path="x")))[0]


def test_llama_2_7b_with_rank_64_on_q_and_v_trains_33_554_432():
    """32 layers x 2 projections x 64 x (4,096 + 4,096)."""
    assert counted(Adapter(kind="lora", r=64, target_modules=["q_proj", "v_proj"])) == 33_554_432


def test_a_square_layer_of_1000_with_rank_2_trains_4_000():
    """r (d + k) = 2 x 2,000, of 1,000,000."""
    sizes = {
        "hidden_size": 1000,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "num_hidden_layers": 1,
    }
    assert counted(Adapter(kind="lora", r=2, target_modules=["q_proj"]), **sizes) == 4_000


def scaled(adapter: Adapter):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=99))
    layer = adapters.apply(model, adapter, Model(path="x")).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    )
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return (
        layer,
        layer.weight.detach(),
        layer.lora_A["default"].weight.detach(),
        layer.lora_B["default"].weight.detach(),
    )


@pytest.mark.parametrize(
    ("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)], ids=["alpha / r", "alpha / sqrt(r)"]
)
def test_lora_is_its_formula(rslora, scale):
    layer, w, a, b = scaled(Adapter(kind="lora", r=4, alpha=6, rslora=rslora))
    x = torch.randn(3, 32)
    assert torch.allclose(layer(x), x @ (w + scale * b @ a).T, atol=1e-5)


def test_dora_keeps_length_apart_from_direction():
    """W' = m V / |V|, V = W + s B A, m the lengths of W's rows at first."""
    layer, w, a, b = scaled(Adapter(kind="lora", r=4, alpha=4, dora=True))
    v = w + b @ a
    x = torch.randn(3, 32)
    wanted = w.norm(dim=1, keepdim=True) * v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), x @ wanted.T, atol=1e-4)


def test_loftq_begins_closer_to_the_unquantised_model(base):
    def model(quantization=None):
        kind, tokenizer = AutoConfig.from_pretrained(base), loading.bytes_tokenizer()
        return loading.load_model(
            Model(path=base), kind, tokenizer, "sdpa", torch.float32, quantization
        )

    ids = torch.arange(64)[None]
    exact = model()(ids).logits
    distances = {}
    for init in ("default", "loftq"):
        adapter = QLora(kind="qlora", init=init)
        adapted = adapters.apply(
            model(adapters.quantization(adapter, torch.float32)), adapter, Model(path=base)
        )
        if init == "loftq":
            adapter_init.initialise_from_quantization(adapted, model())
        distances[init] = (adapted(ids).logits - exact).norm().item()
    assert distances["loftq"] < 0.7 * distances["default"]


# Optimizers


def state_bytes(kind: str) -> int:
    layer = torch.nn.Linear(1024, 1024, bias=False)
    optimizer = optim.build(layer, Optimizer(kind=kind, lr=1e-3))
    layer(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    return sum(
        v.numel() * v.element_size()
        for v in optimizer.state[layer.weight].values()
        if isinstance(v, torch.Tensor)
    )


@pytest.mark.parametrize(
    ("kind", "bytes_per_weight"),
    [
        ("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 2), ("paged_adamw_32bit", 8),
        ("lion", 4), ("lion_8bit", 1), ("muon", 4), ("adafactor", 0),
    ],
)  # fmt: skip
def test_the_state_of_an_optimizer_is_as_small_as_it_says(kind, bytes_per_weight):
    """8 bits: a byte each, a float32 scale for 256 of them and a table of 256 values."""
    assert state_bytes(kind) / 1024**2 == pytest.approx(bytes_per_weight, abs=0.04)


def test_muon_moves_hidden_matrices_as_torch_does_and_the_rest_as_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.ModuleDict({"m": torch.nn.Linear(8, 8)}) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = optim.build(ours, Optimizer(kind="muon", lr=1e-2, weight_decay=0.1))
    muon = torch.optim.Muon(
        [theirs["m"].weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([theirs["m"].bias], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        x = torch.randn(4, 8)
        for model, parts in ((ours, [mine]), (theirs, [muon, adamw])):
            model["m"](x).square().sum().backward()
            for part in parts:
                part.step()
                part.zero_grad()
    assert torch.equal(ours["m"].weight, theirs["m"].weight)
    assert torch.allclose(ours["m"].bias, theirs["m"].bias)


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    model = torch.nn.ModuleDict(
        {
            "wpe": torch.nn.Embedding(8, 8),
            "conv": torch.nn.Conv1d(8, 8, 3),
            "m": torch.nn.Linear(8, 8, bias=False),
        }
    )
    hidden = [
        p
        for group in optim.parameter_groups(model, Optimizer(kind="muon"))
        if group["hidden"]
        for p in group["params"]
    ]
    assert [id(p) for p in hidden] == [id(model["m"].weight)]


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_embeddings_keep_their_state_in_32_bits(kind):
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 1000))
    optimizer = optim.build(model, Optimizer(kind=kind, lr=1e-3))
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in model]
    assert dtypes == [torch.float32, torch.uint8]


def test_groups_have_their_own_rates():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=99))
    full = optim.parameter_groups(model, Optimizer(lr=1e-3, embedding_lr=1e-4))
    assert {
        round(g["scale"], 6): len(g["params"]) for g in full if g["hidden"] or g["scale"] < 1
    } == {0.1: 2, 1.0: 14}
    adapted = adapters.apply(model, Adapter(kind="lora"), Model(path="x"))
    plus = optim.parameter_groups(adapted, Optimizer(lr=1e-3, lora_plus_ratio=16.0))
    assert sorted((g["scale"], len(g["params"])) for g in plus) == [(1.0, 14), (16.0, 14)]
