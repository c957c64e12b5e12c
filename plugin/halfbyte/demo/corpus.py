"""Real text that every machine has: the sources and docstrings of the running Python's standard library."""

import ast
import functools
import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UserError

# Not library prose: tests, generated tables, vendored packages, scripts of an application.
_SKIPPED = {
    "__pycache__", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo", "encodings",
}  # fmt: skip
_TEXT_CHARACTERS = 40_000  # of one module, so that no single file dominates
_WORDS = range(5, 41)  # of a docstring's first paragraph
_SIGNATURE_CHARACTERS = 160
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Text:
    """The source text of one module."""

    module: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A signature and the first paragraph of its docstring, on one line."""

    module: str
    signature: str
    docstring: str


@dataclass(frozen=True)
class Corpus:
    """What one Python installation offers: texts and pairs, sorted and without repetitions."""

    texts: tuple[Text, ...]
    pairs: tuple[Pair, ...]

    @functools.cached_property
    def sha(self) -> str:
        """sha256 of everything in it, in order."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(json.dumps([text.module, text.text]).encode())
        for pair in self.pairs:
            digest.update(json.dumps([pair.module, pair.signature, pair.docstring]).encode())
        return digest.hexdigest()


def held_out(module: str) -> bool:
    """Whether a module belongs to the held-out part; one in ten does, whichever rows it has."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0


def collect(root: Path | None = None) -> Corpus:
    """Read the standard library's sources under ``root`` (the running Python's by default).

    Nothing is imported. A file that cannot be decoded or parsed is left out. Raises `UserError` when
    there is too little text, as on an installation that ships no sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: list[Text] = []
    pairs: list[Pair] = []
    seen_texts: set[str] = set()
    seen_docstrings: set[str] = set()
    for path in _sources(root):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if source.strip() and source not in seen_texts:
            seen_texts.add(source)
            texts.append(Text(module, source[:_TEXT_CHARACTERS]))
        for signature, docstring in _documented(tree.body, ""):
            # One docstring, one row: a copy in another module would leak across the split.
            if docstring.lower() not in seen_docstrings:
                seen_docstrings.add(docstring.lower())
                pairs.append(Pair(module, signature, docstring))
    if len(texts) < 20 or len(pairs) < 200:
        raise UserError(
            f"the demo trains on Python's own library, and {root} holds too little of it\n"
            f"({len(texts)} source files, {len(pairs)} documented functions; 20 and 200 are needed).\n"
            "Run it with a Python that ships its standard library as .py files."
        )
    return Corpus(tuple(texts), tuple(pairs))


def shuffled(docstring: str, seed: int) -> str:
    """The docstring's words in another order, the same for the same ``seed``.

    Raises ValueError when all words are equal.
    """
    words = docstring.split()
    if len(set(words)) < 2:
        raise ValueError(f"no other order of the words of {docstring!r}")
    generator = random.Random(f"{seed} {docstring}")
    order = list(words)
    while order == words:
        generator.shuffle(order)
    return " ".join(order)


def prompt_completions(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Rows for `sft`: the user's turn is the signature, the assistant's the docstring."""
    return [{"prompt": _user(pair), "completion": _assistant(pair.docstring)} for pair in pairs]


def preferences(pairs: list[Pair], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for `dpo`: the docstring is preferred to its own words in another order."""
    return [
        {
            "prompt": _user(pair),
            "chosen": _assistant(pair.docstring),
            "rejected": _assistant(shuffled(pair.docstring, seed)),
        }
        for pair in pairs
    ]


def labelled(preferences: list[dict[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for `kto`: of each pair a coin takes the chosen or the rejected side, labelled as what it is."""
    generator = random.Random(seed)
    rows = []
    for pair in preferences:
        wanted = generator.random() < 0.5
        side = pair["chosen" if wanted else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": side, "label": wanted})
    return rows


def uninformative_preferences(pairs: list[Pair], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for the negative control: of two docstrings in good order, a coin says which is preferred."""
    generator = random.Random(seed)
    rows = []
    for index, pair in enumerate(pairs):
        sides = [pair.docstring, pairs[(index + len(pairs) // 2) % len(pairs)].docstring]
        generator.shuffle(sides)
        rows.append({"prompt": _user(pair), "chosen": _assistant(sides[0]), "rejected": _assistant(sides[1])})
    return rows


def _user(pair: Pair) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair.signature}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith("config-")]
        found += [
            Path(directory, name)
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _documented(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, str]]:
    """(signature, first paragraph of the docstring) of functions and classes, methods under their class."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            signature = f"class {owner}{node.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"def {owner}{node.name}({ast.unparse(node.args)})"
        else:
            continue
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        words = paragraph.split()
        good = len(words) in _WORDS and len(set(words)) > 1 and paragraph.isascii()
        if good and len(signature) <= _SIGNATURE_CHARACTERS:
            yield signature, paragraph
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, f"{owner}{node.name}.")
