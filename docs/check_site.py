"""Checks the site that mkdocs has built: every link in it leads somewhere, and no page loads anything from elsewhere.

    python docs/check_site.py site

mkdocs checks the links of the Markdown. This also checks those that are made from docstrings, notebooks and files of
the repository.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links, the anchors, and what else is loaded, of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser.handle_starttag`."""
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ('id', 'name') if name in found}
        if tag == 'a' and 'href' in found:
            self.links.append(found['href'])
        elif tag == 'link' and found.get('rel') in ('stylesheet', 'icon', 'preload', 'preconnect'):
            self.loaded.append(found['href'])
        elif 'src' in found:
            self.loaded.append(found['src'])


def faults(site: Path) -> list[str]:
    """Returns what is wrong with a site, a line for each fault."""
    pages = {path: Page(path) for path in sorted(site.rglob('*.html')) if path.name != '404.html'}
    found = []

    def anchors(target: Path) -> set[str]:
        return pages[target].anchors if target in pages else set()

    for path, page in pages.items():
        where = path.relative_to(site)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ('mailto', 'data', 'javascript'):
                continue
            if parts.netloc:
                if link in page.loaded:
                    found.append(f'{where} loads {link}')
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / 'index.html' if target.is_dir() else target
            if not target.exists():
                found.append(f'{where}: {link} leads nowhere')
            elif link in page.links and parts.fragment and unquote(parts.fragment) not in anchors(target):
                found.append(f'{where}: {link} has no such anchor')
    return found


if __name__ == '__main__':
    wrong = faults(Path(sys.argv[1]).resolve())
    print('\n'.join(wrong) if wrong else 'every link leads somewhere, and nothing is loaded from elsewhere')
    sys.exit(bool(wrong))
