"""A real SLURM on this machine: controller, accounting with its database, and node daemons, on loopback.

Everything lives in one folder and listens on ports that were free, so several can run side by side. What
is started here is stopped here, even after a failure; the system's own SLURM is not touched. Needs Debian's packages
slurm-wlm, slurmdbd, munge and mariadb-server, and root. By hand, `python tests/slurm/cluster.py` runs one until it is
interrupted, and says how to reach it.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sacctmgr", "sbatch")
NODES = ("cpu1", "gpu1", "gpu2")
GPUS = 8


def missing_programs() -> list[str]:
    """Programs that are needed but not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """A SLURM cluster of one CPU node and two nodes that claim to have GPUs (`NODES`).

    The partition `urgent` preempts jobs of `gpu`; a job that takes more memory than it asked for is killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SALMON_CLUSTER": str(folder),  # marks its jobs' processes
            "PATH": os.pathsep.join([str(folder / "bin"), _PATH]),
        }

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str) -> str:
        """Run one of SLURM's programs against this cluster; return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def _start(self) -> None:
        for name in ("log", "state", "database", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._wrap("srun", "scontrol")
        ports = dict(zip(("controller", "accounting", "database", *NODES), free_ports(3 + len(NODES)), strict=True))
        self._configure(ports)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged",
            "--foreground",
            *(
                f"--{name}={self.folder / file}"
                for name, file in (
                    ("socket", "munge.socket"),
                    ("key-file", "munge.key"),
                    ("pid-file", "munge.pid"),
                    ("log-file", "log/munged.log"),
                    ("seed-file", "munge.seed"),
                )
            ),
        )
        self._until("munged listens", (self.folder / "munge.socket").exists)
        self._start_database(ports["database"])
        self.start("slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self.run("sacctmgr", "-i", "add", "account", "test", "Description=test", "Organization=test")
        self.run("sacctmgr", "-i", "add", "user", "root", "Account=test", "AdminLevel=Admin")
        self.start("slurmctld")
        self._until("slurmctld answers", lambda: self._works("scontrol", "ping"))
        for node in NODES:
            self.start(node)
        self._until("all nodes are idle", lambda: set(self.run("sinfo", "-h", "-o", "%T").split()) == {"idle"})

    def processes(self, **variables: object) -> Iterator[Path]:
        """The /proc folders of jobs' processes that have these variables in their environments."""
        variables["SALMON_CLUSTER"] = self.folder
        marks = {f"{name}={value}".encode() for name, value in variables.items()}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if marks <= set((process / "environ").read_bytes().split(b"\0")):
                    yield process

    def fail(self, node: str) -> None:
        """Make a node fail: its daemon and all that runs on it are gone at once."""
        self.kill(node)
        doomed = set()
        for process in self.processes(SLURMD_NODENAME=node):
            with suppress(OSError):
                parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                doomed.add(int(process.name))
                if Path("/proc", parent, "comm").read_text().startswith("slurmstepd"):
                    doomed.add(int(parent))
        for number in doomed:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def _until(self, what: str, true: Callable[[], object]) -> None:
        """Wait until something is true, but only as long as all daemons live."""

        def check() -> object:
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    said = (self.folder / "log" / f"{name}.out").read_text()[-2000:]
                    raise RuntimeError(f"{name} ended with status {daemon.returncode}: {said}")
            return true()

        until(what, check)

    def _works(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def start(self, name: str) -> None:
        """Start `slurmdbd`, `slurmctld` or the daemon of a node."""
        if name in NODES:
            self._daemon(name, "-D", "-N", name, "-f", str(self.folder / "slurm.conf"), program="slurmd")
        elif name == "slurmctld":
            self._daemon(name, "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        else:
            self._daemon(name, "-D")
            self._until("slurmdbd answers", lambda: self._works("sacctmgr", "-n", "list", "cluster"))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a daemon with a signal, and wait for it."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    def _wrap(self, *programs: str) -> None:
        """Wrap programs so that they find this cluster even in jobs, where the executor removes SLURM_CONF."""
        (self.folder / "bin").mkdir()
        for name in programs:
            wrapper = self.folder / "bin" / name
            wrapper.write_text(
                f'#!/bin/sh\nexport SLURM_CONF={self.folder}/slurm.conf\nexec {shutil.which(name, path=_PATH)} "$@"\n'
            )
            wrapper.chmod(0o755)

    def _daemon(self, name: str, *arguments: str, program: str = "") -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(program or name, path=_PATH) or name, *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )

    def _start_database(self, port: int) -> None:
        data, where = self.folder / "database", self.folder / "mariadb.socket"
        self.run(
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        self._daemon(
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={where}",
            f"--pid-file={self.folder / 'mariadb.pid'}",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--innodb-buffer-pool-size=32M",
            "--innodb-lock-wait-timeout=900",
        )
        self._until("the database listens", where.exists)
        self.run(
            "mariadb",
            "--no-defaults",
            f"--socket={where}",
            "-e",
            "create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm.* to slurm@'127.0.0.1';"
            "create user slurm@localhost identified by 'slurm'; grant all on slurm.* to slurm@localhost",
        )

    def _configure(self, ports: Mapping[str, int]) -> None:
        folder = self.folder
        accounting = folder / "slurmdbd.conf"
        accounting.write_text(f"""AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports["accounting"]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports["database"]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
""")
        accounting.chmod(0o600)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs=8 RealMemory=1000000"
            + (f" Gres=gpu:{GPUS}" if node.startswith("gpu") else "")
            for node in NODES
        )
        (folder / "slurm.conf").write_text(f"""ClusterName=test
SlurmctldHost={self.host}(127.0.0.1)
SlurmctldPort={ports["controller"]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports["accounting"]}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={random.randrange(1, 12000)}
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
KillWait=5
SlurmdTimeout=15
MessageTimeout=10
InactiveLimit=0
OverTimeLimit=0
{nodes}
PartitionName=cpu Nodes=cpu1 Default=YES MaxTime=UNLIMITED OverSubscribe=NO
PartitionName=gpu Nodes=gpu[1-2] MaxTime=UNLIMITED OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=gpu[1-2] MaxTime=UNLIMITED OverSubscribe=NO PriorityTier=2
""")
        devices = [folder / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            device.touch()
        (folder / "gres.conf").write_text(f"NodeName=gpu[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")

    def stop(self) -> None:
        """End all that was started, and the jobs' processes."""
        if "slurmctld" in self.daemons:
            self._works("scancel", "--user=root", "--signal=KILL", "--full")
            self._works("scancel", "--user=root")
            time.sleep(1)
        for name in reversed(list(self.daemons)):
            daemon = self.daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports on which nothing is listening."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def until(what: str, true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


def main() -> int:
    """Run a cluster in a temporary folder until it is interrupted."""
    if missing := missing_programs():
        sys.stderr.write(
            f"not installed: {', '.join(missing)}; apt-get install slurm-wlm slurmdbd munge mariadb-server\n"
        )
        return 1
    if "--check" in sys.argv:
        return 0
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        sys.stdout.write(f"{cluster.run('sinfo')}\n\nexport SLURM_CONF={folder}/slurm.conf   # Ctrl-C here stops it\n")
        sys.stdout.flush()
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
