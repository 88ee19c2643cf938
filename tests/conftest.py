"""How Hypothesis draws under `make test`: the same examples in every run, and a failing one is said as it was found.

Shrinking may take Hypothesis five minutes, where pytest-timeout ends the process after three: what was found would be
lost with it. `pytest` alone draws new examples and shrinks.
"""

from hypothesis import Phase, settings

settings.register_profile(
    "same", parent=settings.get_profile("ci"), phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
