"""Hostile chat templates: each is stopped with a named error, soon, and without taking the machine's memory."""

import time
from datetime import datetime

import pytest

from fallow.domain.errors import BadRequest, ModelError
from fallow.gateway.templates import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}]
GOAL_S = 3.0
"""Far above what a stopped template takes (half a second at worst), far below what an unstopped one would."""

STOPPED = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": '{% for i in "a"*90000 %}{% for j in "a"*90000 %}{% set x = 1 %}{% endfor %}{% endfor %}',
    "product": '{{ "a" * 10**10 }}',
    "product of products": '{% set x = "a" * 1000000 %}{{ x * 1000000 }}',
    "power": '{{ (10**1000)**1000 }}',
    "doubling ~": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling +": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling set": "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set x %}{{ns.s}}{{ns.s}}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
    "shared lists": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s }}",
    "shared dicts": "{% set ns = namespace(s={}) %}{% for i in range(99) %}{% set ns.s = {'a':ns.s, 'b':ns.s} %}"
    "{% endfor %}{{ ns.s|tojson }}",
    "shared tuples as key": "{% set ns = namespace(s=(1,)) %}{% for i in range(99) %}{% set ns.s = (ns.s, ns.s) %}"
    "{% endfor %}{{ {ns.s: 1} }}",
    "shared namespaces": "{% set a=namespace() %}"
    + "{% set b=namespace() %}{% set b.x=a %}{% set b.y=a %}{% set a=b %}" * 60
    + "{{ a }}",
    "namespace in itself": "{% set a=namespace() %}{% set a.x=a %}{{ a }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(x) %}{% if x %}{{ f(x-1) }}{{ f(x-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for i in [1,2] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "% width": '{{ "%0999999999d" % 1 }}',
    "% star width": '{{ "%0*d" % (999999999, 1) }}',
    "format width": '{{ "{:>999999999}".format(1) }}',
    "format nested width": '{{ "{:{}}".format(1, 999999999) }}',
    "format filter width": '{{ "%0999999999d"|format(1) }}',
    "format by attr": '{{ ("{:>999999999}"|attr("format"))(1) }}',
    "format repeats": '{{ ("{0}"*100000).format("a"*1000000) }}',
    "format_map repeats": '{{ ("{a}"*100000).format_map({"a": "a"*1000000}) }}',
    "% repeats": '{{ ("%(a)s"*100000) % {"a": "a"*1000000} }}',
    "center": '{{ "a".center(999999999) }}',
    "center filter": '{{ "a"|center(999999999) }}',
    "ljust": '{{ "a".ljust(10**9) }}',
    "zfill": '{{ "a".zfill(10**9) }}',
    "replace": '{{ ("a"*1000000).replace("a", "b"*1000000) }}',
    "replace nothing": '{{ ("a"*1000000).replace("", "b"*1000000) }}',
    "replace filter": '{{ ("a"*1000000)|replace("a", "b"*1000000) }}',
    "join": '{{ ("b"*1000000).join("a"*1000000) }}',
    "join filter": '{{ range(90000)|join("b"*1000000) }}',
    "join of a generator": '{{ range(9000)|map("string")|join("b"*1000000) }}',
    "join method of a generator": '{{ ("b"*1000000).join(range(9000)|map("string")) }}',
    "indent": '{{ ("\\n"*1000000)|indent("b"*100000) }}',
    "translate": '{{ ("a"*1000000).translate({97:"b"*1000000}) }}',
    "expandtabs": '{{ ("\\t"*1000000).expandtabs(100000) }}',
    "to_bytes": "{{ (1).to_bytes(10**9) }}",
    "batch": '{{ [1]|batch(10**9,"x")|list }}',
    "slice": "{{ [1]|slice(10**9)|list }}",
    "tojson indent": "{{ ([1]*100000)|tojson(indent=100000) }}",
    "tojson separators": '{{ ([1]*100000)|tojson(separators=("x"*100000, ":")) }}',
    "list of lists": "{{ ([[1]*1000]*1000)|sum(start=[]) }}",
    "comparisons": '{% set a="a"*8000000 %}{% for i in range(99999) %}{% if a == a ~ "" %}{% endif %}{% endfor %}',
    "slices": '{% set a="a"*8000000 %}{% for i in range(99999) %}{% set b=a[1:] %}{% endfor %}',
    "upper": '{% set a="a"*8000000 %}{% for i in range(99999) %}{% set b=a.upper() %}{% endfor %}',
    "wordcount": '{% for i in range(9999) %}{{ ("ab "*2000000)|wordcount }}{% endfor %}',
    "output": '{% for i in range(99999) %}{{ "a"*10000 }}{% endfor %}',
    "caller twice": "{% macro d() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call d() %}" * 15 + "a" * 999
    + "{% endcall %}" * 15,
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long sum": "{{ 1" + "+1" * 5000 + " }}",
    "many signs": "{{ " + "-" * 5000 + "1 }}",
}  # fmt: skip

REFUSED = {
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "private attributes": "{{ ().__class__.__mro__ }}",
    "change a list": "{% set l=[] %}{{ l.append(1) }}",
    "change the messages": "{{ messages.clear() }}",
    "include": '{% include "x" %}',
    "extends": '{% extends "x" %}',
    "lipsum": "{{ lipsum(n=10**9) }}",
    "raise_exception": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("source", STOPPED.values(), ids=STOPPED.keys())
def test_hostile_template_is_stopped_in_bounded_time(source: str) -> None:
    started_s = time.thread_time()
    with pytest.raises(ModelError):
        ChatTemplate(source, {}, datetime.now).render(MESSAGES)
    assert time.thread_time() - started_s < GOAL_S


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED.keys())
def test_forbidden_step_is_refused(source: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        ChatTemplate(source, {}, datetime.now).render(MESSAGES)
    assert refusal.value.param == "messages"


def test_a_stopped_template_renders_again() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for i in range(m.n) %}{% endfor %}{% endfor %}ok", {}, datetime.now
    )
    with pytest.raises(ModelError):
        template.render([{"n": 90_000}] * 4)
    assert template.render([{"n": 3}]) == "ok"
