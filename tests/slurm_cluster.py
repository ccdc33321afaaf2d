"""A SLURM cluster of one machine for the tests: controller, node and accounting, without systemd.

All files are in one folder, all ports are on loopback, and the daemons stop with the context. It needs root and
`apt-get install slurmctld slurmd slurmdbd slurm-client munge mariadb-server`.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")

_SLURM = """
ClusterName=vitrail
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
CommunicationParameters=NoInAddrAny
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge.socket
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=10
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=urgent Nodes={host} PriorityTier=2 PreemptMode=OFF
"""

_ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


def missing() -> list[str]:
    """Return the required programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run SLURM with partitions `main` and `urgent`, which preempts `main`; yield its environment variables."""
    folder.mkdir(mode=0o755)
    for name in ("state", "spool", "database"):
        (folder / name).mkdir()
    values = {"folder": folder, "host": socket.gethostname()}
    values |= dict(zip(("controller", "node", "accounting", "database"), _free_ports(4), strict=True))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_SLURM.format(**values))
    (folder / "slurmdbd.conf").write_text(_ACCOUNTING.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def succeed(*command: str) -> str:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    with ExitStack() as running:

        def start(*command: str) -> None:
            log = running.enter_context((folder / f"{Path(command[0]).name}.out").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            running.callback(_end, process)

        start(
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"),
            *(
                f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/munged.seed",
            ),
        )
        data = ("--no-defaults", f"--datadir={folder}/database", "--user=root")
        succeed("mariadb-install-db", *data, "--auth-root-authentication-method=normal", "--skip-test-db")
        database = f"{folder}/database.socket"
        start("mariadbd", *data, f"--socket={database}", f"--port={values['database']}", "--bind-address=127.0.0.1")
        _until(lambda: Path(database).exists(), "the database")
        statement = "create database slurm; grant all on slurm.* to slurm@'127.0.0.1' identified by 'slurm'"
        succeed("mariadb", "--no-defaults", f"--socket={database}", "--user=root", "-e", statement)
        start("slurmdbd", "-D")
        _until(lambda: _listens(int(values["accounting"])), "slurmdbd")
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D")
        states = ["sinfo", "-h", "-o", "%t"]

        def idle() -> bool:
            return "idle" in subprocess.run(states, env=environment, capture_output=True, text=True, check=False).stdout

        _until(idle, "the node")
        yield {"SLURM_CONF": environment["SLURM_CONF"]}
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
