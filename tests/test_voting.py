"""The page of blind votes, the command that rates them, and what evaluate asks of a judge."""

import argparse
import functools
import html
import json

import pytest
from browser import browse, require_narrow
from conftest import pretrained, read_jsonl, tiny_llama
from test_judges import CHATML, Rule, completions

from finetune import page
from finetune.__main__ import main
from finetune.errors import ConfigError, DataError, UserError
from finetune.evaluation import judging, ratings, votes, voting
from finetune.evaluation.judges.weights import FILE
from finetune.evaluation.results import Results
from finetune.evaluation.scores import of
from finetune.evaluation.vote_command import report
from finetune.evaluation.votes import MODEL, Vote

STRANGE = "naïve \U0001f642 </script><script>document.title = 'broken'</script> \u2028 \\ \x00"
ANSWERS = {
    "my-base": completions("no", "same", STRANGE, "one"),
    "my-tuned": completions("yes", "same", "plain", "two", finish_reason="length"),
}


# --------------------------------------------------------------------------------------- a page


def test_a_page_shows_different_answers_in_sides_by_chance_and_hides_their_models():
    answers = {name: completions(*[f"{name} {n}" for n in range(200)]) for name in ("b", "t")}
    shown = voting.pairs(answers, 1)
    assert shown == voting.pairs(answers, 1)
    places = [pair["row"] for pair in shown]
    assert places != sorted(places)
    assert set(places) == {each.prompt.place for each in answers["b"]}
    sides = [pair["answers"][0][0] for pair in shown]
    assert 70 < sides.count("b") < 130
    assert sides != [pair["answers"][0][0] for pair in voting.pairs(answers, 2)]
    assert len({pair["key"] for pair in shown}) == 200, "equal keys would tell models apart"
    made = voting.html(voting.pairs(ANSWERS, 3), 3)
    assert "my-base" not in made
    assert "my-tuned" not in made
    assert len(voting.pairs(ANSWERS, 3)) == 3, "equal answers need no vote"
    assert len(voting.pairs(ANSWERS | {"third": completions(*"abcd")}, 3)) == 11


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "votes.html"
    assert voting.write(path, {"a": completions("x"), "b": completions("x")}, "--votes-page") == 0
    assert not path.exists()
    assert voting.write(path, ANSWERS, "--votes-page") == 3
    assert path.read_text().startswith(page.MARK)
    assert voting.seed_of(ANSWERS) != voting.seed_of({"a": completions("x")})
    path.write_text("mine")
    with pytest.raises(UserError, match="--votes-page: .* exists"):
        voting.write(path, ANSWERS, "--votes-page")


# Votes by keys and a click, goes back, reloads what was kept, and saves.
PRESS = """
const press = (key, target = document) => target.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const seen = () => document.body.innerText;
HTMLAnchorElement.prototype.click = () => {};  // a download would keep the browser open
let text = "", names = /my-base|my-tuned/.test(seen());
URL.createObjectURL = (blob) => { blob.text().then((given) => {
  text = given;
  const out = document.createElement("pre");
  out.id = "exported"; out.textContent = text; document.body.append(out);
  document.title = JSON.stringify(result);
}); return "data:,"; };
const result = {first: document.getElementById("place").textContent};
press("ArrowRight"); press("s"); press("t");
names = names || /my-base|my-tuned/.test(seen());
result.end = document.getElementById("place").textContent;
press("Backspace");
document.querySelector("[data-better=first]").click();
press("a", document.getElementById("rater"));
document.getElementById("rater").value = "Anna";
document.getElementById("rater").dispatchEvent(new Event("input"));
state.votes = {}; load();
result.kept = Object.keys(state.votes).length;
result.pressed = document.querySelectorAll("[aria-pressed=true]").length;
result.named = names;
press("e");
"""


