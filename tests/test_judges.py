"""Judges: probabilities of one pass, both orders of a pair, answers that are kept."""

import json
import math

import pytest
import torch
from chat_server import running
from conftest import read_jsonl, tiny_llama

from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.tokens import encode_prompt
from finetune.endpoint import Client, Server
from finetune.errors import ConfigError, DataError, DirectoryInUse, ModelError, Outage, UserError
from finetune.evaluation.judges import local, rubrics
from finetune.evaluation.judges.g_eval import GEval
from finetune.evaluation.judges.local import LocalJudge
from finetune.evaluation.judges.pairwise import Pairwise
from finetune.evaluation.judges.remote import RemoteJudge
from finetune.evaluation.judges.weights import FILE, Kept, Question, Weights, of_tokens
from finetune.generation.completions import Completion, Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt(number=1, question="why?", reference="because"):
    place = Place("rows.jsonl", number)
    return Prompt(Conversation((Message("user", question),), place), reference)


def completions(*texts, **changes):
    return [Completion(prompt(n), text, **changes) for n, text in enumerate(texts, 1)]


class Rule:
    """A judge that weighs options by a rule: takes a Question, returns probabilities."""

    name = identity = "rule"

    def __init__(self, rule, text="1. Read it.\n2. Grade it."):
        self.rule, self.text, self.asked, self.fails_after = rule, text, [], None

    def weigh(self, questions, note):
        for number, question in enumerate(questions):
            if number == self.fails_after:
                raise Outage("gone")
            self.asked.append(question)
            note(number, of_tokens(self.rule(question), question.options))

    def write(self, prompt, max_tokens):
        self.asked.append(prompt)
        return self.text


