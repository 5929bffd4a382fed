"""Settings by environment id: data, applied by `train.py` and printed at its start.

n_envs and total_timesteps belong to the training run; everything else is a field of the agent's Config. An id's entry
replaces the default one.
docs/policyflow.md has the measurements. Tasks without an entry take the default, which was chosen on other tasks
(benchmarks/notes/policyflow.md).
"""

from __future__ import annotations

from typing import Any

WIDE: dict[str, Any] = {"actor_hidden": (128, 128), "critic_hidden": (128, 128)}
# Rollouts of 1,024 samples: twice as many iterations as with 2,048, and each moves the policy by about desired_kl. A
# critic whose rate does not fall with the actor's, and that may move as far as its targets ask.
SMALL: dict[str, Any] = WIDE | {
    "n_envs": 16, "n_steps": 64, "batch_size": 128, "critic_learning_rate": 1e-3, "clip_range_vf": None,
}  # fmt: skip
# Large steps first, small ones at the end, where the policy is to settle (docs/policyflow.md).
DEFAULT: dict[str, Any] = SMALL | {"desired_kl": 0.02, "desired_kl_end": 0.005}
# Many environments for few steps: the cheapest samples.
LARGE: dict[str, Any] = {"n_envs": 64, "n_steps": 32, "batch_size": 256}

SPREAD: dict[str, Any] = WIDE | {
    "n_envs": 1024, "n_steps": 32, "batch_size": 4096, "n_epochs": 5, "activation": "relu", "base": "standard",
    "base_std": 1.0, "spread": "paper",
}  # fmt: skip
# With the paper's base of 1, which cannot shrink, its ratio loses touch with the exact one here (docs/multimodal.md).
MAZE: dict[str, Any] = WIDE | {
    "n_envs": 32, "n_steps": 64, "batch_size": 256, "base_std": 0.5, "ratio": "endpoint", "ent_coef": 0.01,
}  # fmt: skip
FETCH: dict[str, Any] = {
    "n_envs": 64, "n_steps": 250, "batch_size": 1000, "n_epochs": 10, "total_timesteps": 800_000, "gamma": 0.98,
    "learning_rate": 2e-4, "lr_schedule": "linear", "clip_range": 0.2, "critic_warmup": 4,
    "critic_learning_rate": 1e-3, "base": "gaussian", "base_std": 1.0, "solver_steps": 5, "ratio": "endpoint",
    "action_std": 0.05, "action_std_min": 0.05, "actor_hidden": (256, 256, 256), "activation": "mish",
}  # fmt: skip

