"""Ninja, with the header that most files of mmcv begin with compiled once: they compile in a quarter of the time.

    python ninja.py /path/to/the/real/ninja -v

gcc reads ``x.hpp.gch`` in place of ``x.hpp`` if it was made with the same options, and says nothing if it was not.
Those options are in the ``build.ninja`` that torch has just written. Whatever goes wrong here only costs time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HEADER = 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'

__all__ = ['command_of', 'main']


def command_of(rules: str, header: Path) -> str | None:
    """Command that compiles ``header`` as ``build.ninja`` compiles files; None where it compiles none."""
    found = dict(re.findall(r'^(cxx|cflags|post_cflags) = ?(.*)$', rules, re.MULTILINE))
    if not {'cxx', 'cflags'} <= set(found):
        return None
    flags = re.sub(r' -c$', '', found['cflags'].replace('$:', ':').replace('$ ', ' '))
    return f"{found['cxx']} {flags} {found.get('post_cflags', '')} -x c++-header -c '{header}' -o '{header}.new'"


def precompile(header: Path, rules: Path) -> None:
    """Compile ``header`` unless that was done; only for gcc."""
    compiled = header.with_name(f'{header.name}.gch')
    if compiled.exists() or not header.exists() or not rules.exists():
        return
    command = command_of(rules.read_text(), header)
    if command is None:
        return
    version = subprocess.run([*command.split()[:1], '--version'], capture_output=True, text=True, check=False)
    if 'Free Software Foundation' not in version.stdout:
        return
    print('compiling the common header', flush=True)
    if subprocess.run(command, shell=True, check=False).returncode == 0:
        header.with_name(f'{header.name}.new').replace(compiled)


def main(argv: list[str]) -> None:
    """Compile the header if there is something to build, then become ninja."""
    if '--version' not in argv:
        source = Path.cwd()
        while not (source / HEADER).exists() and source != source.parent:
            source = source.parent
        precompile(source / HEADER, Path('build.ninja'))
    os.execv(argv[0], argv)


if __name__ == '__main__':
    main(sys.argv[1:])
