"""Answers a message by the app that is installed here, whatever app came with the run.

Flower's ``flwr-clientapp`` unpacks the app that the server sent, and runs it. Where a SuperNode finds this file under
that name it is run instead: everything is Flower's but which app is loaded.
"""

import importlib
import sys
from pathlib import Path

from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Runs ``flwr-clientapp`` so."""
    sys.path.insert(0, str(HERE))
    app = importlib.import_module("fedmezo_app.client_app").app
    replaced = {"install_from_fab": lambda *_, **__: None, "get_load_client_app_fn": lambda **_: lambda *_: app}
    for name, own in replaced.items():
        getattr(run_clientapp, name)  # a release of Flower that calls it otherwise is not run at all
        setattr(run_clientapp, name, own)
    flwr_clientapp()


if __name__ == "__main__":
    main()
