"""Fixtures: real models at tiny size, seeds, and the tools as subprocesses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from asr_downstream.console import cli
from asr_downstream.measure import timing
from asr_downstream.plugging.sites import SITES

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ('helpers.pictures', 'helpers.hub')


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are run as those that need no MMDetection see none, here and in the processes that they start.

    `make test` runs them while mmcv is still being compiled: else a test that lacks the mark det would fail only there.
    """
    if 'not det' in config.option.markexpr:
        hidden = Path(__file__).parent / 'helpers/without_detection'
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(hidden), os.environ.get('PYTHONPATH')]))
        runpy.run_path(str(hidden / 'sitecustomize.py'))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only tests marked det are run, files that have none are not imported: that takes as long as many tests."""
    if config.option.markexpr.endswith(' and det') and collection_path.name.startswith('test_'):
        return True if 'mark.det' not in collection_path.read_text(encoding='utf-8') else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked det are skipped where MMDetection is not installed, those marked gpu without a CUDA device."""
    missing = {
        'det': ('needs the extra det', importlib.util.find_spec('mmdet') is None),
        'gpu': ('needs a CUDA device', not torch.cuda.is_available()),
    }
    for mark, (reason, lacks) in missing.items():
        for item in items:
            if lacks and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """What a module of tests draws when it is imported is the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped for want of MMDetection is marked det: `make test` runs those when mmcv is there."""
    report = yield
    if report.skipped and 'det' not in item.keywords and 'mmdet' in str(report.longrepr):
        report.outcome, report.longrepr = 'failed', f'{item.nodeid} needs MMDetection: mark it det'
    return report


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No test sees what another one left: random numbers, blocks that it registered, threads."""
    torch.manual_seed(0)
    threads, sites = torch.get_num_threads(), dict(SITES)
    yield
    SITES.clear()
    SITES.update(sites)
    assert torch.get_num_threads() == threads  # else sums of later tests are of another order


@pytest.fixture(autouse=True)
def _few_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of every timing are enough where times are not what is tested."""
    if 'measure' not in request.path.parts:
        turns = timing.turns
        monkeypatch.setattr(timing, 'turns', lambda names, rounds, text: turns(names, min(rounds, 2), text))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as torchrun gives a process: sums are split by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs: it is the same on the CPU and, with the mark gpu, on a CUDA device."""
    return torch.device(request.param)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Draw all parameters and BN statistics anew: default ones hide bugs (beta = 0, mean = 0, var = 1)."""
    for name, p in model.named_parameters():
        if name.endswith('psi'):
            p.normal_(0, 1)
        elif p.dim() > 1:
            p.normal_(0, (2 / max(1, p[0].numel())) ** 0.5)  # a pruned head may have no inputs
        else:
            p.normal_(0.5, 0.5)
    for name, b in model.named_buffers():
        if name.endswith('running_mean'):
            b.normal_(0, 0.5)
        elif name.endswith('running_var'):
            b.uniform_(0.5, 2)
    return model


@pytest.fixture
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command line tool: ``tool('fold', CONFIG, ...)``, from the root of the checkout."""

    def run(name: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, '-W', 'ignore', f'tools/{name}.py', *map(str, args)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=500, env={**os.environ, **env}, check=False
        )

    return run


@contextlib.contextmanager
def files_of_at_most(count: int) -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond ``count`` bytes inside the block: the kernel refuses as it does on a full disk.

    It holds for the output of pytest too, so not for longer than the block. Gives a function that sets another limit.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(most: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if most < 0 else most, before[1]))

    try:
        limit(count)
        yield limit
    finally:
        limit(-1)


def command(name: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a tool as its command line does, in this process: what it imports takes longer than what it does."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(ROOT)
        for key, value in env.items():
            patch.setenv(key, value)
        try:
            cli.run(lambda argv: tool.main([*map(str, arguments)]))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess([name], code, out.getvalue(), err.getvalue())
