"""Rank 0 works while the others wait: two ranks as two threads over one store."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from halfbyte.distributed import ranks


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """``both(work, hurries)``: the result of each rank, or what it raised."""
    local, store = threading.local(), HashStore()
    monkeypatch.setattr(
        ranks, "PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=local.rank == 0)
    )
    monkeypatch.setattr(ranks.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks, "_blocks", SimpleNamespace(__next__=None))
    monkeypatch.setattr(ranks, "next", lambda _: 0, raising=False)

    def run(work: Any, hurries: Any) -> list[Any]:
        found: list[Any] = [None, None]

        def of(rank: int) -> None:
            local.rank = rank
            try:
                found[rank] = ranks.on_the_first(work, hurries[rank])
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
