"""`fallow up` and `fallow join`: start a service, lend a device."""

import asyncio
from typing import Annotated

import typer

from fallow.cli.options import (
    ConfigFile,
    Insecure,
    LogFile,
    ParentPid,
    StateDir,
    Verbose,
    say,
    set_up_logging,
    settings,
)


def up(
    nodes: Annotated[int | None, typer.Option("--nodes", help="Devices to start on this machine.")] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Interface of the control bus; 0.0.0.0 accepts devices of your network."),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the API; 0 takes any free one.")] = None,
    api_host: Annotated[
        str | None, typer.Option("--api-host", help="Interface of the API; other than loopback it needs API keys.")
    ] = None,
    bus_port: Annotated[int | None, typer.Option("--bus-port", help="Port of the control bus.")] = None,
    bus: Annotated[
        str | None, typer.Option("--bus", help="Use this NATS server instead of starting one.", metavar="URL")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory that each local device lends, such as 2GiB.", metavar="SIZE")
    ] = None,
    max_share: Annotated[
        float | None,
        typer.Option("--max-share", help="No device does more than this share of a model's work, e.g. 0.5."),
    ] = None,
    default_model: Annotated[
        bool | None,
        typer.Option("--default-model/--no-default-model", help="Import the default model when there is none yet."),
    ] = None,
    standbys: Annotated[
        int | None,
        typer.Option("--standbys", help="Coordinators that stand by to take over from the leading one; 1 otherwise."),
    ] = None,
    insecure: Insecure = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
    parent: ParentPid = None,
) -> None:
    """Start the service on this machine: registrar, control bus, coordinators, gateway and, if you like, devices.

    The first start founds a network of yours, and fetches a small default model (98 MB). When everything runs, the
    API's address is printed; `fallow invite` lets other devices in. Processes that die are started again. Ctrl-C stops
    everything.

    Examples:

          fallow up --nodes 3                      three devices on this machine
          fallow up --host 0.0.0.0 --nodes 1       other machines of the network can join
          fallow up --nodes 3 --max-share 0.5      a model is split, even where it fits one device
    """
    from fallow.processes.up import run

    set_up_logging(verbose)
    loaded = settings(
        config,
        {
            "local_nodes": nodes,
            "bus.host": host,
            "bus.port": bus_port,
            "bus.url": bus,
            "gateway.host": api_host,
            "gateway.port": port,
            "node.memory_bytes": memory,
            "placement.max_share": max_share,
            "coordinator.standbys": standbys,
            "models.import_default": default_model,
            "trust.insecure_development": insecure,
            "state_dir": state_dir,
        },
    )
    asyncio.run(run(loaded, say, parent))


def join(
    invitation: Annotated[
        str | None, typer.Argument(help="What `fallow invite` printed. Not needed by a device that joined before.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What people call this device; the host's name otherwise.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Memory to lend, such as 2GiB; half of the machine's otherwise.", metavar="SIZE"),
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget", help="The part of it for running answers' caches; a quarter otherwise.", metavar="SIZE"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Processor threads to lend; all otherwise.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", help="Address for links from other devices, such as 0.0.0.0:7000.", metavar="HOST:PORT"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked, for scripts.")] = False,
    insecure: Insecure = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
    log_file: LogFile = None,
    parent: ParentPid = None,
) -> None:
    """Lend this device to a network until you stop it.

    The first time takes an invitation, and your consent: what runs, for whom, and who can see what is shown before. The
    device then gets its part of a model, checks it, and computes that part for whoever holds a grant. Ctrl-C (or
    SIGTERM) leaves politely: running answers move to other devices first. A second one stops at once.

    An invitation for an operator, an auditor or a reader makes this machine's `fallow status`, `fallow revoke` and
    `fallow audit` those of that network.

    Examples:

          fallow join fallow1-…
          fallow join fallow1-… --name desk --memory 4GiB --threads 4
          fallow join                                  once more, on a device that joined before
    """
    from fallow.processes.node import run

    set_up_logging(verbose, log_file)
    is_url = invitation is not None and "://" in invitation  # of a bus, in the development mode
    loaded = settings(
        config,
        {
            "bus.url": invitation if is_url else None,
            "trust.invitation": None if is_url else invitation,
            "trust.insecure_development": insecure,
            "node.name": name,
            "node.memory_bytes": memory,
            "node.kv_budget_bytes": kv_budget,
            "node.threads": threads,
            "node.listen": listen,
            "state_dir": state_dir,
        },
    )
    asyncio.run(run(loaded.config, say, _agreed if yes else _asked, parent))


def _agreed(_: str) -> bool:
    return True


def _asked(words: str) -> bool:
    """Show the owner what they agree to, and ask."""
    say(words)
    return typer.confirm("Do you agree?", default=False)
