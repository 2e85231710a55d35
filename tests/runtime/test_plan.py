"""Plans of both cuts, with linear forecasts and with a predictor inside, with a prologue and without: no device anywhere."""

from dataclasses import replace

import numpy as np
import pytest

from cachec.runtime.device import ALIGNMENT
from cachec.runtime.errors import BundleError, InputError
from cachec.runtime.instructions import Advance, Compute, Forecast, Predict
from cachec.runtime.model_io import ModelIO
from cachec.runtime.plan import PlannedBuffer, View, constant_data, lay_out
from cachec.runtime.planner import plan_binding
from cachec.runtime.program import KEPT, Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Signature, TensorSpec

BATCH, STEPS = 2, 6
X, ROWS = ("batch", 3, 5), ("batch", 64)
IO = ModelIO("x", "t", ("prompt", "guidance", "unused"))
SIGMAS = np.linspace(1, 0, STEPS + 1, dtype=np.float32) ** 2
TIMESTEPS = np.arange(STEPS, dtype=np.float32) * 10


def specs(**shapes):
    integers = ("step", "history_steps")
    return tuple(TensorSpec(name, shape, "int64" if name in integers else "float32") for name, shape in shapes.items())


COMPUTE_OUT = specs(velocity=X, feature=("batch", 7), next_latents=X)  # a predictor hands out the same
HOISTED = specs(compute_step_values=("compute_steps", *ROWS), forecast_step_values=("forecast_steps", *ROWS), compute_text=ROWS)
PROLOGUE = Signature(specs(compute_timesteps=("compute_steps",), forecast_timesteps=("forecast_steps",), prompt=ROWS), HOISTED)
PLAIN = {
    "compute": Signature(specs(x=X, t=("batch",), prompt=ROWS, guidance=("batch",), delta=("batch",)), COMPUTE_OUT),
    "forecast": Signature(
        specs(
            features=("slots", "batch", 7),
            coefficients=("forecasts", 1, "slots"),
            bias=("forecasts",),
            deltas=("forecasts",),
            x=X,
            t=("forecasts", "batch"),
        ),
        specs(next_latents=X),
    ),
}
HOISTING = {
    "prologue": PROLOGUE,
    "compute": Signature(specs(x=X, delta=("batch",), step_values=ROWS, text=ROWS), COMPUTE_OUT),
    "forecast": Signature(
        (*PLAIN["forecast"].inputs[:-1], TensorSpec("step_values", ("forecasts", *ROWS), "float32")),
        specs(next_latents=X, velocities=("forecasts", *X)),
    ),
}
PREDICTOR = {
    "compute": PLAIN["compute"],
    "forecast": Signature(
        specs(
            feature_0=("batch", 7),
            feature_1=("batch", 7),
            sigmas=(STEPS + 1,),
            step=(),
            history_steps=(2,),
            x=X,
            delta=("batch",),
        ),
        COMPUTE_OUT,
    ),
}
OUTPUT = {
    "prologue": Signature(specs(compute_timesteps=("compute_steps",), prompt=ROWS), (HOISTED[0], HOISTED[2])),
    "compute": Signature(specs(x=X, step_values=ROWS, text=ROWS), specs(velocity=X, feature=("batch", 7))),
    "advance": Signature(
        specs(base=X, velocities=("slots", *X), coefficients=(1, "slots"), base_share=(1,)), specs(next_latents=X)
    ),
}


def program(instructions, capacity=2, cut="hidden"):
    rng = np.random.default_rng(0)
    coefficients, bias = rng.standard_normal((STEPS, 1, capacity), np.float32), rng.standard_normal(STEPS, np.float32)
    for instruction in instructions:
        if instruction.rows:
            coefficients[list(instruction.steps), :, instruction.num_slots :] = 0
    key, kind, out = ProgramKey(STEPS, hash_sigmas(SIGMAS), {"height": 6}), KEPT[cut], {}
    if cut == "output":
        bias *= 0
        out = {"rows_out": 2 * coefficients, "share_out": np.arange(STEPS, dtype=np.float32)}
    return Program(key, tuple(instructions), {kind: capacity}, SIGMAS, TIMESTEPS, coefficients, bias, cut, **out)


