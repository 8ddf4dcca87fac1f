"""Personal data is found by kind, checked by its checksum, and replaced consistently."""

import json
import os
import random
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.__main__ import main
from finetune.preparation.personal import KINDS, find
from finetune.preparation.scrub import scrub

KEY = "sk-" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Write to ann.o'neil+x@mail.example.co.uk.", {"email": "ann.o'neil+x@mail.example.co.uk"}),
        ("<jörg@müller.de>, please", {"email": "jörg@müller.de"}),
        ("mailto:a@b.io?subject=x", {"email": "a@b.io"}),
        ("user@localhost, a @ b.com, @name, x@y", {}),
        ("call (415) 555-2671 now", {"phone": "(415) 555-2671"}),
        ("415.555.2671", {"phone": "415.555.2671"}),
        ("from Berlin +49 30 901820,", {"phone": "+49 30 901820"}),
        ("+14155552671", {"phone": "+14155552671"}),
        ("my phone number is 4155552671.", {"phone": "4155552671"}),
        ("order 4155552671", {}),
        ("tel: 030 901820", {"phone": "030 901820"}),
        ("in 1990-2000, on 2026-01-31, 31/01/2026 and 1500 - 300 = 1200", {}),
        ("<<48/2=24>> 1,234,567.89 3.14159265 12:30:45 £4155552671", {}),
        ("https://example.org/415-555-2671/a", {}),
        ("4111 1111 1111 1111", {"card": "4111 1111 1111 1111"}),
        ("5500-0000-0000-0004", {"card": "5500-0000-0000-0004"}),
        ("378282246310005, 6011111111111117", {"card": ["378282246310005", "6011111111111117"]}),
        ("4111 1111 1111 1112", {}),
        ("355909190063-746", {}),
        ("Numismatics 7\u20138 (1995\u20131996), p. 209", {}),
        ("0000 0000 0000 0000", {}),
        ("GB82 WEST 1234 5698 7654 32 IS MINE", {"iban": "GB82 WEST 1234 5698 7654 32"}),
        ("de89370400440532013000", {"iban": "de89370400440532013000"}),
        ("GB82 WEST 1234 5698 7654 33", {}),
        ("ping 8.8.8.8, or 2001:4860:4860::8888", {"ip": ["8.8.8.8", "2001:4860:4860::8888"]}),
        ("10.0.0.1 127.0.0.1 192.168.1.1 192.0.2.7 ::1 fe80::1", {}),
        ("version 4.2.2.1, v8.8.8.8, 1.2.3.4.5, std::vector 12:30:45", {}),
        (f"use {KEY}!", {"key": KEY}),
        ("AKIA" + "ABCDEFGH23456789", {"key": "AKIA" + "ABCDEFGH23456789"}),
        ("ghp_" + "a1" * 18, {"key": "ghp_" + "a1" * 18}),
        ("password: hunter2!Xx", {"key": "hunter2!Xx"}),
        ("the password is required; token: none; secret = yes", {}),
        ("-----BEGIN RSA PRIVATE KEY-----\nab\n-----END RSA PRIVATE KEY-----",
         {"key": "-----BEGIN RSA PRIVATE KEY-----\nab\n-----END RSA PRIVATE KEY-----"}),
        ("ask-me-anything-about-risk-management", {}),
    ],
)  # fmt: skip
def test_each_kind_is_found_and_what_only_looks_like_it_is_not(text, found):
    expected = [
        (kind, value)
        for kind, values in found.items()
        for value in (values if isinstance(values, list) else [values])
    ]
    assert [(each.kind, text[each.start : each.end]) for each in find(text)] == expected


def test_national_numbers_are_those_of_the_named_countries():
    assert find("at 020 7946 0018") == []
    assert [each.kind for each in find("at 020 7946 0018", regions=["GB"])] == ["phone"]


def test_equal_data_of_one_row_has_the_same_placeholder():
    row = [
        "I am ann@example.org, +1 415 555 2671.", "Bob@example.org?",
        "No: ANN@example.org or (415) 555-2671, never bob@example.org.",
    ]  # fmt: skip
    made, counts = scrub(row, regions=["US"])
    assert made == [
        "I am [EMAIL_1], [PHONE_1].", "[EMAIL_2]?",
        "No: [EMAIL_1] or [PHONE_2], never [EMAIL_2].",
    ]  # fmt: skip
    assert counts == {"email": 4, "phone": 2}


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("aZ09 .@:-+()/[]\n'\"=é\u0660\ud800"), max_size=80))
@example("1" * 5_000)
@example("a." * 5_000 + "@")
@example("password is " * 1_000)
def test_any_text_is_scrubbed_and_scrubbing_again_changes_nothing(text):
    [made], _ = scrub([text])
    assert scrub([made])[0] == [made]
    end = 0
    for each in find(text):
        assert end <= each.start < each.end <= len(text)
        assert each.kind in KINDS
        end = each.end


def test_scrub_searches_all_columns_and_leaves_other_rows_alone(tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "I am a@b.org"}], "id": 7, "mail": "A@b.org"},
        {"messages": [{"role": "user", "content": "hi"}], "id": 8, "extra": [1.5, None, "x"]},
    ]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    files = [str(source), "--output", str(out)]
    assert main(["data", "scrub", *files]) == 0
    rows[0]["messages"][0]["content"], rows[0]["mail"] = "I am [EMAIL_1]", "[EMAIL_1]"
    assert read_jsonl(out) == rows
    expected = "scrub: 2 rows read, 2 written; 2 email; 1 rows changed"
    assert expected in capsys.readouterr().err
    assert main(["data", "scrub", *files, "--force", "--kinds", "phone,ip"]) == 0
    assert out.read_text() == "".join(json.dumps(row) + "\n" for row in read_jsonl(source))
    for option, message in (("--kinds=name", "kinds are key, email"), ("--regions=UK", "country")):
        with pytest.raises(SystemExit):
            main(["data", "scrub", *files, option])
        assert message in capsys.readouterr().err


@pytest.mark.skipif("FINETUNE_REAL_DATA" not in os.environ, reason="FINETUNE_REAL_DATA is not set")
def test_real_rows_without_personal_data_stay_as_they_are():
    """Arithmetic, years, scores and ISBNs are none; 9,000 rows."""
    real = Path(os.environ["FINETUNE_REAL_DATA"])
    rows = read_jsonl(real / "gsm8k/train.jsonl") + read_jsonl(real / "benchmarks/arc_easy.jsonl")
    rows = random.Random(0).sample(rows, 2_000)
    found = [each for row in rows for text in row.values() for each in find(str(text))]
    assert found == []
