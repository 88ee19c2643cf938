"""A request that is ready to be generated: `requests.py` read it, `generation.py` answers it."""

from collections.abc import Sequence

import msgspec

from fallow.gateway.generation import Tally
from fallow.gateway.replies import Answer
from fallow.gateway.requests import Plan
from fallow.gateway.schema import PromptTokensDetails, Usage
from fallow.gateway.text import TextModel


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt for each choice, equal ones next to each other."""

    plan: Plan
    model: TextModel
    prompts: list[list[int]]
    max_new_tokens: int
    answer: Answer

    @property
    def prompt_tokens(self) -> int:
        """A prompt counts once, however many choices it has."""
        return sum(len(prompt) for prompt in self.prompts[:: self.plan.choices])

    def usage(self, tallies: Sequence[Tally]) -> Usage:
        """What was used; the first choice of a prompt says what was cached of it."""
        completion_tokens = sum(tally.completion_tokens for tally in tallies)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(tally.cached_tokens for tally in tallies[:: self.plan.choices])
            ),
        )
