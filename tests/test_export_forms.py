"""Exports for others: shards, GGUF, Ollama, the Hub; adapters combined and taken out again."""

import json
import os
import shutil
import struct
import subprocess

import hub_server
import pytest
import torch
from conftest import Workshop, pretrained, write_jsonl

from finetune.__main__ import main
from finetune.data.built_in_templates import BUILT_IN
from finetune.export import combine, gguf, hub, model_card, ollama
from finetune.export.load import load
from finetune.export.verify import probe_logits

# huggingface_hub sends files in a way that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and two adapters on it."""
    shop = Workshop(tmp_path_factory.mktemp("forms"))
    sizes = {"train__global_batch_size": 4, "train__micro_batch_size": 4}
    base = shop.train("base", optimizer__lr=1e-12, train__max_steps=1, **sizes) / "model"
    lora = {
        **sizes, **pretrained(base), "train__max_steps": 4, "adapter__kind": "lora",
        "optimizer__lr": 0.02,
    }  # fmt: skip
    for name, letter, r in (("one", "x", 2), ("two", "y", 3)):
        rows = [{"question": q, "answer": letter * 9} for q in ("ab", "cd", "ef", "gh")]
        own = write_jsonl(shop.folder / f"{name}.jsonl", rows)
        shop.train(name, **lora, adapter__r=r, data__train=str(own))
    return shop.folder / "runs"


def export(*arguments):
    return main(["export", *map(str, arguments)])


# ------------------------------------------------------------------------------------- folders


