"""What `fallow status` says of coordinators."""

import io

import pytest
from rich.console import Console

from fallow.cli.status import tables
from fallow.domain.fleet import CoordinatorReport, FleetStatus


def shown(*coordinators: CoordinatorReport) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(
        tables(FleetStatus(nodes=(), silent_s={}, models=(), coordinators=coordinators))
    )
    return text.getvalue()


LEADER = CoordinatorReport(id="a", name="desk", epoch=7, since_s=7300.0)
ALONE = CoordinatorReport(id="a", name="desk", epoch=0, since_s=61.0, lease=False)
STANDBYS = tuple(CoordinatorReport(id=name, name=name) for name in ("attic", "cellar"))


@pytest.mark.parametrize(
    ("coordinators", "words"),
    [
        ((LEADER,), "desk leads since 2 h (epoch 7); none stands by"),
        ((LEADER, STANDBYS[0]), "desk leads since 2 h (epoch 7); attic stands by"),
        ((LEADER, *STANDBYS), "attic, cellar stand by"),
        (
            (CoordinatorReport(id="a", name="desk", epoch=0, since_s=61.0, lease=False),),
            "since 1 min (epoch 0); the bus",
        ),
    ],
)
def test_it_says_who_leads_and_who_would_take_over(coordinators: tuple[CoordinatorReport, ...], words: str) -> None:
    assert words in shown(*coordinators)


def test_an_older_coordinator_tells_nothing_of_it() -> None:
    assert "Coordinator" not in shown()
