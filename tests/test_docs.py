"""The pages of the documentation: their measured numbers are those of the JSON, and each page can be found."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# pages whose numbers are tied to JSON by other tests
TIED = {'results.md', 'reliability.md', 'distributed.md', 'gpu.md'}
PAGES = sorted((ROOT / 'docs').rglob('*.md'))
# what is written with a point and was not measured: versions, defaults and other numbers that somebody chose
CHOSEN = {
    '0.7.0',
    '0.2.1',
    '3.10',
    '3.11',
    '2.5',
    '2.10',
    '2.11',
    '2.13',
    '4.57',
    '4.57.1',
    '0.1',
    '0.9',
    'v1.2.3',
    '.95',
    '.12',
}


def load(name: str):
    """A script of docs, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'docs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measured = load('measured')


@pytest.mark.parametrize('page', measured.pages(), ids=lambda page: page.name)
def test_numbers_are_those_of_the_json(page):
    text = page.read_text()
    assert measured.filled(text) == text, 'python docs/measured.py writes them again'


def test_each_number_is_on_a_page():
    text = ''.join(page.read_text() for page in measured.pages())
    assert set(measured.NUMBERS) == {name for _, name, _, _ in measured.MARK.findall(text)}


@pytest.mark.parametrize(
    'page', [ROOT / 'README.md', *(page for page in PAGES if page.name not in TIED)], ids=lambda page: page.name
)
def test_no_measured_number_is_typed_in(page):
    """Nothing with a decimal point stands outside of code and marks, but what somebody chose."""
    text = measured.MARK.sub('', page.read_text())
    text = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv \S+|\d{4}\.\d{5}', '', text, flags=re.DOTALL)
    found = set(re.findall(r'v?\d*\.\d+(?:\.\d+)*', text))
    assert found <= CHOSEN


def test_each_page_is_in_the_navigation():
    listed = set(re.findall(r'[\w/]+\.md', (ROOT / 'mkdocs.yml').read_text().split('nav:')[1].split('\n\n')[0]))
    notebooks = {f'notebooks/{path.stem}.md' for path in (ROOT / 'docs' / 'notebooks').glob('*.ipynb')}
    assert listed == {path.relative_to(ROOT / 'docs').as_posix() for path in PAGES} | notebooks


def test_option_tables_have_defaults():
    for page in PAGES:
        for head in re.findall(r'^\| option \|.*$', page.read_text(), re.MULTILINE):
            assert '| default |' in head, f'{page.name}: {head}'


def test_drawings_are_those_of_the_script(tmp_path):
    """For both backgrounds, and in words for those who do not see them."""
    drawings = load('drawings')
    drawings.FOLDER = tmp_path
    drawings.main()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (ROOT / 'docs' / 'drawings').iterdir()}
    for page in PAGES:
        text = page.read_text()
        assert text.count('<picture>') == len(re.findall(r'<img src="drawings/\w+-light.svg" alt="[^"]{80,}">', text))


def test_version_is_in_one_place():
    version = re.search(r"__version__ = '(.*)'", (ROOT / 'segment_recurrence_pytorch' / 'version.py').read_text())[1]
    assert f'version: {version}\n' in (ROOT / 'CITATION.cff').read_text()
    assert re.search(rf'^## (Unreleased|{re.escape(version)})', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