@pytest.mark.proof
def test_a_model_is_written_in_shards_and_opens_the_same(runs, tmp_path, capsys):
    whole, target = runs / "base/model", tmp_path / "shards"
    assert export(runs / "base", "--output", target, "--max-shard-size", "50KB") == 0
    assert "written, opened and compared" in capsys.readouterr().out
    parts = sorted(target.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert torch.equal(probe_logits(load(target)), probe_logits(load(whole)))
    merged = tmp_path / "merged"
    given = ("--merge", "--output", merged, "--max-shard-size", "50KB", "--modelfile")
    assert export(runs / "one", *given) == 0
    assert "logits differ from base plus adapter" in capsys.readouterr().out
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    assert (merged / "Modelfile").read_text().startswith("FROM .\n")


@pytest.mark.proof
def test_an_adapter_is_written_as_it_is(runs, tmp_path):
    target = tmp_path / "adapter"
    assert export(runs / "one", "--output", target) == 0
    for path in (runs / "one/model").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    damaged = shutil.copytree(target, tmp_path / "damaged")
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert export(damaged, "--output", tmp_path / "never") == 2
    assert not (tmp_path / "never").exists()


@pytest.mark.proof
def test_adapters_are_combined_by_their_weights_and_taken_out_again(runs, tmp_path, capsys):
    target, sources = tmp_path / "both", [runs / "one", runs / "two"]
    assert export(*sources, "--weights", 0.7, -0.3, "--output", target) == 0
    assert "one adapter of 2" in capsys.readouterr().out
    changes = [combine._changes(load(each / "model"), "default") for each in sources]
    found = combine._changes(load(target), "default")
    for layer, change in found.items():
        expected = 0.7 * changes[0][layer] - 0.3 * changes[1][layer]
        assert torch.allclose(change, expected, atol=1e-6), layer
    merged, base = tmp_path / "merged", tmp_path / "base"
    assert export(target, "--merge", "--output", merged) == 0
    assert export(merged, "--unmerge", target, "--output", base) == 0
    assert "the base again; weights differ from it by at most" in capsys.readouterr().out
    given = dict(load(base).named_parameters())
    for name, weight in load(runs / "base/model").named_parameters():
        assert torch.allclose(given[name], weight, atol=1e-6), name
    assert export(merged, "--unmerge", runs / "one", "--output", tmp_path / "no") == 1
    assert "still differ from the base" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--output: name a folder to write"),
        (["--output", "o", "--gguf", "f16"], "--gguf is only for full weights: add --merge"),
        (["--output", "o", "--modelfile"], "--modelfile is only for full weights: add --merge"),
        (["--output", "o", "--max-shard-size", "1GB"], "--max-shard-size is only for full weights"),
        (["--output", "o", "--public"], "--public is only for --push"),
        (["--output", "o", "--dtype", "float32"], "--dtype is only for --merge"),
        (["--output", "o", "--merge", "--weights", "1"], "--merge and --weights: two exports"),
        (["--output", "o", "--weights", "1"], "--weights: 1 for 1 adapters; give two adapters"),
        (["--output", "o", "--merge", "--gguf", "f16"], "is not on PATH; git clone"),
        (["--output", "o", "--merge", "--gguf", "f16", "--llama-cpp", "/no"], "/no has no convert"),
        (["--push", "nameonly"], "--push: should be OWNER/NAME"),
    ],
)
def test_what_cannot_be_exported_is_exit_2_before_weights(tmp_path, capsys, arguments, words):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    from safetensors.torch import save_file

    save_file({"a.lora_A": torch.zeros(1, 1)}, adapter / "adapter_model.safetensors")
    assert export(adapter, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("size", ["0GB", "1", "two", "-1GB", "1.5GB"])
def test_a_wrong_size_is_exit_2(size, capsys):
    with pytest.raises(SystemExit) as caught:
        export("a", "--output", "b", f"--max-shard-size={size}")
    assert caught.value.code == 2
    assert "should be a size such as 500MB" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- llama.cpp


CONVERT = """
import struct, sys
folder, target = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
print("INFO: reading", folder)
if {fails}:
    sys.exit("no such architecture")
open(target, "wb").write({head!r} + b"x" * 99)
"""
GGUF = b"GGUF" + struct.pack("<IQ", 3, 7)


@pytest.mark.parametrize(
    ("head", "fails", "words"),
    [
        (GGUF, False, None),
        (GGUF, True, "ended with 1: no such architecture"),
        (b"oops", False, "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), False, "holds no weights"),
    ],
)
def test_the_converter_of_llama_cpp_writes_a_whole_file_or_none(tmp_path, head, fails, words):
    (tmp_path / gguf.CONVERTER).write_text(CONVERT.format(head=head, fails=fails))
    program = gguf.converter(str(tmp_path))
    if words is None:
        assert gguf.convert(program, tmp_path, "f16") == tmp_path / "model.gguf"
        assert (tmp_path / "model.gguf").read_bytes().startswith(GGUF)
    else:
        with pytest.raises(Exception, match=words):
            gguf.convert(program, tmp_path, "f16")
    assert [path.name for path in tmp_path.iterdir() if "writing" in path.name] == []


# ------------------------------------------------------------------------------------- Ollama


def with_template(tokenizer, source):
    tokenizer.chat_template = source
    tokenizer.bos_token = "<s>"
    return tokenizer


SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = [
    [{"role": "user", "content": "one"}],
    [SYSTEM, {"role": "user", "content": "one\ntwo"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
     {"role": "user", "content": "three {{ x }}"}],
    [SYSTEM, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
     {"role": "user", "content": "three"}],
]  # fmt: skip


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_built_in_templates_are_recognised_by_what_they_render(bytes_tokenizer, name):
    plain = with_template(bytes_tokenizer, "{{ bos_token }}" + BUILT_IN[name])
    assert ollama.known_template(plain) == ollama.Known(name, None)
    start = "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', "
    start += "'content': 'Be brief.'}] + messages %}{% endif %}"
    with_system = with_template(bytes_tokenizer, start + BUILT_IN[name])
    assert ollama.known_template(with_system) == ollama.Known(name, "Be brief.")
    text = ollama.modelfile(with_system, "./model.gguf", ["<|im_end|>", "</s>"], print)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'SYSTEM """Be brief."""\nPARAMETER stop "<|im_end|>"' in text
    assert "<EOS>" not in text


def test_another_template_gets_a_note_and_no_template(bytes_tokenizer):
    notes = []
    own = with_template(bytes_tokenizer, "{% for m in messages %}>> {{ m.content }}{% endfor %}")
    assert ollama.modelfile(own, ".", [], notes.append) == "FROM .\n"
    assert "none of the built-in ones" in notes[0]


GO_PROGRAM = """
package main
import ("encoding/json"; "fmt"; "os"; "strings"; "text/template")
type Message struct { Role string; Content string }
type Case struct { Template string; Messages []*Message }
func main() {
  var cases []Case
  if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
  found := []string{}
  for _, each := range cases {
    var text strings.Builder
    parsed := template.Must(template.New("").Parse(each.Template))
    if err := parsed.Execute(&text, map[string]any{"Messages": each.Messages}); err != nil {
      panic(err) }
    found = append(found, text.String())
  }
  shown, _ := json.Marshal(found)
  fmt.Println(string(shown))
}
"""


@pytest.mark.proof
def test_go_renders_the_prompts_of_training(bytes_tokenizer, tmp_path):
    """With Go's own text/template, which Ollama uses."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    cases, expected = [], []
    for name, source in BUILT_IN.items():
        with_template(bytes_tokenizer, source)
        for talk in TALKS:
            text = ollama.GO[name].replace(ollama.EOS, bytes_tokenizer.eos_token)
            messages = [{"Role": each["role"], "Content": each["content"]} for each in talk]
            cases.append({"Template": text, "Messages": messages})
            options = {"tokenize": False, "add_generation_prompt": True}
            expected.append((name, bytes_tokenizer.apply_chat_template(talk, **options)))
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), text=True,
        env={**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"},
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, wanted), found in zip(expected, json.loads(done.stdout), strict=True):
        assert found == wanted, name


# ------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def model_folder(tmp_path):
    """Files as an export has them; the Hub does not open them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"a" * 5_000)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"b" * 5_000)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / ".cache").mkdir()
    (folder / ".cache/secret").write_text("never")
    return folder


