"""An evaluation that was made up: every kind of row, both cuts, one prompt that is not harmless."""

import numpy as np

from cachec.compiler.evaluation.bench import KeptPrompt, Shown
from cachec.compiler.evaluation.error_by_step import ErrorCurve
from cachec.compiler.evaluation.evaluate import Evaluation
from cachec.compiler.evaluation.summary import Measured, summarize
from cachec.compiler.evaluation.words import Report
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower_advance, lower_table, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.program import ProgramKey, hash_sigmas

STEPS = 10
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
KEY = ProgramKey(STEPS, hash_sigmas(SIGMAS), {"height": 8, "width": 8, "text_tokens": 1})
SCHEDULE = Schedule(STEPS, (0, 1, 2, 5, 8))
MOVES = np.tril(-np.ones((5, 5)) / 5)
PROMPT = "<script>alert('x')</script> & \"quotes\" | bars"
LEVEL = "fine"  # that of the reference run has no part in the names of rows
SCORES = {  # by row: kind, PSNR of two prompts, seconds
    "uncached": ("uncached", (np.inf, np.inf), 0.5),
    LEVEL: ("level", (45.0, 47.0), 0.1),
    "taylor:1": ("method", (44.0, 46.0), 0.11),
    "plain": ("solver", (44.5, 46.5), 0.1),
    "diffusers": ("diffusers", (140.0, 141.0), 1.0),
}


def hidden_program():
    return lower_table(Taylor(1).table(SCHEDULE, SIGMAS, None), KEY, Sampling(SIGMAS, SIGMAS[:-1]))


def uncached_program():
    return lower_uncached(KEY, Sampling(SIGMAS, SIGMAS[:-1]))


def output_program():
    return lower_advance(AdvanceTable(SCHEDULE, MOVES), KEY, Sampling(SIGMAS, SIGMAS[:-1]))


def measured(psnr, seconds, *, probed=True, right=True):
    attributes = {"attributes": {"mood": right, "hair": True}} if probed else {}
    return Measured(
        psnr_db=psnr,
        psnr_db_fine=41.0,
        ssim=0.99,
        latent_error=0.0 if psnr == np.inf else 0.02,
        loop_seconds=seconds,
        total_seconds=2 * seconds,
        **attributes,
    )


def made_up_rows(*, probed=True):
    loops = {name: seconds for name, (_, _, seconds) in SCORES.items()}
    return tuple(
        summarize(name, kind, 5, [measured(psnr, seconds, probed=probed, right=i == 1) for i, psnr in enumerate(psnrs)], loops)
        for name, (kind, psnrs, seconds) in SCORES.items()
    )


def made_up_evaluation(*, kept=True, probed=True):
    setting = {
        "prompts": 2,
        "seed": 0,
        "level": LEVEL,
        "schedule": list(SCHEDULE.compute),
        "schedule_steps": STEPS,
        "steps": STEPS,
        "fine_steps": 200,
        "backend": "eager",
        "method": "taylor",
        "lpips": "not available: torchvision not installed",
        "probe": {"attributes": 3, "prompts_skipped": 1} if probed else None,
    }
    hidden = hidden_program()
    programs = {"uncached": uncached_program(), LEVEL: hidden, "taylor:1": hidden, "plain": output_program()}
    picture = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    shown = {name: Shown(picture, psnrs[0], seconds) for name, (_, psnrs, seconds) in SCORES.items()}
    one = KeptPrompt(PROMPT, 0, shown, Shown(picture, 43.0, 2.0))
    errors = {name: ErrorCurve((1.0, 5.0, 10.0), (0.0, 1e-3, 1e-2)) for name in (LEVEL, "taylor:1", "plain")}
    rows = made_up_rows(probed=probed)
    return Evaluation(rows, setting, programs, (one,) if kept else (), errors if kept else {})


def made_up_report(**changes):
    return Report("toy.cachec", made_up_evaluation(**changes), [("method", "taylor"), ("", "##")], [("processor", "none")])
