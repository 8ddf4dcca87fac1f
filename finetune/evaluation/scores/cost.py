"""What an answer costs: seconds, and money."""

from finetune.evaluation.scores.base import OfAnswer, Value
from finetune.generation.completions import Completion, Score

NOT_TIMED = Score(None, "the time was not measured")


def seconds() -> OfAnswer:
    """Return the seconds that an answer took; of a batch, its share."""
    line = "seconds for an answer: of the request, or of the batch divided by its answers"

    def of(completion: Completion) -> Value:
        return Score(completion.seconds) if completion.seconds else NOT_TIMED

    return OfAnswer("seconds", line, of, higher=False, is_share=False)


def cost(price_of_an_hour: float, of_a_million: tuple[float, float] | None = None) -> OfAnswer:
    """Return what a thousand answers like this one cost on a machine of this price.

    of_a_million: prices of tokens of the prompt and of the answer, for servers that count them.
    """
    line = "price of 1,000 answers like this one, from their seconds and the price of an hour"
    if of_a_million:
        line += "; of a server from its tokens and the price of a million"

    def of(completion: Completion) -> Value:
        if of_a_million and completion.billed:
            return 1_000 * sum(n * each / 1e6 for n, each in zip(completion.billed, of_a_million))
        if not completion.seconds:
            return NOT_TIMED
        return Score(1_000 * completion.seconds * price_of_an_hour / 3_600)

    return OfAnswer("cost of 1,000", line, of, higher=False, is_share=False)