@pytest.fixture
def the_hub(monkeypatch):
    monkeypatch.setattr(hub, "WAIT", 0.01)
    with hub_server.running(monkeypatch) as server:
        yield server


def pushed(folder, name="me/mine", is_public=False):
    notes = []
    try:
        return hub.push(folder, name, "# A card", is_public, notes.append), notes
    finally:
        assert hub_server.TOKEN not in "".join(notes)


@pytest.mark.proof
def test_a_push_is_private_and_whole(the_hub, model_folder):
    url, notes = pushed(model_folder)
    assert (url, notes) == (f"{the_hub.url}/me/mine", [])
    assert the_hub.is_private == {"me/mine": True}
    held = the_hub.repos["me/mine"]
    assert held.pop("README.md") == b"# A card"
    assert ".cache/secret" not in held
    assert {name for name in held if not name.startswith(".")} == {
        path.name for path in model_folder.iterdir() if path.is_file()
    }
    assert held["config.json"] == (model_folder / "config.json").read_bytes()
    pushed(model_folder, "me/open", is_public=True)
    assert the_hub.is_private["me/open"] is False


def test_a_broken_upload_goes_on_and_sends_nothing_twice(the_hub, model_folder, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    # huggingface_hub tries a connection again by itself: as often as this, each fails.
    the_hub.faults = ["400"] * 2
    with pytest.raises(Exception, match="me/mine") as caught:
        pushed(model_folder)
    assert hub_server.TOKEN not in str(caught.value)
    begun = list(the_hub.uploads)
    the_hub.faults = []
    pushed(model_folder)
    assert len(the_hub.uploads) == len(set(the_hub.uploads)) == 3
    assert the_hub.uploads[: len(begun)] == begun
    assert len(the_hub.repos["me/mine"]["model-00002-of-00002.safetensors"]) == 5_000


def test_what_the_hub_refuses_names_no_token(the_hub, model_folder, monkeypatch, capsys):
    secret = "hf_" + "anotherSecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(Exception, match="the Hub refuses me/mine \\(401") as caught:
        pushed(model_folder)
    assert secret not in str(caught.value) + capsys.readouterr().err
    assert the_hub.repos == {}


@pytest.mark.proof
def test_a_public_repository_or_another_model_is_left_alone(the_hub, model_folder):
    pushed(model_folder, is_public=True)
    with pytest.raises(Exception, match="exists and is public; add --public"):
        pushed(model_folder)
    the_hub.repos["me/mine"]["adapter_config.json"] = b"{}"
    with pytest.raises(Exception, match="holds files of another model \\(adapter_config.json\\)"):
        pushed(model_folder, is_public=True)


@pytest.mark.proof
def test_other_bytes_on_the_hub_are_noticed(the_hub, model_folder):
    the_hub.changes = {"config.json": b"{}"}
    with pytest.raises(Exception, match="has 2 bytes of config.json after the upload"):
        pushed(model_folder)


def test_without_a_network_or_a_token_nothing_begins(the_hub, monkeypatch):
    hub.require_name("me/mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(Exception, match="no token for the Hub; log in with"):
        hub.require_name("me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Exception, match="HF_HUB_OFFLINE is set"):
        hub.require_name("me/mine")
    for name in ("mine", "a/b/c", "-/b c", "me/" + "x" * 99):
        with pytest.raises(Exception, match="should be OWNER/NAME"):
            hub.require_name(name)


# ------------------------------------------------------------------------------------ the card


FOUND = {
    "verdict": {"sentence": "tuned is better than base."}, "base": "base", "tuned": "tuned",
    "models": {"base": {}, "tuned": {}}, "run": None,
    "scores": [
        {"name": "exact match", "is_share": True,
         "means": {"base": {"mean": 0.125, "low": 0.1, "high": 0.15, "rows": 80},
                   "tuned": {"mean": 0.9, "low": 0.85, "high": 0.95, "rows": 80}},
         "changes": {"tuned": {"mean": 0.775, "low": 0.7, "high": 0.85}}},
        {"name": "length", "is_share": False, "changes": {},
         "means": {"base": {"mean": 31.25, "low": None, "high": None, "rows": 1}}},
    ],
}  # fmt: skip


def test_scores_of_a_card_are_those_of_the_results(model_folder, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(FOUND))
    text = model_card.card(model_folder, "me/mine", None, results)
    assert "| score | base | tuned | tuned - base |" in text
    assert (
        "| exact match | 12.5% (10.0 to 15.0) | 90.0% (85.0 to 95.0) | +77.5 (+70.0 to +85.0) |"
        in text
    )
    assert "| length | 31.25 | not measured | not measured |" in text
    assert "tuned is better than base." in text
    assert text.startswith("---\nlibrary_name: transformers\ntags: [finetune]\n")
    results.write_text("[]")
    with pytest.raises(Exception, match="--results: .*holds no object"):
        model_card.card(model_folder, "me/mine", None, results)


@pytest.mark.proof
def test_a_run_is_pushed_merged_with_its_receipt_and_no_path_of_this_machine(
    runs, tmp_path, the_hub, capsys
):
    assert export(runs / "one", "--push", "me/adapter") == 2
    assert "a folder of this machine that others cannot open" in capsys.readouterr().err
    assert export(runs / "one", "--merge", "--output", tmp_path / "m", "--push", "me/m") == 0
    seen = capsys.readouterr()
    assert "pushed to" in seen.out
    assert hub_server.TOKEN not in seen.out + seen.err
    card = the_hub.repos["me/m"]["README.md"].decode()
    assert str(runs) not in card
    receipt = json.loads((runs / "one/receipt.json").read_text())
    assert f"fingerprint `{receipt['train_data']['fingerprint']}`" in card
    assert "| adapter.r | 2 |" in card
    assert f"torch {receipt['versions']['torch']}" in card
