"""The demo's tokenizer: a small byte-level BPE with a ChatML template, trained in seconds."""

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> Any:
    """A `PreTrainedTokenizerFast` with at most ``vocabulary`` tokens; any text round-trips through it.

    A turn and a plain text both end with ``<|im_end|>``, the EOS token, so that generation stops there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[_START],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (files("halfbyte.demo") / "chatml.jinja").read_text(encoding="utf-8")
    return fast
