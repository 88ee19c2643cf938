"""How far a conversation's tokens are fed, computed, and valid on the devices. Values only."""

from fallow.policy.recovery import Rewind, with_rewind


class Marks:
    """Of one chain."""

    def __init__(self) -> None:
        self.fed = 0
        self.fed_once = 0
        """The most that was ever fed since the last cut: a rebuilt chain is fed again from below."""
        self.received = 0
        """So many rows have been computed to the end of the chain."""
        self.rebuilt_to = 0
        """So many tokens were there when the chain was opened last."""
        self.void_epoch = -1
        """Of this epoch, no result is believed."""
        self.rewinds: tuple[Rewind, ...] = ()

    def cut(self, epoch: int, position: int) -> None:
        """Whatever stages hold at and above `position` is void from this epoch on."""
        self.fed = min(self.fed, position)
        self.fed_once = min(self.fed_once, position)
        self.received = min(self.received, position)
        self.rewinds = with_rewind(self.rewinds, Rewind(epoch, position))

    def take_back(self, epoch: int, position: int) -> None:
        """What stages hold at and above `position` was wrong from the start: no result of this epoch counts now."""
        self.cut(epoch + 1, position)
        self.void_epoch = epoch

    def confirm(self, epoch: int, position: int | None) -> None:
        """The first stage has seen so many of the tokens that were fed; `None`: all that matter."""
        if position is not None and position < self.fed_once:
            self.cut(epoch, position)

    def feed(self, count: int) -> None:
        """So many more rows are on their way."""
        self.fed += count
        self.fed_once = max(self.fed_once, self.fed)
