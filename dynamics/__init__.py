"""Flows as neural ODEs: velocity fields, probability paths, solvers, likelihoods and regularizers.

Needs torch only and knows nothing of agents or environments. Shapes: ``x [B, D]``, ``t`` a float or ``[B]``, ``cond
[B, C]`` or None.
"""

from .adaptive import AdaptiveResult, Status, odeint_adaptive
from .fields import LinearField, MLPField, PotentialField, ResidualField, VelocityField
from .likelihood import flow_log_prob, flow_push, standard_normal_log_prob
from .ode import (
    DOPRI5,
    EULER,
    HEUN,
    MIDPOINT,
    RK4,
    SOLVERS,
    Tableau,
    odeint,
    odeint_path,
    odeint_reversible,
    rk_step,
    time_grid,
)
from .paths import BROWNIAN_BRIDGE, LINEAR, TRIG, Path, brownian_bridge, flow_matching_loss, score_from_velocity
from .regularize import (
    adversarial_states,
    fokker_planck_residual,
    jacobian_penalty,
    local_error_penalty,
    spectral_bound_,
    spectral_norms,
    stiffness_penalty,
)

__all__ = [
    "BROWNIAN_BRIDGE",
    "DOPRI5",
    "EULER",
    "HEUN",
    "LINEAR",
    "MIDPOINT",
    "RK4",
    "SOLVERS",
    "TRIG",
    "AdaptiveResult",
    "LinearField",
    "MLPField",
    "Path",
    "PotentialField",
    "ResidualField",
    "Status",
    "Tableau",
    "VelocityField",
    "adversarial_states",
    "brownian_bridge",
    "flow_log_prob",
    "flow_matching_loss",
    "flow_push",
    "fokker_planck_residual",
    "jacobian_penalty",
    "local_error_penalty",
    "odeint",
    "odeint_adaptive",
    "odeint_path",
    "odeint_reversible",
    "rk_step",
    "score_from_velocity",
    "spectral_bound_",
    "spectral_norms",
    "standard_normal_log_prob",
    "stiffness_penalty",
    "time_grid",
]
