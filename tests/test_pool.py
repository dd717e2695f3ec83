"""The threads of the kernels: through forks, exits, callers at once and signals."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from llmctl.ops import native
from llmctl.ops.linear import linear

pytestmark = pytest.mark.skipif(not native.path().exists(), reason="the native library is not built")

PREAMBLE = """
import os, threading, torch
from llmctl.ops.linear import linear
torch.set_num_threads(3)
x, weight = torch.randn(64, 512), torch.randn(512, 512)
expected = linear(x, weight)
def check():
    assert torch.equal(linear(x, weight), expected)
"""


def run(program: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {"LLMCTL_KERNELS": "cpu", "PATH": ""}
    command = [sys.executable, "-c", PREAMBLE + program]
    # not from the source tree, which has a native library only where somebody built it there
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, cwd=tempfile.gettempdir(), **kwargs
    )


def test_a_forked_child_has_threads_of_its_own():
    result = run("""
for _ in range(20):
    child = os.fork()
    if child == 0:
        check()
        os._exit(7)
    check()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""")
    assert result.returncode == 0, result.stderr


def test_a_fork_amid_work_of_another_thread():
    result = run("""
stop = threading.Event()
def work():
    while not stop.is_set():
        check()
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        check()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
stop.set()
thread.join()
""")
    assert result.returncode == 0, result.stderr


def test_the_process_ends_while_threads_work():
    # By the library alone: torch's functions abort where a thread comes back from them to an interpreter that is gone.
    result = run("""
from llmctl.ops import native
out, library = torch.empty(64, 512), native.load()
def work():
    while True:
        sizes = 64, 512, 512
        native.call(library, "llmctl_linear", 0, 0, x.data_ptr(), 512, weight.data_ptr(), 512, None, out.data_ptr(), 512, *sizes)
threading.Thread(target=work, daemon=True).start()
import time
time.sleep(0.2)
assert torch.equal(out, expected)
""")
    assert result.returncode == 0, result.stderr


def test_callers_at_once():
    weight = torch.randn(300, 200)
    inputs = [torch.randn(40 + i, 200) for i in range(4)]
    expected = [linear(x, weight) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(200):
            if not torch.equal(linear(inputs[i], weight), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_more_threads_than_cores_and_sleeping_ones():
    before = torch.get_num_threads()
    x, weight = torch.randn(64, 512), torch.randn(512, 512)
    expected = linear(x, weight)
    try:
        torch.set_num_threads(16)
        for _ in range(20):
            assert torch.equal(linear(x, weight), expected)
            time.sleep(0.002)  # they sleep and must be woken
    finally:
        torch.set_num_threads(before)


def test_signals_go_to_the_threads_that_python_knows():
    result = run("""
import signal, time
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(threading.current_thread() is threading.main_thread()))
begun = time.monotonic()
for _ in range(10):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.001)
assert got and all(got)
""")
    assert result.returncode == 0, result.stderr


def test_a_number_of_threads_below_zero_is_refused():
    with pytest.raises(RuntimeError, match="below 0"):
        native.call(native.load(), "llmctl_set_threads", -1)


def test_physical_cores_by_default():
    library = native.load()
    library.llmctl_set_threads(0)
    assert 1 <= library.llmctl_threads()