POLICYFLOW: dict[str, dict[str, Any]] = {
    # 64 x 32 and two solver steps save a quarter of the time here too, and more seeds find the slow gait.
    "HalfCheetah-v5": LARGE
    | WIDE
    | {
        "n_envs": 16, "n_steps": 128, "solver_steps": 4, "gamma": 0.98, "gae_lambda": 0.92, "ema_decay": 0.995,
        "desired_kl": 0.02,
    },
    "Hopper-v5": LARGE | WIDE | {"ema_decay": 0.995, "clip_range_vf": None},
    "Walker2d-v5": DEFAULT,
    # A fall costs all that is to come, which a discount of 0.98 halves. Contact forces are at rest in most steps:
    # standardised by so small a variance they drown the rest.
    "Ant-v5": LARGE | WIDE | {"clip_range_vf": None, "observation_epsilon": 1.0},
    "Humanoid-v5": SMALL | {"gamma": 0.98, "gae_lambda": 0.92},
    # Small rollouts: episodes are short at first and the task is learned within tens of thousands of steps.
    "InvertedPendulum-v5": {"n_envs": 8, "n_steps": 64, "batch_size": 128},
    # A discount near 1: with 0.99 the swimmer never learns the slow stroke that pays.
    "Swimmer-v5": LARGE | {"n_envs": 4, "n_steps": 1024, "gamma": 0.9999, "gae_lambda": 0.98},
    # Balancing wants small steps all along.
    "InvertedDoublePendulum-v5": SMALL,
    # Reaching takes a dozen of the 50 steps.
    "Reacher-v5": DEFAULT | {"gamma": 0.9},
    # Several solutions want a wide base, and the Brownian regularizer keeps it wide (docs/multimodal.md). On MultiGoal
    # the way to a far goal must not be cheap (discount). Noise shifts the centre from which all goals are equally far:
    # steps that end at 0, large rollouts, long returns, networks with edges, and a cost of transport. A heavier weight
    # at the start spreads actions beyond their bounds.
    "driftrl/MultiGoal-v0": SPREAD
    | {
        "n_envs": 2048, "batch_size": 8192, "total_timesteps": 8_000_000, "learning_rate": 1e-3,
        "lr_schedule": "linear", "gamma": 0.95, "gae_lambda": 0.99, "actor_hidden": (64, 64), "ratio": "endpoint",
        "solver_steps": 2, "base_std": 0.5, "action_std": 0.3, "spread": "score", "spread_coef": 0.05,
        "target_entropy": (1.8, 1.2), "transport_coef": 0.2,
    },
    # From its start all goals are equally far; a critic with random values prefers one, and that is slow to go.
    "driftrl/SoftMultiGoal-v0": SPREAD
    | {"total_timesteps": 1_200_000, "critic_gain": 0.0, "spread_coef": 0.05},
    # After pretraining on demonstrations (docs/demonstrations.md): small steps of the policy, so that equally good
    # routes stay, and a critic that learns first.
    "driftrl/Avoid-v0": {
        "n_envs": 64, "n_steps": 50, "batch_size": 640, "n_epochs": 5, "total_timesteps": 400_000,
        "learning_rate": 1e-4, "lr_schedule": "constant", "clip_range": 0.1, "critic_warmup": 3,
        "critic_learning_rate": 1e-3, "base": "standard", "base_std": 1.0, "solver_steps": 5, "ratio": "endpoint",
        "action_std": 0.1, "action_std_min": 0.05, "actor_hidden": (128, 128, 128), "activation": "mish",
    },
    # After pretraining, too: rewards come late, so rollouts hold 320 episodes. Steer (--freeze-flow) at 7e-4.
    "FetchPush-v4": FETCH,
    "FetchPickAndPlace-v4": FETCH,
    "driftrl/PointMazeMedium-v0": MAZE,
    "PointMaze_Medium_Diverse_GDense-v3": MAZE,
}  # fmt: skip

# After pretraining on demonstrations of tasks without settings of their own. A wide base and five steps: two from a
# narrow base miss much of what the flow has learned. Noise is what it has not learned, so there is little.
IMITATION: dict[str, Any] = {
    "n_envs": 16, "n_steps": 128, "batch_size": 256, "n_epochs": 5, "learning_rate": 1e-4, "lr_schedule": "constant",
    "clip_range": 0.1, "critic_warmup": 3, "critic_learning_rate": 1e-3, "base": "standard", "base_std": 1.0,
    "solver_steps": 5, "ratio": "endpoint", "action_std": 0.05, "action_std_min": 0.02,
    "actor_hidden": (128, 128, 128), "activation": "mish",
}  # fmt: skip
POLICYFLOW_DEMONSTRATIONS = {
    env_id: POLICYFLOW[env_id] for env_id in ("driftrl/Avoid-v0", "FetchPush-v4", "FetchPickAndPlace-v4")
}

# For some 50,000 steps: a quarter of the samples per iteration, so four times as many iterations. At 200,000 steps
# Hopper-v5 learns worse with them (docs/policyflow.md). Swimmer-v5 and tasks with several solutions keep theirs.
SHORT: dict[str, Any] = {"n_envs": 16, "n_steps": 32, "batch_size": 128}
POLICYFLOW_SHORT = POLICYFLOW | {
    env_id: POLICYFLOW[env_id] | SHORT
    for env_id in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "Reacher-v5")
}


def _rollouts(first: int, last: int, start: int, end: int) -> dict[str, Any]:
    return {"rollout_min": first, "rollout_max": last, "rollout_start": start, "rollout_end": end}


