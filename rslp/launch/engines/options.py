"""Options of launch_finetune that only some engines have."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from rslp.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of a job that only SLURM has.

    Attributes:
        partition: partition to run in; SBATCH_PARTITION when left out, then the cluster's default.
        account: account to charge; SBATCH_ACCOUNT when left out.
        qos: quality of service; SBATCH_QOS when left out.
        gres: generic resources of each node, as sbatch's --gres, instead of --gpus-per-node; none asks for no GPUs.
        constraint: features that the nodes must have.
        array_limit: how many runs of an array may run at once.
        notice: seconds between the signal and the time limit; the run saves and is queued again.
        extra: further options of sbatch, each as --name=value.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    constraint: str | None = None
    array_limit: int | None = None
    notice: int = 120
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SkyPilotOptions:
    """Options of a job that only SkyPilot has.

    Attributes:
        accelerator: kind of GPU, as SkyPilot names it.
        infra: where to run, for example kubernetes, gcp or aws/us-east-1; anywhere when left out.
    """

    accelerator: str = "A100"
    infra: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """All such options; an engine reads its own.

    Attributes:
        detach: run on this machine in the background.
        slurm: options of SLURM.
        skypilot: options of SkyPilot.
    """

    detach: bool = False
    slurm: SlurmOptions = SlurmOptions()
    skypilot: SkyPilotOptions = SkyPilotOptions()

    def refuse_others(self, engine: str) -> None:
        """Raise ``UsageError`` for an option of another engine than this one, which would have no effect."""
        if self.detach and engine != "local":
            raise UsageError(f"--detach is for --local true; got the engine {engine}")
        defaults = asdict(EngineOptions())
        for group, given in asdict(self).items():
            if group not in ("detach", engine) and given != defaults[group]:
                name = next(name for name, value in given.items() if value != defaults[group][name])
                raise UsageError(f"--{group}.{name} is for --engine {group}; got the engine {engine}")
