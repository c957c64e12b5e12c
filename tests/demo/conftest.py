"""The running Python's library, read once."""

import pytest

from halfbyte.demo import corpus


@pytest.fixture(scope="session")
def library() -> corpus.Corpus:
    return corpus.collect()
