"""What every Triton kernel takes of four chips in every tile that it may be run in, as compiled: no GPU is needed.

Shared memory stays under the chip's limit; shared memory, registers and stack stay under the tables in goldens/triton,
which `python -m tests.support.usage_table` writes. Most of it is slow: minutes a chip and operation.
"""

from typing import Any

import pytest
import torch

from ...support import biased_code, factorized_code, usage_table
from ...support.triton_tools import CHIPS, Usage, with_triton
from ...support.usage_table import FIRST, MODULES, MORE, OTHERS, Variant, hold, out_of_step, read, too_much, whole_up_to

VARIANTS = {operation: usage_table.variants(operation) for operation in MODULES}
operations = pytest.mark.parametrize("operation", MODULES)


@operations
def test_the_table_has_what_can_be_chosen_and_nothing_else(operation):
    said = out_of_step(VARIANTS[operation], read(operation))
    assert not said, f"python -m tests.support.usage_table: {said}"


@operations
def test_what_was_written_down_fits(operation):
    """The chip's shared memory, and our own limit of spills."""
    table = read(operation)
    written = [x for x in VARIANTS[operation] if str(x) in table]
    said = {str(x): too_much(x, Usage(*table[str(x)]), table, table["triton"]) for x in written}
    assert written and not any(said.values()), {name: words for name, words in said.items() if words}


@with_triton
@pytest.mark.parametrize(
    ("operation", "variant"),
    [pytest.param(name, x, id=str(x)) for name, every in VARIANTS.items() for x in every if x.quick],
)
def test_the_published_size_on_a_hopper(operation, variant, tmp_path):
    assert not hold(variant, read(operation), tmp_path)


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
@operations
def test_every_variant(operation, arch, tmp_path):
    """On the chip; each operation's module beside the table says what else its code must be."""
    table = read(operation)
    said = [words for x in VARIANTS[operation] if x.arch == arch for words in hold(x, table, tmp_path)]
    assert not said, "\n".join(said)


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", biased_code.tiles.KERNELS)
def test_float16_is_bfloat16s_program(kernel):
    """The attention with a bias: all but the types, so that one table serves both."""
    tile = biased_code.tiles.tiles_for(CHIPS[90], kernel, torch.float16, 32)[0]
    _same(*(biased_code.code(90, biased_code.Way(kernel, dtype, "ieee", 32), tile) for dtype in ("bf16", "fp16")))


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", factorized_code.tiles.KERNELS)
def test_float16_is_bfloat16s_program_with_points(kernel):
    tile = factorized_code.tiles.tiles_for(CHIPS[90], kernel, torch.float16)[0]
    points = factorized_code.PARTS["points"]
    _same(*(factorized_code.code(90, kernel, dtype, tile, *points) for dtype in ("bf16", "fp16")))


def _same(of_bfloat16: Any, of_float16: Any) -> None:
    """Two programs for Triton's compiler differ in nothing but their 16-bit type.

    And in where their source stood when Triton's cache took them in: another checkout has filled it, maybe.
    """
    ours, other = (
        "\n".join(line for line in code.asm["ttir"].splitlines() if not line.startswith("#loc"))
        for code in (of_bfloat16, of_float16)
    )
    assert "bf16" in ours and "bf16" not in other
    assert ours.replace("bf16", "f16") == other


# What would be seen ---------------------------------------------------------------------------------------------------


def _variant(**more: Any) -> Variant:
    plain = Variant(89, "a b", rank=FIRST, quick=False, stack=64, compile=lambda: None, faults=lambda code: [])
    return plain._replace(**more)


TABLE = {"triton": "3.7.1", "held": {"89": FIRST}, "sm_89 a b": [1000, 200, 8]}


@pytest.mark.parametrize(
    ("found", "version", "said"),
    [
        ((1000, 200, 8), "3.7.1", ""),
        ((900, 100, 0), "3.7.1", ""),
        ((1001, 200, 8), "3.7.1", "the table has Usage(shared=1000"),
        ((1000, 201, 8), "3.7.1", "the table has Usage(shared=1000"),
        ((1000, 200, 16), "3.7.1", "the table has Usage(shared=1000"),
        ((2000, 250, 64), "3.8.0", ""),
        ((1000, 200, 80), "3.8.0", "80 bytes of stack, where 64 are the limit"),
        ((101_377, 200, 8), "3.8.0", "101377 bytes of shared memory, and the chip has 101376"),
    ],
)
def test_more_than_was_written_down_is_seen(found, version, said):
    words = " ".join(too_much(_variant(), Usage(*found), TABLE, version))
    assert said in words if said else not words


def test_what_was_not_written_down_is_seen():
    """As far as the chip is held."""
    ours, other = _variant(), _variant(name="a c", rank=OTHERS)
    assert out_of_step([ours], TABLE) == out_of_step([ours, other], TABLE) == []
    assert out_of_step([ours, other], TABLE | {"held": {"89": OTHERS}}) == ["not written down: sm_89 a c"]
    assert out_of_step([ours, other._replace(rank=FIRST)], TABLE) == ["not written down: sm_89 a c"]
    assert out_of_step([other], TABLE) == ["no variants: sm_89 a b"]
    assert out_of_step([ours, ours], TABLE) == ["two variants of one name: sm_89 a b"]
    assert whole_up_to([ours, other], TABLE)["89"] == MORE and whole_up_to([ours], TABLE)["89"] == OTHERS
    assert "89" not in whole_up_to([ours, other._replace(rank=FIRST)], TABLE)


@operations
def test_every_chip_is_held_to_every_tile(operation):
    """What the table says of itself is so, and it is whole."""
    held = read(operation)["held"]
    assert held == whole_up_to(VARIANTS[operation], read(operation))
    assert held == {str(arch): OTHERS for arch in CHIPS}


def test_a_new_tile_or_type_is_a_new_row(monkeypatch):
    """What the dispatcher may choose decides which rows there are."""
    from foldkernels.kernels.biased_attention import _tiles as tiles

    before = {str(x) for x in usage_table.variants("attention with a dense bias")}
    given = tiles.tiles_for

    def one_more(*arguments: Any) -> list[tiles.Tile]:
        found = given(*arguments)
        return [*found, found[0]._replace(stages=1)]

    monkeypatch.setattr(tiles, "tiles_for", one_more)
    after = {str(x) for x in usage_table.variants("attention with a dense bias")}
    assert before < after and all(name.endswith("x1") for name in after - before)
