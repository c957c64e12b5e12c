"""What differs between runs, and which of them is better by which figure."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.tracking.columns import Evaluated, evaluated, headline, is_less_better
from halfbyte.tracking.runs import Run

# Of the configuration: where a run is, and not what it is.
_PLACES = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "allow_config_change")
_TOKENIZER = ("sha", "chat_template")
_HASH = 12  # characters of a hash that are shown


@dataclass(frozen=True)
class Differences:
    """What differs: by name, the value of each run as text; and how many options only some of the runs have."""

    values: dict[str, list[str]]
    not_shared: int


def differences(runs: Sequence[Run]) -> Differences:
    """Compare the configurations of ``runs``, and what they ran on: base, rows, tokenizer, processes, versions."""
    configs = [run.config for run in runs]
    every = list(dict.fromkeys(key for config in configs for key in config))
    shared = [key for key in every if all(key in config for config in configs) and key not in _PLACES]
    options = {key: [config[key] for config in configs] for key in shared}
    ran_on = [_ran_on(run) for run in runs]
    others = {
        key: [found.get(key) for found in ran_on] for key in dict.fromkeys(k for f in ran_on for k in f)
    }
    found = {key: values for key, values in (options | others).items() if len(set(map(_text, values))) > 1}
    for name, content in (("model_name_or_path", "base"), ("dataset_name", "data")):
        if name in found:  # another name says that the content is another
            found.pop(content, None)
    shown = {key: [_text(value) for value in values] for key, values in found.items()}
    return Differences(shown, len(set(every) - set(shared) - set(_PLACES)))


def _ran_on(run: Run) -> dict[str, Any]:
    strategy = run.part("strategy")
    found = {
        "base": _hash(run.part("base")),
        "data": _hash(run.part("data")),
        "evaluation rows": _hash(_evaluation_rows(run)),
        "tokenizer": _hash(run.part("tokenizer")),
        "chat template": _hash(run.part("tokenizer"), "chat_template"),
        "strategy": strategy.get("name"),
        "processes": strategy.get("world_size"),
    }
    return found | {f"version of {name}": version for name, version in run.part("versions").items()}


def _evaluation_rows(run: Run) -> Mapping[str, Any]:
    found = run.part("data").get("eval")
    return found if isinstance(found, Mapping) else {}


def _hash(part: Mapping[str, Any], key: str = "sha") -> str | None:
    found = part.get(key)
    return str(found)[:_HASH] if found else None


def _text(value: Any) -> str:
    """A value as the YAML spells it, in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verdicts(runs: Sequence[Run]) -> list[str]:
    """A line for each headline figure: which run is best by it, where, and which comes next.

    Only runs of one recipe that evaluated on the same rows are compared, and by a figure whose scale settings and
    tokens decide only those in which they are the same; what is not compared is named.
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        rows = _hash(_evaluation_rows(run)) or _text(run.data)
        groups[str(run.record["recipe"]), rows].append(run)
    lines = [line for group in groups.values() for line in _verdicts(group, named=len(groups) > 1)]
    if len(groups) > 1 and len(runs) > 1:
        recipes = {recipe for recipe, _ in groups}
        why = "recipes" if len(recipes) == len(groups) else "recipes or evaluation rows"
        why = "evaluation rows" if len(recipes) == 1 else why
        lines.append(f"not compared with each other: runs of different {why}")
    return lines


def _verdicts(runs: Sequence[Run], *, named: bool) -> list[str]:
    lines = []
    for figure, part in headline(runs):
        less = is_less_better(figure.key, runs)
        found = [(run, each) for run in runs if (each := evaluated(run, figure, part, less=less)) is not None]
        if part == "train" or figure.direction == "neither" or len(found) < 2:
            continue
        name = f"{runs[0].record['recipe']}, {part} {figure.label}" if named else f"{part} {figure.label}"
        if figure.scaled and (differing := _scales([run for run, _ in found])):
            lines.append(f"{name}: not compared, its scale depends on what differs: {', '.join(differing)}")
        else:
            found.sort(key=lambda pair: pair[1].best, reverse=not less)
            lines.append(f"{name}: {_ranked(found, figure.form)}")
    return lines


def _scales(runs: Sequence[Run]) -> list[str]:
    """What decides the scale of a loss, and differs between ``runs``."""
    settings = dict.fromkeys(key for run in runs for key in run.figures.settings)
    found = [key for key in settings if len({_text(run.config.get(key)) for run in runs}) > 1]
    ran_on: dict[str, list[Any]] = {
        "the tokenizer": [[run.part("tokenizer").get(key) for key in _TOKENIZER] for run in runs],
        "the tokens of the evaluation": [_evaluation_rows(run).get("tokens") for run in runs],
    }
    return [*found, *(name for name, values in ran_on.items() if len(set(map(_text, values))) > 1)]


def _ranked(found: Sequence[tuple[Run, Evaluated]], form: str) -> str:
    """Which of the runs in ``found``, the best first, is the best."""
    best = found[0][1].best
    equal = [run.name for run, each in found if each.best == best]
    # As many digits as tell apart what is not equal.
    values = {each.best for _, each in found}
    form = form if len({f"{value:{form}}" for value in values}) == len(values) else ".6g"
    if len(equal) == len(found):
        return f"equal at best, {best:{form}}"
    if len(equal) > 1:
        return f"{' and '.join(equal)} are equal and best, {best:{form}}"
    parts = []
    for run, each in found[:2]:
        last = (
            f", last {each.last_text(form)}" if each.last_step != each.best_step or each.last is None else ""
        )
        parts.append(f"{run.name}, {each.best:{form}} at step {each.best_step}{last}")
    more = f"; {len(found) - 2} more" if len(found) > 2 else ""
    return f"best is {parts[0]}; next {parts[1]}{more}"
