"""What `make docs` does beside mkdocs, so that the same Markdown can be read in the repository and on the site.

A page may link to a file of the repository that is no page: an example, rules of a benchmark, the changelog. The site
gets a page for each of these files, under repository/, and the links lead there. Notebooks become pages with their
outputs. Files that such a page links to are followed in the same way.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|src="|srcset="|href=")(?!https?:|mailto:|#|/)([^)"#\s]+)')
FENCE = re.compile(r'^(```+|~~~+).*?^\1', re.MULTILINE | re.DOTALL)
PICTURE = re.compile(
    r'<picture>.*?srcset="(?P<dark>[^"]+)".*?src="(?P<light>[^"]+)" alt="(?P<alt>[^"]+)".*?</picture>', re.DOTALL
)
CODE = {'.py': 'python', '.toml': 'toml', '.txt': 'text', '.jsonl': 'json', '.json': 'json', '.yml': 'yaml', '': 'make'}


def page_of(path: str) -> str:
    """Returns where a file of the repository stands in the site."""
    if path.startswith('docs/') and Path(path).suffix not in CODE:
        return path.removeprefix('docs/')
    return f'repository/{path}' + '.md' * (Path(path).suffix in CODE)


def file_of(page: str) -> str:
    """Returns the file of the repository that a page of the site shows. It is the inverse of `page_of`."""
    if not page.startswith('repository/'):
        return f'docs/{page}'
    path = page.removeprefix('repository/')
    return path if (ROOT / path).exists() else path.removesuffix('.md')


def links(text: str, page: str) -> dict[str, str]:
    """Returns the links of a page to files of the repository, as they are written, with the paths of these files."""
    found = {}
    for _, link in LINK.findall(FENCE.sub('', text)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file_of(page)), link))
        if (ROOT / path).is_file():
            found[link] = path
    return found


def text_of(path: str) -> str:
    """Returns the Markdown of a file of the repository, whatever its kind."""
    content = (ROOT / path).read_text()
    suffix = Path(path).suffix
    if suffix == '.md':
        return content
    return f'---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{CODE[suffix]}\n{content}````\n'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that are linked to and are no pages, and turns notebooks into pages."""
    for path in sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb')):
        uri = f'notebooks/{path.name}'
        if old := files.get_file_from_path(uri):
            files.remove(old)
        text, pictures = notebook(path)
        for name, content in pictures.items():
            files.append(File.generated(config, f'notebooks/{name}', content=content))
        files.append(File.generated(config, uri.replace('.ipynb', '.md'), content=text))
    open_pages = [file.src_uri for file in files.documentation_pages()]
    while open_pages:
        page = open_pages.pop()
        text = files.get_file_from_path(page).content_string
        for path in links(text, page).values():
            target = page_of(path)
            if files.get_file_from_path(target) or path.endswith('.ipynb'):
                continue
            if target.endswith('.md'):
                files.append(File.generated(config, target, content=text_of(path)))
                open_pages.append(target)
            else:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    # a browser chooses a picture by the theme of the system, and the site by the theme that the reader has chosen
    both = r'<div class="drawing" markdown>\n![\g<alt>](\g<light>#only-light)\n![\g<alt>](\g<dark>#only-dark)\n</div>'
    markdown = PICTURE.sub(both, markdown)
    uri = page.file.src_uri
    targets = links(markdown, uri)

    def moved(match: re.Match[str]) -> str:
        path = targets.get(match[2])
        if path is None:
            return match[0]
        target = page_of(path).replace('.ipynb', '.md')
        return match[1] + os.path.relpath(target, posixpath.dirname(uri) or '.')

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return ''.join([*parts, LINK.sub(moved, markdown[end:])])


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns the Markdown of a notebook with its outputs, and its pictures by name.

    Args:
        path: the notebook.
    """
    cells: list[dict[str, Any]] = json.loads(path.read_text())['cells']
    parts, pictures = [], {}
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
            continue
        parts.append(f'```python\n{source}\n```')
        for output in cell['outputs']:
            data = output.get('data', {})
            if 'image/png' in data:
                name = f'{path.stem}-{len(pictures)}.png'
                pictures[name] = base64.b64decode(data['image/png'])
                parts.append(f'![what the cell above draws]({name})')
            elif text := ''.join(output.get('text', data.get('text/plain', ''))):
                parts.append(f'```text title="output"\n{text.rstrip()}\n```')
    return '\n\n'.join(parts) + '\n', pictures
