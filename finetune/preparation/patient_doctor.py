"""Make rows of what patients ask and a doctor answers, from rows with columns Patient and Doctor.

    finetune data patient_doctor sid6i7/patient-doctor --output data/patient_doctor

Every question begins "As a medical doctor, respond to this patient query: Patient:", and every
answer "Doctor:"; the markers <start> and <end> are removed. Near-duplicates never part. Without an
INPUT the dialogues are composed by rule: to try a recipe, never as advice.
"""

import argparse
import random

from finetune.config import paths
from finetune.data.formats import to_conversation
from finetune.data.problems import Problems
from finetune.preparation import sets
from finetune.preparation.frame import Frame

ASKED = "As a medical doctor, respond to this patient query: Patient: "
ANSWERED = "Doctor: "
COLUMNS = {"question": "Patient", "answer": "Doctor"}
MARKERS = ("<start>", "<end>")
PARTS = {
    "knee": "put your leg up", "ankle": "put your foot up",
    "shoulder": "do not lift anything heavy", "back": "walk a little every hour",
    "wrist": "wear a light bandage", "neck": "keep it warm", "thumb": "cool it for ten minutes",
    "elbow": "do not carry bags with that arm", "heel": "wear soft shoes",
    "hip": "do not climb stairs", "jaw": "eat soft food", "calf": "stretch it gently",
    "toe": "go barefoot at home", "thigh": "cool it with a wet cloth",
    "hand": "let others open jars for now", "rib": "sleep on the other side",
}  # fmt: skip
CAUSES = (
    "a long walk;a day in the garden;a football match;a bicycle tour;a move to another house;"
    "an afternoon of cleaning;a dance class;a day at the sea;a long drive;a morning on a ladder;"
    "a fall on the ice;a night on a sofa;a swim in the lake;a climb in the hills;"
    "a week of painting;a tennis lesson;a ride on a horse;a day of skiing;a bump against the door;"
    "a jump from a wall;a clumsy step;a day of carrying boxes;a run in new shoes;"
    "a game of bowling;an hour of digging;a boat trip;"
    "a visit to the gym;a fall from my bicycle;a long flight;a day at a loom"
).split(";")
ILLS = {
    "a cough": "Drink warm tea with honey.", "a sore throat": "Rest your voice.",
    "a headache": "Drink water and rest your eyes.", "a runny nose": "Breathe warm steam.",
    "a stiff jaw": "Eat soft food for now.", "a dry mouth": "Sip water often.",
    "a blocked ear": "Yawn and chew.", "an itchy eye": "Cool it with a wet cloth.",
    "a cold": "Sleep more than usual.", "a sunburn": "Stay in the shade.",
    "a blister": "Cover it with a plaster.", "a sore tongue": "Avoid hot food.",
    "an upset stomach": "Eat rice and toast.", "a bruise": "Cool it with ice in a towel.",
    "a hoarse voice": "Speak as little as possible.", "a stuffy nose": "Air the bedroom at night.",
}  # fmt: skip
NUMBERS = "two three four five six seven eight nine ten".split()
PEOPLE = ["I have", "My son has", "My daughter has", "My husband has", "My wife has"]
ENDS = ["What should I do?", "Is this normal?", "Do I need to see someone?"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "files, folders or globs of rows with columns Patient and Doctor, or a name on the Hub"
    parser.add_argument("inputs", nargs="*", metavar="INPUT", type=paths.argument, help=what)
    sets.add_arguments(parser, 3_000)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.inputs:
        sets.require_no_sizes(arguments)
        rows = _dialogues(frame)
        numbers = sets.parted(["\n".join(row.values()) for row in rows], arguments.seed)
        parts = {name: [rows[number] for number in own] for name, own in numbers.items()}
    else:
        parts = sets.drawn(compose, sets.sizes(arguments), arguments.seed)
    sets.write(frame, arguments, parts)


def _dialogues(frame: Frame) -> list[dict[str, str]]:
    """Return the rows of all inputs, without the markers; drop and count those with an empty side.

    Raise DataError that lists the rows without a text in Patient or Doctor.
    """
    found, problems = [], Problems()
    for row in frame.rows():
        sides = [row.values.get(column) for column in COLUMNS.values()]
        texts = [_bare(side) for side in sides if isinstance(side, str)]
        if len(texts) == 2 and not all(texts):
            frame.drop(row, "empty")
            continue
        with problems.noted(row):
            to_conversation(row, "question_answer", COLUMNS)
            found.append(dialogue(*texts))
    problems.num_rows = frame.read
    problems.raise_if_any()
    return found


def _bare(text: str) -> str:
    for marker in MARKERS:
        text = text.replace(marker, "")
    return text.strip()


def dialogue(patient: str, doctor: str) -> dict[str, str]:
    return {"question": ASKED + patient, "answer": ANSWERED + doctor}


def compose(source: random.Random) -> tuple[str, dict[str, str]]:
    """Return an invented dialogue, and what decides its split."""
    days, end = source.choice(NUMBERS), source.choice(ENDS)
    if source.random() < 0.5:
        part, cause = source.choice(list(PARTS)), source.choice(CAUSES)
        age = source.randrange(20, 80)
        patient = f"I am {age} years old. My {part} has hurt for {days} days, since {cause}. {end}"
        doctor = (
            f"Rest your {part} for some days, and {PARTS[part]}. If it is not better in a week, "
            f"let a doctor see it. Pain after {cause} often passes."
        )
        return f"{part} {cause}", dialogue(patient, doctor)
    ill, person = source.choice(list(ILLS)), source.choice(PEOPLE)
    patient = f"{person} had {ill} for {days} days. {end}"
    doctor = (
        f"Hello. {ill[0].upper()}{ill[1:]} for {days} days is common. {ILLS[ill]} "
        "If a fever comes with it, go to a doctor."
    )
    return ill, dialogue(patient, doctor)
