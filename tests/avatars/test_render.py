import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cachec.runtime.errors import MissingExtraError
from reference.avatars import dataset, render
from reference.avatars.attributes import Look
from reference.avatars.render import Pose, install, open_pictures, spec_line

LOOK = Look("smiling", "light", "short", "black", "", "turtleneck", "red", "blue")


def test_a_spec_is_one_line_with_all_that_the_renderer_needs():
    spec = json.loads(spec_line(LOOK, Pose(dx=3, tilt=-2)))
    assert spec["figure"] == [3, 0.0, 1.0]
    assert spec["tilt"] == -2
    assert spec["options"] == LOOK.options()


def test_eyes_can_differ_from_the_moods_own():
    assert json.loads(spec_line(LOOK, Pose(), eyes="humble"))["options"]["eyes"] == ["humble"]


def test_absent_node_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match="install node and npm"):
        install(tmp_path)


def test_packages_are_installed_until_that_is_finished_and_again_for_a_new_lock_file(monkeypatch, tmp_path):
    runs = []

    def npm(command, *, cwd, check):
        runs.append(command[:2])
        (cwd / "node_modules").mkdir(exist_ok=True)
        if len(runs) in (1, 3):
            raise KeyboardInterrupt
        (cwd / "node_modules" / ".package-lock.json").touch()

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(render.subprocess, "run", npm)
    with pytest.raises(KeyboardInterrupt):
        install(tmp_path)
    install(tmp_path)
    install(tmp_path)
    assert runs == [["npm", "ci"]] * 2
    (tmp_path / "package-lock.json").write_text("of last year")
    with pytest.raises(KeyboardInterrupt):
        install(tmp_path)
    install(tmp_path)
    assert len(runs) == 4


def test_samples_are_the_same_each_time_whatever_their_number():
    few, more = dataset.make_samples("held-out", 3), dataset.make_samples("held-out", 5)
    assert few == more[:3]
    assert json.loads(few[0].line())["caption"] == few[0].saying.caption


def test_what_is_there_is_not_drawn_again(monkeypatch, tmp_path):
    drawn = []

    def draw(lines, to, *, script, side):
        lines = list(lines)
        drawn.append(len(lines))
        with to.open("ab") as file:
            file.write(bytes(side * side * 3 * len(lines)))

    monkeypatch.setattr(dataset, "install", lambda folder: folder / "render.mjs")
    monkeypatch.setattr(dataset, "render", draw)
    dataset.write("held-out", 2, tmp_path)
    with (tmp_path / "held-out.rgb").open("ab") as file:
        file.write(b"half a picture")
    dataset.write("held-out", 5, tmp_path)
    assert drawn == [2, 3]
    pictures, described = dataset.read("held-out", tmp_path)
    assert pictures.shape == (5, 128, 128, 3)
    assert len(described) == 5


@pytest.mark.slow
def test_pictures_show_what_they_are_asked_for(tmp_path, monkeypatch):
    if shutil.which("npm") is None:
        pytest.skip("drawing avatars needs Node and npm")
    monkeypatch.chdir(tmp_path)
    script = install(Path("node"))
    plain = [LOOK, replace(LOOK, background="green"), replace(LOOK, hair_colour="pink")]
    lines = [spec_line(look, Pose()) for look in plain] + [spec_line(LOOK, Pose(dx=100))]
    render.render(lines, Path("a.rgb"), script=script)
    pictures = open_pictures(Path("a.rgb"), num=4)
    assert pictures[0, 2, 2].tolist() == [0x8F, 0xD0, 0xF0]
    assert pictures[1, 2, 2].tolist() == [0xA9, 0xDF, 0xA0]
    assert pictures[2, 12, 64].tolist() == [0xEC, 0x6F, 0xB0]
    assert np.abs(pictures[3, :, 20:].astype(int) - pictures[0, :, :-20]).mean() < 1
