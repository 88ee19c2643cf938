"""`fallow serve …`: single processes, for operators who run them under their own supervisor."""

import asyncio
import os

import typer

from fallow.cli.options import ConfigFile, LogFile, ParentPid, StateDir, Verbose, set_up_logging, settings

app = typer.Typer(
    no_args_is_help=True,
    help="Run one process of the service under a supervisor of your own. `fallow up` does this for you.",
)


@app.command()
def coordinator(
    state_dir: StateDir = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
    log_file: LogFile = None,
    parent: ParentPid = None,
) -> None:
    """Run a coordinator: who is there, which device holds what, and which way a request goes.

    It needs `bus.url` in the settings or FALLOW_BUS_URL, and with `bus.system_url` it hears of crashes at once. It may
    be restarted at any time; running answers go on. Run it on two machines, and one leads while the other stands by to
    take over; for that the NATS server needs JetStream. Without it, run only one.
    """
    # Routing solves many small systems: BLAS threads would only wait for each other. Read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from fallow.processes.coordinator import run

    set_up_logging(verbose, log_file)
    asyncio.run(run(settings(config, {"state_dir": state_dir}).config, parent))


@app.command()
def registrar(
    state_dir: StateDir = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
    log_file: LogFile = None,
    parent: ParentPid = None,
) -> None:
    """Run the registrar: it admits and revokes, renews credentials and the lease, and serves the council's repository.

    It needs the state folder of a network that `fallow up` founded, and `bus.url`. Devices stop when it stays away for
    longer than the lease.
    """
    from fallow.processes.registrar import run

    set_up_logging(verbose, log_file)
    asyncio.run(run(settings(config, {"state_dir": state_dir}).config, parent))


@app.command()
def gateway(
    state_dir: StateDir = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
    log_file: LogFile = None,
    parent: ParentPid = None,
) -> None:
    """Run the gateway: the OpenAI-compatible API, and the store from which devices fetch models.

    It needs `bus.url` in the settings or FALLOW_BUS_URL. The API listens on `gateway.host` and `gateway.port`.
    """
    from fallow.processes.gateway import run

    set_up_logging(verbose, log_file)
    asyncio.run(run(settings(config, {"state_dir": state_dir}).config, parent))
