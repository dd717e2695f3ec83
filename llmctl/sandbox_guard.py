"""Runs as a program of its own (`python -I sandbox_guard.py LIMITS`): gives up what it may do, then runs main.py.

Only the standard library is here, so that the process is small. Several walls stand one behind another, because not
every kernel has each: namespaces (no network, no mounts that could be written), Landlock (no files but Python's own),
limits of resources, no capabilities (those of a namespace could mount its files anew), and a seccomp filter (no sockets,
no further processes, no signals to others). One process that cannot fork makes the limits of a process those of the whole
program. Each wall's name is reported to the other side.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback
import types

_DISK_MEGABYTES = 64
_OPEN_FILES = 128

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_NETWORK = 0x20000, 0x08000000, 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SIGKILL = 1, 22, 38, 9
_CAPABILITIES_V3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = -100, 0x8000, 1
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 0x4000, 0x40000
_EPERM, _ENOSYS = 1, 38

# Landlock and mount_setattr have the same numbers everywhere.
_MOUNT_SETATTR, _CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 442, 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIRECTORY = 1 << 0, 1 << 2, 1 << 3
_ACCESSES = {1: 13, 2: 14, 3: 15, 4: 15}  # rights over files that each version of Landlock knows; 16 after the last

# The kernel's own numbers of system calls, on x86_64 and aarch64. Forbidden is what reaches the network, other processes
# or the kernel's state, or holds memory that the limit of address space does not count.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_FORBIDDEN = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "chroot": (161, 51),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "prlimit64": (302, 261),
}
_CLONE, _CLONE3, _SIGNALS = (56, 220), (435, 435), ((62, 129), (234, 131))
_CLONE_THREAD = 0x10000


def main() -> None:
    limits = json.loads(sys.argv[1])
    with open("main.py", "rb") as file:
        code = file.read()
    try:
        guards = _give_up(limits, code)
        report = {"guards": guards}
    except OSError as error:
        report = {"error": str(error)}
    with open(limits["report"], "w") as file:
        json.dump(report, file)
    if "guards" in report:
        _run(code)


def _give_up(limits: dict, code: bytes) -> list[str]:
    on_linux = sys.platform.startswith("linux")
    libc = ctypes.CDLL(None, use_errno=True)
    has_namespaces = on_linux and _leave_namespaces(libc, code)
    _limit(limits)
    has_landlock = on_linux and _confine_files(libc)
    if on_linux:
        _drop_capabilities(libc)
    has_filter = on_linux and _filter_calls(libc)
    sees = [name for name, holds in (("namespace", has_namespaces), ("seccomp", has_filter)) if holds]
    if not sees:
        sys.addaudithook(_refuse_network_and_processes)
        sees = ["audit hook, which native code can pass by"]
    wrote = [name for name, holds in (("read-only mounts", has_namespaces), ("Landlock", has_landlock)) if holds]
    return [
        f"network: {' and '.join(sees)}",
        f"files: {' and '.join(wrote) or 'not confined'}",
        f"processes: {'none but itself' if has_filter else 'its group is killed with it'}",
    ]


def _leave_namespaces(libc, code: bytes) -> bool:
    """A namespace with no network and a tree of files that cannot be written but for a small directory in memory."""
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_MOUNTS | _NEW_IPC):
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    here = os.getcwd()
    size = f"size={_DISK_MEGABYTES}m,nr_inodes=4096,mode=700".encode()
    read_only = ctypes.create_string_buffer(struct.pack("QQQQ", _READ_ONLY, 0, 0, 0), 32)
    if (
        libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, ctypes.c_size_t(32))
        or libc.mount(b"tmpfs", os.fsencode(here), b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    ):
        return False
    os.chdir(here)
    with open("main.py", "wb") as file:
        file.write(code)
    return True


def _limit(limits: dict) -> None:
    size = limits["megabytes"] << 20
    for name, soft, hard in (
        ("RLIMIT_AS", size, size),
        ("RLIMIT_CPU", limits["seconds"], limits["seconds"] + 1),
        ("RLIMIT_FSIZE", _DISK_MEGABYTES << 20, _DISK_MEGABYTES << 20),
        ("RLIMIT_NOFILE", _OPEN_FILES, _OPEN_FILES),
        ("RLIMIT_CORE", 0, 0),
    ):
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:  # never more than we were left
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(kind, (soft, hard))
        except ValueError:
            if name != "RLIMIT_AS" or sys.platform.startswith("linux"):  # macOS refuses this one
                raise OSError(f"the limit {name} cannot be set") from None


def _confine_files(libc) -> bool:
    """Landlock: Python and the system's libraries to read, the own directory to write, and no other file."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    everything = (1 << _ACCESSES.get(version, 16)) - 1
    attributes = ctypes.create_string_buffer(struct.pack("Q", everything), 8)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    reading = _EXECUTE | _READ_FILE | _READ_DIRECTORY
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    places = {path: reading for path in [*prefixes, "/usr", "/lib", "/lib64", "/proc/self", "/etc/ld.so.cache"]}
    places |= {path: reading for path in sys.path if os.path.isdir(path)}
    places |= {"/dev/null": _READ_FILE | 2, "/dev/urandom": _READ_FILE, "/dev/zero": _READ_FILE}
    places |= {"/etc/localtime": _READ_FILE, os.getcwd(): everything}
    for path, rights in places.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = rights if os.path.isdir(path) else rights & ~_READ_DIRECTORY
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights & everything, place), 12)
        libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return held


def _drop_capabilities(libc) -> None:
    """Whether they are root's own or those that a new namespace brings: a program needs none."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITIES_V3, 0), 8)
    if libc.capset(header, ctypes.create_string_buffer(24)):
        raise OSError("capabilities cannot be dropped")


def _filter_calls(libc) -> bool:
    """A seccomp filter over the numbers of system calls; threads are allowed, processes are not."""
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    program = _program(*_ARCHITECTURES[platform.machine()])
    instructions = b"".join(struct.pack("HBBI", *line) for line in program)
    memory = ctypes.create_string_buffer(instructions, len(instructions))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(memory)), 16)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0


def _program(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """Instructions of the classic packet filter as (code, skip if true, skip if false, constant)."""
    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | _EPERM, 0x80000000
    number_at, architecture_at, argument_at = 0, 4, 16
    lines = [(load, 0, 0, architecture_at), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, number_at)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x32's numbers name the same calls again
    for numbers in _FORBIDDEN.values():
        if numbers[column] is not None:
            lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    # Without clone3 the C library makes its threads by clone, whose flags can be seen from here.
    lines += [(equal, 0, 1, _CLONE3[column]), (give, 0, 0, 0x00050000 | _ENOSYS)]
    lines += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, argument_at), (has_bit, 0, 1, _CLONE_THREAD)]
    lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    for numbers in _SIGNALS:
        lines += [(equal, 0, 4, numbers[column]), (load, 0, 0, argument_at), (equal, 0, 1, os.getpid())]
        lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    return [*lines, (give, 0, 0, allow)]


def _refuse_network_and_processes(event: str, arguments: tuple) -> None:
    """Another process would have no such hook."""
    if event.startswith("socket.") and event != "socket.gethostname":
        raise PermissionError("no network here")
    if event.startswith(("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn")):
        raise PermissionError("no other process here")


def _run(code: bytes) -> None:
    module = types.ModuleType("__main__")
    module.__file__ = "main.py"
    sys.modules["__main__"], sys.argv = module, ["main.py"]
    try:
        exec(compile(code, "main.py", "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - printed as Python prints it, without this file's own frame
        try:
            traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        except MemoryError:
            os.write(2, b"MemoryError\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
