"""What workers open: the recorder that a process by itself has."""

import pickle
from dataclasses import replace

import numpy as np
from toy_model import SETTINGS

from cachec.compiler.calibration.runs import Batch, Recorder, Subject, WantedRun
from cachec.compiler.calibration.statistics import KeepGrams
from cachec.compiler.calibration.workers import Place, no_tick
from cachec.compiler.commands.recipes import ModelRecorder
from cachec.compiler.frontend import evaluator_of
from cachec.compiler.models import find_model, load_model


def test_a_worker_records_what_this_process_would(toy_directory, monkeypatch):
    spec = find_model(str(toy_directory))
    settings, model = replace(SETTINGS, steps=2), load_model(spec)
    subject = Subject.of(model, settings)
    task = Batch(0, ("a circle", "a ring"), (3, 4), (WantedRun(subject.own_sampling, KeepGrams(np.array([0, 2]))),))
    recipe, sent = pickle.loads(pickle.dumps((ModelRecorder(spec.portable_source, settings), task)))  # as to another process
    here = Recorder(subject, evaluator_of(model, settings))
    taken = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    with recipe.open(Place("cpu", threads=3)) as recorder:
        assert taken == [3]
        assert recorder.facts == here.facts
        assert (recorder.facts.device, recorder.facts.precision) == ("cpu", "float32")
        there = pickle.loads(pickle.dumps(recorder.do(sent, no_tick)))
    for name, values in here.do(task, no_tick).items():
        np.testing.assert_array_equal(there[name], values)
