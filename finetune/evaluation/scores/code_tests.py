"""Code that passes its tests, run in a sandbox without network and files."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from finetune import sandbox
from finetune.evaluation.scores.base import gap_of
from finetune.generation.completions import Completion, Prompt, Score

DEFAULT_COLUMN = "tests"
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class CodeTests:
    """1 if the answer's code runs and the tests in a column of its row, in Python, pass."""

    higher, is_share = True, True
    line = "1 if the answer's Python passes the tests of its row, in a sandbox"

    def __init__(self, column: str = DEFAULT_COLUMN, setting: str = "--scores code-tests") -> None:
        sandbox.require(setting)
        self.column = column
        self.name = "code tests" + (f" of {column}" if column != DEFAULT_COLUMN else "")

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._of, completions))

    def _of(self, completion: Completion) -> Score:
        if (gap := gap_of(completion, needs_reference=False)) is not None:
            return gap
        tests = self.tests_of(completion.prompt)
        if not tests:
            return Score(None, f"the row has no text of tests in {self.column}")
        found = sandbox.run(code_in(completion.text), tests)
        return Score(float(found.passed), found.reason)

    def tests_of(self, prompt: Prompt) -> str:
        """Return the tests of a row; "" if it has none."""
        tests = prompt.fields.get(self.column)
        if isinstance(tests, list) and all(isinstance(each, str) for each in tests):
            tests = "\n".join(tests)  # as in MBPP
        return tests if isinstance(tests, str) and tests.strip() else ""


def code_in(answer: str) -> str:
    """Return the code of an answer: its fenced blocks, one after the other, or all of it."""
    blocks = _FENCED.findall(answer)
    return "\n".join(blocks) if blocks else answer
