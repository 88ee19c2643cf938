"""Who decodes together at the first stage of a chain. A value that only its methods change; no clock.

While one team is at this stage, the others are at those behind it (`batching.decode_groups`). A row that has missed its
team and is computed alone costs a call of its own, at every stage and for every token from then on: scattered rows meet
again by chance only. So

- a session has a team from its first decode step on, the smallest then, and keeps it;
- a team is computed when all its rows are here, and goes before the oldest row, whose team is not;
- it does so `teams - 1` times: every other team once. Then, or when there is none and waiting is over or not worth
  while, what is here of the oldest row's team is computed. So a row is computed within `teams` calls for itself and
  every row that is older, whatever others do;
- a member that was waited for in vain, or while every other team went first, has no team until it comes again;
- a row changes over to a team that is smaller by two or more.

The oldest row waits from when there is nothing whole, for `patience_s` (`batching.patience_s`). What is computed
meanwhile is no waiting: it begins again. Stages behind the first compute what arrives together.
"""

from collections.abc import Sequence

from fallow.domain.ids import SessionId


class DecodeTeams:
    """The teams of one model on one device.

    `ready`, in what follows: who has a row, in the order of arrival, somebody at least; `teams`: how many there are to
    be.
    """

    def __init__(self) -> None:
        self._team: dict[SessionId, int] = {}
        self._oldest: SessionId | None = None
        """Whose team is waited for,"""
        self._since_s: float | None = None
        """since when, if it has begun,"""
        self._passed = 0
        """and how many whole teams went first."""

    def forget(self, session: SessionId) -> None:
        """It has ended. Idempotent."""
        self._team.pop(session, None)
        if self._oldest == session:
            self._oldest = None

    def wait_s(self, ready: Sequence[SessionId], teams: int, now_s: float, patience_s: float) -> float:
        """How long to wait for the oldest row's team; 0 when there is something to compute by now."""
        self._look(ready, teams)
        if self._whole(ready):
            return 0.0
        if self._since_s is None:
            self._since_s = now_s
        return max(0.0, self._since_s + patience_s - now_s)

    def wait_again(self) -> None:
        """Something else was computed: waiting for the oldest row's team begins anew."""
        self._since_s = None

    def choose(self, ready: Sequence[SessionId], teams: int, now_s: float, patience_s: float) -> list[SessionId]:
        """Who is computed now. Whoever is chosen is not ready any more."""
        self._look(ready, teams)
        chosen = self._whole(ready)
        if ready[0] not in chosen:
            if chosen and self._passed < teams - 1:
                self._passed += 1
                self.wait_again()
                return chosen
            in_vain = bool(chosen) or (self._since_s is not None and now_s >= self._since_s + patience_s)
            chosen = self._of(self._team[ready[0]], ready)
            if in_vain:
                self._leave_out(self._team[ready[0]], chosen)
        self._oldest = None
        return chosen

    def _look(self, ready: Sequence[SessionId], teams: int) -> None:
        """See who is here, and for whom there is no time yet."""
        self._place(ready, teams)
        if ready[0] != self._oldest:
            self._oldest, self._since_s, self._passed = ready[0], None, 0

    def _whole(self, ready: Sequence[SessionId]) -> list[SessionId]:
        """The team whose rows are all here; of several the one with the oldest row; empty when there is none."""
        teams = list(self._team.values())
        here = [self._team[session] for session in ready]
        for team in dict.fromkeys(here):
            if here.count(team) == teams.count(team):
                return self._of(team, ready)
        return []

    def _of(self, team: int, ready: Sequence[SessionId]) -> list[SessionId]:
        return [session for session in ready if self._team[session] == team]

    def _leave_out(self, team: int, present: Sequence[SessionId]) -> None:
        """Who is not present has no team any more."""
        for session in [each for each, its in self._team.items() if its == team and each not in present]:
            del self._team[session]

    def _place(self, ready: Sequence[SessionId], teams: int) -> None:
        """Give everybody a team, and even the teams out as far as rows that are here can."""
        sizes = [0] * teams
        for session, team in list(self._team.items()):
            if team < teams:
                sizes[team] += 1
            else:
                del self._team[session]  # there were more teams
        for session in ready:
            smallest = sizes.index(min(sizes))
            now = self._team.get(session)
            if now is None or sizes[now] >= sizes[smallest] + 2:
                if now is not None:
                    sizes[now] -= 1
                self._team[session] = smallest
                sizes[smallest] += 1
