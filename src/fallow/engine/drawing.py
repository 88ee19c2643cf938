"""The token that follows a step, by a recipe: what an engine and its agent both come to."""

import numpy as np

from fallow.engine.contract import Drawn, Stepped
from fallow.policy.sampling import choose


def drawn_token(stepped: Stepped, drawn: Drawn) -> bytes | None:
    """The token after the last row of a step, as int32. `None` when the step led to no candidates, or when the token
    ends the answer."""
    if not (stepped.logit_count and stepped.k):
        return None
    k, size = stepped.k, stepped.logit_count * stepped.k
    ids = np.frombuffer(stepped.payload, np.int32, size)[-k:]
    logprobs = np.frombuffer(stepped.payload, np.float32, size, offset=4 * size)[-k:]
    token = ids[choose(ids, logprobs, drawn.recipe, drawn.nth)]
    return None if int(token) in drawn.ends else token.tobytes()