@pytest.mark.proof
def test_votes_are_given_by_keys_kept_and_exported(tmp_path):
    path = tmp_path / "votes.html"
    voting.write(path, ANSWERS, "--votes-page")
    seen = browse(path, PRESS)
    assert seen.console == []
    result = json.loads(html.unescape(seen.title))
    assert result == {
        "first": "1 of 3, 0 voted", "end": "3 of 3, 2 voted", "kept": 3, "pressed": 1,
        "named": False,
    }  # fmt: skip
    exported = seen.dom.partition('<pre id="exported">')[2].partition("</pre>")[0]
    (tmp_path / "votes.jsonl").write_text(html.unescape(exported))
    found = votes.read([str(tmp_path / "votes.jsonl")])
    assert [vote.better for vote in found] == ["second", "first", "tie"]
    assert {vote.rater for vote in found} == {"Anna"}
    texts = {(name, each.prompt.place): each.text for name in ANSWERS for each in ANSWERS[name]}
    for vote in found:
        assert vote.answers == tuple(texts[model, vote.row] for model in vote.models)
    lines = (tmp_path / "votes.jsonl").read_text().split("\n")  # an answer has another line end
    assert [json.loads(line)["seed"] for line in lines[:-1]] == 3 * [voting.seed_of(ANSWERS)]


@pytest.mark.proof
def test_a_browser_that_keeps_nothing_says_so(tmp_path):
    path = tmp_path / "votes.html"
    voting.write(path, ANSWERS, "--votes-page")
    script = """Storage.prototype.setItem = () => { throw new Error("full"); };
      move(1); document.title = document.getElementById("note").textContent;"""
    assert browse(path, script).title.startswith("This browser keeps nothing: save your votes")


@pytest.mark.proof
def test_the_page_fits_a_narrow_screen(tmp_path):
    path = tmp_path / "votes.html"
    voting.write(path, ANSWERS, "--votes-page")
    require_narrow(path)


