"""The pages of the site: each is in the navigation, links lead on, and what they name exists."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lavender
from lavender.cli.main import build_parser
from lavender.world.studies.registry import STUDIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LAY_OUT = runpy.run_path(str(DOCS / "lay_out.py"))
HOW_IT_WORKS = (DOCS / "how-it-works.md").read_text()


def pages_of(nav: list[dict[str, Any]]) -> list[str]:
    pages = []
    for entry in nav:
        for page in entry.values():
            pages += [page] if isinstance(page, str) else pages_of(page)
    return pages


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    LAY_OUT["lay_out"](out)
    return out


def test_every_page_is_in_the_navigation_once(site):
    nav = pages_of(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    reached_by_links = {
        path for path in site.rglob("*.md") if path.relative_to(site).parts[0] in ("evidence", "repository")
    }
    assert sorted(nav) == sorted(str(path.relative_to(site)) for path in {*site.rglob("*.md")} - reached_by_links)


def relinked(text: str, page: str = "docs/page.md", place: str = "page.md") -> str:
    return LAY_OUT["relinked"](ROOT / page, text, place)[0]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[results](../README.md#does-it-work)", "[results](evidence.md)"),
        ("[front](../README.md#in-your-own-trl-script)", "[front](index.md)"),
        ("[stores](stores.md#merge)", "[stores](stores.md#merge)"),
        ("[here](#merge)", "[here](#merge)"),
        ("[paper](https://arxiv.org/abs/2502.06814)", "[paper](https://arxiv.org/abs/2502.06814)"),
        ("[`files`](../examples/accelerate)", "[`files`](recipe-files.md)"),
        ("[test](../tests/test_site.py)", "test"),
        ("[changes](../CHANGELOG.md)", "[changes](changelog.md)"),
        ("[real](../benchmarks/real/README.md)", "[real](repository/benchmarks/real/README.md)"),
        ("`[a](../no.md)`", "`[a](../no.md)`"),
        ("```\n[a](../no.md)\n```\n", "```\n[a](../no.md)\n```\n"),
        ("```jsonl train.jsonl\n{}\n```\n", '```jsonl title="train.jsonl"\n{}\n```\n'),
    ],
)
def test_a_link_leads_to_its_place_on_the_site(link, expected):
    assert relinked(link) == expected


def test_links_are_relative_to_the_page():
    assert relinked("[log](../log.md)", "docs/decisions/a.md", "decisions/a.md") == "[log](../log.md)"
    assert relinked("[data](docs/data.md)", "CHANGELOG.md", "changelog.md") == "[data](data.md)"


def test_a_link_to_nothing_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"no\.md, which does not exist"):
        relinked("[a](no.md)")


def test_every_recipe_can_be_copied_from_the_site(site):
    page = (site / "recipe-files.md").read_text()
    recipes = [path.read_text().strip() for path in (ROOT / "examples").rglob("*.yaml")]
    assert len(recipes) > 10
    assert all(recipe in page for recipe in recipes)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(lavender(?:\.\w+)+)`", HOW_IT_WORKS))))
def test_what_the_equations_lead_to_exists(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)


def test_every_study_has_its_place():
    assert set(re.findall(r"`lavender study ([a-z][a-z-]+)`", HOW_IT_WORKS)) == set(STUDIES)


def test_every_public_name_is_on_the_api_page():
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    assert {f"lavender.{name}" for name in lavender.__all__} <= set(named)
    assert len(named) == len(set(named))


@pytest.mark.parametrize("command", re.findall(r"`lavender ((?:look|eval|data|study) [^`]+)`", HOW_IT_WORKS))
def test_the_command_of_a_figure_or_table_is_understood(command):
    build_parser().parse_args(shlex.split(command))