LINEAR = program([Compute(0, 0), Forecast((1,), 1), Compute(2, 1), Forecast((3, 4), 2), Compute(5, None)])
PREDICTED = program(
    [
        Compute(0, 0),
        Compute(1, 1),
        Predict(2, (1, 0), 2),
        Predict(3, (2, 1)),
        Compute(4, 0),
        Predict(5, (0, 2)),
    ],
    capacity=3,
)
GAPS = program(
    [
        Compute(0, 0, "velocity"),
        Advance((0, 1), 1),
        Compute(2, 1, "velocity"),
        Advance((2, 3, 4), 2),
        Compute(5, 2, "velocity"),
        Advance((5,), 3),
    ],
    3,
    "output",
)

CASES = {
    "plain": (PLAIN, LINEAR),
    "hoisted": (HOISTING, LINEAR),
    "predictor": (PREDICTOR, PREDICTED),
    "output": (OUTPUT, GAPS),
}


def plan_of(name, **options):
    signatures, what = CASES[name]
    return plan_binding(signatures, what, IO, batch=BATCH, **options)


@pytest.fixture(params=CASES)
def case(request):
    return *CASES[request.param], plan_of(request.param)


def calls_of(plan):
    return [*([plan.prologue] if plan.prologue else []), *plan.operations]


def rows_of(plan, view):
    """What a view covers, as (buffer, row); a buffer that is only ever taken whole is one row."""
    return {(view.buffer, row) for row in view.rows((plan.buffers[view.buffer].shape or (1,))[0])}


def test_views_fit_the_engines(case):
    signatures, _, plan = case
    for call in calls_of(plan):
        signature, sizes = signatures[call.engine], {"batch": BATCH}
        assert set(call.inputs) == {spec.name for spec in signature.inputs}
        assert set(call.outputs) <= {spec.name for spec in signature.outputs}
        for spec, view in [
            (s, call.inputs.get(s.name, call.outputs.get(s.name))) for s in (*signature.inputs, *signature.outputs)
        ]:
            if view is not None:
                shape = plan.shape(view)
                assert plan.buffers[view.buffer].dtype == spec.dtype
                assert len(shape) == len(spec.shape)
                for want, got in zip(spec.shape, shape, strict=True):
                    assert got == (sizes.setdefault(want, got) if isinstance(want, str) else want), spec


def test_what_is_read_was_written_before(case):
    _, _, plan = case
    written = set()
    for buffer in plan.buffers.values():
        if buffer.value is not None or buffer.name == "noise" or buffer.name.startswith("condition/"):
            written |= rows_of(plan, View(buffer.name))
    for call in calls_of(plan):
        for name, view in call.inputs.items():
            assert rows_of(plan, view) <= written, (call.engine, call.steps, name)
        for view in call.outputs.values():
            assert plan.buffers[view.buffer].value is None
            written |= rows_of(plan, view)
    assert rows_of(plan, plan.final) <= written


def test_no_call_writes_what_it_reads(case):
    _, _, plan = case
    for call in calls_of(plan):
        read = set().union(*(rows_of(plan, view) for view in call.inputs.values()))
        writes = [rows_of(plan, view) for view in call.outputs.values()]
        assert not read & set().union(*writes)
        assert sum(map(len, writes)) == len(set().union(*writes)), "two results in one place"


def test_each_call_starts_where_the_one_before_left_the_latents(case):
    _, _, plan = case
    latents = View("noise")
    for call in plan.operations:
        assert call.latents == latents
        if "x" in call.inputs:
            assert call.inputs["x"] == latents
        latents = call.outputs.get("next_latents", latents)
    assert plan.final == latents
    assert plan.final.buffer.startswith("latents/")


