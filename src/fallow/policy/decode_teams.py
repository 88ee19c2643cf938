"""Who decodes together at the first stage of a chain. A value that only its methods change; no clock.

While one team is at this stage, the others are at those behind it (`batching.decode_groups`). A row that has missed its
team and is computed alone costs a call of its own, at every stage and for every token from then on: scattered rows meet
again by chance only. So

- a session has a team from its first decode step on, the smallest then, and keeps it;
- a team is computed when all its rows are here;
- a member that was waited for in vain has no team until it comes again;
- a row changes over to a team that is smaller by two or more.

How long a team is waited for is `batching.patience_s`. Stages behind the first compute what arrives together.
"""

from collections import Counter
from collections.abc import Sequence

from fallow.domain.ids import SessionId


class DecodeTeams:
    """The teams of one model on one device."""

    def __init__(self) -> None:
        self._team: dict[SessionId, int] = {}

    def forget(self, session: SessionId) -> None:
        """It has ended. Idempotent."""
        self._team.pop(session, None)

    def whole(self, ready: Sequence[SessionId], teams: int) -> list[SessionId]:
        """Of the `teams` teams, the one whose rows are all here; empty when there is none. `ready`: who has a row, in
        the order of arrival; of several teams, the one with the oldest row."""
        self._place(ready, teams)
        sizes = Counter(self._team.values())
        here = Counter(self._team[session] for session in ready)
        for session in ready:
            team = self._team[session]
            if here[team] == sizes[team]:
                return self._of(team, ready)
        return []

    def part(self, ready: Sequence[SessionId], teams: int) -> list[SessionId]:
        """Who is here of the team with the oldest row; the rest of it was waited for in vain."""
        self._place(ready, teams)
        team = self._team[ready[0]]
        present = self._of(team, ready)
        for session in [each for each, its in self._team.items() if its == team and each not in present]:
            del self._team[session]
        return present

    def _of(self, team: int, ready: Sequence[SessionId]) -> list[SessionId]:
        return [session for session in ready if self._team[session] == team]

    def _place(self, ready: Sequence[SessionId], teams: int) -> None:
        """Give everybody a team, and even the teams out as far as rows that are here can."""
        sizes = Counter(dict.fromkeys(range(teams), 0))
        for session, team in list(self._team.items()):
            if team < teams:
                sizes[team] += 1
            else:
                del self._team[session]  # there were more teams
        for session in ready:
            smallest = min(range(teams), key=sizes.__getitem__)
            now = self._team.get(session)
            if now is None or sizes[now] >= sizes[smallest] + 2:
                if now is not None:
                    sizes[now] -= 1
                self._team[session] = smallest
                sizes[smallest] += 1
