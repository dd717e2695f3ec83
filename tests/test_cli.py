"""What holds for every command: help, flags, messages and exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys

import click
import pytest

from llmctl import options
from llmctl.cli import program
from llmctl.quantities import (
    format_count,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_float,
    parse_interval,
    parse_size,
)

CONTEXT = click.Context(program, info_name="llmctl")
COMMANDS = {name: program.get_command(CONTEXT, name) for name in program.list_commands(CONTEXT)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(llmctl, name):
    text = llmctl(name, "--help").stdout
    assert COMMANDS[name].help and COMMANDS[name].short_help is None
    assert f"llmctl {name}" in text.partition("Examples:")[2]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command in a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_in_an_example_exists(name):
    for line in COMMANDS[name].examples.strip().splitlines():
        for words in simple_commands(line):
            if "llmctl" not in words:
                continue
            command, *args = words[words.index("llmctl") + 1 :]
            known = {opt for param in COMMANDS[command].params for opt in param.opts + param.secondary_opts}
            flags = {arg.partition("=")[0] for arg in args if re.match(r"--?[a-z]", arg)}
            assert flags <= known | {"--help"}, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_explains_itself(name):
    for param in COMMANDS[name].params:
        if isinstance(param, click.Option):
            assert param.help, param.name
            assert not any("_" in opt for opt in param.opts), "flags are kebab-case"


def test_flags_mean_the_same_everywhere():
    """An alias names one flag in all commands."""
    owners: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            if isinstance(param, click.Option):
                main = next(opt for opt in param.opts if opt.startswith("--"))
                for opt in param.opts:
                    owners.setdefault(opt, set()).add(main)
    assert not {alias: mains for alias, mains in owners.items() if len(mains) > 1}


def test_version_and_help(llmctl):
    from llmctl import __version__

    assert llmctl("--version").stdout == f"llmctl {__version__}\n"
    assert "Commands:" in llmctl("-h").stdout
    bare = llmctl(code=2)
    assert bare.stdout == "" and "Commands:" in bare.stderr


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["shwo"], "no such command: shwo", "did you mean show?"),
        (["show", "--learning-rat", "1"], "no such option: --learning-rat", "did you mean --learning-rate?"),
        (["show", "--lr"], "option '--lr' requires an argument", "llmctl show --help lists its flags"),
        (["show", "--lr", "0"], "--learning-rate: expected more than 0, got 0", None),
        (["show", "--lr", "nan"], "--learning-rate: expected a number, got 'nan'", None),
        (["show", "--warmup-fraction", "1.5"], "--warmup-fraction: expected at most 1, got 1.5", None),
        (["show", "--tokens", "10X"], "--tokens: expected a count such as 500, 10k, 10M or 1e6, got '10X'", None),
        (["show", "--time", "soon"], "--time: expected a duration such as 90s, 10m or 1h30m, got 'soon'", None),
        (["show", "--schedule", "step"], "--schedule: 'step' is not one of 'cosine', 'linear'", None),
        (["show", "extra"], "got unexpected extra argument (extra)", None),
        (["completions"], "missing argument", None),
    ],
)
def test_a_wrong_call_gets_two_lines_and_code_2(llmctl, programs, args, message, hint):
    result = llmctl(*args, code=2)
    first, second = result.stderr.splitlines()
    assert first.startswith(f"error: {message}")
    assert second == f"hint: {hint}" if hint else second.startswith("hint: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("kind", "code", "stderr"),
    [
        ("user", 1, ["error: a.bin: expected 3, got 4", "hint: make it 3"]),
        ("wrongly", 2, ["error: --x excludes --y"]),
        ("check", 3, ["error: error 0.5 is above the tolerance 0.1"]),
        ("interrupted", 143, ["interrupted"]),
        (
            "defect",
            1,
            [
                "error: unexpected KeyError: 'secret'",
                "hint: this is a defect of llmctl; --debug shows where it happened",
            ],
        ),
        ("disk-full", 1, ["error: disk full while writing model.safetensors"]),
        ("missing-file", 1, ["error: corpus.txt: no such file or directory"]),
        ("memory", 1, ["error: out of memory: 9 GiB more were needed", "hint: try a smaller --batch-size"]),
        ("cpu-memory", 1, ["error: out of memory: 218 MB more were needed", "hint: try a smaller --batch-size"]),
        (
            "torch-memory",
            1,
            [
                "error: out of memory: 20.00 MiB more were needed",
                "hint: try a smaller --batch-size",
            ],
        ),
        ("other-pipe", 1, ["error: broken pipe"]),
    ],
)
def test_failures_become_lines_and_codes(llmctl, programs, kind, code, stderr):
    assert llmctl("fault", kind, code=code).stderr.splitlines() == stderr


@pytest.mark.parametrize("args", [["--debug", "fault", "user"], ["fault", "user", "--debug"]], ids=" ".join)
def test_debug_adds_the_traceback(llmctl, programs, args):
    stderr = llmctl(*args, code=1).stderr
    assert "Traceback" in stderr and stderr.endswith("error: a.bin: expected 3, got 4\nhint: make it 3\n")


def test_notices_of_the_library_go_to_stderr(llmctl, programs):
    result = llmctl("fault", "notices")
    assert (result.stdout, result.stderr) == ("data\n", "note: a note\nwarning: a warning\n")
    assert llmctl("fault", "notices", "--quiet").stderr == "warning: a warning\n"
    assert llmctl("--quiet", "fault", "notices").stderr == "warning: a warning\n"


def test_of_several_processes_one_speaks(llmctl, programs):
    other = llmctl("fault", "notices", env={"RANK": "1"})
    assert (other.stdout, other.stderr) == ("", "")
    assert llmctl("fault", "user", code=1, env={"RANK": "1"}).stderr.startswith("rank 1: error: a.bin")
    assert llmctl("fault", "--no", code=2, env={"RANK": "1"}).stderr == ""


def run_shell(line: str, **env: str) -> subprocess.CompletedProcess:
    line = f'llmctl() {{ {shlex.quote(sys.executable)} -m llmctl "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def test_a_reader_that_goes_away_is_no_error(programs):
    result = run_shell('llmctl fault write | head -n 1; echo "${PIPESTATUS[0]}"')
    assert (result.stdout, result.stderr) == ("line 0\n0\n", "")


def test_a_reader_that_is_gone_before_the_last_flush(programs):
    result = run_shell('llmctl fault buffered | sleep 0; echo "${PIPESTATUS[0]}"')
    assert (result.stdout, result.stderr) == ("0\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["write", "buffered"])
def test_a_full_disk_behind_stdout_is_an_error(programs, kind):
    result = run_shell(f"llmctl fault {kind} > /dev/full; echo $?")
    assert (result.stdout, result.stderr) == ("1\n", "error: disk full while writing the output\n")


def test_a_closed_stdout_is_an_error(programs):
    result = run_shell("llmctl completions bash >&-")
    assert (result.returncode, result.stderr) == (
        1,
        "error: standard output is closed, so the result has nowhere to go\n",
    )


def test_ctrl_c_ends_with_130(programs):
    command = [sys.executable, "-m", "llmctl", "fault", "sleep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_data_is_utf8_whatever_the_locale(llmctl, programs, tmp_path):
    """The name of this output is no UTF-8; its path comes back byte by byte."""
    output = os.fsdecode(b"caf\xe9 \xe2\x98\x95")
    result = llmctl("copy", "-o", output, input=b"text", env={"PYTHONIOENCODING": "ascii"})
    assert result.stdout == os.fsencode(tmp_path / output) + b"\n"


def on_terminal(code: str) -> str:
    """What a terminal is sent by a program that uses `ui`."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=follower, env=environment) as process:
        os.close(follower)
        sent = b""
        while True:
            try:
                sent += os.read(leader, 65536)
            except OSError:  # how Linux tells that the other end is closed
                break
        assert process.wait() == 0
    os.close(leader)
    return sent.decode()