# Value gradients, after DHMBPO (arXiv 2512.15439), with one model: one preset for all tasks (docs/lipschitz_mbpo.md).
# Start states are those of the last ten batches of 260 model rollouts of 20 steps.
VALUE_GRADIENT: dict[str, Any] = {
    "n_envs": 1, "total_timesteps": 100_000, "learning_starts": 2500, "gradient_steps": 1, "value_gradient": 5,
    "gamma": 0.995, "temperature": 0.1, "normalize_observation": True, "ema_decay": 0.999, "activation": "silu",
    "actor_hidden": (256, 256, 256), "critic_hidden": (256, 256, 256), "n_critics": 3, "critic_layer_norm": True,
    "lr_schedule": "linear",  # with a constant rate the last policies swing between 1,400 and 3,400 on Hopper-v5
    "model": "homoscedastic", "model_hidden": (256, 256, 256), "model_layer_norm": True, "model_dropout": 0.0075,
    "model_weight_decay": 1e-3, "model_patience": 125, "regularizer": "none",
    "observation_noise": 0.05,  # without it a shift of a state by as much may halve the return on Hopper-v5
    "rollout_interval": 20, "model_rollouts": 13, "model_retain": 200, "rollout_min": 20, "rollout_max": 20,
}  # fmt: skip
VALUE_GRADIENTS: dict[str, dict[str, Any]] = {
    "Hopper-v5": VALUE_GRADIENT | {"total_timesteps": 30_000},
    "InvertedPendulum-v5": VALUE_GRADIENT | {"total_timesteps": 5000, "learning_starts": 300},
}

# MBPO's schedules (jannerm/mbpo, examples/config), for one environment and hours of training.
MBPO_DEFAULT: dict[str, Any] = {"n_envs": 1, "total_timesteps": 300_000, "rollout_min": 1, "rollout_max": 1}
LONG: dict[str, dict[str, Any]] = {
    "Hopper-v5": {"total_timesteps": 125_000, **_rollouts(1, 15, 20_000, 150_000), "target_entropy": -1},
    "Walker2d-v5": {"target_entropy": -3},
    "HalfCheetah-v5": {"total_timesteps": 400_000, "gradient_steps": 40, "target_entropy": -3},
    # MBPO's Ant and Humanoid have 27 and 45 observations: --env-kwargs include_cfrc_ext_in_observation=false and so on.
    "Ant-v5": {**_rollouts(1, 25, 20_000, 100_000), "target_entropy": -4},
    "Humanoid-v5": {
        **_rollouts(1, 25, 20_000, 300_000), "target_entropy": -2, "model_interval": 1000, "model_retain": 5000,
        "model_hidden": (400, 400, 400, 400),
    },
    "InvertedPendulum-v5": {
        "total_timesteps": 5000, "learning_starts": 300, "gradient_steps": 12, "learning_rate": 1e-3,
        "temperature": 0.1, "actor_hidden": (128, 128), "critic_hidden": (128, 128), "model_hidden": (100, 100, 100),
        "normalize_observation": True,  # the pole's angle is a tenth of the velocities
        "robust_actions": "same_action",  # the paper's flattens Q over actions, on which everything depends here
    },
}  # fmt: skip
MBPO = {env_id: MBPO_DEFAULT | preset for env_id, preset in LONG.items()}

# For two cores: fewer updates per step, smaller networks and short model rollouts, for some ten minutes of training.
FAST: dict[str, Any] = {
    "total_timesteps": 30_000, "learning_starts": 2000, "gradient_steps": 4, "learning_rate": 1e-3, "temperature": 0.1,
    "actor_hidden": (128, 128), "critic_hidden": (128, 128), "model_hidden": (128, 128, 128), "model_rollouts": 100,
}  # fmt: skip
MBPO_FAST_DEFAULT = MBPO_DEFAULT | FAST
MBPO_FAST = {env_id: preset | FAST for env_id, preset in MBPO.items()} | {
    "Hopper-v5": MBPO["Hopper-v5"] | FAST | {**_rollouts(1, 5, 5_000, 30_000)},
    "InvertedPendulum-v5": MBPO["InvertedPendulum-v5"],
}
