"""What the demo reads, and that its held-out part is honest."""

from pathlib import Path

import pytest

from halfbyte.demo import corpus
from halfbyte.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A library of 25 modules with 10 documented functions each, and files that do not belong to it."""
    for module in range(25):
        functions = "\n".join(
            f'def f{n}(a, *, b=1):\n    """Return the {module} times {n}\n    of the sum.\n\n    More of it."""'
            for n in range(10)
        )
        (tmp_path / f"module{module}.py").write_text(f'"""Module {module}."""\n{functions}\n')
    for skipped in ("test", "site-packages", "idlelib"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "x.py").write_text('def g():\n    """A function that must not be read."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\xff\n")
    (tmp_path / "copy.py").write_bytes((tmp_path / "module3.py").read_bytes())
    return tmp_path


def test_reads_signatures_and_first_paragraphs(tree: Path) -> None:
    found = corpus.collect(tree)
    assert len(found.texts) == 25  # a copy of a module counts once
    assert len(found.pairs) == 250
    assert {"def f4(a, *, b=1)", "Return the 3 times 4 of the sum."} <= {
        part for pair in found.pairs for part in (pair.signature, pair.docstring)
    }


def test_methods_carry_the_name_of_their_class(library: corpus.Corpus) -> None:
    signatures = {pair.signature for pair in library.pairs}
    assert "class ArgumentParser" in signatures
    assert "def BoundArguments.apply_defaults(self)" in signatures


def test_same_files_same_corpus(tree: Path) -> None:
    first, second = corpus.collect(tree), corpus.collect(tree)
    assert first == second
    assert first.sha == second.sha
    (tree / "module7.py").write_text('"""Another."""\n')
    assert corpus.collect(tree).sha != first.sha


def test_too_little_text_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds too little"):
        corpus.collect(tmp_path)


def test_no_module_and_no_docstring_is_on_both_sides(library: corpus.Corpus) -> None:
    sides: dict[bool, list[corpus.Pair]] = {True: [], False: []}
    for pair in library.pairs:
        sides[corpus.held_out(pair.module)].append(pair)
    assert len(sides[True]) > 200
    assert len(sides[False]) > 2000
    for fact in ("module", "docstring"):
        held_out, trained = ({getattr(pair, fact).lower() for pair in sides[side]} for side in (True, False))
        assert not held_out & trained


def test_rejections_keep_the_words_and_lose_the_order(library: corpus.Corpus) -> None:
    pairs = list(library.pairs[:200])
    rows = corpus.preferences(pairs)
    assert rows == corpus.preferences(pairs)
    for pair, row in zip(pairs, rows, strict=True):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen == pair.docstring
        assert rejected != chosen
        assert sorted(rejected.split()) == sorted(chosen.split())
    assert corpus.preferences(pairs, seed=1) != rows


def test_one_word_has_no_other_order() -> None:
    with pytest.raises(ValueError, match="no other order"):
        corpus.shuffled("same same", 0)


def test_labelled_answers_are_one_side_of_each_pair(library: corpus.Corpus) -> None:
    pairs = corpus.preferences(list(library.pairs[:1000]))
    rows = corpus.labelled(pairs)
    assert rows == corpus.labelled(pairs)
    for pair, row in zip(pairs, rows, strict=True):
        assert row["prompt"] == pair["prompt"]
        assert row["completion"] == pair["chosen" if row["label"] else "rejected"]
    assert 450 < sum(row["label"] for row in rows) < 550


def test_control_prefers_by_coin(library: corpus.Corpus) -> None:
    pairs = list(library.pairs[:1000])
    rows = corpus.uninformative_preferences(pairs)
    own = [row["chosen"][0]["content"] == pair.docstring for pair, row in zip(pairs, rows, strict=True)]
    assert 0.45 < sum(own) / len(own) < 0.55
    assert all(row["chosen"] != row["rejected"] for row in rows)
