"""Each fault that is put back (mutations.py) turns a named test red: what the stub is judged by.

README.md has the table, with the findings of the audit.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest.outcomes import Failed

from stepvideo_serve.errors import EngineError
from tests.engine import test_nvinfer_on_stub as runners
from tests.fakes import mutations, test_ranks_on_stub
from tests.fakes import test_assembly_on_stub as assembly
from tests.fakes.machine import machine

Mutation = Callable[[], AbstractContextManager[Any]]
# The fault, where the test is that turns red and its name, and what it says then.
FAULTS: tuple[tuple[Mutation, ModuleType, str, str], ...] = (
    (
        mutations.kernels_are_sought_in_the_folder_of_the_part,
        assembly,
        "test_plugins_of_a_rank_find_their_kernels",
        r"tp0of2/kernels/vae_attention\.fp16\.sm90\..*\.json must describe a built kernel, could not be read",
    ),
    (
        mutations.kernels_are_sought_at_the_first_request,
        assembly,
        "test_a_kernel_that_is_missing_is_said_before_an_engine_is_loaded",
        "DID NOT RAISE",
    ),
    (mutations.refusals_are_not_noticed, runners, "test_a_refusal_has_its_reason", "DID NOT RAISE"),
    (mutations.every_engine_has_a_runtime, runners, "test_one_runtime_and_one_logger", "assert 3 == 1"),
    (
        mutations.activations_are_subtracted_twice,
        assembly,
        "test_activations_are_accounted_for_once",
        "need 33.0 GiB for their weights, 22.0 GiB are free",
    ),
    (
        mutations.torch_keeps_the_smaller_buffer,
        assembly,
        "test_a_larger_buffer_takes_the_place_of_the_smaller",
        "need 33.0 GiB for their weights",
    ),
    (
        mutations.running_out_of_memory_asks_for_another_build,
        runners,
        "test_too_little_memory_for_weights",
        "Regex pattern did not match",
    ),
    (
        mutations.reserving_raises_what_torch_raises,
        runners,
        "test_too_little_memory_for_activations",
        "CUDA out of memory",
    ),
    (
        mutations.addresses_are_taken_as_they_are,
        runners,
        "test_inputs_at_addresses_that_tensorrt_refuses_are_copied",
        "gain must be aligned to 256",
    ),
    (
        mutations.an_engine_does_not_wait_for_torch,
        runners,
        "test_engines_and_torch_take_turns",
        "engine toy on stream .*: memory is read that .* uses on the default stream",
    ),
    (
        mutations.torch_does_not_wait_for_an_engine,
        runners,
        "test_engines_and_torch_take_turns",
        "engine toy uses on stream",
    ),
)
RED = (AssertionError, Failed, EngineError, RuntimeError)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_fault_that_is_put_back_turns_a_named_test_red(fault: Any, request: pytest.FixtureRequest) -> None:
    mutation, module, name, message = fault
    named = getattr(module, name)
    wanted = [one for one in inspect.signature(named).parameters if one != "gpu_machine"]
    given = {one: request.getfixturevalue(one) for one in wanted}  # before there is a machine: some export graphs
    with mutation(), pytest.raises(RED, match=message):
        run_on_a_machine(named, given, 1 << 30 if module is runners else 80 << 30)


def run_on_a_machine(named: Callable[..., None], given: dict[str, Any], total_bytes: int) -> None:
    with machine(total_bytes=total_bytes) as made:
        extra = {"gpu_machine": made} if "gpu_machine" in inspect.signature(named).parameters else {}
        named(**given, **extra)


def test_the_table_names_every_fault_and_its_test(root: Path) -> None:
    """With those that other processes show: the sums, in ranks."""
    text = (root / "tests" / "fakes" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    pairs = [(mutation.__name__, name) for mutation, _, name, _ in FAULTS]
    pairs.append(
        (
            mutations.sums_are_not_waited_for.__name__,
            test_ranks_on_stub.test_a_sum_that_is_not_waited_for_is_found.__name__,
        )
    )
    for pair in pairs:
        assert any(all(f"`{one}`" in row for one in pair) for row in rows), pair
    ours = [one for one in vars(mutations).values() if inspect.isfunction(one) and one.__module__ == mutations.__name__]
    assert {one.__name__ for one in ours if one.__name__[0] != "_"} == {name for name, _ in pairs}
