"""Commands run as a person runs them: as processes, with files and pipes."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytest.register_assert_rewrite("family_checks")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LLMCTL_DATA", ROOT.parent / "shared" / "data"))

# Several test processes share few cores; torch's own threads would only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


SAMPLE = 6
"""Of so many slow tests one runs when nothing is said."""


def pytest_addoption(parser):
    parser.addoption("--slow", choices=["none", "sample", "all"], default="sample", help="which slow tests run")


def pytest_collection_modifyitems(config, items):
    choice = config.getoption("--slow")
    if choice == "all" or any("::" in name for name in config.args):
        return

    def stays(item) -> bool:
        if item.get_closest_marker("slow") is None:
            return True
        return choice == "sample" and zlib.crc32(item.nodeid.encode()) % SAMPLE == 0

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]


@pytest.fixture
def llmctl(tmp_path):
    """Run `llmctl ARGS` in a fresh directory: `llmctl("env", "--json", code=0)` gives a CompletedProcess of text.

    `code` is the exit code to expect; None accepts any. Further keywords are those of subprocess.run; `env` adds to the
    environment.
    """

    def run(*args: object, code: int | None = 0, env: dict[str, str] | None = None, **kwargs):
        kwargs.setdefault("cwd", tmp_path)
        kwargs.setdefault("timeout", 600)
        if "input" not in kwargs:
            kwargs.setdefault("stdin", subprocess.DEVNULL)
        is_text = not isinstance(kwargs.get("input"), bytes)
        environment = {**os.environ, **(env or {})}
        command = [sys.executable, "-m", "llmctl", *map(str, args)]
        result = subprocess.run(command, env=environment, capture_output=True, text=is_text, **kwargs)
        if code is not None and result.returncode != code:
            pytest.fail(
                f"llmctl {' '.join(map(str, args))} ended with {result.returncode}, not {code}:\n{result.stderr}"
            )
        return result

    return run


@pytest.fixture
def llmctl_here(tmp_path, monkeypatch):
    """As `llmctl`, in this process, whose imports are done: for what a process of its own would not show better."""
    from llmctl import cli

    def run(*args: object, code: int | None = 0, input: str = ""):
        streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), "utf-8"))
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            returned = cli.main([str(each) for each in args])
        logger = logging.getLogger("llmctl")
        logger.handlers.clear()
        logger.propagate = True
        for stream in streams.values():
            stream.flush()
        said = {name: stream.buffer.getvalue().decode() for name, stream in streams.items()}
        if code is not None and returned != code:
            pytest.fail(f"llmctl {' '.join(map(str, args))} ended with {returned}, not {code}:\n{said['stderr']}")
        return subprocess.CompletedProcess(args, returned, **said)

    return run


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """Adds the commands of tests/programs (`copy`, `fault`, `show`) to llmctl; their runs are noted in the file given."""
    paths = [str(ROOT / "tests" / "programs"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))
    return tmp_path / "runs.txt"


@pytest.fixture(scope="session")
def data() -> Path:
    """The directory of real texts and models; a test that asks for it is skipped where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no data in {DATA}; set LLMCTL_DATA")
    return DATA


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def isa(request) -> str:
    """Each instruction set that kernels are written for, forced in turn; skipped where the processor lacks it."""
    from llmctl.ops import native

    if not native.path().exists():
        pytest.skip("the native library is not built")
    library = native.load()
    if library.llmctl_set_isa(request.param.encode()):
        pytest.skip(library.llmctl_last_error().decode())
    yield request.param
    library.llmctl_set_isa(None)


@pytest.fixture(scope="session")
def some_texts() -> list[str]:
    """Two hundred short documents of few words, the same on every machine."""
    choose = random.Random(0)
    words = "the cat sat on a mat and saw two dogs run by his red house".split()
    return [" ".join(choose.choices(words, k=choose.randint(1, 60))) + "." for _ in range(200)]


@pytest.fixture(scope="session")
def write_tokens():
    """`write_tokens(path, texts, held_out=20)` writes a token stream whose last documents are for validation."""
    from llmctl.streams import TokenStreamWriter
    from llmctl.tokenizer import Tokenizer

    def write(path: Path, texts: list[str], held_out: int = 0, tokenizer: Tokenizer | None = None) -> Path:
        tokenizer = tokenizer or Tokenizer.bytes()
        cut = len(texts) - held_out
        sizes = {}
        with open(path, "wb") as sink:
            writer = TokenStreamWriter(sink, tokenizer, split=held_out > 0)
            for split, part in (("train", texts[:cut]), ("val", texts[cut:])):
                if part:
                    writer.write(*tokenizer.encode_documents(part), split=split)
                    sizes[split] = sum(len(text.encode()) for text in part)
            writer.close(sizes)
        return path

    return write


@pytest.fixture
def in_transformers(tmp_path_factory):
    """`in_transformers(tokenizer, model_type=None)`: what AutoTokenizer makes of the files that we save."""
    transformers = pytest.importorskip("transformers")

    def reopen(tokenizer, model_type: str | None = None):
        directory = tmp_path_factory.mktemp("saved")
        tokenizer.save(directory)
        if model_type:
            (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        return transformers.AutoTokenizer.from_pretrained(directory)

    return reopen
