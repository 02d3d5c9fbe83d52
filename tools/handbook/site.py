"""A hook of MkDocs: documents outside of docs/ become pages, and links to other files lead to copies of them.

Documents are written for GitHub, where links are paths of files. On the site README.md is the first page, READMEs of
folders are pages, and a file that a document links to, such as a table of defaults or a picture, is part of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    'README.md': 'index.md',
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md',
    'SECURITY.md': 'security.md',
    'det_configs/README.md': 'det_configs.md',
    'diffusion/README.md': 'diffusion_configs.md',
    'tools/far_configs/README.md': 'far_configs.md',
}
SOURCES = {page: document for document, page in PAGES.items()}
LINK = re.compile(r'(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<path>[^)"#\s:]+)(?P<anchor>#[^)"]*)?(?=[)"])')
CODE = re.compile(r'(^```.*?^```$)', re.MULTILINE | re.DOTALL)

HIDDEN = '---\nsearch: {exclude: true}\n---\n\n'  # from the search


def document_of(page: str) -> str:
    """Path in the repository of the document that a page is made from."""
    return SOURCES.get(page, f'docs/{page}')


def page_of(target: str) -> str:
    """Path in the site of a file of the repository; a program becomes a page that shows it."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith('docs/'):
        return target.removeprefix('docs/')
    return f'files/{target}.md' if target.endswith('.py') else f'files/{target}'


def targets(document: str, text: str) -> Iterator[str]:
    """Files of the repository that a document links to."""
    for match in LINK.finditer(CODE.sub('', text)):
        yield resolve(document, match['path'])


def resolve(document: str, link: str) -> str:
    """Path in the repository of a relative link."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), link))


def relink(document: str, page: str, text: str) -> str:
    """The text of a document with links as the site has them; a folder is no page, so its link becomes plain text."""

    def replaced(match: re.Match[str]) -> str:
        target = resolve(document, match['path'])
        path = posixpath.relpath(page_of(target), posixpath.dirname(page) or '.')
        return f'{match["before"]}{path}{match["anchor"] or ""}'

    def plain(match: re.Match[str]) -> str:
        is_folder = (ROOT / resolve(document, match[2])).is_dir()
        return match[1] if is_folder else match[0]

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(replaced, re.sub(r'\[([^\]]*)\]\(([^)\s:#]+)\)', plain, part)) for part in parts[::2]]
    return ''.join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the documents outside of docs/, and the files that any document links to."""
    documents = [*PAGES, *(f'docs/{file.src_uri}' for file in files.documentation_pages())]
    linked = {target for name in documents for target in targets(name, (ROOT / name).read_text(encoding='utf-8'))}
    for document, page in PAGES.items():
        text = (ROOT / document).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=text))
    for target in sorted(linked - {*PAGES}):
        path = ROOT / target
        if target.startswith('docs/') or path.is_dir():
            continue
        if target.endswith('.py'):
            text = HIDDEN + f'# {target}\n\n```python\n{path.read_text(encoding="utf-8")}```\n'
            files.append(File.generated(config, page_of(target), content=text))
        elif path.exists():  # a link to nothing stays, and strict mode names it
            files.append(File.generated(config, page_of(target), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page."""
    name = page.file.src_uri
    return markdown if name.startswith('files/') else relink(document_of(name), name, markdown)
