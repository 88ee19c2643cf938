"""Chat templates render exactly as `transformers` rendered them when the fixtures were made."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fallow.domain.errors import BadRequest, ModelError
from fallow.gateway.templates import ChatTemplate
from tests.unit.gateway.gateway_world import CHATML

FIXTURES = Path(__file__).parents[2] / "fixtures" / "templates" / "cases.json"


def fixtures() -> list[Any]:
    document = json.loads(FIXTURES.read_text())
    return [pytest.param(case, document["templates"][case["template"]], id=case["name"]) for case in document["cases"]]


def at_noon() -> datetime:
    return datetime(2024, 7, 26, 12)


@pytest.mark.parametrize(("case", "source"), fixtures())
def test_renders_as_transformers_did(case: dict[str, Any], source: str) -> None:
    variables = case["variables"] | {"tools": case["tools"], "add_generation_prompt": case["add_generation_prompt"]}
    template = ChatTemplate(source, case["special_tokens"], at_noon)
    if "error" in case:
        with pytest.raises(BadRequest, match=re.escape(case["error"])):
            template.render(case["messages"], variables)
    else:
        assert template.render(case["messages"], variables) == case["rendered"]


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate(source, {"eos_token": "</s>"}, at_noon).render(messages or [], variables)


def test_helpers() -> None:
    assert render("{{ strftime_now('%d %B %Y') }}") == "26 July 2024"
    assert render("{{ x|tojson }}", x={"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{{ x|tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{% for i in [1,2,3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("{% generation %}a{{ eos_token }}{% endgeneration %}") == "a</s>"
    assert render("{{ '{:>4}|{}'.format('a', 2) }}|{{ '%03d' % 7 }}") == "   a|2|007"


def test_blocks_are_trimmed_and_nothing_is_escaped() -> None:
    assert render("  {% if true %}\n<b>&\n  {% endif %}\n!") == "<b>&\n!"


def test_variables_cannot_replace_messages_or_special_tokens() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ eos_token }}", {"eos_token": "</s>"}, at_noon)
    text = template.render([{"content": "mine"}], {"messages": "theirs", "eos_token": "x"})
    assert text == "mine</s>"


def test_raise_exception_and_bad_expressions_are_the_request_s_fault() -> None:
    with pytest.raises(BadRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest):
        render("{{ messages[0].content.strip() }}", [{"role": "user"}])
    with pytest.raises(BadRequest):
        render("{{ 1 / 0 }}")


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% unknown %}", "{{ a|nofilter }}", "x" * (2 << 20)])
def test_broken_template_is_an_error_of_the_model(source: str) -> None:
    with pytest.raises(ModelError):
        ChatTemplate(source, {}, at_noon)


def test_long_conversations_fit_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "ok " * 200}] * 500
    text = ChatTemplate(CHATML, {}, at_noon).render(messages)
    assert len(text) > 500 * 1600
