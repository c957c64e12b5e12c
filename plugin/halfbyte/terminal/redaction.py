"""Secrets out of everything that a run writes, sends or prints.

No library is used for the patterns. detect-secrets 1.5.0 (2024) gives a verdict on each line of a file: of a GitHub or
GitLab token it returns the prefix, of a private key the header, of a URL the password without the user, so that the
rest would stay. It knows no key of Hugging Face, W&B, Google or Anthropic, no URL parameter and no Bearer header, and
its import takes 0.3 s.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

REDACTED = "***"

# Names, cut into words and joined by `_`. Under the first every value is a secret, under the second a string is.
_STRICT = re.compile(
    r"passw(?:or)?ds?|passphrase|passcode|secret|credential|authorization|(?:^|_)(?:pwd|dsn|o?auth|cookies?|jwt|bearer)(?:_|$)"
)
# Many tokens or keys are those of a vocabulary or a mapping, unless their name says whose; so is a key that more words
# follow (key_states), and what is counted of a token.
_WHOSE = "access|account|api|auth|bearer|hub|license|private|refresh|secret|session|signing|wandb"
_TOKEN_OR_KEY = re.compile(
    r"token(?!iz|s|_(?:id|index|type|count|budget|limit|length|accuracy|loss|entropy|embed|mask|class))"
    rf"|(?:{_WHOSE})_?(?:token|key)s?(?:id)?(?:_|$)|(?:^|_)key(?:id)?$"
)
_IN_URLS = re.compile(r"(?:^|_)(?:sig|sas|signature|hmac|session(?:_?id)?|sid|ticket|otp)(?:_|$)")

# Fields of TRL, transformers and halfbyte whose names look like secrets and whose string values are none.
_HARMLESS_NAMES = frozenset(
    {
        "added_tokens",
        "additional_special_tokens",
        "include_num_input_tokens_seen",
        "special_tokens",
        "stop_token",
        "user_special_tokens",
        *(
            f"{name}_token"
            for name in ("audio", "bos", "cls", "eos", "image", "mask", "pad", "sep", "unk", "video")
        ),
    }
)
# Words of prose and of our own reports, which are a secret's name only in a URL or a configuration.
_BARE = frozenset({"key", "keys"})
# Values that are none under any name: words of a configuration, special tokens, and what is redacted already.
_NO_SECRET = re.compile(
    r"true|false|none|null|nan|auto|value|\*\*\*|<{1,2}/?[^<>\s]{1,40}>{1,2}|\[/?[A-Z_]{1,20}\]",
    re.IGNORECASE,
)
# A figure, also the first of a list; more digits at a stretch are a key.
_NUMBER = re.compile(r"[(\[]*[-+]?(?!\d{10})[\d.,_]*(?:e[-+]?\d+)?[kMG]?[)\]]*")

# A commit or a content hash has the shape of a W&B key; under these names, or after them, it is what it says.
_HASH_NAME = re.compile(
    r"revision|(?<![a-z])sha(?![a-z])|commit|hash|fingerprint|version|snapshots|blobs|refs|tree|resolve|(?<=[\w/])@$"
    r"|/\d+\.\d+\.\d+/$",
    re.IGNORECASE,
)
# Where a word begins, also after an escape in a string that was quoted (\\n) or in a URL (%3D).
_START = r"(?:(?<![0-9a-zA-Z])|(?<=\\[nrt])|(?<=%[0-9a-fA-F]{2}))"

# What follows a prefix is a name and no key if it is words and short numbers: sk-learn-classifier-v2.
_WORD = r"[a-z]{1,15}|[A-Z][a-z]{0,15}|v?\d{1,4}[a-zA-Z]?"
_WORDS = rf"(?:{_WORD})(?:[-_.](?:{_WORD}))*(?![0-9a-zA-Z_-])"

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{2,40}-----.*?(?:-----END [A-Z0-9 ]{2,40}-----|\Z)", re.DOTALL)
_HEX_KEY = re.compile(rf"{_START}[0-9a-f]{{40}}(?![0-9a-zA-Z])")
_SHAPES = re.compile(
    _START
    + r"""(?:
        hf_[0-9a-zA-Z]{16,} | api_org_[0-9a-zA-Z]{16,}                 # Hugging Face
      | wandb_v\d_[0-9a-zA-Z_-]{16,} | local-[0-9a-f]{40}              # W&B
      | (?:sk|gsk|xai|pplx|nvapi|rk|phc|rpa|fw|tgp_v1|dop_v1|figd|lin_api|whsec|hvb|glsa|tskey|shpat|ATATT3|GOCSPX)
        [-_.](?=[a-zA-Z_-]{0,40}\d)(?!WORDS)[0-9a-zA-Z_.-]{16,}        # OpenAI, Anthropic, Stripe, ...
      | r8_[0-9a-zA-Z]{24,} | dckr_pat_[0-9a-zA-Z_-]{16,} | pypi-AgE[0-9a-zA-Z_-]{16,}
      | gh[oprsu]_[0-9a-zA-Z]{16,} | github_pat_\w{16,}                # GitHub
      | gl(?:agent|cbt|dt|ffct|ft|imt|oas|pat|ptt|rt|soat)-[0-9a-zA-Z_.-]{16,}     # GitLab
      | dapi[0-9a-f]{32} | \d{8,10}:AA[0-9a-zA-Z_-]{30,}               # Databricks, Telegram
      | npm_[0-9a-zA-Z]{30,}
      | (?:AKIA|ASIA|AGPA|AROA)[0-9A-Z]{12,}                           # AWS
      | AIza[0-9a-zA-Z_-]{30,} | ya29\.[0-9a-zA-Z_-]{16,}              # Google
      | xox[a-z]-[0-9a-zA-Z-]{8,} | xapp-[0-9a-zA-Z-]{8,}              # Slack
      | SG\.[0-9a-zA-Z_-]{16,}\.[0-9a-zA-Z_-]{16,} | hvs\.[0-9a-zA-Z_-]{16,}
      | eyJ[0-9a-zA-Z_-]{8,}\.[0-9a-zA-Z_-]{4,}(?:\.[0-9a-zA-Z_-]*){0,3}           # JWT
      | eyJ[0-9a-zA-Z_+/=-]{40,}                                       # Neptune: JSON in base64
    )""".replace("WORDS", _WORDS),
    re.VERBOSE,
)
_WEBHOOK = re.compile(r"(?<=hooks\.slack\.com/)\w+/[\w/]+|(?<=/api/webhooks/)\d+/[\w-]+")
_USERINFO = re.compile(r"(?<=//)(?!git@)(?:[^\s/:@\"'<>]*:(?!\d+(?:[/?#]|$))[^\s\"'<>]+|[^\s/?#\"'<>]+)(?=@)")
_PARAMETER = re.compile(r"(?<=[?&#;])([^=&#;?\s\"'<>/]{1,100})=([^&#\s\"'<>]+)")
_HEADER = re.compile(
    _START + r"((?:proxy-)?authorization|(?:set-)?cookie)(\s*:\s*)([^\n\"']+)", re.IGNORECASE
)
_SCHEME = re.compile(
    _START + r"(authorization\s*=\s*(?:basic|digest|negotiate|token)\s+)([^\s\"',;]+)", re.IGNORECASE
)
_BEARER = re.compile(_START + r"(bearer\s+)(?!tokens?\b|auth\w*\b)([^\s\"',;]{6,})", re.IGNORECASE)
_OPTION = re.compile(r"(?<![\w-])--(?P<name>[\w-]{1,80})(?:\s*=\s*|\s+|[\"'],\s+(?=[\"']))(?![\"']?--)")
_ASSIGNMENT = re.compile(
    r"(?:(?<![\w.-])|(?<=\\[nrt])|(?<=%[0-9a-fA-F]{2}))(?P<name>[A-Za-z_][\w.-]{0,80})"
    r"(?P<quoted>\\*[\"'`])?\s*(?P<sign>=>|:=|=(?!=)|:|%3[dDaA])\s*"
)
_VALUE = re.compile(
    r"""(?P<open3>\"{3}|'{3})(?:(?!(?P=open3)).)*|(?P<open>")(?:[^"\\]|\\.)*|(?P<open1>')(?:[^'\\]|\\.)*"""
    r"""|(?P<open2>\\+["'])(?:(?!\\+["']).)*|\*{3}(?!\w)|[^\s&"'\\]+(?:(?:[&'"]|\\(?![nrt]))\w[^\s&"'\\]*)*""",
    re.DOTALL,
)
_HOLDER = re.compile(r"""(?:[\w.]{0,40}[(\[]\s*(?=["'])|[bruf]{1,2}(?=["'])|[|>][-+\d]{0,2}[ ]*\n\s*)?""")


def redact(value: Any, name: str = "") -> Any:
    """Copies `value` with every secret in it replaced by ``***``, at any depth.

    A secret is a string under the name of one (token, key, secret, password, auth, credentials, cookie, dsn and their
    like; a number too where the name can mean nothing else), except the special tokens of a tokenizer; or a part of
    any string, as :func:`redact_text` finds it. A JSON object or list in a string (``--model_init_kwargs '{...}'``) is
    searched as well. Booleans and None are kept as they are; an object that JSON does not know becomes its string.

    Args:
        value: a mapping, a sequence, or a scalar.
        name: the key that `value` stands under.
    """
    return _redact(value, name, *_meaning(name))


def redact_text(text: str, name: str = "") -> str:
    """``text`` with every secret replaced by ``***``.

    These are keys of known services, credentials and parameters of URLs, headers, PEM blocks, and what is assigned to
    the name of a secret (``--hub_token X``, ``password=X``, ``"key": "X"``). ``name`` is what the text stands under: 40
    hexadecimal digits are a W&B key except where a hash is named.
    """
    text = _PEM.sub(REDACTED, text)
    text = _SHAPES.sub(REDACTED, text)
    if "//" in text:
        text = _USERINFO.sub(REDACTED, text)
    if "=" in text:
        text = _PARAMETER.sub(_parameter, text)
    text = _WEBHOOK.sub(REDACTED, text)
    text = _SCHEME.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1\2{REDACTED}", text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    if "--" in text:
        text = "".join(_assigned(_OPTION, text))
    if "=" in text or ":" in text or "%3" in text:
        text = "".join(_assigned(_ASSIGNMENT, text))
    if _HASH_NAME.search(name):
        return text
    return _HEX_KEY.sub(
        lambda m: m[0] if _HASH_NAME.search(m.string[max(0, m.start() - 24) : m.start()]) else REDACTED, text
    )


def _words(name: str) -> str:
    """``name`` in lower case with ``_`` between its words: ``clientSecret`` is ``client_secret``."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def _meaning(name: str) -> tuple[bool, bool]:
    """Whether a string under ``name`` is a secret, and whether a number is one too."""
    words = _words(name)
    if words.strip("_") in _HARMLESS_NAMES:
        return False, False
    strict = _STRICT.search(words) is not None
    return strict or _TOKEN_OR_KEY.search(words) is not None, strict


def _is_secret(name: str, value: str, *, url: bool = False) -> bool:
    """Whether ``value``, found as text, is a secret under ``name``."""
    secret, strict = _meaning(name)
    if not secret and not (url and _IN_URLS.search(_words(name))):
        return False
    if not value or _NO_SECRET.fullmatch(value):
        return False
    return strict or url or _NUMBER.fullmatch(value) is None


def _redact(value: Any, name: str, secret: bool, strict: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return REDACTED if strict else value
    if isinstance(value, Mapping):
        return dict(_entries(value, secret, strict))
    if isinstance(value, list | tuple | set | frozenset):
        return list(_items(value, name, secret, strict))
    text = str(value)
    if secret and (_is_secret(name, text) or (text and not _meaning(name)[0])):
        return REDACTED
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            inner = json.loads(text)
            clean = _redact(inner, name, secret, strict)
        except (ValueError, RecursionError):
            pass
        else:
            return text if clean == inner else json.dumps(clean)
    return redact_text(text, name)


def _entries(value: Mapping[Any, Any], secret: bool, strict: bool) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        its_secret, its_strict = _meaning(str(key))
        yield redact_text(str(key)), _redact(item, str(key), secret or its_secret, strict or its_strict)


def _items(values: Iterable[Any], name: str, secret: bool, strict: bool) -> Iterator[Any]:
    """The items of a list; the value after an option that names a secret is one, as on a command line."""
    before = ""
    for item in values:
        flagged = before.startswith("--") and isinstance(item, str) and not item.startswith("--")
        yield redact(item, before) if flagged else _redact(item, name, secret, strict)
        before = item if isinstance(item, str) else ""


def _parameter(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    return f"{name}={REDACTED}" if _is_secret(unquote(name), value, url=True) else found[0]


def _assigned(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """The pieces of ``text`` with the values of secrets replaced; what no secret is assigned to may hold one."""
    start = 0
    while (found := pattern.search(text, start)) is not None:
        yield text[start : found.end()]
        start = found.end()
        if not _meaning(found["name"])[0] or found["name"].lower() in _BARE:
            continue
        # As Python and YAML write it: b'X', ['X'], SecretStr('X'), a block below.
        held = start + len(_HOLDER.match(text, start)[0])  # type: ignore[index]
        value = _VALUE.match(text, held)
        if value is None:
            continue
        yield text[start:held]
        start = held
        quote = value["open3"] or value["open"] or value["open1"] or value["open2"] or ""
        inner = value[0][len(quote) :] if quote else value[0].rstrip(",;)]}.")
        prose = pattern is _ASSIGNMENT and found["sign"] == ":" and not quote and _is_prose(found, value)
        if not prose and not _NO_SECRET.fullmatch(value[0]) and _is_secret(found["name"], inner):
            yield f"{quote}{REDACTED}"
            start += len(quote) + len(inner)
    yield text[start:]


def _is_prose(found: re.Match[str], value: re.Match[str]) -> bool:
    """Whether ``name: value`` is a sentence ("key: unknown"): no word alone on its line, nor one with digits.

    After ``hub_token`` a word of a sentence is a short one.
    """
    alone = value.string[value.end() : value.end() + 1] in ("", "\n")
    mixed = len(value[0]) >= 6 and re.search(r"\d", value[0]) and re.search(r"[a-zA-Z]", value[0])
    long = "_" in found["name"] and len(value[0]) >= 16
    return not mixed and not long and not (alone and _meaning(found["name"])[1])
