"""A private SLURM of two "nodes" on this machine, in one folder; it dies with the tests."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rslp.launch.processes import free_port
from rslp.runtime.children import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = 2

# n1 and n2 resolve nowhere, as on some clusters: only their addresses do.
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
EnforcePartLimits=ALL
MinJobAge=86400
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """The programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass
class Cluster:
    """The running cluster.

    Attributes:
        environment: what its clients need.
    """

    folder: Path
    environment: Mapping[str, str]

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True)
        return done.stdout

    def about(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        line = self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(pair.partition("=")[::2] for pair in line.split(" ") if "=" in pair)

    def wait(self, job: str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of these states; a job that was queued again need not wait its two minutes."""
        end, hurried = time.monotonic() + seconds, set[str]()
        while (about := self.about(job))["JobState"] not in states:
            assert time.monotonic() < end, about
            waits = about["JobState"] == "PENDING" and about["Reason"] == "BeginTime"
            if waits and about["Restarts"] not in hurried:
                # Not at once: in the second in which slurmd gave the job up, it takes a new start for the old one
                # ("Job credential revoked"), and the job fails.
                self.ask("scontrol", "update", f"jobid={about['JobId']}", "StartTime=now+3")
                hurried.add(about["Restarts"])
            time.sleep(0.3)
        return about


def start(folder: Path, stack: ExitStack) -> Cluster:
    """Start the daemons below a folder; they end with the stack, or with this process."""
    for name in ("state", *(f"spool-n{n + 1}" for n in range(NODES))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    port, *nodes = sorted({free_port() for _ in range(NODES + 3)})
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    names = {"host": host, "user": getpass.getuser(), "folder": folder}
    conf.write_text(_CONF.format(**names, port=port, first=nodes[0], second=nodes[1]))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    cluster = Cluster(folder, {"SLURM_CONF": str(conf)})
    files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    _daemon(cluster, stack, "munged", "--foreground", "--force", f"--key-file={key}", *options)
    _until(lambda: (folder / "munge.sock").exists(), "munged")
    _daemon(cluster, stack, "slurmctld", "-D", "-f", str(conf))
    for n in range(NODES):
        _daemon(cluster, stack, "slurmd", "-D", "-N", f"n{n + 1}", "-f", str(conf))
    _until(lambda: _states(cluster) == ["idle"] * NODES, "the nodes")
    stack.callback(_empty, cluster)
    return cluster


def _empty(cluster: Cluster) -> None:
    """End what a failed test has left running: jobs outlive the daemons."""
    cluster.ask("scancel", "--full", f"--user={getpass.getuser()}")
    _until(lambda: not cluster.ask("squeue", "--noheader"), "the last job's end")


def _states(cluster: Cluster) -> list[str]:
    words = ("sinfo", "-h", "-N", "-p", "main", "-o", "%T")
    done = subprocess.run(words, env={**os.environ, **cluster.environment}, capture_output=True, text=True)
    return done.stdout.split()


def _daemon(cluster: Cluster, stack: ExitStack, *words: str) -> None:
    program = shutil.which(words[0])
    assert program
    with (cluster.folder / f"{words[0]}.out").open("ab") as output:
        process = subprocess.Popen(
            (program, *words[1:]),
            env={**os.environ, **cluster.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    stack.callback(process.wait, timeout=20)
    stack.callback(process.terminate)


def _until(ready: Callable[[], bool], what: str, *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} did not come up"
        time.sleep(0.1)
