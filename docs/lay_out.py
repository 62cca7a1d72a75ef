"""Lay out the pages of the site in build/docs: `make site` builds it from there with zensical.

The pages are those of docs/, and what they link to outside it. In the repository such a link leads to the file. The
site holds only the pages, so there the link leads to the page's place on the site, or is reduced to its text.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "docs"
PLACES = {
    "README.md": "index.md",
    "README.md#does-it-work": "evidence.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files outside docs/ that have a place on the site, and sections of the README whose subject has a page."""
RECIPES = "recipe-files.md"
_CODE_OR_LINK = re.compile(r"```.*?^```$|`[^`]*`|\[(?P<text>(?:`[^`]*`|[^\]`])*)\]\((?P<target>[^)\s]+)\)", re.M | re.S)

_NAMED_BLOCK = re.compile(r"^```(\w+) (\S+)$", re.M)  # "```jsonl train.jsonl": a block with the name of its file


def relinked(page: Path, text: str, place: str, root: Path = ROOT) -> tuple[str, set[Path]]:
    """The text of a page of the repository as it stands on the site, and the Markdown files that it needs there.

    Args:
        page: path of the page in the repository.
        text: its Markdown.
        place: its path on the site.
        root: the repository.

    Raises:
        FileNotFoundError: a link leads to a file that does not exist.
    """
    needed: set[Path] = set()

    def relink(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or target.startswith("#") or re.match(r"\w+:", target):
            return match[0]
        path, _, section = target.partition("#")
        linked = Path(os.path.normpath(page.parent / path))
        if not linked.exists():
            raise FileNotFoundError(f"{page}: a link leads to {linked}, which does not exist")
        name = linked.relative_to(root).as_posix()
        to = _place(name, section)
        if to is None:
            return match["text"]
        if linked.suffix in (".md", ".ipynb") and not name.startswith("docs/") and name not in PLACES:
            needed.add(linked)
        return f"[{match['text']}]({os.path.relpath(to, Path(place).parent)})"

    return _NAMED_BLOCK.sub(r'```\1 title="\2"', _CODE_OR_LINK.sub(relink, text)), needed


def _place(name: str, section: str) -> str | None:
    """Where a file of the repository is on the site, with the section; None for one that is not there."""
    anchor = f"#{section}" if section else ""
    if name in PLACES:
        return PLACES.get(name + anchor, PLACES[name])
    if name.startswith("docs/"):
        return name.removeprefix("docs/") + anchor
    if name.endswith((".md", ".ipynb")):
        return f"repository/{name}{anchor}"
    return RECIPES if name.startswith("examples") else None


def recipe_files(root: Path = ROOT) -> str:
    """The page with every file of examples/ that a command is given."""
    parts = [
        "# Recipe files\n\nEach YAML file of `examples/`, to copy. The repository has the rest: scripts, a notebook, a "
        "chat template. [Recipes](recipes.md) says which to start from.\n"
    ]
    for path in sorted((root / "examples").rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(root / "examples").as_posix()
        parts.append(f"## {name}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(parts)


def lay_out(out: Path = OUT, root: Path = ROOT) -> None:
    """Write the pages, pictures and data of the site to a folder, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root / "docs", out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (out / RECIPES).write_text(recipe_files(root), encoding="utf-8")
    waiting = {path: path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md")}
    waiting |= {root / name: place for name, place in PLACES.items() if "#" not in name and name != "README.md"}
    done: set[Path] = set()
    while waiting:
        page, place = waiting.popitem()
        done.add(page)
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        if page.suffix != ".md":
            shutil.copyfile(page, out / place)
            continue
        text, needed = relinked(page, page.read_text(encoding="utf-8"), place, root)
        (out / place).write_text(text, encoding="utf-8")
        waiting |= {path: f"repository/{path.relative_to(root)}" for path in needed - done}


if __name__ == "__main__":
    lay_out()
