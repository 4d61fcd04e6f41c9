"""The processes of a job, and the trainer's settings for them."""

from __future__ import annotations

from typing import Any

import pytest

from rslp.errors import ConfigError, UsageError
from rslp.runtime.world import World, read_world
from rslp.train.strategy import trainer_for_world

TORCHRUN = {
    "RSLP_RANKS": "torchrun",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "RSLP_RANKS": "slurm",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environ", [TORCHRUN, SLURM])
def test_a_starter_says_who_is_who(environ: dict[str, str]) -> None:
    world = read_world(environ)
    assert world == World(4, 3, 2, 1, 1, "node0", 29500)
    assert (world.nodes, world.first) == (2, False)


def test_inherited_variables_are_nothing_without_a_starter() -> None:
    assert read_world({**TORCHRUN, **SLURM, "BEAKER_REPLICA_RANK": "3", "RSLP_RANKS": ""}) == World()
    assert read_world({}).first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RSLP_RANKS": "mpi"}, "must be one of torchrun, slurm"),
        ({"RANK": ""}, "RANK is not set: start the processes with torchrun"),
        ({"RANK": "one"}, "RANK must be a number, got 'one'"),
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"LOCAL_RANK": "2"}, "2 of 2, is impossible"),
        ({"LOCAL_WORLD_SIZE": "3"}, "the same number of processes"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_what_a_starter_says_wrong_is_one_clear_error(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_world({**TORCHRUN, **changed})


FOUR = World(4, 3, 2, 1, 1, "node0", 29500)
OURS = {"class_path": "rslp.train.strategy.SummedGradients"}
ALONE = [{"class_path": "rslp.train.strategy.RanksEnvironment"}]


@pytest.mark.parametrize(
    ("trainer", "world", "expected"),
    [
        ({}, World(), {"devices": 1, "plugins": ALONE}),
        ({"devices": "auto", "strategy": "ddp"}, World(), {"devices": 1, "plugins": ALONE}),
        ({"devices": [3], "num_nodes": 1}, World(), {"devices": [3], "plugins": ALONE}),
        ({}, FOUR, {"devices": 2, "num_nodes": 2, "strategy": OURS}),
        (
            {"strategy": "ddp_find_unused_parameters_true", "devices": 2, "precision": "16-mixed"},
            FOUR,
            {"devices": 2, "num_nodes": 2, "strategy": OURS, "precision": "16-mixed"},
        ),
        (
            {"strategy": {"class_path": "lightning.pytorch.strategies.DDPStrategy"}},
            FOUR,
            {"devices": 2, "num_nodes": 2, "strategy": OURS},
        ),
    ],
)
def test_a_trainer_is_laid_out_over_the_processes(
    trainer: dict[str, Any], world: World, expected: dict[str, Any]
) -> None:
    assert trainer_for_world(trainer, world) == expected


@pytest.mark.parametrize(
    ("trainer", "world", "message"),
    [
        ({"devices": 2}, World(), "trainer.devices: 2 processes asked for, but the job was started with 1 process;"),
        ({"devices": 8}, FOUR, "8 processes asked for, but the job was started with 2 processes;"),
        ({"num_nodes": 3}, FOUR, "trainer.num_nodes: 3 machines asked for, but the job was started with 2 machines;"),
        ({"strategy": "fsdp"}, FOUR, "trainer.strategy: got fsdp"),
        ({"sync_batchnorm": True}, FOUR, "trainer.sync_batchnorm: is not supported"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(trainer: dict[str, Any], world: World, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_for_world(trainer, world)
