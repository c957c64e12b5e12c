"""Where rows come from: the hub, a local file or directory, or a mixture of them."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from trl.scripts.utils import DatasetConfig

from halfbyte import identity
from halfbyte.data import contents, nested
from halfbyte.data.contents import BUILDERS, reading
from halfbyte.errors import UserError, about
from halfbyte.files import LONGEST_TEXT, digest_of
from halfbyte.files import read as read_file
from halfbyte.names import is_path
from halfbyte.terminal.wording import suggestion

ACCEPTED = "json, jsonl, csv, parquet, arrow, a `save_to_disk` directory, or a directory of such files"
# What `glob` reads as a pattern.
_MAGIC = re.compile(r"[*?[]")

Splits = Mapping[str, Any]  # split name -> Dataset, or IterableDataset when streaming


def read(script: Any, mixture: Any, *, seed: int) -> Splits:
    """Return all splits that ``dataset_name`` or ``datasets:`` names (trl.ScriptArguments, DatasetMixtureConfig).

    ``seed`` draws the test split of a mixture, so that every process draws the same one. Raises UserError.
    """
    if mixture.datasets:
        _refuse_unused(
            "with `datasets:`",
            dataset_name=(script.dataset_name, "leave one of the two out"),
            dataset_config=(script.dataset_config, "write `name:` beside the `path:`"),
            dataset_streaming=(script.dataset_streaming, "write `streaming: true`"),
        )
        return _mixture(mixture, seed)
    _refuse_unused(
        "without `datasets:`",
        streaming=(mixture.streaming, "write `dataset_streaming: true`"),
        test_split_size=(mixture.test_split_size is not None, "name the data as `datasets: [{path: ...}]`"),
    )
    if not script.dataset_name:
        raise UserError("no data: give `dataset_name` (a hub id or a local path) or `datasets:`")
    with about("dataset_name"):
        return _one(script.dataset_name, script.dataset_config, script.dataset_streaming)


def split(splits: Splits, name: str, option: str) -> Any:
    """Return the split called ``name``, which ``option`` sets. Raises UserError naming the splits that exist."""
    if name in splits:
        return splits[name]
    advice = f"set `{option}` to one of them"
    if option == "dataset_test_split":
        advice += (
            ", cut one off with `datasets: [{path: ...}]` and `test_split_size: 0.1`, or `eval_strategy: no`"
        )
    raise UserError(
        f"no split {name!r}{suggestion(name, splits)}\n  found: {', '.join(splits)}\n  {advice}",
        option=option,
    )


def _refuse_unused(where: str, **given: tuple[Any, str]) -> None:
    for option, (value, advice) in given.items():
        if value:
            raise UserError(f"has no effect {where}; {advice}", option=option)


def _one(name: str, config: str | None, streaming: bool) -> Splits:
    path = Path(name).expanduser()
    if path.is_file():
        if config:
            raise UserError(
                f"{config!r} has no effect on one local file; leave it out", option="dataset_config"
            )
        return _load(
            name, path=_builder(path), data_files={"train": _literal(path)}, split=None, streaming=streaming
        )
    if path.is_dir():
        if _saved(path):
            if config:
                raise UserError(
                    f"{config!r} has no effect on a saved data set; leave it out", option="dataset_config"
                )
            return _from_disk(name, path, streaming)
        return _load(name, **_directory(name, path, config), streaming=streaming)
    _refuse_missing(name, path)
    return _load(name, path=name, name=config, streaming=streaming)


def _mixture(mixture: Any, seed: int) -> Splits:
    if mixture.streaming and mixture.test_split_size is not None:
        raise UserError(
            "a stream cannot be split; give its test data as a split of its own", option="test_split_size"
        )
    parts, loaded = [], []
    for index, part in enumerate(mixture.datasets):
        with about(f"datasets[{index}].path"), reading(part.path):
            parts.append(_local_part(part))
            loaded.append(_part(parts[-1], mixture.streaming))
    with reading(", ".join(part.path for part in mixture.datasets)):
        shares = [part.fraction for part in parts]
        if any(share is not None for share in shares):
            loaded = _shared(loaded, shares, mixture.streaming)
        # Not by `trl.get_dataset`: parts whose nested columns have other keys cannot be concatenated as they are,
        # and it draws the test split unseeded, another one in every process.
        whole = datasets.concatenate_datasets(nested.alike(loaded))
        if mixture.test_split_size is None:
            return {"train": whole}
        return whole.train_test_split(test_size=mixture.test_split_size, seed=seed)


def _part(part: DatasetConfig, streaming: bool) -> Any:
    loaded = _loaded(
        path=part.path,
        name=part.name,
        data_dir=part.data_dir,
        data_files=part.data_files,
        split=part.split,
        streaming=streaming,
    )
    return loaded if part.columns is None else loaded.select_columns(part.columns)


def _shared(parts: list[Any], fractions: list[float | None], streaming: bool) -> list[Any]:
    """The first rows of each part, as many as its share of the largest mixture that repeats no row (as TRL)."""
    if streaming:
        raise UserError("a stream has no length to take a `fraction` of; leave it out", option="datasets")
    given = [fraction for fraction in fractions if fraction is not None]
    if len(given) < len(fractions):
        raise UserError("`fraction` must be set for all parts or for none", option="datasets")
    weights = [fraction / sum(given) for fraction in given]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight > 0)
    pairs = zip(parts, weights, strict=True)
    return [part.select(range(round(weight * total))) for part, weight in pairs]


def _local_part(part: DatasetConfig) -> DatasetConfig:
    """The same part, with the path of a local file or saved data set in the form that `load_dataset` requires."""
    path = Path(part.path).expanduser()
    if part.data_files is not None or part.data_dir is not None:
        return part
    if path.is_file():
        return dataclasses.replace(part, path=_builder(path), data_files={"train": _literal(path)})
    if path.is_dir() and _saved(path):
        folders = [path] if (path / "state.json").exists() else [p for p in path.iterdir() if p.is_dir()]
        files = {
            "train" if folder == path else folder.name: [_literal(p) for p in _saved_files(folder)]
            for folder in folders
        }
        return dataclasses.replace(part, path="arrow", data_files=files)
    if path.is_dir():
        return dataclasses.replace(part, **_directory(part.path, path, part.name))
    _refuse_missing(part.path, path)
    return part


def _builder(path: Path) -> str:
    if path.suffix not in BUILDERS:
        raise UserError(
            f"{path}: {path.suffix or 'a file without extension'} is not read; accepted: {ACCEPTED}"
        )
    contents.refuse(path)
    return BUILDERS[path.suffix]


def _literal(path: Path) -> str:
    """The path, escaped: `data_files` takes patterns."""
    return _MAGIC.sub(lambda found: f"[{found[0]}]", str(path.absolute()))


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved split; what `datasets` derived from it may lie beside them."""
    try:
        state = json.loads(read_file(folder / "state.json", LONGEST_TEXT))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: its state.json is not one that `save_to_disk` writes") from error
    for file in files:
        contents.refuse(file)
    return files


