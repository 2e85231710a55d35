"""Samplers of diffusers that are linear: class, options, what ``set_timesteps`` is told."""

import numpy as np

STEPS = 8
UNCLIPPED = {"clip_sample": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SIGMAS = {"sigmas": np.linspace(1, 1 / STEPS, STEPS)}
SHIFTED = {**SIGMAS, "mu": 1.15}
DIT = {**UNCLIPPED, "beta_schedule": "linear", "timestep_spacing": "trailing"}
FEW = {"num_train_timesteps": 50}  # made in less time
DYNAMIC = {"use_dynamic_shifting": True}

EULER = [  # class, options, what set_timesteps is told
    ("FlowMatchEulerDiscreteScheduler", {}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, SIGMAS),
    ("FlowMatchEulerDiscreteScheduler", {**DYNAMIC, "shift": 3.0}, SHIFTED),
    ("FlowMatchEulerDiscreteScheduler", {**DYNAMIC, "time_shift_type": "linear", "shift_terminal": 0.02}, SHIFTED),
    ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {}),
    ("FlowMapEulerDiscreteScheduler", {}, {}),
    ("MiniMaxH3Scheduler", {}, {"num_inference_steps": STEPS + 1}),  # it counts noise levels
    ("DDIMScheduler", UNCLIPPED, {}),
    ("DDIMScheduler", DIT, {}),
    ("DDIMScheduler", {**DIT, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
    ("DDIMScheduler", {**DIT, "prediction_type": "sample"}, {}),
    ("DDIMParallelScheduler", UNCLIPPED, {}),
    ("DDIMInverseScheduler", UNCLIPPED, {}),
    ("CogVideoXDDIMScheduler", UNCLIPPED, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}),
    ("EDMEulerScheduler", {}, {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    ("LTXEulerAncestralRFScheduler", {"eta": 0.0}, {}),
]
MULTISTEP = [
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", FLOW, {}),
    ("DPMSolverMultistepInverseScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("DPMSolverSinglestepScheduler", FLOW, {}),
    ("EDMDPMSolverMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {"prediction_type": "v_prediction", "solver_order": 3}, {}),
    ("UniPCMultistepScheduler", FLOW, {}),
    ("DEISMultistepScheduler", {}, {}),
    ("DEISMultistepScheduler", FLOW, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("IPNDMScheduler", {}, {}),
]
