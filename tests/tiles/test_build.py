"""Compiling generated kernels: once for each content, never half, with a reason where it fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dks.dispatch.tiles import build, library
from dks.dispatch.tiles import unit as units
from dks.dispatch.tiles.library import Missing
from dks.dispatch.tiles.unit import Unit

ROOT = Path(__file__).parent.parent.parent
UNIT = Unit("dks_test_built", "avx2", "softmax", "tiny.hpp", "dks::Tiny")
BROKEN = replace(UNIT, symbol="dks_test_broken", type="dks::NoSuch<1>")
TINY = """#include "deep.hpp"
namespace dks {{
struct Tiny {{
  static int run(const void*, void*, int64_t, int64_t, int) {{ {} }}
}};
}}
"""


@pytest.fixture(autouse=True)
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of headers whose kernel compiles at once, and an empty cache."""
    folder = tmp_path / "headers"
    folder.mkdir()
    (folder / units.TEMPLATE).write_text((units.HEADERS / units.TEMPLATE).read_text())
    (folder / "abi.h").write_text((units.HEADERS / "abi.h").read_text())
    (folder / "deep.hpp").write_text('#pragma once\n#include "abi.h"\n')
    (folder / "tiny.hpp").write_text(TINY.format("return 7;"))
    monkeypatch.setattr(units, "HEADERS", folder)
    monkeypatch.setattr(build, "HEADERS", folder)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "a b é"))
    monkeypatch.setattr(library, "_locate", build.locate)
    units.source_of.cache_clear()
    yield folder
    units.source_of.cache_clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def answer(unit: Unit) -> int:
    return library.function(unit)(None, None, 0, 0, 1)


def test_what_is_compiled_is_called_and_kept() -> None:
    assert library.lack(UNIT) == f"dks_test_built: is not in {build.cache()}"
    assert build.build([UNIT, UNIT]) == {} and answer(UNIT) == 7
    kept = {path: path.stat().st_mtime_ns for path in build.cache().iterdir()}
    assert len(kept) == 2, "an object to ship and a library to measure"
    assert build.build([UNIT]) == {}
    assert kept == {path: path.stat().st_mtime_ns for path in build.cache().iterdir()}


@pytest.mark.parametrize("file", ["tiny.hpp", "deep.hpp", "abi.h", units.TEMPLATE])
def test_other_text_is_another_file(headers: Path, file: str) -> None:
    assert build.build([UNIT]) == {}
    before = build.locate(UNIT)
    with (headers / file).open("a") as header:
        header.write("\n// changed\n")
    units.source_of.cache_clear()
    assert not build.is_built(UNIT) and library.lack(UNIT) is not None
    assert build.build([UNIT]) == {} and build.locate(UNIT) != before and before.is_file()


def test_another_compiler_or_option_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build._path(UNIT, ".so"), build._path(replace(UNIT, defines=("X",)), ".so")}
    monkeypatch.setenv("CXX", "g++ -g0")
    paths.add(build._path(UNIT, ".so"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    paths.add(build._path(UNIT, ".so"))
    assert len(paths) == 4


def test_the_compiler_s_error_is_the_reason_and_others_are_compiled() -> None:
    failed = build.build([BROKEN, UNIT])
    assert set(failed) == {BROKEN.symbol} and answer(UNIT) == 7
    first = failed[BROKEN.symbol].splitlines()[0]
    assert first.startswith("dks_test_broken does not compile: ") and "error: 'NoSuch' is not" in first, first
    assert library.lack(BROKEN) == failed[BROKEN.symbol], "another process finds the reason too"


def test_a_header_that_was_mended_is_compiled_again(headers: Path) -> None:
    (headers / "deep.hpp").write_text("#error not now\n")
    assert "not now" in build.build([UNIT])[UNIT.symbol].splitlines()[0]
    (headers / "deep.hpp").write_text('#pragma once\n#include "abi.h"\n')
    units.source_of.cache_clear()
    assert build.build([UNIT]) == {} and answer(UNIT) == 7


@pytest.mark.parametrize("cxx", ["/nonexistent", "script"])
def test_without_a_compiler(cxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"\x00no program")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script) if cxx == "script" else cxx)
    why = "Exec format error" if cxx == "script" else "$CXX is '/nonexistent'"
    assert why in build.build([UNIT])[UNIT.symbol]
    with pytest.raises(Missing, match="does not compile"):
        build.locate(UNIT)
    with pytest.raises(Missing, match=r"does not compile.*; and 1 more"):
        build.link([UNIT, BROKEN], tmp_path / "all.so")
    assert not (tmp_path / "all.so").exists()


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv(build.CACHE, str(where))
        why = build.build([UNIT])[UNIT.symbol]
        assert str(where) in why and "can't be written" in why and build.CACHE in why, why