def test_the_noise_and_the_conditions_stay_as_they_came(case):
    _, _, plan = case
    kept = {"noise", *(name for name in plan.buffers if name.startswith("condition/"))}
    assert not kept & {view.buffer for call in calls_of(plan) for view in call.outputs.values()}


def constants(plan, call):
    return {name: plan.buffers[view.buffer].value for name, view in call.inputs.items()}


def test_conditions_are_those_that_an_engine_reads():
    assert list(plan_of("plain").given) == ["prompt", "guidance"]
    assert list(plan_of("hoisted").given) == ["prompt"]
    assert plan_of("hoisted").buffers["condition/prompt"].shape == (BATCH, 64)


def test_constants_of_linear_forecasts():
    for name in ("plain", "hoisted"):
        call = plan_of(name).operations[3]
        given = constants(plan_of(name), call)
        assert call.steps == (3, 4)
        np.testing.assert_array_equal(given["coefficients"], LINEAR.coefficients[3:5])
        np.testing.assert_array_equal(given["bias"], LINEAR.bias[3:5])
        np.testing.assert_array_equal(given["deltas"], np.diff(SIGMAS)[3:5])
    np.testing.assert_array_equal(constants(plan_of("plain"), plan_of("plain").operations[3])["t"], [[30, 30], [40, 40]])
    first = plan_of("plain").operations[1]
    assert constants(plan_of("plain"), first)["coefficients"].shape == (1, 1, 1)  # the second slot is not written yet
    assert first.inputs["features"] == View("slots/feature", 0, 1)


def test_constants_of_computed_steps():
    plan = plan_of("plain")
    given = constants(plan, plan.operations[2])
    np.testing.assert_array_equal(given["t"], [20, 20])
    np.testing.assert_array_equal(given["delta"], np.diff(SIGMAS)[[2, 2]])
    assert plan.operations[2].outputs["feature"] == View("slots/feature", 1)
    assert "feature" not in plan.operations[4].outputs  # nothing reads it


def test_constants_of_a_predictor():
    plan = plan_of("predictor")
    call = plan.operations[5]
    given = constants(plan, call)
    np.testing.assert_array_equal(given["sigmas"], SIGMAS)
    assert given["step"] == 5
    np.testing.assert_array_equal(given["history_steps"], [4, 2])
    assert given["step"].dtype == given["history_steps"].dtype == np.int64
    assert (call.inputs["feature_0"], call.inputs["feature_1"]) == (View("slots/feature", 0), View("slots/feature", 2))
    assert plan.operations[2].outputs["feature"] == View("slots/feature", 2)


def test_constants_of_moves_over_a_gap():
    plan = plan_of("output")
    call = plan.operations[3]
    np.testing.assert_array_equal(constants(plan, call)["coefficients"], GAPS.coefficients[2, :, :2])
    assert constants(plan, call)["base_share"] == [1]
    assert call.inputs["velocities"] == View("slots/velocity", 0, 2)
    assert call.inputs["base"] == View("noise")
    assert plan.operations[2].outputs == {"velocity": View("slots/velocity", 1)}


@pytest.mark.parametrize("name", ["hoisted", "output"])
def test_rows_of_the_prologue(name):
    plan = plan_of(name)
    given = constants(plan, plan.prologue)
    np.testing.assert_array_equal(given["compute_timesteps"], [0, 20, 50])
    assert name == "output" or given["forecast_timesteps"].tolist() == [10, 30, 40]
    assert plan.prologue.outputs["compute_step_values"] == View("hoisted/compute_step_values")
    assert [op.inputs["step_values"] for op in plan.operations if op.engine == "compute"] == [
        View("hoisted/compute_step_values", row) for row in range(3)
    ]
    assert {op.inputs["text"] for op in plan.operations if op.engine == "compute"} == {View("hoisted/compute_text")}
    forecasts = [op.inputs["step_values"] for op in plan.operations if op.engine == "forecast"]
    rows = [View("hoisted/forecast_step_values", 0, 1), View("hoisted/forecast_step_values", 1, 3)]
    assert forecasts == (rows if name == "hoisted" else [])


