"""How much is done for an answer beyond computing it."""

from enum import StrEnum


class ServiceTier(StrEnum):
    """What a client asks for, in the OpenAI API's words."""

    DEFAULT = "default"
    PRIORITY = "priority"
    """A loss of devices should not hold it up: another chain stands by, where devices are idle."""


class Standby(StrEnum):
    """For which answers another chain stands by."""

    NEVER = "never"
    PRIORITY = "priority"
    ALWAYS = "always"

    def covers(self, tier: ServiceTier) -> bool:
        """Whether one stands by for an answer of this tier."""
        return self is Standby.ALWAYS or (self is Standby.PRIORITY and tier is ServiceTier.PRIORITY)
