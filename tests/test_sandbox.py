"""Python code in the sandbox: what it may do, and what becomes of it when it does what it may not."""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time

import pytest

from llmctl import sandbox_guard
from llmctl.errors import CalledWrongly
from llmctl.sandbox import run_python

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="these walls are Linux's own")


def test_a_program_runs_to_its_end():
    outcome = run_python("import sys, math\nprint(math.comb(10, 3))\nprint('no', file=sys.stderr)\nsys.exit(3)")
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == ("120\n", "no\n", 3)
    assert not outcome.timed_out and not outcome.truncated


def test_an_error_is_printed_as_python_prints_it():
    outcome = run_python("def f():\n    return 1 / 0\nf()")
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith('Traceback (most recent call last):\n  File "main.py", line 3')
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n") and "sandbox" not in outcome.stderr
    assert "SyntaxError" in run_python("def f(:").stderr
    assert run_python("print('\udc80')").exit_code == 1  # source that is no UTF-8


def test_it_stands_in_an_empty_directory_with_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    code = "import os\nprint(os.listdir(), 'SECRET_TOKEN' in os.environ, os.environ['HOME'] == os.getcwd())"
    code += "\nprint(os.getcwd())\nopen('kept', 'w').write('x')"
    said, directory = run_python(code).stdout.splitlines()
    assert said == "['main.py'] False True" and not os.path.exists(directory)


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "import sys; sys.stdin.read()"])
def test_a_program_that_hangs_is_stopped(code):
    started = time.monotonic()
    outcome = run_python(code, seconds=0.5)
    assert time.monotonic() - started < 10
    assert outcome.timed_out is ("stdin" not in code)  # an input that is empty hangs nobody


def test_what_it_said_before_it_hung_is_kept():
    outcome = run_python("print('so far', flush=True)\nwhile True: pass", seconds=0.5)
    assert outcome.timed_out and outcome.stdout == "so far\n" and outcome.exit_code < 0


def test_closing_its_outputs_hides_nothing():
    assert run_python("import os\nos.close(1); os.close(2)\nwhile True: pass", seconds=0.5).timed_out


def test_megabytes_of_printing_are_cut():
    outcome = run_python("print('é' * 10_000_000)\nprint('end')", output_bytes=1001)
    assert outcome.truncated and outcome.exit_code == 0 and not outcome.timed_out
    assert len(outcome.stdout.encode(errors="replace")) <= 1003 and outcome.stdout.startswith("éé")


def test_memory_is_bounded():
    outcome = run_python("kept = []\nwhile True: kept.append(bytearray(10**7))", megabytes=256)
    assert outcome.exit_code == 1 and "MemoryError" in outcome.stderr
    assert run_python("kept = bytearray(10**8)\nprint(len(kept))", megabytes=256).stdout == "100000000\n"


@linux
def test_disk_is_bounded():
    outcome = run_python("for i in range(200):\n  open(str(i), 'wb').write(bytes(10**6))")
    assert outcome.exit_code == 1 and "OSError" in outcome.stderr


@linux
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0, 'Operation not permitted'",
    ],
)
def test_it_has_no_other_process(code):
    outcome = run_python(code)
    assert outcome.exit_code == 1 and "not permitted" in outcome.stderr


NUMBERS = {"x86_64": (29, 447), "aarch64": (194, 447)}


@linux
@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="the numbers of system calls are not known here")
def test_it_can_neither_mount_its_files_anew_nor_hide_memory():
    """A user namespace brings all capabilities over what was mounted in it, and with them the way out of it."""
    shared_memory, secret_memory = NUMBERS[platform.machine()]
    outcome = run_python(
        "import ctypes, struct\n"
        "libc = ctypes.CDLL(None)\n"
        "writable = ctypes.create_string_buffer(struct.pack('QQQQ', 0, 1, 0, 0), 32)\n"
        "print(libc.syscall(442, -100, b'/', 0, writable, ctypes.c_size_t(32)))\n"
        f"print(libc.syscall({shared_memory}, 0, ctypes.c_size_t(1 << 20), 0o1600), libc.syscall({secret_memory}, 0))\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')))\n"
    )
    mount, memory, capabilities = outcome.stdout.splitlines()
    assert (mount, memory) == ("-1", "-1 -1")
    assert {int(each, 16) for each in capabilities.split()[:3]} == {0}  # inheritable, permitted, effective


def test_threads_are_allowed():
    code = "import threading\nt = threading.Thread(target=print, args=('done',)); t.start(); t.join()"
    assert run_python(code).stdout == "done\n"


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_no_network(address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_python(f"import socket; socket.create_connection(({address!r}, {port}), 2).send(b'x')", seconds=5)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome.exit_code == 1
    assert any(guard.startswith("network: ") for guard in outcome.guards)


@pytest.mark.parametrize("event", ["socket.connect", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"])
def test_where_only_python_watches_it_watches_processes_too(event):
    with pytest.raises(PermissionError, match="here"):
        sandbox_guard._refuse_network_and_processes(event, ())
    sandbox_guard._refuse_network_and_processes("open", ())


@linux
def test_other_files_are_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("abc")
    if "not confined" in " ".join(run_python("").guards):
        pytest.skip("this kernel confines no files")
    assert "Error" in run_python(f"print(open({str(secret)!r}).read())").stderr
    assert "Error" in run_python(f"open({str(secret)!r}, 'w')").stderr
    assert "Error" in run_python(f"import os; os.remove({str(secret)!r})").stderr
    assert "Error" in run_python(f"print(open('/proc/{os.getpid()}/environ').read())").stderr
    assert secret.read_text() == "abc"


def test_several_run_at_once():
    outcomes = {}
    threads = [
        threading.Thread(target=lambda i=i: outcomes.update({i: run_python(f"print({i})").stdout})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {i: f"{i}\n" for i in range(4)}


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"megabytes": 1}, {"seconds": float("nan")}])
def test_limits_that_cannot_be(limits):
    with pytest.raises(CalledWrongly, match="expected"):
        run_python("", **limits)