PROGRESS = """
from llmctl import ui
with ui.progress("tokenize", 8_000_000, "B") as bar:
    bar.update(2_000_000, "500k tokens")
    ui.note("in the middle")
    bar.update(8_000_000, "2M tokens")
ui.table("counts", ["split", "n"], [["train", 12], ["val", 3]])
"""


def test_progress_is_a_bar_on_a_terminal():
    sent = on_terminal(PROGRESS)
    assert "\r\x1b[2Knote: in the middle\r\n" in sent, "a note stands on a line of its own"
    assert "8 MB of 8 MB (100 %)" in sent and "\x1b[?25h" in sent, "the cursor comes back"


def test_progress_is_lines_elsewhere():
    result = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, text=True, timeout=60, check=True)
    first, second, *table = result.stderr.splitlines()
    assert first == "note: in the middle"
    assert re.fullmatch(r"tokenize: 8 MB of 8 MB \(100 %\), \S+ \wB/s, 2M tokens", second)
    assert table == ["counts", "  split   n", "  train  12", "  val     3"]


def shown(llmctl, *args, **kwargs) -> dict:
    return json.loads(llmctl("show", *args, **kwargs).stdout)


def test_values_as_people_write_them(llmctl, programs):
    flags = ["--lr", "1e-4", "--tokens", "10M", "--memory", "1GiB", "--time", "1h30m", "--save-every", "500", "-n", "7"]
    values = shown(llmctl, *flags, "--no-bf16", "--compile", "--stop", "a b", "--stop", "--")
    expected = {"learning-rate": 1e-4, "tokens": 10**7, "memory": 2**30, "time": 5400.0, "save-every": 500}
    expected |= {"max-new-tokens": 7, "bf16": False, "compile": True, "stop": ["a b", "--"], "schedule": "cosine"}
    assert {name: values[name] for name in expected} == expected


