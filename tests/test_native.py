"""The C ABI as Python declares it is the C ABI of the header, and LLMCTL_KERNELS is obeyed."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmctl.errors import CalledWrongly, UserError
from llmctl.ops import bpe, cached_attention, decode_step, native, norm, quantized_linear, sampling, training_attention

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "llmctl.h"
C_TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "const char*": ctypes.c_char_p,
}

STRUCTS = {
    "llmctl_attention_args": cached_attention.Args,
    "llmctl_sample_args": sampling.Args,
    "llmctl_quantized_weight": quantized_linear.Args,
    "llmctl_norm": decode_step.Norm,
    "llmctl_matrix": decode_step.Matrix,
    "llmctl_decoder_layer": decode_step.Layer,
    "llmctl_decoder": decode_step.Decoder,
    "llmctl_rotary": decode_step.Rotary,
    "llmctl_kv_cache": decode_step.KvCache,
    "llmctl_decode_args": decode_step.Args,
    "llmctl_training_attention": training_attention.Args,
}


def c_type(declaration: str):
    """The ctypes type of a declaration without its name; every pointer but a string is 64 bits of void*."""
    return ctypes.c_void_p if declaration.endswith("*") and declaration not in C_TYPES else C_TYPES[declaration]


def prototypes() -> dict[str, list]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    found = {}
    for result, name, parameters in re.findall(r"LLMCTL_API ([^;(]*?)(llmctl_\w+)\(([^)]*)\);", text):
        types = [] if parameters == "void" else [re.sub(r"\w+$", "", p.strip()).strip() for p in parameters.split(",")]
        found[name] = [c_type(result.strip()), *map(c_type, types)]
    return found


def fields(struct: str) -> list[tuple[str, object]]:
    """Names and ctypes types of a struct's fields."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {struct};", text)[1]
    found = []
    for kind, names in re.findall(r"\s*((?:const )?\w+\*?) ([^;]+);", body):
        for name, length in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            of = STRUCTS[kind] if kind in STRUCTS else c_type(kind)
            found.append((name, of * int(length) if length else of))
    return found


def enumerators(prefix: str) -> dict[str, str]:
    return dict(re.findall(rf"{prefix}(\w+) = ([^,/\n]+?)\s*(?:,|/\*|\n)", HEADER.read_text()))


@pytest.fixture
def fresh():
    """Whatever a test makes of the library is forgotten after it."""
    clear()
    yield
    clear()


def clear():
    native._library.cache_clear()
    native.load.cache_clear()


def test_signatures_are_the_headers():
    assert native.SIGNATURES == prototypes()


def test_structs_are_the_headers():
    for name, struct in STRUCTS.items():
        assert struct._fields_ == fields(name), name
    limit = re.search(r"#define LLMCTL_ATTENTION_MAX_HEAD_DIM (\d+)", HEADER.read_text())[1]
    assert int(limit) == cached_attention.MAX_HEAD_DIM
    rows = re.search(r"#define LLMCTL_ROWS_PER_SUM (\d+)", HEADER.read_text())[1]
    assert int(rows) == norm.ROWS_PER_SUM


def test_constants_are_the_headers():
    assert re.search(r"#define LLMCTL_ABI (\d+)", HEADER.read_text())[1] == str(native.ABI)
    features = {name: f"1 << {bit}" for bit, name in enumerate(native.CPU_FEATURES)}
    assert {name.lower(): value for name, value in enumerators("LLMCTL_CPU_").items()} == features
    splits = {name.removeprefix("SPLIT_"): value for name, value in vars(bpe).items() if name.startswith("SPLIT_")}
    assert {name: int(value) for name, value in enumerators("LLMCTL_SPLIT_").items()} == splits


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to read the header with")
def test_header_is_plain_c():
    subprocess.run(["cc", "-x", "c", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", HEADER], check=True)


def test_features_are_known_names():
    assert set(native.cpu_features()) <= set(native.CPU_FEATURES)


def test_failure_carries_the_librarys_message():
    model = bpe.BpeModel(split=99, byte_ids=list(range(256)), merges=[])
    with pytest.raises(RuntimeError, match="unknown way to split text: 99"):
        bpe.BpeEncoder(native.load(), model)


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_library_is_used(choice, monkeypatch, fresh):
    monkeypatch.setenv("LLMCTL_KERNELS", choice)
    assert native.library().llmctl_abi_version() == native.ABI


def test_reference_uses_no_library(monkeypatch, fresh):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    assert native.library() is None


def test_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "gpu")
    with pytest.raises(CalledWrongly, match="gpu"):
        native.library()


def test_auto_falls_back_with_one_notice(monkeypatch, tmp_path, caplog, fresh):
    monkeypatch.setenv("LLMCTL_KERNELS", "auto")
    monkeypatch.setattr(native, "path", lambda: tmp_path / "libllmctl.so")
    with caplog.at_level(logging.INFO, logger="llmctl"):
        assert native.library() is None
        assert native.library() is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_an_explicit_choice_never_falls_back(choice, monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("LLMCTL_KERNELS", choice)
    monkeypatch.setattr(native, "path", lambda: tmp_path / "libllmctl.so")
    with pytest.raises(UserError, match=f"LLMCTL_KERNELS={choice}"):
        native.library()


def test_cuda_needs_a_build_with_cuda(monkeypatch, fresh):
    if native.load().llmctl_built_with_cuda():
        pytest.skip("this build has CUDA")
    monkeypatch.setenv("LLMCTL_KERNELS", "cuda")
    with pytest.raises(UserError, match="without CUDA"):
        native.library()


def test_another_abi_is_refused(monkeypatch, fresh):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(UserError, match=f"has ABI {native.ABI - 1}, this package needs {native.ABI}"):
        native.load()


def test_a_library_without_a_function_is_refused(monkeypatch, fresh):
    monkeypatch.setitem(native.SIGNATURES, "llmctl_of_tomorrow", [ctypes.c_int])
    with pytest.raises(UserError, match="lacks llmctl_of_tomorrow"):
        native.load()


@pytest.mark.parametrize("kernels", ["auto", "cpu"])
def test_an_instruction_set_that_cannot_be_used_is_refused(kernels, monkeypatch, fresh):
    monkeypatch.setenv("LLMCTL_KERNELS", kernels)
    monkeypatch.setenv("LLMCTL_ISA", "avx1024")
    with pytest.raises(CalledWrongly, match="LLMCTL_ISA=avx1024: .* expected one of scalar, "):
        native.library()


def test_the_chosen_instruction_set_is_used(monkeypatch, fresh):
    monkeypatch.setenv("LLMCTL_ISA", "scalar")
    library = native.library()
    assert library.llmctl_isa() == b"scalar"
    library.llmctl_set_isa(None)
