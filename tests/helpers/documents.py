"""The documents: their Python blocks, command lines, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

FOLDERS = ('asr_downstream', 'det_configs', 'diffusion', 'docs', 'tests', 'tools')
FOUND = [*sorted(ROOT.glob('*.md')), *sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob('*.md'))]
PATHS = [p for p in FOUND if 'fixtures' not in p.parts]  # those are cards that older versions have written
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r'((?:tools|diffusion)/\w+\.(?:py|sh))\b([^\n`;|&]*)')
CONSOLE = re.compile(r'(?:^|[\s`])(?:asr-downstream|-m asr_downstream)(?![\w.])()([^\n`;|&]*)')
ASSIGNED = re.compile(r'\b([A-Z]\w*)=(\'[^\']*\'|"[^"]*"|[^\s;]+)')
LINK = re.compile(r'\]\(([^)\s]+)\)|\b(?:src|srcset|href)="([^"]+)"')


@dataclass(frozen=True)
class Document:
    """One Markdown file of the repository."""

    path: Path

    @property
    def name(self) -> str:
        """Path from the root of the checkout."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        """Everything."""
        return self.path.read_text(encoding='utf-8')

    def blocks(self, language: str) -> list[str]:
        """Fenced blocks of a language."""
        return [body for found, body in FENCE.findall(self.text) if found == language]

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Script or console command, and its arguments, of shell blocks and of code in the text."""
        for block in self.blocks('shell'):
            yield from commands(block)
        for code in re.findall(r'`([^`\n]+)`', FENCE.sub('', self.text)):
            if ' ' in code:
                yield from commands(code)

    def links(self) -> list[str]:
        """Targets of links and pictures, those with a scheme left out."""
        found = (a or b for a, b in LINK.findall(FENCE.sub('', self.text)))
        return [link for link in found if not re.match(r'[a-z]+:', link)]

    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub and Python-Markdown make them."""
        heads = re.findall(r'^#+ (.*)$', FENCE.sub('', self.text), re.MULTILINE)
        return {re.sub(r'[^\w\- ]', '', head.lower()).strip().replace(' ', '-') for head in heads}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Calls of tools in shell text; brackets around what is optional are dropped, variables are put in.

    ``A|B`` stands for either and ``...`` for more of the same. What is no word of a shell is left as it is.
    """
    text = re.sub(r'\\\n\s*', ' ', text)
    values = {
        name: value.strip('\'"') for name, value in re.findall(r'\b([A-Z]\w*)=(\'[^\']*\'|"[^"]*"|[^\s;]+)', text)
    }
    for line in text.splitlines():
        line = re.sub(r'(^|\s)#.*', '', line)
        line = re.sub(r'\$\{?(\w+)\}?', lambda m: values.get(m[1], '0'), line)
        for script, rest in [*SCRIPT.findall(line), *CONSOLE.findall(line)]:
            bare = re.sub(r'\[(?=[\w-])|(?<=[\w.\]])\]', ' ', rest.replace('[:WEIGHTS]', ''))
            yield script or 'asr-downstream', [word for word in shlex.split(bare.replace('\\', ' ')) if word != '...']


DOCUMENTS = [Document(path) for path in PATHS]