def _from_disk(name: str, path: Path, streaming: bool) -> Splits:
    for state in path.rglob("state.json"):
        if not _saved_files(state.parent):  # how a split without rows is saved, and cannot be read
            raise UserError(f"{state.parent}: the split has no rows")
    with reading(name):
        saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    splits = {key: _by_content(split) for key, split in splits.items()}
    return {key: value.to_iterable_dataset() if streaming else value for key, value in splits.items()}


def _by_content(saved: Any) -> Any:
    """The same rows, for whose content what is derived from them is cached, and not for a number saved beside them."""
    held = [identity.sha256(Path(file["filename"])) for file in saved.cache_files]
    return datasets.Dataset(saved.data, info=saved.info, split=saved.split, fingerprint=digest_of(held)[:16])


def _directory(name: str, path: Path, config: str | None) -> dict[str, Any]:
    """How `load_dataset` must be called for a directory of files. Raises UserError where it would ignore some."""
    present = {
        file.resolve() if file.exists() else file
        for file in path.rglob("*")
        if file.suffix in BUILDERS
        and not file.is_dir()
        and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
    }
    if not present:
        raise UserError(f"{name}: no data files in this directory; accepted: {ACCEPTED}")
    for file in sorted(present):
        contents.refuse(file)
    called: dict[str, Any] = {"path": str(path), "name": config}
    if _MAGIC.search(str(path.absolute())):
        # Read as a pattern otherwise, of its own name and of others; the files decide the format, and not a README.
        if config is not None:
            raise UserError(f"{name}: rename the directory, without *, ? and [", option="dataset_config")
        first = min(present, key=lambda file: sum(file.suffix != other.suffix for other in present))
        called = {"path": BUILDERS[first.suffix], "data_dir": _literal(path), "name": None}
    with reading(name):
        files = datasets.load_dataset_builder(**called).config.data_files or {}
    used = {Path(str(file)).resolve() for paths in files.values() for file in paths}
    # A README may declare configurations, and then the rest belongs to the others.
    strays = sorted(str(file.relative_to(path.resolve())) for file in present - used)
    if strays and not (path / "README.md").exists():
        raise UserError(
            f"{name}: {len(strays)} of its files would not be read, among them {', '.join(strays[:5])}\n"
            "  give all files one format, and all or none of them a split's name (train.jsonl, test.jsonl)"
        )
    return called


def _refuse_missing(name: str, path: Path) -> None:
    """Refuse a local path that does not exist; anything else may be a hub id."""
    if path.exists() or path.is_symlink():
        contents.refuse(path)
    if path.suffix in BUILDERS or is_path(name):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such file or directory{suggestion(path.name, siblings)}")


def _load(shown: str, **options: Any) -> Splits:
    with reading(shown):
        return _loaded(**options)


def _loaded(*, split: str | None = None, streaming: bool, **options: Any) -> Any:
    """`load_dataset`, whose cache is kept by the content of local files: it goes by their modification times."""
    if not streaming and (
        Path(options["path"]).exists() or options.get("data_files") or options.get("data_dir")
    ):
        files = datasets.load_dataset_builder(**options).config.data_files or {}
        local = [Path(str(file)) for names in files.values() for file in names]
        held = [[str(file), identity.sha256(file)] for file in local if file.is_file()]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "by-content" / digest_of(held)[:32]
        return datasets.load_dataset(**options, split=split, cache_dir=str(cache))
    return datasets.load_dataset(**options, split=split, streaming=streaming)
