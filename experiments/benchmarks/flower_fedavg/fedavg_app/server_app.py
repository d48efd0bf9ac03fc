"""Flower's FedAvg of arrays with the shapes of a LoRA adapter. A line in a file for each round shows its progress."""

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedavg_app.sizes import random_arrays

app = ServerApp()


class Noted(FedAvg):
    """FedAvg that notes the time after each round."""

    def __init__(self, progress: str, clients: int):
        """Waits for all clients, and evaluates at none."""
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self._progress = Path(progress)

    def aggregate_train(self, server_round, replies):
        """As FedAvg does."""
        done = super().aggregate_train(server_round, replies)
        with self._progress.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")
        return done


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    given = context.run_config
    strategy = Noted(str(given["progress"]), int(given["clients"]))
    initial = random_arrays(str(given["shapes"]))
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(given["rounds"]))
