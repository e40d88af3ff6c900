"""Text from data, models and names is shown and does nothing."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import unicodedata
from pathlib import Path

import pytest

from fine_tune.report.page import Study, write_report
from fine_tune.report.visible import visible

from .conftest import Page, write_run

PAYLOADS = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x="',
    "single quote": "' autofocus onfocus='alert(1)",
    "textarea": "</textarea></title></style><svg onload=alert(1)>",
    "style": "</style><style>*{display:none}</style>",
    "details": "</summary></details></main><iframe src=http://example.com></iframe>",
    "svg": '"/><a xlink:href="javascript:alert(1)">x</a>',
    "cdata": "]]><![CDATA[<b>x</b>]]>",
    "comment": "--><!-- <b>",
    "url": "javascript:alert(1)",
    "markdown": "[x](javascript:alert(1)) ![y](http://example.com/z.png) | `a` |\n# b\n```",
    "statement": "{{ 7 * 7 }}{% include '/etc/passwd' %}{# x #}",
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{0.__class__} {unit} %s %(x)s ${oc.env:HOME}",
    "rich": "[red]x[/red] [link=http://example.com]y[/link]",
    "colours": "\x1b[31mred\x1b[0m\x1b]8;;http://example.com\x07x\x1b]8;;\x07\x00\x9b2J",
    "bidi": "user\u202e\u2066cod.exe\u2069\u2066 \u200f\u061c\u200b\ufeff\U000e0041",
    "entities": "&lt;b&gt; &#x3c;script&#x3e; &amp;amp; &nbsp",
    "surrogate": "\ud800x\udfff\r\n\u2028\u2029",
}  # fmt: skip
# Every element a page may have, and the attributes of each: nothing fetches, nothing acts.
KNOWN = {
    "html": {"lang"}, "head": set(), "meta": {"charset", "http-equiv", "content", "name"}, "title": set(), "style": set(),
    "body": set(), "main": set(), "header": set(), "section": set(), "article": {"class"}, "div": {"class"},
    "h1": set(), "h2": set(), "h3": set(), "h4": set(), "p": {"class"}, "span": {"class"}, "b": set(), "strong": set(),
    "code": set(), "pre": {"class"}, "dl": {"class"}, "dt": set(), "dd": {"class"},
    "table": set(), "thead": set(), "tbody": set(), "tr": set(), "th": {"scope", "class"}, "td": {"class"},
    "details": {"class", "open"}, "summary": set(), "figure": {"class"}, "figcaption": set(),
    "svg": {"class", "viewbox", "role", "aria-label", "aria-hidden"}, "g": {"class"}, "path": {"class", "d"},
    "polyline": {"class", "points"}, "circle": {"class", "cx", "cy", "r"},
    "rect": {"class", "x", "y", "width", "height", "rx"}, "text": {"class", "x", "y", "dy", "text-anchor"},
}  # fmt: skip
# What may stand in a page unescaped: layout, and joiners that scripts and emoji are written with.
LAYOUT = {"\n", "\t", "\u200c", "\u200d"}
# Characters that open or close something, somewhere, and characters that act instead of showing.
PIECES = [*"<>&'\"`={}[]()%$#\\/;:-!|~", "<script>", "</style>", "-->", "{{", "%}", "]]>", "javascript:", "onload=", "&#x3c;"]
ACTING = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F))]
ACTING += [chr(code) for code in (*range(0x2060, 0x2070), 0x061C, 0xAD, 0xFEFF, 0xFFF9, 0xE0041, 0xD800, 0xDFFF)]


def drawn(seed: int) -> str:
    """Hostile text at random, the same for a seed."""
    rng = random.Random(seed)
    return "x" + "".join(rng.choice(rng.choice((PIECES, ACTING, list("ab \u05d0\u0645\U0001f600")))) for _ in range(40))


def rendered(folder: Path, word: str) -> tuple[str, Page]:
    """The page of a run beside another one, in which everything that can be text is ``word``."""
    run, other = write_run(folder / "run", word), write_run(folder / "other", word)
    html = write_report(run, folder / "report.html", others=[other]).read_text(encoding="utf-8")
    return html, Page(html)


def rendered_study(folder: Path, word: str) -> tuple[str, Page]:
    """The page of a study on the same run, named by ``word``."""
    run = write_run(folder / "run", word)
    study = Study(word, word, ("base", word), {word: run.resolve()}, (run / "eval" / "exact_match",), word)
    html = write_report(run, folder / "study.html", study=study).read_text(encoding="utf-8")
    return html, Page(html)


def assert_inert(html: str, page: Page) -> None:
    """Nothing hidden, no element and no attribute beyond those the templates have."""
    hidden = {c for c in html if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - LAYOUT
    assert hidden == set()
    for tag, attributes in page.elements:
        assert tag in KNOWN, tag
        assert set(attributes) <= KNOWN[tag], (tag, attributes)
    assert page.texts_of("style") == 1
    assert not re.search(r"url\(|@import|@font-face|expression", page.style)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return rendered(tmp_path_factory.mktemp("harmless"), "harmless")[1]


@pytest.fixture(scope="module", params=PAYLOADS)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Page]:
    """A payload, and the source and the elements of the page of a run that is full of it."""
    payload = PAYLOADS[request.param]
    return (payload, *rendered(tmp_path_factory.mktemp("hostile"), payload))


def test_there_are_twenty() -> None:
    assert len(PAYLOADS) == 20


def test_no_element_and_no_attribute_comes_from_data(hostile: tuple[str, str, Page], harmless: Page) -> None:
    page = hostile[2]
    assert page.structure == harmless.structure
    # Values, too, but for the one that says a figure in words.
    kept = [
        [{k: v for k, v in a.items() if k != "aria-label"} for _, a in found.elements] for found in (page, harmless)
    ]
    assert kept[0] == kept[1]


def test_the_text_is_shown_as_it_is_wherever_it_stands(hostile: tuple[str, str, Page], harmless: Page) -> None:
    # Keys are shown with spaces for underscores.
    wanted = visible(hostile[0]).replace("_", " ").strip()
    found = sum(piece.replace("_", " ").strip() == wanted for piece in hostile[2].pieces)
    assert found == sum(piece.strip() == "harmless" for piece in harmless.pieces) >= 50


def test_the_command_is_shown_as_it_was_typed(hostile: tuple[str, str, Page]) -> None:
    payload, _, page = hostile
    assert f"python train.py {visible(payload)}" in page.pieces


def test_nothing_hidden_is_left_and_no_element_is_new(hostile: tuple[str, str, Page]) -> None:
    assert_inert(*hostile[1:])


@pytest.mark.parametrize("seed", range(8))
def test_hostile_text_at_random_changes_no_element(tmp_path: Path, harmless: Page, seed: int) -> None:
    html, page = rendered(tmp_path, drawn(seed))
    assert_inert(html, page)
    assert page.structure == harmless.structure


@pytest.fixture(scope="module")
def harmless_study(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return rendered_study(tmp_path_factory.mktemp("study"), "harmless")[1]


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_study_shows_hostile_text_as_it_is(tmp_path: Path, name: str, harmless_study: Page) -> None:
    html, page = rendered_study(tmp_path, PAYLOADS[name])
    assert_inert(html, page)
    assert page.structure == harmless_study.structure
    assert visible(PAYLOADS[name]) in page.pieces  # its title, its lead and its command


def test_every_panel_was_there(harmless: Page) -> None:
    heads = {"Did it help?", "In short", "The runs compared", "Training", "Side by side: exact match", "Previews over time"}
    further = {"Evaluations", "Data", "Memory and speed", "To repeat it", "The other runs", "Length of the rows in tokens"}
    inner = {"flipped items", "flip", "Why rows were dropped or cut", "the whole config", "versions and fingerprints"}
    assert heads | further | inner <= {piece.strip() for piece in harmless.pieces}
    assert {"rect", "polyline"} <= {tag for tag, _ in harmless.elements}
    assert any(a.get("class") == "bar" and "viewbox" not in a for tag, a in harmless.elements if tag == "rect")


def test_the_policy_allows_this_style_sheet_and_nothing_else(plain_run: Path) -> None:
    page = Page(write_report(plain_run).read_text(encoding="utf-8"))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@pytest.mark.parametrize("name", ["<b>x", "'\"><svg onload=x>", "{{ 7*7 }}", "\u202egpj", "\x1b[31m"])
def test_names_of_folders_are_text_too(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / name, "harmless")
    other = write_run(tmp_path / f"{name}2", "harmless")
    (run / "eval" / name).mkdir()
    (run / "eval" / name / "metrics.json").write_text('{"metrics": {"a": 1}, "checkpoint": "c"}', encoding="utf-8")
    harmless = write_run(tmp_path / "h", "harmless")
    harmless2 = write_run(tmp_path / "h2", "harmless")
    (harmless / "eval" / "e").mkdir()
    (harmless / "eval" / "e" / "metrics.json").write_text('{"metrics": {"a": 1}, "checkpoint": "c"}', encoding="utf-8")
    found = Page(write_report(run, others=[other]).read_text(encoding="utf-8"))
    wanted = Page(write_report(harmless, others=[harmless2]).read_text(encoding="utf-8"))
    assert sorted(found.structure) == sorted(wanted.structure)
    assert visible(name) in found.text
