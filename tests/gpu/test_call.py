"""A call's recipe, launched by the compiled fast path and by Python: the same launches, outputs and refusals."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dks.dispatch import native
from dks.dispatch.gpu import call, library
from dks.dispatch.gpu.call import Buffer, Recipe, buffer, buffer_stride, given, number, rows, size, stride
from dks.dispatch.gpu.launch import ContextLost, LaunchFailed, Misaligned, Plan, Step
from dks.dispatch.gpu.library import Steps
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Declined
from dks.dispatch.tiles.library import Missing
from tests.gpu.conftest import Fake, Open
from tests.gpu.cubins import ARGUMENTS, made

FORMS = [pytest.param(True, id="compiled"), pytest.param(False, id="python")]
PROGRAM = Program("f", "none.py", "f", ARGUMENTS, (), 16, 4, 1, ((("m", 64), ("n", 32)), (("", 3),), ()))
VALUES = {
    "x": given(0),
    "y": buffer(0),
    "m": rows(0),
    "n": size(0, -1),
    "stride": stride(0, 0),
    "scale": number(1, 0.5),
}
RECIPE = Recipe(("bfloat16", "number"), ((PROGRAM, VALUES),), (Buffer(dtype="float32"),))

Bind = Callable[..., Any]


@pytest.fixture
def bind(request: pytest.FixtureRequest, opened: Open, monkeypatch: pytest.MonkeyPatch) -> Bind:
    """bind(recipe, *otherwise, **changes of the compiled program) -> the launch, on the fake driver."""
    if not request.param:
        monkeypatch.setattr(native, "module", None)

    def made_here(recipe: Recipe = RECIPE, *otherwise: Recipe, **changes: Any) -> Any:
        launcher = opened()

        def locate(steps: Steps) -> Plan:
            found = []
            for each, bound in steps:
                cubin = made(each.symbol, arguments=each.arguments, align=each.align, grid=each.grid, **changes)
                found.append(Step(launcher.add(cubin), bound))
            return Plan(launcher, found)

        monkeypatch.setattr(library, "_locate", locate)
        return call.bound(recipe, *otherwise, device="cpu")

    return made_here


def bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> torch.Tensor:
    """Whose address is divisible by 64, and then ``offset`` elements on."""
    storage = torch.zeros(4096, dtype=dtype)
    start = -storage.data_ptr() % 64 // storage.element_size() + offset
    count = torch.Size(shape).numel()
    return storage[start : start + count].view(shape)


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_numbers_come_from_where_the_recipe_says(bind: Bind, fake: Fake) -> None:
    run, x = bind(), tensor(3, 4, 40)
    y = run(x, 2.25)
    assert y.shape == x.shape and y.dtype is torch.float32 and y.is_contiguous()
    run(x, None)
    run(x)
    (_, first), (_, second), (_, third) = fake.calls("launch")
    assert first[:4] == [1 * 2, 3, 1, 128] and first[7] == 0, "the grid, and the default stream"
    assert first[9:] == [x.data_ptr(), y.data_ptr(), 12, 40, 160, bits(2.25), 0, 0]
    assert second[14] == third[14] == bits(0.5)


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_whole_numbers_are_passed_to_the_last_digit(bind: Bind, fake: Fake) -> None:
    arguments = (Argument("x", "*bf16", 1), Argument("ignored", "i64"))
    program = Program("f", "none.py", "f", arguments, (), 16, 4, 1, ((("", 1),), (), ()))
    run = bind(Recipe(RECIPE.inputs, ((program, {"x": given(0), "ignored": number(1, -100)}),), RECIPE.buffers))
    for given_number in (2**60 + 1, -(2**60) - 1, None):
        run(tensor(40), given_number)
    assert [numbers[10] for _, numbers in fake.calls("launch")] == [2**60 + 1, -(2**60) - 1, -100]


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_outputs_have_the_shapes_that_the_recipe_says_and_constants_are_held(bind: Bind, fake: Fake) -> None:
    weight = tensor(24)
    values = {**VALUES, "x": weight, "y": buffer(2), "n": 24, "stride": 24, "scale": 1.5}
    buffers = (Buffer(last=7), Buffer(last=0, dtype="int8"), Buffer(last=24, dtype="float32", returned=False))
    run = bind(Recipe(("bfloat16",), ((PROGRAM, values),), buffers))
    address = weight.data_ptr()
    del weight, values
    first, second = run(tensor(5, 6, 16))
    assert (first.shape, first.dtype) == ((5, 6, 7), torch.bfloat16)
    assert (second.shape, second.dtype) == ((5, 6), torch.int8)
    ((_, numbers),) = fake.calls("launch")
    assert numbers[9] == address and numbers[10] not in (first.data_ptr(), second.data_ptr())
    assert numbers[11:15] == [30, 24, 24, bits(1.5)]


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_what_is_misaligned_takes_the_other_programs(bind: Bind, fake: Fake) -> None:
    scalar = Program("g", "none.py", "g", ARGUMENTS, (), 2, 4, 1, PROGRAM.grid)
    other = Recipe(RECIPE.inputs, ((scalar, VALUES),), RECIPE.buffers)
    run = bind(RECIPE, other)
    for x in (tensor(2, 40), tensor(2, 40, offset=3), tensor(2, 39)):
        run(x, 1.0)
    assert [name[0] for name, _ in fake.calls("launch")] == ["f", "g", "g"]
    with pytest.raises(Misaligned):
        bind(RECIPE)(tensor(2, 40, offset=3))
    assert len(fake.calls("launch")) == 3


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_what_is_too_large_takes_the_first_of_the_others_that_can(bind: Bind, fake: Fake) -> None:
    def program(name: str, align: int) -> Program:
        return Program(name, "none.py", name, ARGUMENTS, (), align, 4, 1, PROGRAM.grid)

    small = (size(0, -1), 40), (rows(0), 3)
    first, *others = (
        Recipe(RECIPE.inputs, ((program(name, align), VALUES),), RECIPE.buffers, most)
        for name, align, most in (("f", 16, small), ("g", 2, small), ("h", 16, ()), ("i", 2, ()))
    )
    run = bind(first, *others)
    for x in (tensor(3, 40), tensor(3, 39), tensor(3, 48), tensor(4, 40), tensor(4, 40, offset=3)):
        y = run(x)
        assert y.shape == x.shape
    assert [name[0] for name, _ in fake.calls("launch")] == ["f", "g", "h", "h", "i"]
    with pytest.raises(Declined, match="a size above 40, which is the most that the programs take"):
        bind(first)(tensor(3, 48))
    with pytest.raises(Declined, match="a rows above 3"):
        bind(first)(tensor(4, 40))
    assert len(fake.calls("launch")) == 5


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_strides_are_those_of_inputs_and_buffers_and_nothing_where_there_is_one_element(
    bind: Bind, fake: Fake
) -> None:
    def strided(source: Any) -> Any:
        values = {**VALUES, "m": stride(0, 1), "n": buffer_stride(0, 1), "stride": source, "scale": 1.0}
        return bind(Recipe(("bfloat16",), ((PROGRAM, values),), (Buffer(swapped=True),)))

    x = tensor(2, 3, 5, 16)
    y = strided(buffer_stride(0, 2))(x)
    assert y.shape == x.shape and y.stride() == (240, 16, 48, 1)
    one = x[:, :, :1]
    for source in (buffer_stride(0, 2), stride(0, 2), stride(0, 0)):
        strided(source)(one)
    assert [numbers[11:14] for _, numbers in fake.calls("launch")] == [
        [80, 16, 48], [80, 16, 0], [80, 16, 0], [80, 16, 240],
    ]  # fmt: skip


@pytest.mark.parametrize("bind", FORMS, indirect=True)
@pytest.mark.parametrize(
    "inputs",
    [
        (torch.zeros(2, 40),),
        (torch.zeros(2, 40, dtype=torch.bfloat16, device="meta"),),
        (torch.nn.Parameter(torch.zeros(2, 40)).to_sparse(),),
        (3,),
    ],
    ids=["dtype", "device", "layout", "number"],
)
def test_what_the_recipe_does_not_take_is_declined(bind: Bind, fake: Fake, inputs: tuple[Any, ...]) -> None:
    with pytest.raises(Declined):
        bind()(*inputs)
    assert not fake.calls("launch")


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_a_drivers_refusal_raises_what_it_means(bind: Bind, fake: Fake) -> None:
    run = bind()
    fake.set(launch=701)  # too many resources
    with pytest.raises(LaunchFailed, match="701"):
        run(tensor(2, 40))
    fake.set(launch=716)  # misaligned address
    with pytest.raises(ContextLost):
        run(tensor(2, 40))
    fake.set(launch=0)


@pytest.mark.parametrize("bind", FORMS, indirect=True)
def test_scratch_memory_of_blocks_is_allocated_for_each_call(bind: Bind, fake: Fake) -> None:
    run = bind(scratch=384, scratch_align=64)
    run(tensor(65, 40))
    ((_, numbers),) = fake.calls("launch")
    assert numbers[:3] == [4, 3, 1] and numbers[15] != 0 and numbers[15] % 64 == 0


def test_no_loaded_package_is_said_in_words() -> None:
    missing = Program("h", "none.py", "h", (Argument("x", "*bf16", 1),), (), 16, 4, 1, ((("", 1),), (), ()))
    assert library._locate is library._nowhere
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "digest", lambda _: "0")
        with pytest.raises(Missing, match="no loaded package ships it"):
            library.plan([(missing, {})])
