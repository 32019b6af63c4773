"""Command lines that survive a launcher which joins words without quoting them.

``ray submit`` and ``ray job submit`` hand their arguments to a shell on another machine: spaces split words, quotes
and backslashes go, ``$`` and ``*`` are expanded. Percent-encoded, a word has none of these.

    $ raysgd quote RUN.toml --set 'data.label="arr delay"'
    --percent-encoded RUN.toml --set data.label=%22arr%20delay%22
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote as percent
from urllib.parse import unquote

import click

from raysgd.errors import InputError

#: The word that says that all others are percent-encoded.
FLAG = "--percent-encoded"

#: What no shell changes, besides letters, digits and ``_.-``.
SAFE = "/=:,@+"

#: An empty word. Encoded, a percent sign is never alone.
EMPTY = "%"


def encoded(words: Sequence[str]) -> list[str]:
    """The words, and in front of them the flag, so that no shell changes or splits one.

    >>> encoded(["RUN.toml", "--set", 'model.type="mlp"', ""])
    ['--percent-encoded', 'RUN.toml', '--set', 'model.type=%22mlp%22', '%']
    """
    return [FLAG, *(percent(word, safe=SAFE).replace("~", "%7E") or EMPTY for word in words)]


def decoded(words: Sequence[str]) -> list[str]:
    """The inverse of :func:`encoded`; words without the flag as they are. The flag may be after a command's name.

    >>> decoded(["train", *encoded(["$HOME is not a  path"])])
    ['train', '$HOME is not a  path']
    """
    if FLAG not in words:
        return list(words)
    try:
        return ["" if w == EMPTY else unquote(w, errors="strict") for w in words if w != FLAG]
    except UnicodeDecodeError as error:
        raise InputError(f"{FLAG}: a word is no percent-encoded UTF-8: {error}") from None


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def quote(words: tuple[str, ...]) -> None:
    """Write WORDS so that `ray submit` and `ray job submit` pass them on unchanged to a script of jobs/."""
    click.echo(" ".join(encoded(words)))
