"""A hostile chat template ends soon and in little memory, and an honest one never notices the bounds."""

from __future__ import annotations

import threading
import time

import pytest
from jinja2 import Environment
from jinja2.exceptions import TemplateError

from edge_runtime.errors import ConfigError
from edge_runtime.text.chat_config import ChatConfig
from edge_runtime.text.chat_template import _CompiledTemplate
from edge_runtime.text.template_budget import BUDGET, Budget
from edge_runtime.text.template_sandbox import _DEEP_FILTERS, _DEEP_TESTS, _SHALLOW_FILTERS, Sandbox

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_CPU_S = 2.0
MOST_MIB = 200
USER = [{"role": "user", "content": "Tell me a story about a fox."}]
DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for i in range(40) %%}{%% set ns.x = %s %%}{%% endfor %%}"

HOSTILE = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ c }}"
    + "{% endfor %}" * 3,
    "empty nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 200 }}{% endfor %}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching blocks": "{% block a %}{{ self.b() }}{{ self.b() }}{% endblock %}"
    "{% block b %}{{ self.a() }}{% endblock %}",
    "long text": "{{ 'x' * 10**9 }}",
    "long text, not written": "{% set x = 'x' * 10**9 %}",
    "long list": "{% set x = [0] * 10**9 %}",
    "number times text": "{{ 10**9 * 'x' }}",
    "doubled text": DOUBLE % ("'ab'", "ns.x ~ ns.x"),
    "added text": DOUBLE % ("'ab'", "ns.x + ns.x"),
    "doubled list": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "doubled list as JSON": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    "doubled list as text": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{% set s = ns.x | string %}",
    "doubled list compared": DOUBLE % ("[1]", "[ns.x, ns.x]")
    + "{% set a = ns.x %}"
    + DOUBLE % ("[1]", "[ns.x, ns.x]")
    + "{{ a == ns.x }}",
    "doubled list searched": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ 2 in [ns.x, ns.x] }}{{ [ns.x].count([1]) }}",
    "doubled tuple as a key": DOUBLE % ("(1,)", "(ns.x, ns.x)") + "{{ {}.get(ns.x) }}",
    "doubled dictionary": DOUBLE % ("{'a': 1}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
    "doubled namespace": "{% set ns = namespace(x=namespace()) %}{% for i in range(40) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "doubled list in an error": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ raise_exception(ns.x) }}",
    "doubled list formatted": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ '{}'.format(ns.x) }}",
    "doubled list by %": DOUBLE % ("[1]", "[ns.x, ns.x]") + "{{ '%s' % (ns.x,) }}",
    "doubled block": "{% set x %}ab{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "much plain text in a loop": "{% set x %}{% for a in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "tower of powers": "{{ 10 ** (10 ** (10 ** 10)) }}",
    "large power": "{{ 3 ** (10**8) }}",
    "growing number": DOUBLE % ("3", "ns.x * ns.x"),
    "growing number, divided": DOUBLE % ("3", "ns.x * ns.x // 2"),
    "center": "{{ 'a' | center(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**7) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent many": "{{ ('%(a)s' * 5000) % {'a': 'x' * 100000} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format width by argument": "{{ '{:{}}'.format(1, 10**9) }}",
    "format many": "{{ ('{0}' * 5000).format('x' * 100000) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "replace": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "replace method": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "replace of nothing": "{{ ('a' * 10**5).replace('', 'b' * 10**5) }}",
    "indent": "{{ ('a\\n' * 10**5) | indent(10**6) }}",
    "indent by text": "{{ ('a\\n' * 10**5) | indent('x' * 10**5) }}",
    "join": "{{ range(99999) | join('x' * 10**5) }}",
    "join method": "{{ ('x' * 10**5).join(('a,' * 10**5).split(',')) }}",
    "join of one text": "{{ ''.join(([namespace(a='x' * 10**6)] * 10**5) | map(attribute='a')) }}",
    "JSON indent": "{{ ([[[[1]]]] * 10**4) | tojson(indent=10**6) }}",
    "JSON separators": "{{ ([1] * 10**4) | tojson(separators=('x' * 10**5, ':')) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9) }}",
    "sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "sorting in a loop": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "map in a loop": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "slices in a loop": "{% set l = range(99999) | list %}{% for i in l %}{% set x = l[::-1] %}{% endfor %}",
    "splits in a loop": "{% set s = 'a ' * 10**5 %}{% for i in range(99999) %}{% set x = s.split() %}{% endfor %}",
    "searches in a loop": "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ 'ab' in s }}{% endfor %}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') | length }}",
    "encode": "{{ 'a'.encode().ljust(10**9) | length }}",
    "translate": "{{ ('a' * 10**5).translate({97: 'b' * 10**5}) | length }}",
    "strftime": "{{ strftime_now('%c' * 10**5) }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "urlize": "{{ ('(' * 10**5) | urlize }}",
    "wordwrap": "{{ ('a ' * 10**5) | wordwrap(1, wrapstring='x' * 10**5) }}",
    "pprint": "{{ range(99999) | list | pprint }}" * 100,
    "deep nesting": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "1 + " * 20_000 + "1 }}",
    "very long": "{{ 1 }}" * 100_000,
    "many branches": "{% if a %}" + "{% elif a %}" * 8_000 + "{% endif %}{{ 1 / 0 }}",
    "unfinished": "{{ 'x" + "{# " * 40_000,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_ends_within_two_seconds_in_little_memory_with_one_line(source):
    before, started = peak_mib(), time.thread_time()
    with pytest.raises(ConfigError, match=r"chat template refuses these messages: .") as caught:
        _CompiledTemplate(source, {}).render(USER, ChatConfig())
    assert time.thread_time() - started < MOST_CPU_S
    assert peak_mib() - before < MOST_MIB
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def peak_mib() -> int:
    """Return the most memory that this process has ever had, where the system tells."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 if resource else 0


def test_every_filter_and_test_of_jinja_is_known_to_the_sandbox():
    """One that a later jinja2 adds is not to be had until somebody has thought about its cost."""
    ours, theirs = Sandbox(), Environment(autoescape=False)
    layout = {"pprint", "urlize", "wordwrap", "xmlattr"}
    assert set(ours.filters) == set(theirs.filters) - layout
    assert set(ours.filters) == _SHALLOW_FILTERS | _DEEP_FILTERS | {"tojson"}
    constant = "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none"
    constant += " number odd sameas sequence string test true undefined"
    assert set(ours.tests) == set(_DEEP_TESTS) | set(constant.split())


def test_budget_grows_with_the_messages():
    """A megabyte of messages may be trimmed, split, compared and written, each several times."""
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1] %}"
        "{% endif %}{{ m.role ~ ': ' ~ c.strip() + '\n' }}{% if loop.index == messages | length %}.{% endif %}"
        "{% endfor %}{{ messages | tojson }}"
    )
    template = _CompiledTemplate(source, {})
    for chat in ([USER[0]] * 20_000, [{"role": "user", "content": "a fox, " * 1_000_000}]):
        assert template.render(chat, ChatConfig()).count("fox") >= 20_000


def test_a_budget_that_is_spent_stays_spent():
    budget = Budget(0)
    with pytest.raises(TemplateError):
        budget.read("x" * (BUDGET + 1))
    with pytest.raises(TemplateError):
        budget.spend(1)


def test_one_template_renders_for_many_threads(tmp_path, shared_data):
    """The budget belongs to one rendering: a hundred at once must not pay from the same."""
    from edge_runtime.text.chat_template import ChatTemplate

    source = "{% for i in range(20000) %}{% set x = i %}{% endfor %}{{ messages[0].content }}"
    template = ChatTemplate(tmp_path, {"chat_template": source})
    texts: list[str] = []
    threads = [
        threading.Thread(
            target=lambda i=i: texts.append(template.render([{**USER[0], "content": str(i)}], ChatConfig()))
        )
        for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts, key=int) == [str(i) for i in range(20)]
