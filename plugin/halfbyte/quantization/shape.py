"""The shape of a base, read from its configuration alone: what decides which dtype is faster on a CPU."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

# What architectures call the feed-forward size where transformers gives it no common name.
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "dim_feedforward")
# Wider layers behave alike, and take long to time.
_WIDEST = 512


@dataclass(frozen=True)
class Shape:
    """Hidden size H, feed-forward size F and heads N of a decoder layer."""

    hidden: int = _WIDEST
    feed_forward: int = 4 * _WIDEST
    heads: int = 8

    def timed(self) -> "Shape":
        """The shape to time for this one: the same proportions, not wider than 512."""
        if self.hidden <= _WIDEST:
            return self
        heads = max(1, self.heads * _WIDEST // self.hidden)
        return Shape(_WIDEST, max(1, self.feed_forward * _WIDEST // self.hidden), heads)


def shape_of(name_or_path: str, revision: str = "main") -> Shape:
    """Return the shape of a base, and the default where its configuration cannot be read or says otherwise.

    No code of the checkpoint's is run. What is wrong with it is reported when it is loaded.
    """
    directory = Path(name_or_path)
    if directory.exists() and not (directory / "config.json").is_file():  # a pipe would be waited for
        return Shape()
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        config = config.get_text_config()
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    except Exception:  # of any configuration class
        return Shape()
    given = [getattr(config, name, None) for name in _FEED_FORWARD]
    feed_forward = next((size for size in given if isinstance(size, int) and size > 0), 4 * hidden)
    return Shape(hidden, feed_forward, heads) if hidden >= heads > 0 else Shape()