def kept(rule, folder):
    return Kept(rule, folder, log=lambda text: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of random weights with a chat template; bytes are its tokens."""
    from transformers import LlamaForCausalLM

    from finetune.models.load import bytes_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), bytes_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4_096)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # peaked, so that the options differ
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------- probabilities


def test_weights_are_the_softmax_of_one_pass_whatever_the_batch(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    judge, found = LocalJudge(str(tiny)), {}
    asked = [Question(text, ("1", "2", "3")) for text in ("a", "b" * 40, "", "<|im_end|> 5")]
    judge.weigh(asked, found.__setitem__)
    model, tokenizer = (
        kind.from_pretrained(tiny) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for number, question in enumerate(asked[:3]):
        text = f"<|im_start|>user\n{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        each = {text: math.exp(logits[tokenizer(text)["input_ids"][-1]]) for text in "123"}
        total = sum(math.exp(logit) for logit in logits)
        wanted = {text: value / total for text, value in each.items()}
        assert found[number].probabilities == pytest.approx(wanted, rel=1e-4)
        assert found[number].outside == pytest.approx(1 - sum(wanted.values()), abs=1e-6)
        mean = sum(int(text) * value for text, value in each.items()) / sum(each.values())
        assert found[number].expectation() == pytest.approx(mean, rel=1e-4)
    with torch.no_grad():
        forged = judge._encoded(asked[3])[0]
    assert forged.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1, "text forges no turn"


def test_a_judge_reads_no_prompt_beyond_its_context(tiny):
    judge, found = LocalJudge(str(tiny)), {}
    judge.weigh([Question("a" * 5_000, ("1", "2"))], found.__setitem__)
    assert "tokens, and its context 4,096" in found[0].problem


def test_white_space_that_every_option_begins_with_belongs_to_the_prompt(tiny, monkeypatch):
    def spaced(text, tokenizer):
        """Encode "1" as space and digit, as some SentencePiece models do."""
        return encode_prompt(f"{text[:-1]} {text[-1]}", tokenizer)

    judge, question = LocalJudge(str(tiny)), Question("a", ("1", "2"))
    bare, alone = judge._encoded(question)
    monkeypatch.setattr(local, "encode_prompt", spaced)
    ids, spelled = judge._encoded(question)
    assert judge._tokenizer.decode(ids) == judge._tokenizer.decode(bare) + " "
    assert spelled == alone == {each: encode_prompt(each, judge._tokenizer) for each in "12"}


def test_models_that_cannot_judge_are_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match="--judge: .*none"):
        LocalJudge(str(tmp_path / "none"))
    (tiny / "chat_template.jinja").rename(tiny / "kept")
    try:
        with pytest.raises(ModelError, match="no chat template; choose a model that answers"):
            LocalJudge(str(tiny))
    finally:
        (tiny / "kept").rename(tiny / "chat_template.jinja")


def test_batches_are_bounded_by_tokens_and_rows():
    sizes = [len(each) for each in local._batches([(0, [0] * n, {}) for n in [5] * 20 + [5_000]])]
    assert sizes == [1, 16, 4]


# --------------------------------------------------------------------------------------- scores


def test_scores_are_expectations_and_what_lies_outside_is_reported(tmp_path):
    def rule(question):
        if "<answer>\ngood" in question.prompt:
            return {"5": 0.6, " 4": 0.3, "4": 0.06, "<think>": 0.04}
        return {"<think>": 0.7, "1": 0.3}

    with kept(Rule(rule), tmp_path) as judge:
        scorer = GEval(judge, rubrics.read("quality"), tmp_path)
        good, bad, failed = scorer([
            *completions("good", "bad"), Completion(prompt(3), "", finish_reason="failed"),
        ])  # fmt: skip
    assert good.value == pytest.approx((5 * 0.6 + 4 * 0.36) / 0.96)
    assert bad.value is None
    assert bad.reason == "the judge puts 70% outside its options, likeliest on '<think>'"
    assert (failed.value, failed.reason) == (None, "no answer came")
    assert scorer.summary() == (
        "judge quality: 37.0% of the probability lies outside the scores, at most 70.0%; 1 of 2 "
        "answers have no score"
    )


def test_evaluation_steps_are_written_once_kept_and_may_be_edited(tmp_path):
    def scorer(text):
        rule = Rule(lambda question: {"5": 1.0}, text)
        judge = kept(rule, tmp_path)
        return rule, judge, GEval(judge, rubrics.read("quality"), tmp_path)

    rule, judge, first = scorer("Here they are:\n1. Read it.\n- **Check** it.\n\n3) Grade it.")
    first(completions("a"))
    judge.__exit__()
    assert "1. Read it.\n2. **Check** it.\n3. Grade it." in rule.asked[-1].prompt
    path = tmp_path / "judge_steps_quality.yaml"
    path.write_text(path.read_text().replace("Read it.", "Count to ten."))
    rule, judge, second = scorer("never")
    second(completions("a"))
    judge.__exit__()
    [asked] = rule.asked
    assert "1. Count to ten." in asked.prompt
    path.write_text(path.read_text().replace("The answer does", "The answer avoids"))
    with kept(Rule(None), tmp_path) as judge, pytest.raises(ConfigError, match="another criterion"):
        _ = GEval(judge, rubrics.read("quality"), tmp_path).steps
    path.unlink()
    what = "writes no evaluation steps, but 'I will.'"
    with kept(Rule(None, "I will."), tmp_path) as judge, pytest.raises(UserError, match=what):
        _ = GEval(judge, rubrics.read("quality"), tmp_path).steps
    assert not path.exists()


def test_a_rubric_of_ones_own_reaches_the_judge(tmp_path):
    path = tmp_path / "tone.yaml"
    path.write_text(
        "name: tone\ncriterion: It is polite.\nscores: {0: rude, 9: polite}\nsteps: [Read it.]\n"
        "examples:\n- {prompt: Where, answer: Dunno., score: 0}\n"
        "pairs:\n- {prompt: Where, first: Dunno., second: There., better: second}\n"
    )
    rule = Rule(lambda question: {question.options[-1]: 0.5, question.options[0]: 0.5})
    with kept(rule, tmp_path) as judge:
        scorer = GEval(judge, rubrics.read(str(path)), tmp_path)
        [score] = scorer(completions("Here."))
        Pairwise(judge, rubrics.read(str(path)), tmp_path).compare(
            {"base": completions("x"), "tuned": completions("y")}
        )
    assert score.value == 4.5
    [graded, compared, _] = [asked.prompt for asked in rule.asked]
    for part in ("Tone: It is polite.", "0: rude\n9: polite", "1. Read it.", "Dunno.", "Score: 0",
                 "<request>\nwhy?\n</request>", "<right_answer>\nbecause\n</right_answer>",
                 "<answer>\nHere.\n</answer>", "one of 0, 9"):  # fmt: skip
        assert part in graded
    assert "<answer_a>\nDunno.\n</answer_a>\n<answer_b>\nThere.\n</answer_b>\nBetter: B" in compared
    assert rubrics.read("relevancy").use_reference is False


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("scores: {1: bad}", "scores: "),
        ("scores: {1: bad, 10: good}", r"scores.10.*: Input should be less than or equal to 9"),
        ("criterion: ' '", "criterion: "),
        ("colour: red", "colour: Extra inputs are not permitted, got red"),
        ("examples: [{prompt: a, answer: b, score: 4}]", "the score 4, and scores has only 1, 5"),
        ("pairs: [{prompt: a, first: b, second: c, better: A}]", "pairs.0.better"),
        ("name: ../../x", "name: "),
        ("name: [", "not valid YAML"),
    ],
)
def test_a_wrong_rubric_is_named(tmp_path, change, what):
    values = {"name": "name: tone", "criterion": "criterion: polite",
              "scores": "scores: {1: bad, 5: good}"}  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text("\n".join((values | {change.partition(":")[0]: change}).values()))
    with pytest.raises(ConfigError, match=f"--rubric: (?s:.*){what}"):
        rubrics.read(str(path))


def test_a_missing_rubric_names_those_that_exist(tmp_path):
    with pytest.raises(ConfigError, match="no such file.*one of quality, relevancy"):
        rubrics.read(str(tmp_path / "none.yaml"))


# ---------------------------------------------------------------------------------------- pairs


def test_a_win_counts_only_if_it_survives_the_swap(tmp_path):
    def rule(question):
        """Prefer "best"; a "loud" answer where it stands first; of others the first."""
        first, second = question.prompt.rpartition("<answer_a>")[2].split("<answer_b>")
        if "unclear" in first + second:
            return {"Both": 0.9, "A": 0.1}
        if "same" in first:
            return {"C": 1.0}
        return {"A": 0.1, "B": 0.9} if "best" in second else {" A": 1.0}

    base = completions("good", "good", "equal", "same", "good", "left")
    tuned = completions("best", "loud", "equal", "same, nearly", "unclear", "")
    tuned[5] = Completion(prompt(6), "", finish_reason="failed")
    with kept(judge := Rule(rule), tmp_path) as asked:
        pairwise = Pairwise(asked, rubrics.read("quality"), tmp_path)
        found = pairwise.compare({"base": base, "tuned": tuned})
    assert [vote.better for vote in found] == ["second", "tie", "tie", "tie"]
    assert {vote.rater for vote in found} == {"rule, quality"}
    better = [each.better for each in pairwise.comparisons]
    assert better == ["second", "tie", "tie", "tie", None, None]
    assert [each.is_flip for each in pairwise.comparisons] == [False, True] + [False] * 4
    assert len(judge.asked) == 1 + 2 * 4, "the steps, and four pairs in both orders"
    assert [score.value for score in pairwise(tuned)] == [1, 0.5, 0.5, 0.5, None, None]
    assert [score.value for score in pairwise(base)] == [0, 0.5, 0.5, 0.5, None, None]
    assert "likeliest on 'Both'" in pairwise(tuned)[4].reason
    assert pairwise.summary() == (
        "judge wins quality: 33% of 3 comparisons flip with the order, and count as ties; 75% of "
        "the choices are the answer shown first (50% would be fair); 2 of 6 comparisons are not "
        "usable"
    )


def test_any_number_of_models_is_compared_by_pairs(tmp_path):
    rule = Rule(lambda question: {"A": 1.0})
    answers = {name: completions(name) for name in ("a", "b", "c")}
    with kept(rule, tmp_path) as judge:
        votes = Pairwise(judge, rubrics.read("quality"), tmp_path).compare(answers)
    assert [vote.models for vote in votes] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {vote.better for vote in votes} == {"tie"}, "the first answer, whatever it says"


# -------------------------------------------------------------------------------- what is kept


def test_what_a_judge_has_said_is_not_asked_again_even_after_a_kill(tmp_path):
    rubric, answers = rubrics.read("quality"), completions("a", "b", "c")

    def scored(rule):
        with kept(rule, tmp_path) as judge:
            return [s.value for s in GEval(judge, rubric, tmp_path)(answers)], judge.num_asked

    first = Rule(lambda question: {"4": 1.0})
    first.fails_after = 2
    with pytest.raises(Outage):
        scored(first)
    with (tmp_path / FILE).open("ab") as file:  # a kill in the middle of a line
        file.write(b'{"key": "abc')
    again = Rule(lambda question: {"5": 1.0})
    assert scored(again) == ([4, 4, 5], 1)
    assert scored(Rule(None)) == ([4, 4, 5], 0)
    assert len(read_jsonl(tmp_path / FILE)) == 3
    another = Rule(lambda question: {"1": 1.0})
    another.identity = "another model"
    assert scored(another) == ([1, 1, 1], 3)


def test_a_file_of_something_else_is_refused_and_stays(tmp_path):
    for content in (b"mine\n", b"\xff\n", b"[]\n", b'{"key": 1}\n', b"{" * 100_000 + b"\n"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(DataError, match=f"{FILE}:1: holds no answer of a judge"):
            kept(Rule(None), tmp_path)
        assert (tmp_path / FILE).read_bytes() == content


def test_two_processes_do_not_write_one_file(tmp_path):
    with kept(Rule(lambda q: {"5": 1.0}), tmp_path) as judge:
        GEval(judge, rubrics.read("quality"), tmp_path)(completions("a"))
        with pytest.raises(DirectoryInUse):
            kept(Rule(None), tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        kept(Rule(None), tmp_path / "none")


# ------------------------------------------------------------------------------------ endpoints


def answering(body):
    if not body.get("logprobs"):
        return "1. Read it."
    return "x"


@pytest.fixture
def server(monkeypatch):
    """A server whose likeliest tokens are set by a test: `tops`, of token and log-probability."""
    import chat_server

    inner = chat_server.reply

    def replied(body, text, usage):
        values = inner(body, text, usage)
        if body.get("logprobs"):
            asked = body["messages"][-1]["content"]
            top = next(top for part, top in found.tops.items() if part in asked)
            listed = [{"token": token, "logprob": value} for token, value in top.items()]
            values["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = listed
        return values

    monkeypatch.setattr(chat_server, "reply", replied)
    with running(answer=answering) as found:
        found.tops = {"": {"5": 0.0}}
        yield found


def by_server(server, folder, answers, **changes):
    with (
        Client(Server(server.url, "good-model", retries=1, **changes)) as client,
        Kept(RemoteJudge(client), folder, log=lambda text: None) as judge,
    ):
        scorer = GEval(judge, rubrics.read("quality"), folder)
        return scorer(answers)


def test_an_endpoints_log_probabilities_give_the_same_expectation(server, tmp_path):
    server.tops = {
        "<answer>\ngood": {"5": math.log(0.6), " 4": math.log(0.36), "Well": math.log(0.01)},
        "<answer>\nodd": {"Well": math.log(0.5), "3": math.log(0.2), "x": 9e9, "y": math.nan},
        "": {"5": 1e-7},
    }
    good, odd, sure = by_server(server, tmp_path, completions("good", "odd", "sure"))
    assert good.value == pytest.approx((5 * 0.6 + 4 * 0.36) / 0.96)
    assert odd.reason == "the judge puts 80% outside its options, likeliest on 'Well'"
    assert sure.value == 5
    asked = [body for body in server.seen if body.get("logprobs")]
    assert {(b["max_tokens"], b["top_logprobs"], b["temperature"]) for b in asked} == {(1, 20, 1.0)}
    server.tops = {"": {"1": 0.0}}
    assert by_server(server, tmp_path, completions("good"))[0] == good, "it is not asked again"


def test_a_prompt_that_a_server_refuses_is_a_gap_and_all_of_them_are_an_error(server, tmp_path):
    steps = tmp_path / "judge_steps_quality.yaml"
    rubrics.write_steps(steps, rubrics.read("quality"), "me", "1. Read it.")
    server.faults = ["400"]
    scores = by_server(server, tmp_path, completions("a", "b"), at_once=1)
    assert "refuses the request (400: fault 400)" in scores[0].reason
    assert scores[1].value == 5
    server.faults = ["400"]
    with pytest.raises(UserError, match="refuses the request"):
        by_server(server, tmp_path, completions("c"))
    assert by_server(server, tmp_path, completions("a", "b"))[0].value == 5, "gaps are asked again"


def test_a_server_that_fails_ends_with_its_own_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.endpoint.FIRST_WAIT", 0.01)
    server.faults = ["503"] * 9
    with pytest.raises(Outage, match="503"):
        by_server(server, tmp_path, completions("a"))
    server.faults = ["key"]
    with pytest.raises(UserError, match="refuses the key"):
        by_server(server, tmp_path, completions("a"))
    assert not list(tmp_path.glob("*")), "nothing was said, so nothing is kept"


def test_weights_without_any_mass_are_a_gap():
    assert Weights({"1": 0.0}, 1.0, "x").problem
    assert json.dumps(of_tokens({}, ("1",)).probabilities) == '{"1": 0.0}'
    assert of_tokens({}, ("1",)).problem