def test_snake_case_is_accepted(llmctl, programs):
    assert shown(llmctl, "--learning_rate", "2")["learning-rate"] == 2.0
    assert shown(llmctl, "--no_bf16")["bf16"] is False


def test_defaults_are_shown_as_they_are_written(llmctl, programs):
    text = llmctl("show", "--help").stdout
    for default in ("[default: 0.0003]", "[default: 100M]", "[default: 64MB]", "[default: 10m]", "[default: cosine]"):
        assert default in text
    assert "Optimizer:" in text and "LLMCTL_SHOW_<FLAG>" in text


def test_flag_over_environment_over_recipe_over_default(llmctl, programs, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-5\ntokens: 1M\nbf16: off\nmax_new_tokens: 3\n")
    environment = {"LLMCTL_SHOW_TOKENS": "2M", "LLMCTL_SHOW_LEARNING_RATE": "2e-5"}
    values = shown(llmctl, "--recipe", recipe, "--lr", "3e-5", env=environment)
    assert (values["learning-rate"], values["tokens"], values["bf16"]) == (3e-5, 2_000_000, False)
    assert (values["max-new-tokens"], values["shard-tokens"]) == (3, 100_000_000)
    assert set(values["given"]) == {"learning_rate", "tokens", "bf16", "max_new_tokens"}


def test_the_environment_knows_every_name_of_a_flag_and_no_other(llmctl, programs):
    assert shown(llmctl, env={"LLMCTL_SHOW_LR": "7"})["learning-rate"] == 7.0
    assert json.loads(llmctl("env", env={"LLMCTL_ENV_JSON": "1"}).stdout)["llmctl"]["version"]
    assert llmctl("show", env={"LLMCTL_SHOW_LRR": "7"}, code=2).stderr.splitlines() == [
        "error: the environment sets LLMCTL_SHOW_LRR, which is no flag of show",
        "hint: did you mean LR?",
    ]


def test_a_wrong_value_names_where_it_came_from(llmctl, programs, tmp_path):
    (tmp_path / "r.yaml").write_text("lr: fast\n")
    assert llmctl("show", "--recipe", "r.yaml", code=2).stderr.startswith("error: r.yaml: --learning-rate: expected a")
    stderr = llmctl("show", code=2, env={"LLMCTL_SHOW_TOKENS": "x"}).stderr
    assert stderr.startswith("error: LLMCTL_SHOW_TOKENS: --tokens: expected a count")


def test_torchrun_starts_it_as_a_module():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmctl", "--version"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (result.returncode, result.stdout.count("llmctl")) == (0, 1), result.stderr


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "500", 500),
        (parse_count, "10M", 10_000_000),
        (parse_count, "1.5k", 1500),
        (parse_count, "2_000", 2000),
        (parse_count, "1e6", 1_000_000),
        (parse_count, "1.1B", 1_100_000_000),
        (parse_count, "123456789012345678901", 123456789012345678901),
        (parse_size, "64MB", 64_000_000),
        (parse_size, "1 GiB", 2**30),
        (parse_size, "512", 512),
        (parse_duration, "90s", 90),
        (parse_duration, "10m", 600),
        (parse_duration, "1h30m", 5400),
        (parse_duration, "0.5h", 1800),
        (parse_duration, "45", 45),
        (parse_duration, "2d", 172800),
        (parse_interval, "500", 500),
        (parse_interval, "1k", 1000),
        (parse_interval, "10m", 600.0),
        (parse_float, "1e-5", 1e-5),
    ],
)
def test_quantities_are_read(parse, text, value):
    assert parse(text) == value
    assert parse_interval("10m") == 600.0 and isinstance(parse_interval("10m"), float)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_count, "1.5"),
        (parse_count, "-3"),
        (parse_count, "ten"),
        (parse_count, ""),
        (parse_size, "3 bananas"),
        (parse_duration, "10x"),
        (parse_duration, "1h x"),
        (parse_interval, "often"),
        (parse_float, "inf"),
        (parse_float, ""),
    ],
)
def test_quantities_are_refused(parse, text):
    with pytest.raises(ValueError, match="expected"):
        parse(text)


def test_quantities_are_written_short():
    assert [format_count(n) for n in (7, 999, 1234567, 10**7, 999_999)] == ["7", "999", "1.23M", "10M", "1M"]
    assert [format_size(n) for n in (0, 64_000_000, 1_234)] == ["0 B", "64 MB", "1.23 kB"]
    assert [format_duration(s) for s in (0, 59, 65, 600, 7800, 90_000)] == [
        "0s",
        "59s",
        "1m 5s",
        "10m",
        "2h 10m",
        "1d 1h",
    ]


def test_settings_refuse_a_field_of_a_type_they_do_not_know():
    import dataclasses

    odd = dataclasses.make_dataclass("Odd", [("weights", dict, dataclasses.field(default=None))])
    with pytest.raises(KeyError):
        options.settings(odd)(lambda settings: None)
