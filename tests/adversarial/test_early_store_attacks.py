"""Attacks on a coordinator that does not know yet what publishers signed: it was just started, and has no charter.

A real coordinator on virtual time, as in `test_quarantine_attacks.py`. What it believes of stores once it knows:
`test_figure_attacks.py`.
"""

import msgspec

from fallow.domain.charter import Standing
from fallow.domain.fleet import ModelEntry
from tests.adversarial.test_quarantine_attacks import GATEWAYS, SUBJECTS, Cell, run
from tests.unit.coordinator.test_registry import MODELS, entry, store


def test_a_captured_gateway_tells_of_models_before_anything_is_known() -> None:
    """
    Attack: a captured gateway announces a model while the coordinator has no charter, to be believed as in the
        development mode, where there is none either.
    Expected: nothing is taken from any store until it is known what is signed.
    Unharmed: what was known before; stores are heard again as soon as there is a charter.
    """

    async def script(cell: Cell) -> None:
        async def tell(told: ModelEntry) -> None:
            message = msgspec.json.encode(store(told, node=GATEWAYS[1]))
            await cell.buses[GATEWAYS[1]].publish(SUBJECTS.store(GATEWAYS[1]), message)
            await cell.clock.sleep(0.01)

        await cell.clock.sleep(0.01)
        before = cell.coordinator.status().models
        assert [each.model for each in before] == [MODELS[0]]
        charter, cell.lease.charter = cell.lease.charter, None
        cell.lease.turn(Standing.NO_LEASE)
        await tell(entry(MODELS[1], name="early"))
        assert GATEWAYS[1] not in cell.coordinator.fleet.stores
        assert cell.coordinator.status().models == before
        cell.lease.charter = charter
        cell.lease.turn(Standing.WORKING)
        await tell(entry(MODELS[1], name="later"))
        assert "later" in {each.name for each in cell.coordinator.status().models}
        await cell.served()

    run(script)
