"""What the verbs of `mla-tune` share: exit codes, `--json`, errors as messages, options that may be repeated."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from mla_jit.errors import InvalidInput, MlaJitError, NoVariant, SettingsError, UnknownTarget

DONE, SHORT, USAGE = 0, 1, 2


def verb(function: Callable[..., int]) -> Callable[..., None]:
    """Adds `--json`, turns the function's number into the exit code, and mla_jit's errors into messages."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
    @functools.wraps(function)
    def run(**options: Any) -> None:
        try:
            code = function(**options)
        except MlaJitError as error:
            code = USAGE if isinstance(error, (InvalidInput, UnknownTarget, SettingsError)) else SHORT
            if options["as_json"]:
                extra = {"reasons": error.reasons} if isinstance(error, NoVariant) else {}
                print_json({"ok": False, "error": type(error).__name__, "message": str(error), **extra})
            else:
                click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(code)

    return run


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, ensure_ascii=False, default=str))


def _list(kind: Callable[[str], Any]) -> Callable[[Any, Any, tuple[str, ...]], tuple[Any, ...]]:
    """An option that may be repeated and may hold commas: a flat tuple."""

    def parse(context: Any, parameter: Any, values: tuple[str, ...]) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for value in values for part in value.split(",") if part.strip())
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return parse


def repeated(flag: str, kind: Callable[[str], Any], text: str, **more: Any) -> Callable[..., Any]:
    return click.option(
        flag, multiple=True, callback=_list(kind), help=f"{text} Repeat, or separate by commas.", **more
    )


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is not positive")
    return number
