"""The data of one run: read, recognised, checked and reported before any model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from trl import extract_prompt

from halfbyte.data import calls, nested, sources, unread
from halfbyte.data.chat import delimiters
from halfbyte.data.chat.rendering import known_roles, template_advice, training_template
from halfbyte.data.chat.template import text_markers
from halfbyte.data.contents import reading
from halfbyte.data.conversion import columns as conversion
from halfbyte.data.conversion.shapes import Seen
from halfbyte.data.formats import BESIDE_TOKENS, DECIDING, DataFormat, Layout
from halfbyte.data.preparation import equal
from halfbyte.data.progress import showing
from halfbyte.data.prompts import Prompts
from halfbyte.data.prompts import load as load_prompts
from halfbyte.data.report import DataReport, SplitReport
from halfbyte.data.rows import RowCheck, digest
from halfbyte.data.sample import Sample, placed
from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten


@dataclass
class RunData:
    """Both splits, ready for the trainer; each a Dataset, or an IterableDataset when streaming.

    ``tokenizer`` rendered the rows; ``added_token_ids`` are the tokens that ``additional_special_tokens`` added to it.
    ``prompts`` are those of ``sample_prompts``.
    """

    train: Any
    eval: Any | None
    report: DataReport
    tokenizer: Any = None
    added_token_ids: list[int] = field(default_factory=list)
    prompts: Prompts = field(default_factory=Prompts)


def load(
    script: Any,
    mixture: Any,
    training: Any,
    format: DataFormat | None,
    tokenizer: Any,
    added_token_ids: list[int] | None = None,
    sample: Sample | None = None,
) -> RunData:
    """Read what ``dataset_name`` or ``datasets:`` names and check every row.

    ``script``, ``mixture`` and ``training`` are TRL's ScriptArguments, DatasetMixtureConfig and trainer
    config. ``eval`` is read only with ``eval_strategy``. Without a format only an empty split is refused.
    A ``sample`` takes the place of all rows, except of a stream's. Raises UserError, with the row number where a row is
    at fault.
    """
    with showing(training):
        return _load(script, mixture, training, format, tokenizer, added_token_ids or [], sample)


def _load(
    script: Any,
    mixture: Any,
    training: Any,
    format: DataFormat | None,
    tokenizer: Any,
    added_token_ids: list[int],
    sample: Sample | None,
) -> RunData:
    splits = sources.read(script, mixture, seed=training.seed)
    wanted = {"train": (script.dataset_train_split, "dataset_train_split")}
    if training.eval_strategy != "no":
        wanted["eval"] = (script.dataset_test_split, "dataset_test_split")
    found = {name: sources.split(splits, *asked) for name, asked in wanted.items()}
    report = DataReport(format=format)
    if "eval" not in wanted and (test := script.dataset_test_split) in splits:
        report.notes.append(
            f"split {test!r} is there and nothing is evaluated on it; `eval_strategy: steps` does"
        )
    policy = getattr(script, "user_special_tokens", "error")
    origin = [part.path for part in mixture.datasets] or [script.dataset_name]
    ready = {}
    for name, whole in found.items():
        streaming = isinstance(whole, datasets.IterableDataset)
        places = None if sample is None or streaming else sample.places(whole)
        dataset = whole if places is None else whole.select(places)
        with placed(places):
            ready[name], counts = _split(
                name, dataset, training, format, tokenizer, report, policy, origin, places
            )
        counts.whole, counts.places = None if streaming else len(whole), places
        if name == "train":
            report.train = counts
        else:
            report.eval = counts
    rendered = report.train.check is not None and report.train.check.conversational
    if rendered and (markers := text_markers(tokenizer)):
        text = f"chat template: {', '.join(markers)} are no tokens of the vocabulary but ordinary text"
        report.notes.append(text)
    if tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token:
        said = "only the padding is masked"
        if format is not None and not format.generates:
            said = "a sequence is scored at its last token before that"
        report.notes.append(f"padding with the end token {tokenizer.pad_token}: {said}")
    prompts = Prompts()
    if (samples := getattr(script, "sample_prompts", None)) is not None:
        loaded = {split: ready[name] for name, (split, _) in wanted.items()}

        def settled(name: str) -> Any:
            if name in loaded:
                return loaded[name]
            aside = DataReport(format=format)
            return _split(name, splits[name], training, format, tokenizer, aside, policy, origin)[0]

        prompts = load_prompts(samples, splits, settled, ready["train"], tokenizer, training)
        report.notes.append(prompts.line(script.sample_steps, evaluates="eval" in ready))
    return RunData(ready["train"], ready.get("eval"), report, tokenizer, added_token_ids, prompts)


def _split(
    name: str,
    dataset: Any,
    training: Any,
    format: DataFormat | None,
    tokenizer: Any,
    report: DataReport,
    policy: str,
    origin: list[str],
    places: np.ndarray | None = None,
) -> tuple[Any, SplitReport]:
    streaming = isinstance(dataset, datasets.IterableDataset)
    with reading(*origin):
        first = next(iter(dataset), None)
    if first is None:
        raise UserError("the split has no rows", split=name)
    counts = SplitReport(streaming=streaming)
    if not streaming:
        dataset = dataset.with_format(None)
        counts.rows, counts.sha = len(dataset), digest(dataset, name)
        if nulls := nested.written_nulls(dataset):
            report.notes.append(
                f"{name}: keys that hold null are left out of {', '.join(nulls)}, as Arrow cannot tell them from "
                "absent ones; `tools` as JSON text keep them"
            )
    dataset = nested.settle(dataset)
    if format is None:
        return dataset, counts
    first = next(iter(dataset))
    text_field = getattr(training, "dataset_text_field", "text")
    roles = known_roles(tokenizer)
    seen = Seen(tuple(dataset.column_names or first), first, dataset, name, roles, text_field)
    seen = _converted(seen, format, tokenizer, training, report)
    dataset, first = seen.dataset, seen.first
    layout = format.detect(seen.columns, first, text_field)
    conversational = layout.conversational(first)
    dataset, lines = unread.settle(seen, layout, deciding=_deciding(seen.columns, layout, text_field))
    report.notes += lines
    if layout.begin_alike and all(isinstance(first[side], str) for side in layout.columns):
        prompt = shorten(repr(extract_prompt(dict(first))["prompt"]))
        report.notes.append(
            f"{name}: no prompt column; the prompt is what both sides begin with, in row 1 {prompt}"
        )
    _refuse_options(training, layout, conversational, tokenizer, first)
    if not conversational and layout.token_ids is None and tokenizer.eos_token is None:
        why = "a model would never learn to stop" if format.generates else "each text must end with it"
        advice = "; set `eos_token`" if hasattr(training, "eos_token") else ""
        raise UserError(f"the tokenizer has no end-of-sequence token: {why}{advice}")
    template = training_template(tokenizer, training) if conversational else None
    form = calls.form(tokenizer, template) if conversational else None
    if (
        form is not None
        and not streaming
        and any(calls.has(dataset, column, form) for column in layout.spoken)
    ):
        report.notes.append(f"{name}: arguments of tool calls are given to the chat template as {form}")
    dataset = nested.settle(
        dataset,
        {*layout.spoken, *layout.beside},
        join=conversational and nested.joins(tokenizer, template),
        form=form,
    )
    check = RowCheck(
        split=name,
        layout=layout,
        tokenizer=tokenizer,
        roles=roles,
        template=template,
        conversational=conversational,
        assistant_only=getattr(training, "assistant_only_loss", False),
    )
    counts.check = check
    if streaming:
        dataset = check.arriving(dataset)
    else:
        check.all(dataset)
    if conversational:
        dataset = delimiters.settle(name, dataset, layout, tokenizer, policy, report, check.template, places)
    if streaming:
        return dataset, counts
    equal.refuse_identical(dataset, name, format, places)
    if format.remark is not None and (remark := format.remark(dataset, training)) is not None:
        report.notes.append(f"{name}: {remark}")
    return dataset, counts


def _converted(seen: Seen, format: DataFormat, tokenizer: Any, training: Any, report: DataReport) -> Seen:
    """The same rows in the columns of the format's layouts, and a line where that takes a conversion."""
    found = None if format.convert is None else format.convert(seen)
    if found is None:
        return seen
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{' + '.join(found.read)} would become a conversation, but the tokenizer has no chat template\n"
            f"  {template_advice(training)}; or write the text to train on into the data",
            split=seen.split,
        )
    report.notes.append(f"{seen.split}: {found.line(seen.first, seen.whole)}")
    dataset = conversion.apply(seen.split, seen.dataset, seen.columns, found)
    first = next(iter(dataset))
    return replace(
        seen, dataset=dataset, columns=tuple(dataset.column_names or first), first=first, conversion=found
    )


def _deciding(columns: Sequence[str], layout: Layout, text_field: str) -> list[str]:
    allowed = set(layout.columns) | (BESIDE_TOKENS if layout.token_ids is not None else set())
    return [column for column in columns if column in (DECIDING | {text_field}) - allowed]


def _refuse_options(
    training: Any, layout: Layout, conversational: bool, tokenizer: Any, first: Mapping[str, Any]
) -> None:
    """Refuse the options that TRL would ignore for this data, or fail on without naming."""
    if getattr(training, "packing", False) and training.max_length is None:
        raise UserError("needs `max_length`, the length to pack to", option="packing")
    if getattr(training, "assistant_only_loss", False) and not conversational:
        raise UserError(f"needs conversations, but the data has {layout}", option="assistant_only_loss")
    if getattr(training, "completion_only_loss", None) and not layout.masks_prompt(first):
        raise UserError(
            f"needs prompts with completions, but the data has {layout}", option="completion_only_loss"
        )
