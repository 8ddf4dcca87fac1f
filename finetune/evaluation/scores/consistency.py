"""Whether a model answers alike what means the same: paraphrases of a question, or samples."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from finetune.data import clusters
from finetune.generation.completions import Completion, Score, no_answer
from finetune.preparation.rouge import rouge_l

ALONE = Score(None, "no other answer to the same question")


class Consistency:
    """ROUGE-L of an answer with the others of its group, on average.

    column: rows with the same value of it ask the same; None: rows with the same messages, such as
    several samples.
    """

    higher, is_share = True, True

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        self.name = f"consistency by {column}" if column else "consistency"
        self.line = "words shared with the model's other answers to the same question, in order"

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        groups = defaultdict[Hashable, list[int]](list)
        scores = [ALONE] * len(completions)
        for number, each in enumerate(completions):
            group = self._group(each)
            if each.finish_reason == "failed":
                scores[number] = no_answer(each)
            elif group is None:
                scores[number] = Score(None, f"the row has no {self.column}")
            else:
                groups[group].append(number)
        for members in groups.values():
            found = [clusters.words(completions[number].text) for number in members]
            for place, number in enumerate(members):
                others = [_alike(found[place], each) for i, each in enumerate(found) if i != place]
                if others:
                    scores[number] = Score(sum(others) / len(others))
        return scores

    def _group(self, completion: Completion) -> Hashable:
        if self.column is None:
            return tuple(
                (each.role, each.content, each.context) for each in completion.prompt.messages
            )
        value = completion.prompt.fields.get(self.column)
        return None if value is None else str(value)


def _alike(one: Sequence[bytes], other: Sequence[bytes]) -> float:
    return rouge_l(one, other) if one or other else 1.0