# ------------------------------------------------------------------------------------- ratings


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals are tested in test_votes.py; here their digits do not matter."""
    monkeypatch.setattr(ratings, "rate", functools.partial(ratings.rate, draws=40))


def vote(number, better, rater="Anna", by="person", models=("base", "tuned")):
    prompt = ({"role": "user", "content": f"question {number}"},)
    return Vote(f"rows.jsonl:{number}", prompt, models, (f"{models[0]}!", f"{models[1]}!"), better,
                rater, by)  # fmt: skip


def test_people_and_judges_are_rated_apart_and_compared(tmp_path, capsys):
    people = [vote(n, "second" if n % 3 else "first") for n in range(40)]
    by_ben = {1: "first", 2: "first", 3: "second"}
    people += [vote(n, by_ben[n], "Ben", models=("tuned", "base")) for n in by_ben]
    judged = [vote(n, "second" if n % 3 or n % 2 else "first", "m, quality", MODEL)
              for n in range(120)]  # fmt: skip
    votes.write(tmp_path / "people.jsonl", [*people, people[0]])
    votes.write(tmp_path / "judge.jsonl", judged)
    made = tmp_path / "preferences.jsonl"
    files = [str(tmp_path / name) for name in ("people.jsonl", "judge.jsonl")]
    assert main(["votes", *files, "--equal", "length", "--preferences", str(made)]) == 0
    found = capsys.readouterr()
    assert "note: 1 votes repeat an earlier one of the same rater" in found.err
    for line in (
        "43 votes by 2 people, on 40 prompts", "tuned      1054",
        "people agree by Krippendorff's alpha 1.00", "people prefer the answer on side A in 37%",
        "120 votes by m, quality", "agrees with people on 82% of 40 pairs, Cohen's kappa",
        "tuned gets 65.7% of the points against base (", "by it alone 83.3%", "alone 65.0%",
        "40 preference rows; without a majority 0", "length: the votes do not say what it does",
    ):  # fmt: skip
        assert line in found.out
    assert read_jsonl(made)[0]["chosen"] == [{"role": "assistant", "content": "base!"}]


def test_names_in_files_of_others_cannot_write_to_the_terminal(tmp_path, capsys):
    given = [
        vote(n, better, models=("\x1b[31mx", "y")) for n, better in enumerate(["first", "second"])
    ]
    votes.write(tmp_path / "votes.jsonl", given)
    assert main(["votes", str(tmp_path / "votes.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "\u241b[31mx" in out
    assert "\x1b" not in out


def test_wrong_files_and_options_of_votes_are_exit_2(tmp_path, capsys):
    assert main(["votes", str(tmp_path / "none.jsonl")]) == 2
    assert "should be a file of votes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["votes", "x", "--equal", "colour"])
    votes.write(tmp_path / "votes.jsonl", [vote(1, "tie")])
    (tmp_path / "taken").write_text("mine")
    taken = ["--preferences", str(tmp_path / "taken")]
    assert main(["votes", str(tmp_path / "votes.jsonl"), *taken]) == 2


def test_a_report_of_judges_alone_needs_no_people():
    lines = report([vote(1, "first", "m", MODEL), vote(2, "second", "m", MODEL)])
    assert lines[0].startswith("2 votes by m, on 2 prompts")
    assert len(lines) == 4


# ------------------------------------------------------------------------------------ evaluate


def parsed(*arguments, **others):
    parser = argparse.ArgumentParser()
    judging.add_arguments(parser)
    parser.set_defaults(**{"output": None, "report": None, "trust_remote_code": False, **others})
    return parser.parse_args([*map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--pairwise"], "--pairwise: would be ignored without --judge"),
        (["--rubric", "quality"], "--rubric: would be ignored without --judge"),
        (["--judge", "http://localhost:1/v1"], "add --judge-model NAME"),
        (["--judge", "x", "--judge-model", "y"], "--judge-model: would be ignored"),
        (["--judge", "x", "--judge-key", "y"], "--judge-key: would be ignored"),
        (["--judge", "x", "--pairwise", "--labels", "y"], "--pairwise gives none"),
        (["--judge", "x", "--rubric", "quality", "--rubric", "quality"], "two have the name"),
        (["--judge", "x", "--rubric", "none"], "--rubric: .*none"),
        (["--judge", "x"], "add --report FOLDER, or evaluate a run directory"),
        (["--votes-page", "none/x.html"], "--votes-page: .* its folder does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, what):
    with (
        pytest.raises((UserError, ConfigError), match=what),
        judging.opened(parsed(*arguments), None),
    ):
        pass


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Evaluate answers of base and tuned with a judge by rule, in a run directory."""
    monkeypatch.setattr(judging, "_opened", lambda arguments, stack: Rule(rule))
    answers = {
        "base": completions(*[f"base {n % 3}" for n in range(60)]),
        "tuned": completions(*[f"tuned {n % 3}" for n in range(60)]),
    }

    def rule(question):
        shown = question.prompt.rpartition("<request>")[2]
        if "A" in question.options:
            return {"A" if "tuned" in shown.split("<answer_b>")[0] else "B": 1.0}
        return {"5" if "tuned" in shown else "2": 0.5, "4": 0.5}

    def run(*arguments):
        prompts = [each.prompt for each in answers["base"]]
        with judging.opened(parsed("--judge", "m", *arguments, report=tmp_path), None) as found:
            scorers = found.scorers_of(answers)
            by_name = {each.name: each for each in scorers}
            results = Results(prompts, range(60), answers, of(scorers, answers), by_name)
            return results, list(found.report(results))

    return run


def test_a_judges_scores_are_corrected_by_labels_of_people(judged, tmp_path):
    results, lines = judged()
    assert (results.mean("judge quality", "base"), results.mean("judge quality", "tuned")) == (
        3,
        4.5,
    )
    assert lines == [
        "judge quality: 0.0% of the probability lies outside the scores, at most 0.0%; 0 of 120 "
        "answers have no score"
    ]
    labelled = [
        {"row": f"rows.jsonl:{n + 1}", "base": f"base {n % 3}", "base_label": 2 + n % 2,
         "tuned": f"tuned {n % 3}", "tuned_label": 3 + n % 2}
        for n in range(40)
    ]  # fmt: skip
    labelled += [{"row": "rows.jsonl:1", "base": "an older answer", "base_label": 1}]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in labelled))
    _, lines = judged("--labels", path)
    assert lines[1:3] == [
        "1 labels are of other answers than these, and do not count",
        lines[2],
    ]
    assert lines[2].startswith("judge quality beside 80 labels of people: alpha (interval) 0.")
    assert lines[3].startswith("judge quality of base, corrected by people: 2.50 (2.3")
    assert lines[4].startswith("judge quality of tuned, corrected by people: 3.50 (3.3")
    assert lines[5] == (
        "judge quality, tuned against base, corrected by people: +1.00 (+1.00 to +1.00); the judge "
        "alone +1.50, 40 labels alone +1.00"
    )


