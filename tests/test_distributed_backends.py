"""What each rank finds in its environment, and the host files that say it."""

from __future__ import annotations

import io
import json
import sys

import pytest
from mlx._distributed_utils import common as mlx_common
from mlx._distributed_utils import launch as mlx_launch

from ring_mlx.cli import main
from ring_mlx.distributed import hosts
from ring_mlx.distributed.failure import DistributedError


def entry(name, *ips, rdma=()):
    return {"ssh": name, "ips": list(ips), "rdma": list(rdma)}


HOST_FILES = {
    "ring": {"backend": "ring", "hosts": [entry("a", "10.0.0.1"), entry("b", "10.0.0.2")]},
    "a list": [entry("a", "10.0.0.1", "10.1.0.1"), entry("b", "10.0.0.2", "10.1.0.2"), entry("127.0.0.1", "10.0.0.3")],
    "jaccl": {
        "backend": "jaccl",
        "envs": ["MLX_METAL_FAST_SYNCH=1", "A=b=c"],
        "hosts": [entry("a", "10.0.0.1", rdma=[None, "en2"]), entry("b", rdma=["en3", None])],
    },
    "jaccl-ring": {
        "backend": "jaccl-ring",
        "hosts": [
            entry("a", "10.0.0.1", rdma=[None, "en2", None, "en5"]),
            entry("b", rdma=["en3", None, ["en1", "en2"], None]),
            entry("c", rdma=[None, "en3", None, "en1"]),
            entry("d", rdma=["en3", None, "en2", None]),
        ],
    },
    "nccl": {"backend": "nccl", "hosts": [entry("a", "10.0.0.1"), entry("b")]},
}


@pytest.mark.parametrize("name", HOST_FILES)
def test_ranks_find_in_their_environment_what_mlx_launch_gives(name, tmp_path, monkeypatch, capsys):
    file, given = tmp_path / "hosts.json", []
    file.write_text(json.dumps(HOST_FILES[name]))
    monkeypatch.setattr(mlx_launch, "_launch_with_io", lambda _, arguments, verbose: given.extend(arguments))
    # It leaves its file open.
    monkeypatch.setattr(mlx_common, "open", lambda path: io.StringIO(path.read_text()), raising=False)
    backend = name if name != "a list" else "ring"
    options = ["--hostfile", str(file), "--starting-port", "4000", "--backend", backend, "--python", "py"]
    monkeypatch.setattr(sys, "argv", ["mlx.launch", *options, "--", "-m", "x"])
    mlx_launch.main()
    chosen, _, env = hosts.read_host_file(file)
    more, files = hosts.variables(backend, chosen, 4000)
    assert [h.name for h in chosen] == [args[1] for args, _ in given]
    for (_, _, _, _, theirs, variables, _), _ in given:
        size = ("COLUMNS", "LINES")  # of a terminal, which ranks here have not
        assert env | more == dict(v.split("=", 1) for v in variables if not v.startswith(size))
        assert {k: json.loads(v) for k, v in files.items()} == {k: json.loads(v) for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"hosts": [entry("a"), entry("b", "10.0.0.2")]}, "host a has no address"),
        ({"backend": "mpi", "hosts": HOST_FILES["ring"]["hosts"]}, "backend mpi is not started here"),
        (
            {"backend": "jaccl", "hosts": HOST_FILES["ring"]["hosts"]},
            "rdma of host a must have 2 entries and null at 0",
        ),
        ({"backend": "jaccl", "hosts": [entry("a", "1", rdma=[None, None])] * 2}, "rdma of host a names no device to"),
        ({"envs": ["=x"], "hosts": HOST_FILES["ring"]["hosts"]}, "has a variable '' among envs"),
        ({"envs": ["A=\0"], "hosts": HOST_FILES["ring"]["hosts"]}, "has a variable 'A' among envs"),
        ({"envs": 3, "hosts": HOST_FILES["ring"]["hosts"]}, "is not a host file"),
        ({"backend": ["ring"], "hosts": HOST_FILES["ring"]["hosts"]}, "backend ['ring'] is not started here"),
        ({"hosts": [{"ssh": "a", "ips": 3}] * 2}, "is not a host file"),
        ({"hosts": [{"ssh": "a", "ips": ["1"], "rdma": 3}] * 2}, "is not a host file"),
        ({"hosts": 3}, "is not a host file"),
        ({"hosts": [{"ssh": None, "ips": ["1"]}] * 2}, "is not a host file"),
        ({"hosts": [{"ssh": "a", "ips": ["1"]}] * 257}, "257 processes are more than 256"),
        ({"hosts": [3, 4]}, "is not a host file"),
    ],
)
def test_a_host_file_that_will_not_do_is_one_line(data, why, tmp_path, capsys):
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(data))
    assert main(["launch", "--no-check", "--hostfile", str(file), "generate"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert why in err


def test_launches_at_once_take_ports_of_their_own():
    here = hosts.parse_hosts("127.0.0.1", 4)
    taken = [hosts.variables("ring", here, None)[1]["MLX_HOSTFILE"] for _ in range(20)]
    assert len(set(taken)) > 10
    assert json.loads(hosts.variables("ring", here, 5000)[1]["MLX_HOSTFILE"])[3] == ["127.0.0.1:5003"]
    with pytest.raises(DistributedError, match="leaves no room for 4 ports"):
        hosts.variables("ring", here, 65533)
