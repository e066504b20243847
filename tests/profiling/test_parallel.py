"""Work over threads: order, limits, exceptions, and the thread setting afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from batch_reference import measure
from rankwise.profiling.parallel import map_in_order
from rankwise.spectra import singular_values
from tiny_models import tiny_llama, token_batch


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_results_come_in_order(count: int, workers: int) -> None:
    assert list(map_in_order(lambda n: n * n, range(count), workers)) == [
        n * n for n in range(count)
    ]


def test_work_is_shared_and_each_thread_uses_one_core() -> None:
    met = threading.Barrier(3, timeout=30)  # breaks unless three work at a time

    def work(_: int) -> tuple[int, int]:
        met.wait()
        return threading.get_ident(), torch.get_num_threads()

    seen = list(map_in_order(work, range(6), 3))
    assert {threads for _, threads in seen} == {1}
    assert threading.get_ident() not in {ident for ident, _ in seen}


def test_few_items_are_taken_before_their_turn() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(20):
            taken.append(n)
            yield n

    for done, _ in enumerate(map_in_order(lambda n: n, items(), 3), 1):
        assert len(taken) <= done + 2


@pytest.mark.parametrize("workers", [1, 3])
def test_exception_comes_out_and_the_setting_is_restored(workers: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = map_in_order(lambda n: 1 // (3 - n), range(9), workers)
        with pytest.raises(ZeroDivisionError):
            list(results)
        assert torch.get_num_threads() == 2
        unfinished = map_in_order(lambda n: n, range(9), workers)
        next(unfinished)
        unfinished.close()
        assert torch.get_num_threads() == 2
        found: list[int] = []
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_spectra_do_not_depend_on_the_number_of_threads() -> None:
    matrices = [torch.randn(70 + n, 90) for n in range(7)]
    one = list(map_in_order(singular_values, matrices, 1))
    three = list(map_in_order(singular_values, matrices, 3))
    assert all(map(torch.equal, one, three))


def test_profile_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    batches = [token_batch([9, 6], seed=i) for i in range(3)]
    one = measure(tiny_llama(), batches)
    try:
        torch.set_num_threads(3)
        three = measure(tiny_llama(), batches)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert list(one.modules) == list(three.modules)
    assert three.gid == pytest.approx(one.gid, rel=1e-5)
    for name, entry in one.modules.items():
        assert three.modules[name].sensitivity == pytest.approx(entry.sensitivity, rel=1e-5)
