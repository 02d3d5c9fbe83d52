"""A hub on this machine: a server that takes what huggingface_hub sends, and keeps it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import ROOT


@dataclass
class Hub:
    """What a server was asked."""

    url: str = ''
    refuses: bool = False
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0)) or self.chunks()
            found.tokens.add(self.headers.get('Authorization'))
            if found.refuses:
                self.answer({'error': 'you have no right to write here'}, 403)
            elif self.path.endswith('/repos/create'):
                found.created.append(json.loads(body))
                self.answer({'url': f'{found.url}/user/name'})
            elif '/preupload/' in self.path:
                asked = json.loads(body)['files']
                self.answer({'files': [
                    {'path': each['path'], 'uploadMode': 'regular', 'shouldIgnore': False} for each in asked
                ]})  # fmt: skip
            elif '/commit/' in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry['key'] == 'file':
                        found.files[entry['value']['path']] = base64.b64decode(entry['value']['content'])
                self.answer({'commitUrl': f'{found.url}/user/name/commit/1', 'commitOid': '1', 'hookOutput': ''})
            else:
                self.answer({'errors': [], 'warnings': []})

        def chunks(self) -> bytes:
            if self.headers.get('Transfer-Encoding') != 'chunked':
                return b''
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(parts)

        def answer(self, content: Any, status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.send_header('Content-Length', str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    found.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def asr_downstream(hub: Hub, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command where the hub is that of the test: huggingface_hub reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, '-m', 'asr_downstream', *map(str, words)],
        env={**os.environ, 'HF_ENDPOINT': hub.url, 'HF_TOKEN': 'hf_test'},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
