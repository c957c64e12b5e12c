"""The one parser of the commands: no abbreviations, and invalid input is a UserError with the nearest name."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from halfbyte.commands import TABLE
from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten, suggestion


class Parser(argparse.ArgumentParser):
    """The parser of the command ``name``, with usage and summary from the table of commands."""

    def __init__(self, name: str) -> None:
        command = TABLE[name]
        super().__init__(
            prog=f"halfbyte {name}",
            usage=command.usage,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse ``arguments``; raises UserError for what the command does not take, SystemExit(0) after its help."""
        # Before argparse looks for what is missing; behind `--` stand no options.
        for word in takewhile(lambda word: word != "--", arguments):
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                self._unknown(word)
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            self._unknown(unknown[0])
        return options

    def parse_beside(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse what the command takes, and return the words that it leaves: the options of a recipe."""
        return self.parse_known_args(arguments)

    def _unknown(self, word: str) -> NoReturn:
        word = word.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        near = suggestion(word, known) if word.startswith("-") else ""
        self.error(f"unknown {'option' if word.startswith('-') else 'argument'} {shorten(word)}{near}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nusage: {self.usage}", option=self.prog)