def test_a_cache_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(build.CACHE, "near")
    build.link([UNIT], tmp_path / "all.so")
    assert (tmp_path / "all.so").is_file() and build.locate(UNIT).is_relative_to(tmp_path / "near")


def test_a_killed_build_leaves_nothing_that_is_taken_as_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler writes half a file and waits; whoever called it is killed then."""
    slow, script = tmp_path / "slow", tmp_path / "slow.py"
    slow.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{script}' \"$@\"\n")  # no shebang has room for a space
    script.write_text(
        "import sys, time, os\n"
        "if '--version' in sys.argv: sys.exit(print('slow 1'))\n"
        "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('half')\n"
        f"open({str(tmp_path / 'begun')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    builder = multiprocessing.get_context("fork").Process(target=build.build, args=([UNIT],))
    builder.start()
    try:
        until = time.monotonic() + 30
        while not ((tmp_path / "begun").exists() and (tmp_path / "begun").read_text()):
            assert time.monotonic() < until and builder.is_alive()
            time.sleep(0.01)
        assert builder.pid is not None
        os.kill(builder.pid, signal.SIGKILL)
        builder.join()
    finally:
        os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)
    assert not build.is_built(UNIT) and library.lack(UNIT) is not None
    assert not [name for name in names(build.cache()) if name.endswith((".so", ".o"))]
    monkeypatch.delenv("CXX")
    assert build.build([UNIT]) == {} and answer(UNIT) == 7


def test_builds_of_one_unit_at_once_do_not_collide() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: build.build([UNIT]), range(4))) == [{}] * 4
    fork = multiprocessing.get_context("fork")
    other = replace(UNIT, symbol="dks_test_at_once")
    builders = [fork.Process(target=lambda: os._exit(len(build.build([other])))) for _ in range(4)]
    for each in builders:
        each.start()
    for each in builders:
        each.join()
    assert [each.exitcode for each in builders] == [0] * 4 and answer(other) == 7
    assert len(names(build.cache())) == 4, "nothing but the two units' files"


def test_a_library_of_another_version_is_not_called(
    headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packages in one process, one of them old: their functions have the same names."""
    monkeypatch.setattr(library, "_shipped", {})
    build.link([UNIT], tmp_path / "old.so")
    (headers / "tiny.hpp").write_text(TINY.format("return 8;"))
    units.source_of.cache_clear()
    build.link([UNIT], tmp_path / "new.so")
    monkeypatch.setattr(library, "_locate", library._nowhere)
    library.add("old", (tmp_path / "old.so").read_bytes(), "digest of the old")
    assert "no loaded package ships it" in str(library.lack(UNIT))
    library.add("new", (tmp_path / "new.so").read_bytes(), "digest of the new")
    assert answer(UNIT) == 8
    monkeypatch.setattr(library, "_shipped", dict(reversed(library._shipped.items())))
    assert answer(UNIT) == 8


def test_a_damaged_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.build([UNIT]) == {}
    other = replace(UNIT, symbol="dks_test_damaged")
    assert build.build([other]) == {}
    build._path(other, ".so").write_bytes(b"\x7fELF half")
    assert "too short" in str(library.lack(other)) and library.lack(UNIT) is None


def test_a_serving_process_compiles_nothing() -> None:
    """With everything there to do it, an empty PATH included, so that nothing could be run either."""
    script = """
        import sys
        from dks.dispatch.tiles import library
        from dks.dispatch.tiles.unit import Unit
        why = library.lack(Unit("dks_x", "avx2", "softmax", "rows.hpp", "dks::Softmax<dks::Avx2, float, 2, 4>"))
        assert why == "dks_x: no loaded package ships it, and nothing is compiled while serving", why
        assert not {"dks.dispatch.tiles.build", "dks.dispatch.compiler", "jinja2"} & set(sys.modules)
    """
    env = {**os.environ, "PATH": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
