"""How the tokens of one answer are chosen from the model's distributions, so that whoever has these comes to the same
tokens."""

import msgspec


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a choice depends on, but for the distribution. Ranges are the request's, checked at the edge."""

    temperature: float = 0.0
    """0 takes the most probable token, the lowest id among equals."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0
    """64 bits without a sign."""
    index: int = 0
    """Tells the choices of one seeded request apart."""
