"""Chat templates, rendered as `transformers` renders them.

The same Jinja options (trim_blocks, lstrip_blocks, loop controls), the same helpers (`raise_exception`,
`strftime_now`, a `tojson` that escapes nothing and keeps order) and the same tolerance of `generation` blocks. What a
template may do is bounded by `sandbox.py`, so rendering runs on the caller's thread. Tokenising is not done here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from fallow.domain.errors import BadRequest, ModelError
from fallow.gateway.sandbox import BudgetedEnvironment, BudgetSpent

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 4 << 20


class TemplateRejected(jinja2.TemplateError):
    """The template called `raise_exception`."""


class ChatTemplate:
    """A compiled template. Not for threads: it renders one conversation at a time."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], local_time: Callable[[], datetime]) -> None:
        """`special_tokens` as in the manifest (`bos_token`, …). Raises `ModelError` for a template that is broken."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"The chat template has {len(source)} characters; {MAX_TEMPLATE_CHARS} are allowed.")
        self._special_tokens = dict(special_tokens)
        self._environment = _environment(local_time)
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ModelError(f"The model's chat template cannot be compiled: {error}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt for these messages, ending where the assistant's answer begins.

        `variables` are passed to the template but cannot replace messages or special tokens. Raises `BadRequest` when
        the template does not take the conversation, `ModelError` when it does more work than it may.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
        values |= dict(variables or {})
        values |= self._special_tokens | {"messages": messages}
        self._environment.refill()
        try:
            return self._rendered(values)
        except (BudgetSpent, RecursionError, MemoryError) as error:
            raise ModelError(f"The model's chat template was stopped: {error}") from error
        except TemplateRejected as error:
            raise BadRequest(
                f"The model's chat template refuses these messages: {error.message}", "messages"
            ) from error
        except Exception as error:  # a template can raise whatever its expressions raise
            raise BadRequest(f"The model's chat template cannot render these messages: {error}", "messages") from error

    def _rendered(self, values: dict[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        for piece in self._template.root_render_func(self._template.new_context(values)):
            length += len(piece)
            if length > MAX_RENDERED_CHARS:
                raise BudgetSpent(f"It writes more than {MAX_RENDERED_CHARS} characters.")
            pieces.append(piece)
        return "".join(pieces)


def _environment(local_time: Callable[[], datetime]) -> BudgetedEnvironment:
    environment = BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: local_time().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateRejected(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only passes it through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("passed_through"), [], [], body).set_lineno(lineno)

    def passed_through(self, caller: Callable[[], str]) -> str:
        return caller()
