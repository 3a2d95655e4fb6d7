"""Training computes the recorded numbers to the last bit: a guard for changes of the code that are to change nothing.

`cells.py` has the twenty steps of every cell; `record.py` pins their arithmetic and records anew, on purpose only:
`python tests/golden/record.py`. Where the kernels are not built, or torch is another version than that of the record,
bits cannot be promised; the first steps in plain torch are then held to the recorded losses within rounding.
"""

from __future__ import annotations

import copy
import json
import math

import access
import pytest
from cells import LOOSE_STEPS, STEPS, all_cells
from record import COMMAND, RECORD, Results, differences, format_record, run_cells, toolchain

RECORDED = json.loads(RECORD.read_text("utf-8"))
GOLDEN: Results = RECORDED["cells"]
LOOSE = 1e-4  # a token that another rounding sends to another expert moves a loss by a fifth of this


def obstacle() -> str:
    """Why no exact numbers can be asked for here; empty where they can."""
    if not access.kernels_run():
        return "the native kernels are not built, or this CPU cannot run them"
    recorded, here = RECORDED["toolchain"]["torch"], toolchain()["torch"]
    return "" if here == recorded else f"losses were recorded with torch {recorded}, this is {here}"


def test_every_cell_is_recorded() -> None:
    assert sorted(GOLDEN) == sorted(all_cells()), f"record anew with: {COMMAND}"
    for name, cell in GOLDEN.items():
        assert len(cell["losses"]) == len(cell["grad_norms"]) == STEPS, name
        assert all(0 < float.fromhex(number) < math.inf for number in cell["losses"] + cell["grad_norms"]), name


@pytest.mark.slow
@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_training_is_the_same_to_the_last_bit() -> None:
    found = differences(GOLDEN, run_cells("exact"))
    if found:
        pytest.fail(
            f"{len(found)} of {len(GOLDEN)} cells of training differ from {RECORD.name}; the first step that does:\n"
            + "\n".join(found)
            + f"\nRecorded under {RECORDED['toolchain']}, now {toolchain()}."
            + f"\nIf training is meant to change, record anew with `{COMMAND}`, and say why in the commit.",
            pytrace=False,
        )


@pytest.mark.slow
@pytest.mark.skipif(not obstacle(), reason="the exact comparison covers it")
def test_plain_torch_comes_close() -> None:
    results, far = run_cells("loose"), []
    for name, cell in results.items():
        for step, numbers in enumerate(zip(GOLDEN[name]["losses"][:LOOSE_STEPS], cell["losses"], strict=True)):
            golden, loss = map(float.fromhex, numbers)
            if not math.isclose(golden, loss, rel_tol=LOOSE):
                far.append(f"{name}: step {step}, loss {golden:.9g}, now {loss:.9g}")
    assert not far, "\n".join(far)
    assert len(results) == sum(cell.precision == "fp32" for cell in all_cells().values())


@pytest.mark.parametrize("key", ["losses", "grad_norms"])
def test_one_changed_bit_is_named(key: str) -> None:
    changed = copy.deepcopy(GOLDEN)
    numbers = changed["router/switch"][key]
    numbers[7] = math.nextafter(float.fromhex(numbers[7]), math.inf).hex()
    (line,) = differences(GOLDEN, changed)
    assert line.startswith("router/switch: step 7, ") and numbers[7] in line


def test_changed_loads_and_missing_cells_are_named() -> None:
    changed = copy.deepcopy(GOLDEN)
    changed["router/switch"]["loads"][0][0] += 1
    del changed["recompute"]
    missing, loads = differences(GOLDEN, changed)
    assert missing == "recompute: recorded, and no cell any more" and loads.startswith("router/switch: loads ")
    assert "recompute: not recorded yet" in differences(changed, GOLDEN)
    assert differences(GOLDEN, GOLDEN) == []


def test_the_record_reads_as_it_was_written() -> None:
    assert json.loads(format_record(GOLDEN))["cells"] == GOLDEN
