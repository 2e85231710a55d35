"""The two libraries as modules: which there are, and what they say."""

import sys
import types

import pytest
from engine_toys import install
from fake_tensorrt import Fake

from cachec.engines.tensorrt_library import LEAN, TENSORRT, Library, Reports, dtypes_of, reports_of
from cachec.runtime.errors import EngineError, InputError, MissingExtraError


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    install(monkeypatch, fake)
    return fake


def test_the_module_is_loaded_and_knows_its_version(fake):
    assert TENSORRT.load() is fake.module
    assert TENSORRT.version() == "11.0.0.114"
    assert TENSORRT.can_build()
    TENSORRT.check_builder()


def test_another_major_version_is_refused(monkeypatch):
    install(monkeypatch, Fake(version="10.16.1.2"))
    with pytest.raises(InputError, match=r"tensorrt is version 10\.16\.1\.2, but the tensorrt backend is written for 11"):
        TENSORRT.load()


def test_the_lean_module_only_runs(fake, monkeypatch):
    monkeypatch.setattr(Library, "module_name", lambda self: LEAN)
    monkeypatch.setitem(sys.modules, LEAN, fake.module)
    assert not TENSORRT.can_build()
    with pytest.raises(InputError, match="tensorrt_lean runs engines, but has no builder"):
        TENSORRT.check_builder()


def test_a_module_that_is_missing_or_broken_is_named(monkeypatch, tmp_path):
    other = Library("other", ("no_such_module", "broken_module"), "rtx", major=1, driver=(13, 0))
    with pytest.raises(MissingExtraError, match=r"the other backend needs 'no_such_module', .*pip install 'cachec\[rtx\]'"):
        other.load()
    (tmp_path / "broken_module.py").write_text("raise OSError('libnvinfer.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"broken_module is installed but cannot be loaded: libnvinfer.so"):
        other.load()


def test_errors_have_all_that_was_said_since_the_last(fake):
    reports = Reports(fake.module)
    logger = fake.module.ILogger
    for severity, text in ((logger.WARNING, "slow"), (logger.ERROR, "one\n line"), (logger.INTERNAL_ERROR, "two")):
        reports.logger.log(severity, text)
    assert str(reports.error("build it")) == "cannot build it: one line; two"
    assert str(reports.error("build it")) == "cannot build it: the library does not say why"
    reports.logger.log(logger.ERROR, "forgotten")
    reports.clear()
    with pytest.raises(EngineError, match="cannot start: the library does not say why"), reports.explaining("start"):
        raise TypeError("factory function returned nullptr")


def test_errors_about_memory_say_what_to_do(fake):
    reports = Reports(fake.module)
    reports.logger.log(fake.module.ILogger.ERROR, "Error Code 2: OutOfMemory\n (Requested size was 99 bytes)")
    error = str(reports.error("build the compute engine"))
    assert "no memory to build the compute engine: Error Code 2: OutOfMemory (Requested size was 99 bytes)" in error
    assert "a workspace limits" in error


def test_a_library_has_one_logger(fake):
    assert reports_of(fake.module) is reports_of(fake.module)


def test_types_have_names(fake):
    names = dtypes_of(fake.module)
    assert names[fake.module.DataType.BF16] == "bfloat16"
    assert len(set(names.values())) == len(names)
    assert isinstance(fake.module, types.ModuleType)