def test_velocities_are_left_for_a_sampler_outside():
    plan = plan_of("hoisted", for_sampler=True)
    call = plan.operations[3]
    assert call.outputs == {"velocities": View("velocities/3")}
    assert call.velocities == (View("velocities/3", 0), View("velocities/3", 1))
    assert plan.shape(View("velocities/3")) == (2, BATCH, 3, 5)
    assert plan_of("hoisted").operations[3].velocities == ()
    assert plan.operations[0].velocities == (View("velocity"),)
    assert {operation.latents for operation in plan.operations} == {View("noise")}
    with pytest.raises(InputError, match="compile the bundle without --no-velocities"):
        plan_of("plain", for_sampler=True)


def test_a_sampler_outside_gets_each_step_of_a_gap_by_its_own_row():
    plan = plan_of("output", for_sampler=True)
    assert [(call.engine, call.steps) for call in plan.operations][:6] == [
        ("compute", (0,)), ("advance", (0,)), ("advance", (1,)), ("compute", (2,)), ("advance", (2,)), ("advance", (3,)),
    ]  # fmt: skip
    assert plan.operations[0].velocities == ()
    call = plan.operations[5]
    given = constants(plan, call)
    np.testing.assert_array_equal(given["coefficients"], GAPS.rows_out[3, :, :2])
    np.testing.assert_array_equal(given["base_share"], [3])
    assert call.inputs["base"] == call.latents == View("noise")
    assert call.velocities == (call.outputs["next_latents"],)


def test_predictors_answer_a_sampler_outside_step_by_step():
    plan = plan_of("predictor", for_sampler=True)
    assert [call.velocities for call in plan.operations] == [(View("velocity"),)] * STEPS
    assert plan.operations[2].outputs == {"velocity": View("velocity"), "feature": View("slots/feature", 2)}


def test_all_calls_are_the_prologue_and_the_operations():
    plan = plan_of("hoisted")
    assert plan.calls == (plan.prologue, *plan.operations)
    without = plan_of("plain")
    assert without.calls == without.operations


def test_flow_maps_are_told_a_second_time():
    told = replace(LINEAR, target_timesteps=TIMESTEPS + 5)
    compute = Signature((*PLAIN["compute"].inputs, *specs(target_timestep=("batch",))), COMPUTE_OUT)
    signatures = {**PLAIN, "compute": compute}
    plan = plan_binding(signatures, told, IO, batch=BATCH)
    np.testing.assert_array_equal(constants(plan, plan.operations[2])["target_timestep"], [25, 25])
    with pytest.raises(BundleError, match="engine compute takes what its program lacks, target_timestep: compile again"):
        plan_binding(signatures, LINEAR, IO, batch=BATCH)


def test_a_program_may_use_several_compute_graphs():
    both = program([Compute(0, 0), Compute(1, 1), Forecast((2, 3), 2), Compute(4, graph="unguided"), Compute(5)])
    plan = plan_binding({**PLAIN, "unguided": PLAIN["compute"]}, both, IO, batch=BATCH)
    assert [call.engine for call in plan.operations] == ["compute", "compute", "forecast", "unguided", "compute"]
    np.testing.assert_array_equal(constants(plan, plan.operations[3])["t"], [40, 40])


def test_a_program_needs_all_its_engines():
    without = {name: signature for name, signature in PLAIN.items() if name != "forecast"}
    with pytest.raises(BundleError, match="the program needs the engine forecast, which the bundle lacks: compile it again"):
        plan_binding(without, LINEAR, IO, batch=1)
    guided = replace(GAPS, key=replace(GAPS.key, guided=True))
    with pytest.raises(BundleError, match="the program needs the engine guide, which the bundle lacks"):
        plan_binding(PLAIN | {"advance": PLAIN["forecast"]}, guided, IO, batch=1)


