"""Neural ODEs and SDEs, and models of an environment's step made of them.

Velocity fields, probability paths, noise, solvers, Langevin samplers, likelihoods, regularizers. Needs torch only and
knows nothing of agents or environments. Shapes: ``x [B, D]``, ``t`` a float or ``[B]``, ``cond [B, C]`` or None.

The names below are a start; each module has more. They load on first use: whoever imports ``dynamics.fields`` loads no
solver.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = [
    "DOPRI5",
    "LINEAR",
    "SDE",
    "BrownianGrid",
    "BrownianTree",
    "GaussianTransition",
    "LangevinSDE",
    "MLPField",
    "Path",
    "TransitionSettings",
    "VelocityField",
    "adversarial_states",
    "flow_log_prob",
    "flow_matching_loss",
    "interpolant_sde",
    "jacobian_penalty",
    "kinetic",
    "local_error_penalty",
    "mala",
    "odeint",
    "odeint_adaptive",
    "odeint_path",
    "odeint_reversible",
    "overdamped",
    "sdeint",
    "sdeint_adaptive",
    "sdeint_path",
    "sdeint_reversible",
    "spectral_norms",
    "standard_normal_log_prob",
    "step_noise",
]

if TYPE_CHECKING:
    from .adaptive import odeint_adaptive
    from .adaptive_sde import sdeint_adaptive
    from .brownian import BrownianGrid
    from .brownian_tree import BrownianTree
    from .fields import MLPField, VelocityField
    from .langevin import kinetic, mala, overdamped
    from .likelihood import flow_log_prob, standard_normal_log_prob
    from .lipschitz import adversarial_states, spectral_norms
    from .neural_sde import LangevinSDE, interpolant_sde
    from .noise import step_noise
    from .ode import DOPRI5, odeint, odeint_path
    from .paths import LINEAR, Path, flow_matching_loss
    from .regularize import jacobian_penalty, local_error_penalty
    from .reversible import odeint_reversible
    from .reversible_sde import sdeint_reversible
    from .sde import SDE, sdeint, sdeint_path
    from .transition import GaussianTransition
    from .transition_settings import TransitionSettings
else:  # out of a type checker's sight, for which a module-level __getattr__ would make every name valid
    _NAMES = {
        "adaptive": ("odeint_adaptive",),
        "adaptive_sde": ("sdeint_adaptive",),
        "brownian": ("BrownianGrid",),
        "brownian_tree": ("BrownianTree",),
        "fields": ("MLPField", "VelocityField"),
        "langevin": ("kinetic", "mala", "overdamped"),
        "likelihood": ("flow_log_prob", "standard_normal_log_prob"),
        "lipschitz": ("adversarial_states", "spectral_norms"),
        "neural_sde": ("LangevinSDE", "interpolant_sde"),
        "noise": ("step_noise",),
        "ode": ("DOPRI5", "odeint", "odeint_path"),
        "paths": ("LINEAR", "Path", "flow_matching_loss"),
        "regularize": ("jacobian_penalty", "local_error_penalty"),
        "reversible": ("odeint_reversible",),
        "reversible_sde": ("sdeint_reversible",),
        "sde": ("SDE", "sdeint", "sdeint_path"),
        "transition": ("GaussianTransition",),
        "transition_settings": ("TransitionSettings",),
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value  # found without this function from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
