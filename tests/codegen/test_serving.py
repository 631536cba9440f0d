"""serving.hpp under threads and sanitizers: generations that are swapped while others dispatch."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import dks.dispatch
from dks.dispatch.compiler import find_compiler

STRESS = Path(__file__).parent / "stress.cpp"
HEADERS = Path(dks.dispatch.__file__).parent / "cpp"
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-pthread")
SANITIZERS = {
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}

soak = pytest.mark.skipif(os.environ.get("DKS_SOAK") != "1", reason="takes a minute: make soak runs it")


def stress(folder: Path, flags: tuple[str, ...], *sizes: int) -> dict[str, float]:
    """What the stress program says of (threads, dispatches, swaps); it must end well."""
    compiler, lack = find_compiler()
    if lack:
        pytest.skip(lack)
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    empty = subprocess.run([*compiler, *flags, probe, "-o", folder / "probe"], capture_output=True, check=False)
    if empty.returncode or subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip(f"no {' '.join(flags)} here")
    done = subprocess.run(
        [*compiler, *STRICT, *flags, "-iquote", HEADERS, STRESS, "-o", folder / "stress"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(
        [folder / "stress", *map(str, sizes)],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told: dict[str, float] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_call_sees_one_generation(sanitizer: str, tmp_path: Path) -> None:
    told = stress(tmp_path, SANITIZERS[sanitizer], 8, 200_000, 200)
    assert told["wrong"] == 0 and told["swaps"] == 200
    assert told["counted"] == told["dispatches"] >= 200_000


@soak
def test_a_hundred_million_calls_under_ten_thousand_swaps(tmp_path: Path) -> None:
    told = stress(tmp_path, ("-O2",), 64, 100_000_000, 10_000)
    print(json.dumps(told))
    assert told["wrong"] == 0 and told["counted"] == told["dispatches"] >= 100_000_000


UNITS = """
#include "serving.hpp"
#include <cstdio>
#include <cstring>

#define CHECK(...) if (!(__VA_ARGS__)) { std::printf("line %d: %s\\n", __LINE__, #__VA_ARGS__); return 1; }

constexpr dks::Rule rules[] = {{"zero", 64}, {"one", 4}};
constexpr std::int64_t edges_data[] = {4, 8, INT64_MAX};
constexpr std::uint16_t first[] = {0, 0, 0, 1, 2};
constexpr dks::Edges edges{edges_data, 2, first, 1};
constexpr std::int32_t cells_64[] = {0, -1}, cells_4[] = {-1, 1};
constexpr dks::Class classes[] = {{64, cells_64}, {4, cells_4}};
constexpr dks::Group group{"op", "direct", "", nullptr, 0, &edges, 1, classes, 2};
constexpr dks::Table table{rules, &group, 1, 2};
using dks::Outcome;

int main() {
  dks::Tables<> tables(1);
  dks::Tables<>::Reader reader(tables);
  try {
    dks::Tables<>::Reader second(tables);
    return 1;
  } catch (const std::runtime_error&) {}
  CHECK(!tables.rollback());
  {
    const auto call = reader.enter();
    CHECK(!call && !call.choose(0, {4}, 64).hit);
  }
  const auto one = std::make_shared<dks::Generation>(table, "one");
  tables.publish(one);
  CHECK(!tables.rollback());
  {
    const auto call = reader.enter();
    CHECK(call->id() == "one" && call.choose(0, {4}, 64).rule == 0);
    tables.publish(std::make_shared<dks::Generation>(table, "two"));
    CHECK(call->id() == "one" && reader.enter()->id() == "one");
    const std::int64_t sizes[] = {4, 3, 5, 17, 0, 4};
    for (const std::int64_t size : sizes) call.choose(0, {size}, 64);
    call.choose(0, {4}, 4);
    call.choose(0, {9}, 64);
    call.choose(7, {9}, 64);
    call.choose(0, {9, 9}, 64);
  }
  CHECK(one->count(0, Outcome::exact) == 3 && one->count(0, Outcome::bin) == 2);
  CHECK(one->count(0, Outcome::nearest) == 1);
  CHECK(one->count(0, Outcome::out_of_range) == 1 && one->count(0, Outcome::zero_sized) == 1);
  CHECK(one->count(0, Outcome::misaligned) == 1 && one->count(0, Outcome::unmeasured) == 1);
  CHECK(one->count(1, Outcome::unmeasured) == 1);
  {
    const auto call = reader.enter();
    CHECK(call->id() == "two");
    for (int i = 0; i < 3; ++i) {
      const dks::Choice choice = call.choose(0, {8}, 64);
      CHECK(choice.hit && choice.rule == 1);
      call.report_failure(0, choice.rule);
    }
    CHECK(call->switched_off(1) && !call->switched_off(0) && !one->switched_off(1));
    const dks::Choice choice = call.choose(0, {8}, 64);
    CHECK(!choice.hit && choice.rule == -1 && std::strlen(choice.candidate) == 0);
    CHECK(call->count(0, Outcome::failed) == 3 && call->count(0, Outcome::switched_off) == 1);
  }
  CHECK(tables.rollback() && reader.enter()->id() == "one");
  CHECK(tables.rollback() && reader.enter()->id() == "two" && tables.current()->id() == "two");
  try {
    tables.publish(one);
    return 1;
  } catch (const std::logic_error&) {}
  {  // a reader that never leaves: publishing ends with an error, rolling back does not
    const auto call = reader.enter();
    std::shared_ptr<dks::Generation> last;
    int published = 0;
    try {
      for (; published < 200; ++published)
        tables.publish(last = std::make_shared<dks::Generation>(table, "late"), std::chrono::milliseconds(1));
      return 1;
    } catch (const std::runtime_error&) {}
    CHECK(call->id() == "two" && published <= 66 && published > 60);
    CHECK(tables.rollback() && call->id() == "two");
  }
  tables.publish(std::make_shared<dks::Generation>(table, "again"));
  CHECK(reader.enter()->id() == "again");
  CHECK(tables.total(Outcome::exact) == 6 && tables.total(Outcome::failed) == 3);
  std::printf("fine\\n");
}
"""


def test_counters_switches_and_limits(tmp_path: Path) -> None:
    compiler, lack = find_compiler()
    if lack:
        pytest.skip(lack)
    (tmp_path / "main.cpp").write_text(UNITS)
    command = [*compiler, *STRICT, "-O1", "-iquote", HEADERS, tmp_path / "main.cpp", "-o", tmp_path / "main"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n")
