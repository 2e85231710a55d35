"""Archives of PyTorch, and what is built from them: a full disk is an error, not the end of the process."""

from types import SimpleNamespace

import pytest
import torch
from full_disk import full_disk

from cachec.engines import aoti, eager
from cachec.engines.torch_files import archive
from cachec.runtime.errors import OutputError

SAYS = r"^cannot write .*: File too large\. Make room there, or choose another place$"


@pytest.fixture(scope="module")
def sources():
    program = torch.export.export(torch.nn.Linear(40, 40), (torch.zeros(2, 40),))
    return SimpleNamespace(programs=lambda: {"compute": program}, signatures={})


def test_an_archive_is_read_again(sources, tmp_path):
    (path,) = eager.BUILDER.build(sources, tmp_path).values()
    x = torch.ones(2, 40)
    torch.testing.assert_close(torch.export.load(path).module()(x), sources.programs()["compute"].module()(x))


def test_exported_programs_on_a_full_disk(sources, tmp_path):
    with full_disk(), pytest.raises(OutputError, match=SAYS):
        eager.BUILDER.build(sources, tmp_path)


def test_compiled_programs_on_a_full_disk(sources, tmp_path, monkeypatch):
    (tmp_path / "model.so").write_bytes(b"x" * 9000)
    monkeypatch.setattr("torch._inductor.aot_compile", lambda *arguments, **options: [str(tmp_path / "model.so")])
    with full_disk(), pytest.raises(OutputError, match=SAYS):
        aoti.BUILDER.build(sources, tmp_path)


def test_a_place_that_is_none(sources, tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*compute\.pt2: No such file or directory"):
        eager.BUILDER.build(sources, tmp_path / "none")


def test_an_error_of_the_writer_itself_is_not_one_of_the_disk(tmp_path):
    with pytest.raises(TypeError, match="a bytes-like object is required"), archive(tmp_path / "a.pt2") as file:
        file.write("text")
