"""How `ring-mlx launch` starts ranks, passes on what they say, and ends with them: ranks without a model."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from ring_mlx import harmless
from tests.stand_in import Stage
from tests.test_distributed import running

HERE, FAR = ("127.0.0.1", "127.0.0.1"), ("far", "farther")
MIXED = ("127.0.0.1", "far")
# Wide, since machines that test are slow; before, what must end in a moment went on for ever or for more than a minute.
LIMIT_S = 40
ENDLESS = "import time; print('under way', flush=True); time.sleep(600)"
OTHERS = "import os, time\nwhile not os.path.exists('rank1'): time.sleep(0.01)\nrank or print('under way', flush=True); time.sleep(600)"
DATA = bytes(range(256)) + b"\r\n\x1b[31m" + "\u00e9\u2028\U0001f40d".encode() + b"\xff\xfe" + b"x" * 300_000
EXACT = r"""
import sys
data = bytes(range(256)) + b"\r\n\x1b[31m" + "\u00e9\u2028\U0001f40d".encode() + b"\xff\xfe" + b"x" * 300_000
sys.stderr.write("\x1b[2Jno\rclear\u202e\n")
sys.stdout.buffer.write(data if rank == 0 else b"nobody asked")
"""


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def ranks_of(stage):
    """The ranks that run, by their command lines."""
    return [
        pid for pid, text in running() if str(stage.python) in text and "ring_mlx" in text and " launch " not in text
    ]


def wait_for_none(stage):
    end = time.monotonic() + LIMIT_S
    while ranks_of(stage):
        assert time.monotonic() < end, [text for _, text in running() if str(stage.python) in text]
        time.sleep(0.1)


@pytest.mark.parametrize("hosts", [HERE, FAR, MIXED, (*FAR, "127.0.0.1")], ids="-".join)
def test_answers_alone_are_on_standard_output_byte_for_byte(stage, hosts):
    code, out, err = stage.run(hosts, EXACT)
    assert code == 0, err
    assert out == DATA
    shown = [line for line in err if "clear" in line]
    assert shown == ["clear\\u202e"]  # said by all, once, without what a terminal would obey
    assert [line for line in err if line not in shown] == (
        ["Welcome to far", "no newline"] if hosts[0] == "far" else []
    )


def test_arguments_variables_and_folders_arrive_as_they_are(stage):
    odd = ["it's; touch owned", '"$(touch owned)"', "`touch owned`", "a\nb\\'c", "\u00e9 \U0001f40d", "-x", ""]
    envs = [f"ODD={odd[0]}{odd[1]}", "EMPTY=", "with-dash=1", f"LINES_={odd[3]}"]
    text = "import json, os; rank or print(json.dumps([words[3:], dict(os.environ), os.getcwd(), os.read(0, 9).hex()]))"
    for hosts in (HERE, FAR):
        code, out, err = stage.run(hosts, text, *odd, envs=envs)
        assert code == 0, err
        words, seen, folder, given = json.loads(out)
        assert words == odd
        assert [seen.get(e.partition("=")[0]) for e in envs] == [e.partition("=")[2] for e in envs]
        assert folder == str(stage.folder)
        assert given == ""
        assert seen["MLX_RANK"] == "0"
        assert not os.path.exists(seen["MLX_HOSTFILE"])
    assert not (stage.folder / "owned").exists()


@pytest.mark.parametrize("hosts", [HERE, FAR, MIXED], ids="-".join)
@pytest.mark.parametrize("how", ["TERM", "INT", "HUP", "KILL", "background", "nohup", "pipe"])
def test_ranks_end_with_their_launcher(stage, hosts, how):
    ignored = {"background": "INT", "nohup": "HUP"}.get(how)
    wrap = ("sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh") if ignored else ()
    text = ENDLESS.replace("time.sleep(600)", "[(time.sleep(0.1), print('x', flush=True)) for _ in range(6000)]")
    with stage.popen(hosts, text, wrap=wrap) as p:
        assert p.stdout.readline() == b"under way\n"
        assert len(ranks_of(stage)) == 2
        if how == "pipe":
            p.stdout.close()
        else:
            if ignored:
                p.send_signal(getattr(signal, f"SIG{ignored}"))
                time.sleep(0.3)
                assert p.poll() is None
            p.send_signal(getattr(signal, f"SIG{'TERM' if ignored else how}"))
        err = p.stderr.read().decode()
        wait_for_none(stage)
        assert p.wait(LIMIT_S) == {"KILL": -signal.SIGKILL, "pipe": 141}.get(how, 130)
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3  # what the shells there say


def test_ranks_of_a_background_job_are_interrupted_not_cut_off(stage):
    text = "import time\nprint('under way', flush=True)\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('told')"
    with stage.popen(HERE, text, wrap=("sh", "-c", "trap '' INT; exec \"$@\"", "sh")) as p:
        assert p.stdout.readline() == b"under way\n"
        p.terminate()
        assert p.communicate(timeout=LIMIT_S) == (b"told\n", b"")
    assert p.returncode == 130


def test_a_rank_that_is_cut_off_from_a_dead_launcher_ends(stage):
    with stage.popen(MIXED, OTHERS) as p:
        assert p.stdout.readline() == b"under way\n"
        (stage.folder / "cut-far").touch()
        p.kill()
        wait_for_none(stage)
        (stage.folder / "cut-far").unlink()  # and the link is over too


def test_a_rank_that_does_not_obey_ends_too(stage):
    text = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); " + ENDLESS
    with stage.popen(MIXED, text) as p:
        assert p.stdout.readline() == b"under way\n"
        p.terminate()
        time.sleep(0.5)
        p.terminate()
        assert p.wait(LIMIT_S) == 130
        wait_for_none(stage)
        p.communicate()


@pytest.mark.parametrize("hosts", [HERE, FAR, MIXED], ids="-".join)
@pytest.mark.parametrize("how", ["STOP", "KILL", "cut"])
def test_a_rank_that_is_lost_is_told_in_one_line(stage, hosts, how):
    with stage.popen(hosts, OTHERS) as p:
        assert p.stdout.readline() == b"under way\n"
        if how == "cut":
            if hosts == HERE:
                pytest.skip("no link to cut")
            (stage.folder / f"cut-{hosts[1]}").touch()
        else:
            victim = stage.pid(1)
            os.kill(victim, getattr(signal, f"SIG{how}"))
        started = time.monotonic()
        _, err = p.communicate(timeout=LIMIT_S)
        assert time.monotonic() - started < LIMIT_S / 2
        assert p.returncode == 3
    if how == "STOP" and hosts[1] != "127.0.0.1":
        os.kill(victim, signal.SIGCONT)
    said = [line for line in err.decode().splitlines() if line.startswith("ring-mlx")]
    assert len(said) == 1, err
    assert f"rank 1 ({hosts[1]}) " in said[0]
    # On a busy machine rank 1 may be lost before it has been heard at all.
    silent = "is silent", "has not reached the others"
    assert any(words in said[0] for words in {"KILL": ("was killed",)}.get(how, silent))
    assert b"Traceback" not in err
    wait_for_none(stage)


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        ("raise SystemExit(0)", 0, None),
        (
            "import sys; print('ring-mlx: [x] refused; do y.', file=sys.stderr); sys.exit(2)",
            2,
            "ring-mlx: [x] refused; do y.",
        ),
        ("raise SystemExit(7 if rank else 0)", 7, "rank 1 (far) ended with exit code 7"),
        ("import sys; rank and sys.exit('ring-mlx: [x] alone.')", 1, "ring-mlx: [x] alone."),
        ("rank and 1 / 0", 1, "rank 1 (far) ended with exit code 1"),
        ("import os; rank or os.abort()", 3, "rank 0 (127.0.0.1) was killed by signal 6"),
        (
            "import os, sys; rank or print('[ring] Socket 4 was closed by the peer', file=sys.stderr); sys.exit(3)",
            3,
            "rank ",
        ),
        (
            "import sys; rank or print('[ring]ring-mlx: [x] gone.\\n Socket 6', file=sys.stderr); sys.exit(3)",
            3,
            "[x] gone.",
        ),
        ("import sys; rank or print('6 failed with errno 104 \\n 104\\n', file=sys.stderr); sys.exit(3)", 3, "rank "),
    ],
)
def test_the_exit_code_is_of_the_first_rank_that_failed(stage, text, code, why):
    got, _, err = stage.run(MIXED, text)
    assert got == code, err
    said = [line for line in err if line.startswith("ring-mlx")]
    assert len(said) == (why is not None), err
    assert why is None or why in said[0]
    assert not any(word in line for line in err for word in ("[ring]", "Socket", "errno"))
    assert ("ZeroDivisionError: division by zero" in err) == ("1 / 0" in text)


def test_a_host_that_refuses_is_one_line(stage):
    code, out, err = stage.run(("127.0.0.1", "no-host"), ENDLESS)
    assert (code, out) == (2, b"")
    assert len(err) == 1
    assert "rank 1 (no-host) could not be reached (ssh: connect to host no-host port 22: Connection refused)" in err[0]


def test_an_interpreter_that_is_not_there_is_one_line(stage):
    for hosts, code in ((HERE, 2), (FAR, 127)):
        stage.python = stage.folder / "no python"
        got, out, err = stage.run(hosts, ENDLESS)
        assert (got, out, len(err)) == (code, b"", 1), err
        assert "no python" in err[0]
        assert "Traceback" not in err[0]


@pytest.mark.parametrize("name", ["-oProxyCommand=touch", "-oProxyCommand=touch owned", "a b", "", "a\nb"])
def test_a_host_name_is_no_option_of_ssh(stage, name):
    code, out, err = stage.run(("127.0.0.1", name), ENDLESS)
    assert (code, out, len(err)) == (2, b"", 1)
    assert "is not a name of a host" in err[0]
    assert not (stage.folder / "owned").exists()


def test_what_a_terminal_gets_of_a_line():
    assert harmless("a\tb\x1b[0m\x9b\u202e\x00\u00e9") == "a\tb\\x1b[0m\\x9b\\u202e\\x00\u00e9"


def test_a_slow_reader_of_errors_is_no_silence(stage):
    text = "import sys, time; rank or [print('y' * 1000, file=sys.stderr) for _ in range(1000)]; print('done')"
    with stage.popen(MIXED, text) as p:
        time.sleep(9)
        out, err = p.communicate(timeout=LIMIT_S)
    assert (p.returncode, out) == (0, b"done\n")
    assert err.count(b"y" * 1000) == 1000


@pytest.mark.parametrize("hosts", [FAR, HERE], ids="-".join)
def test_a_terminal_that_closes_ends_all(stage, hosts):
    """What a rank elsewhere prints reaches a terminal without what it would obey; the closing hangs up."""
    ours, theirs = os.openpty()
    text = "import time; print('\\x1b[31mred\\u202e', flush=True); " + ENDLESS
    wrap = (sys.executable, "-c", AT_TERMINAL, os.ttyname(theirs))
    with stage.popen(hosts, text, wrap=wrap, stdout=theirs, stderr=theirs, start_new_session=True) as p:
        os.close(theirs)
        seen = b""
        while b"under way" not in seen:
            seen += os.read(ours, 1000)
        if hosts == FAR:
            assert b"\\x1b[31mred\\u202e" in seen
            assert b"\x1b" not in seen
        os.close(ours)
        assert p.wait(LIMIT_S) == 130
        wait_for_none(stage)


# Makes a terminal the controlling one of a session, then becomes the rest of the command.
AT_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(os.open(sys.argv[1], 2), termios.TIOCSCTTY, 0); os.execv(sys.argv[2], sys.argv[2:])"