def test_a_judge_of_pairs_adds_a_score_ratings_and_its_votes(judged, tmp_path):
    results, lines = judged("--pairwise", "--votes-page", tmp_path / "page.html")
    assert results.mean("judge wins quality", "tuned") == 1
    assert "0% of 60 comparisons flip" in lines[0]
    assert "a model without a rating has won, or lost, all its votes; collect more" in lines
    assert "60 pairs to vote on" in lines[-1]
    kept = tmp_path / judging.VOTES
    assert len(votes.read([str(kept)])) == 60
    judged("--pairwise", "--rubric", "relevancy")
    assert len(votes.read([str(kept)])) == 120, "votes by another rubric are added"
    judged("--pairwise")
    assert len(votes.read([str(kept)])) == 120
    kept.write_text("mine\n")
    with pytest.raises(DataError, match="should be a vote in JSON"):
        judged("--pairwise")
    assert kept.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"row": "a", "base": "b"}', "no line has a column such as tuned_label"),
        ('{"row": "a", "base": "b", "base_label": "good"}', "'base_label' should be a number"),
        ('{"row": "a", "base": "b", "base_label": NaN}', "should be finite"),
        ('{"base": "b", "base_label": 3}', "a label needs the columns 'row' and 'base'"),
        ("[]", "should be an object in JSON"),
        ("\ufeff", "no line has a column"),
        ("{", "should be an object in JSON"),
    ],
)
def test_wrong_labels_are_named_before_any_model_answers(judged, tmp_path, line, what):
    (tmp_path / "labels.jsonl").write_text(line)
    with pytest.raises(DataError, match=what):
        judged("--labels", tmp_path / "labels.jsonl")


@pytest.mark.proof
def test_evaluate_with_a_model_as_judge_from_end_to_end(workshop, tmp_path, capsys):
    base = workshop.train("base", train__max_steps=1) / "model"
    tuned = workshop.train(
        "tuned", **pretrained(base), train__max_steps=3, data__eval_fraction=0.3,
        optimizer__lr=0.05,
    )  # fmt: skip
    grader, comparer = (judge_between(*both, tmp_path / both) for both in ("15", "AB"))
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("name: r\ncriterion: c\nscores: {1: bad, 5: good}\nsteps: [Read.]\n")
    asked = ["evaluate", str(tuned), "--judge", str(grader), "--rubric", str(rubric),
             "--max-new-tokens", "8", "--examples", "0"]  # fmt: skip
    page = tmp_path / "votes.html"
    assert main([*asked, "--votes-page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "judge r: 0.0% of the probability lies outside the scores" in out
    assert f"{page}: " in out
    folder = tuned / "evaluation"
    kept = read_jsonl(folder / FILE)
    assert {*kept[0]["probabilities"]} == {"1", "5"}
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["rubric"] == [str(rubric)]
    assert main(asked) == 0
    assert read_jsonl(folder / FILE) == kept, "nothing is asked twice"
    capsys.readouterr()
    asked[3] = str(comparer)
    assert main([*asked, "--pairwise"]) == 0
    assert "comparisons flip with the order" in capsys.readouterr().out
    assert main(["votes", str(folder / judging.VOTES)]) == 0
    assert "rating" in capsys.readouterr().out


def judge_between(one, other, folder):
    """Save a model that puts all its probability on two tokens."""
    import torch
    from transformers import LlamaForCausalLM

    from finetune.models.load import bytes_tokenizer

    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4_096))
    head, row = model.lm_head.weight.data.zero_(), 50 * torch.randn(32)
    head[tokenizer.convert_tokens_to_ids(one)] = row
    head[tokenizer.convert_tokens_to_ids(other)] = -row
    model.save_pretrained(folder)
    return folder
