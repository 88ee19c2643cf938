"""`fallow serve gateway`: the API, its conversations with the fleet, and the operator's store of models."""

import asyncio
import logging
import socket
from typing import Final

from fallow import wiring
from fallow.config import Config
from fallow.domain.credentials import Role
from fallow.domain.errors import UnknownModel
from fallow.domain.frames import Frame
from fallow.domain.ids import NodeId
from fallow.domain.model import Manifest
from fallow.fabric.peers import Peers
from fallow.gateway.api import create_app
from fallow.gateway.keys import ApiKey
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.server import serve
from fallow.gateway.sessions import FleetTokenSource
from fallow.models.store import Store
from fallow.policy.admission import AdmissionRules
from fallow.processes.addresses import api_url, check_exposure
from fallow.processes.lifetime import Stop
from fallow.processes.party import Newcomer, take_part
from fallow.processes.store_server import StoreServer

CLOSE_LIMIT_S: Final = 10.0
"""The server itself ends running answers sooner; this is for what it cannot."""

log = logging.getLogger(__name__)


async def run(config: Config, parent_pid: int | None = None) -> None:
    """Run until a signal. Raises `BusUnavailable`, `ConfigError`."""
    check_exposure(config)
    stop = Stop()
    stop.listen(parent_pid)
    clock = wiring.clock()
    store = Store(config.store_dir)
    newcomer = Newcomer(role=Role.GATEWAY, name=socket.gethostname() or "gateway")
    party = await take_part(config, config.state_dir / "gateway", newcomer, log.info)
    bus, subjects = party.bus, party.subjects
    endpoint = await wiring.open_links(config, party.who, config.gateway.links, bus, party.cell, party.bus_urls)

    def on_frame(peer: NodeId, frame: Frame) -> None:
        if not files.on_frame(peer, frame):
            source.on_frame(peer, frame)

    def on_lost(peer: NodeId, reason: str) -> None:
        source.on_lost(peer, reason)

    async def tokenizer_file(manifest: Manifest) -> bytes:
        path = store.blob_path(manifest.tokenizer.digest)
        if path is None:
            raise UnknownModel(f"The files of {manifest.name} are no longer in the store.")
        return await asyncio.to_thread(path.read_bytes)

    peers = Peers(endpoint, clock, role="gateway", admission=party.admission, on_frame=on_frame, on_lost=on_lost)
    files = StoreServer(store, bus, peers, clock, subjects, endpoint.address)
    source = FleetTokenSource(
        bus, peers, store, clock, subjects, party.who.node, api_url(config), lease=party.lease, routes=party.routes,
        run_ahead=config.gateway.run_ahead, standby=config.gateway.standby,
    )  # fmt: skip
    keys = [ApiKey(id=key.id, sha256=key.sha256, limits=key.limits) for key in config.gateway.keys]
    rules = AdmissionRules(
        wait_max_s=config.gateway.wait_max_s,
        waiting_max=config.gateway.waiting_max,
        places_max=config.gateway.answers_max,
    )
    metrics = GatewayMetrics()
    metrics.watch_quarantine(lambda: source.quarantined)
    metrics.watch_standbys(source.moves.standing_by, lambda: source.moves.takeovers)
    app = create_app(source, tokenizer_file, clock, keys, metrics=metrics, admission=rules)
    try:
        await peers.start()
        await files.start()
        await source.start()
        server = await serve(app, config.gateway.host, config.gateway.port)
        log.info("the API is at %s", server.url)
        await stop.polite.wait()
        await stop.unless_at_once(server.close(), CLOSE_LIMIT_S)
    finally:
        await source.close()
        await files.close()
        await peers.close()
        await endpoint.close()
        await party.close()
