"""Rank 0 works while the others wait, or all work in step: two ranks as two threads over one store."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from halfbyte.distributed import ranks
from halfbyte.errors import Halted


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """``both(work, hurries)``: the result of each rank, or what it raised; of another function of `ranks` by name."""
    local, store = threading.local(), HashStore()
    monkeypatch.setattr(
        ranks,
        "PartialState",
        lambda: SimpleNamespace(num_processes=2, process_index=local.rank, is_main_process=local.rank == 0),
    )
    monkeypatch.setattr(ranks, "agree", lambda value: value)
    monkeypatch.setattr(ranks.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks, "_blocks", SimpleNamespace(__next__=None))
    monkeypatch.setattr(ranks, "next", lambda _: 0, raising=False)

    def run(work: Any, hurries: Any, function: str = "on_the_first") -> list[Any]:
        found: list[Any] = [None, None]

        def of(rank: int) -> None:
            local.rank = rank
            try:
                found[rank] = getattr(ranks, function)(work, hurries[rank])
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=of, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    return run


def _never() -> bool:
    return False


@pytest.mark.parametrize("result", [True, False])
def test_every_rank_has_the_result(both: Any, result: bool) -> None:
    assert both(lambda hurry: result, (_never, _never)) == [result, result]


def test_any_rank_makes_it_hurry(both: Any) -> None:
    def work(hurry: Callable[[], bool]) -> bool:
        while not hurry():
            pass
        return True

    assert both(work, (_never, lambda: True)) == [True, True]


def test_a_failure_leaves_no_rank_waiting(both: Any) -> None:
    def work(hurry: Callable[[], bool]) -> bool:
        raise RuntimeError("lost")

    failed, other = both(work, (_never, _never))
    assert str(failed) == "lost"
    assert other is False


def test_any_rank_makes_all_of_them_hurry(both: Any) -> None:
    def work(hurry: Callable[[], bool]) -> bool:
        while not hurry():
            pass
        return True

    assert both(work, (_never, lambda: True), "in_step") == [True, True]


def test_an_error_that_all_have_is_raised_again(both: Any) -> None:
    def work(hurry: Callable[[], bool]) -> bool:
        raise RuntimeError("no kernel")

    errors = both(work, (_never, _never), "in_step")
    assert [(type(error), str(error)) for error in errors] == [(RuntimeError, "no kernel")] * 2


def test_an_error_of_one_rank_ends_the_run_on_all(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_ALIKE_SECONDS", 0.2)
    ended = threading.Event()

    def work(hurry: Callable[[], bool]) -> bool:
        if ranks.PartialState().process_index == 1:
            raise RuntimeError("no memory")
        ended.wait(60)
        raise RuntimeError("connection closed")  # in the collective in which it waits for the other

    stock = ranks._failed_alone

    def failed_alone(*args: Any) -> str | None:
        try:
            return stock(*args)
        finally:
            ended.set()

    monkeypatch.setattr(ranks, "_failed_alone", failed_alone)
    errors = both(work, (_never, _never), "in_step")
    assert [type(error) for error in errors] == [Halted, Halted]
    assert {str(error) for error in errors} == {"rank 1 failed alone: RuntimeError: no memory"}