def test_a_layout_keeps_everything_apart_and_aligned(case):
    _, _, plan = case
    layout = lay_out(plan, scratch_bytes=1000)
    ends = sorted((begin, begin + plan.buffers[name].nbytes) for name, begin in layout.offsets.items())
    assert set(layout.offsets) == set(plan.buffers)
    assert all(begin % ALIGNMENT == 0 for begin, _ in ends)
    assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    assert layout.scratch_offset % ALIGNMENT == 0
    assert layout.scratch_offset >= ends[-1][1]
    assert layout.size == layout.scratch_offset + 1000
    assert lay_out(plan).size == layout.scratch_offset


def test_constants_come_first_and_in_one_piece(case):
    _, _, plan = case
    layout = lay_out(plan)
    data = constant_data(plan, layout)
    assert data.nbytes == layout.constant_bytes
    for buffer in plan.buffers.values():
        begin = layout.offsets[buffer.name]
        assert (begin < layout.constant_bytes) == (buffer.value is not None)
        if buffer.value is not None:
            part = data[begin : begin + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
            np.testing.assert_array_equal(part, buffer.value)


def test_rows_know_whether_they_are_aligned():
    plan = plan_of("hoisted")
    assert plan.begin(View("slots/feature", 1)) == BATCH * 7 * 4
    assert plan.begin(View("slots/feature", 1, 2)) == BATCH * 7 * 4
    assert plan.begin(View("slots/feature")) == plan.begin(View("slots/feature", 0)) == 0
    assert plan.is_aligned(View("slots/feature", 0, 2))
    assert not plan.is_aligned(View("slots/feature", 1))
    assert plan.is_aligned(View("hoisted/compute_step_values", 2))  # rows of 2 * 64 * 4 bytes


def test_planning_for_a_huge_batch_takes_no_memory():
    plan = plan_binding(PLAIN, LINEAR, IO, batch=2**40)
    assert lay_out(plan).size > 2**40


def test_an_uncached_run_has_no_slots():
    nothing = LINEAR.coefficients[..., :0]
    uncached = replace(LINEAR, instructions=tuple(map(Compute, range(STEPS))), slots={}, coefficients=nothing)
    plan = plan_binding(HOISTING, uncached, IO, batch=1)
    assert plan.shape(plan.prologue.inputs["forecast_timesteps"]) == (1,)
    assert not any("feature" in op.outputs for op in plan.operations)


def test_a_table_is_a_constant_that_all_calls_share():
    table = PlannedBuffer("table/table_1", (3,), "float32", np.arange(3, dtype=np.float32))
    wide = Signature((*PLAIN["compute"].inputs, *specs(table_1=(3,))), COMPUTE_OUT)
    plan = plan_binding({**PLAIN, "compute": wide}, LINEAR, IO, batch=BATCH, tables={"table_1": table})
    read = [call.inputs["table_1"] for call in plan.calls if call.engine == "compute"]
    assert len(read) > 1
    assert {view.buffer for view in read} == {"table/table_1"}
    assert "table_1" not in plan.given
    layout = lay_out(plan)
    held = constant_data(plan, layout)[layout.offsets["table/table_1"] :][:12]
    np.testing.assert_array_equal(held.view("f4"), [0, 1, 2])


def test_a_prologues_table_is_no_time_where_a_step_is_computed_beside_the_program():
    table = PlannedBuffer("table/table_1", (3,), "float32", np.arange(3, dtype=np.float32))
    reading = Signature((*PROLOGUE.inputs, *specs(table_1=(3,))), PROLOGUE.outputs)
    signatures = {**HOISTING, "prologue": reading}
    plan = plan_binding(signatures, LINEAR, IO, batch=BATCH, for_sampler=True, tables={"table_1": table})
    (prologue, _) = plan.asides["compute"].calls
    assert prologue.inputs["table_1"] == plan.prologue.inputs["table_1"]
