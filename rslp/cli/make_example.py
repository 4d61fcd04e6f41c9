"""The workflow that writes the built-in example."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table


def make_example(
    path: str = "example/",
    size: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Write the built-in example: four small synthetic datasets, their configs and an encoder; needs no network.

    The same seed and size give the same bytes. A folder that exists is left as it is if it was made with the
    same arguments.

    Args:
        path: folder to write.
        size: factor on the number of windows; 1 suits a few minutes of training on two CPU cores.
        seed: seed of everything random in it.
        overwrite: replace an example that was made with other arguments.
        workers: worker processes; by default one per core, at most 8.
    """
    from rslp.example.build import build

    built = build(Path(path), size=size, seed=seed, overwrite=overwrite, workers=workers)
    console = Console()
    if not built.windows:
        console.print(f"{built.path}/ exists, made with the same arguments: nothing is written.", highlight=False)
        return
    table = Table(title=f"{built.path}/: {built.windows} windows")
    for column in ("dataset", "metric", "floor", "best possible", "test windows"):
        table.add_column(column, justify="left" if column in ("dataset", "metric") else "right")
    for name, oracle in built.oracles.items():
        table.add_row(name, oracle.metric, f"{oracle.floor:.2f}", f"{oracle.bound:.2f}", str(oracle.windows))
    console.print(table)
