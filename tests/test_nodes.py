"""Training on two machines with torchrun, simulated by two connected network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from programs import PROJECT, environment, metrics, run_directories
from vitrail.checkpoints.reading import read_checkpoint

pytestmark = pytest.mark.slow

QUICK = ("data.batch_size=8", "data.num_workers=0", "callbacks.model_summary=null", "callbacks.progress=null")
NODES = ("vitrail_a", "vitrail_b")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def nodes():
    """Two network namespaces with addresses 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("takes root and iproute2")
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "v0", "netns", NODES[0], "type", "veth", "peer", "name", "v1", "netns", NODES[1])
        for number, name in enumerate(NODES):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"v{number}")
            for device in (f"v{number}", "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError:
        pytest.skip("no network namespaces here")
    yield NODES
    for name in NODES:
        end(name)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def agent(number, nodes, nnodes, *arguments, logs):
    """Start torchrun with two processes on one of the machines; it notices a dead machine within seconds."""
    conf = f"is_host={1 - number},join_timeout=60,last_call_timeout=2,keep_alive_interval=1"
    command = [
        *("ip", "netns", "exec", nodes[number], sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}"),
        *("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=test"),
        *(
            "--local-addr",
            f"10.77.0.{number + 1}",
            "--rdzv-conf",
            conf,
            "--max-restarts=3",
            str(PROJECT / "src/train.py"),
            *arguments,
        ),
    ]
    network = {"GLOO_SOCKET_IFNAME": f"v{number}", "TP_SOCKET_IFNAME": f"v{number}"}
    return subprocess.Popen(
        command,
        env=environment(logs, **network, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        cwd=logs,
        stdout=(logs / f"out{number}.txt").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(name):
    """Kill all processes of a machine: torchrun and its workers."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def test_two_machines__one_training(nodes, tmp_path):
    arguments = ("trainer=ddp_cpu_2", "epochs=1", "trainer.limit_train_batches=4", *QUICK)
    both = [agent(number, nodes, 2, *arguments, logs=tmp_path) for number in range(2)]
    assert [process.wait(200) for process in both] == [0, 0], (tmp_path / "out0.txt").read_text()
    (directory,) = run_directories(tmp_path)
    assert directory.name == "torchrun_test"
    assert [row["step"] for row in metrics(directory)] == [3]
    assert "4 x cpu" in (tmp_path / "out0.txt").read_text()
    assert "Training finished" not in (tmp_path / "out1.txt").read_text()


def test_dead_machine__the_other_one_resumes_from_the_last_checkpoint(nodes, tmp_path):
    """All processes of one machine are killed; the other one restarts its processes after the same images."""
    arguments = ("trainer=ddp_cpu_2", "epochs=6", "callbacks.preemption.minutes=0", "schedule.per_step=true", *QUICK)
    both = [agent(number, nodes, "1:2", *arguments, logs=tmp_path) for number in range(2)]
    last = tmp_path / "train" / "runs" / "torchrun_test" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.is_file() or read_checkpoint(last)["global_step"] < 60:
        assert time.monotonic() < deadline, (tmp_path / "out0.txt").read_text()
        time.sleep(0.1)
    end(nodes[1])
    assert both[0].wait(250) == 0, (tmp_path / "out0.txt").read_text()
    output = (tmp_path / "out0.txt").read_text()
    assert "4 x cpu" in output
    assert output.count("restarted in") == 1  # at the first attempt
    assert "2 x cpu" in output.split("restarted in")[1]
    rows = metrics(last.parent.parent)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]
    # With batches of 8, an epoch has 44 steps on four processes and 89 on two; the interrupted epoch mixes both.
    first, interrupted = rows[0]["step"] + 1, rows[1]["step"] + 1
    assert first == 44
    assert 60 + (88 - 60) * 2 - 4 <= interrupted <= 44 + 89
    assert rows[-1]["step"] + 1 == interrupted + 4 * 89
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    checkpoint = read_checkpoint(last)
    assert checkpoint["images_per_batch"] == 16
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-5, rel=0.05)
