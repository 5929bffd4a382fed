"""What benchmarks/learning.py compares: each arm makes an agent and says which settings are to be kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results" / "learning"
LATE_NOISE_SHARE = 0.3
"""Part of a run, at its end, that has the noise of `late_noise`."""

# rl_zoo3 2.9.2, hyperparams/ppo.yml, entries of the v4 tasks (it has none for v5). Ant's are SB3's defaults, as are
# Walker2d's networks.
ZOO: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {
        "n_steps": 512, "batch_size": 64, "n_epochs": 20, "learning_rate": 2.0633e-05, "gamma": 0.98,
        "gae_lambda": 0.92, "clip_range": 0.1, "ent_coef": 0.000401762, "vf_coef": 0.58096, "max_grad_norm": 0.8,
    },
    "Hopper-v5": {
        "n_steps": 512, "batch_size": 32, "n_epochs": 5, "learning_rate": 9.80828e-05, "gamma": 0.999,
        "gae_lambda": 0.99, "clip_range": 0.2, "ent_coef": 0.00229519, "vf_coef": 0.835671, "max_grad_norm": 0.7,
    },
    "Walker2d-v5": {
        "n_steps": 512, "batch_size": 32, "n_epochs": 20, "learning_rate": 5.05041e-05, "gamma": 0.99,
        "gae_lambda": 0.95, "clip_range": 0.1, "ent_coef": 0.000585045, "vf_coef": 0.871923, "max_grad_norm": 1.0,
    },
    "Humanoid-v5": {
        "n_steps": 512, "batch_size": 256, "n_epochs": 5, "learning_rate": 3.56987e-05, "gamma": 0.95,
        "gae_lambda": 0.9, "clip_range": 0.3, "ent_coef": 0.00238306, "vf_coef": 0.431892, "max_grad_norm": 2.0,
    },
    "Ant-v5": {"gamma": 0.99},
    "Ant27-v5": {"gamma": 0.99},
}  # fmt: skip


def result_folder(env: str, arm: str, total_timesteps: int) -> Path:
    """Where the seeds of one row of the table are kept."""
    name = env.rpartition(":")[2]  # without the module that registers it
    return RESULTS / f"{name}-{total_timesteps // 1000}k" / re.sub(r"[^\w.+-]+", "_", arm)


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    env: str
    arm: str
    seed: int
    total_timesteps: int

    @property
    def path(self) -> Path:
        return result_folder(self.env, self.arm, self.total_timesteps) / f"s{self.seed}.json"


def sb3_zoo(run: Run) -> tuple[Any, dict[str, Any]]:
    """SB3's PPO with rl_zoo3's hyperparameters, one environment, VecNormalize."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    env_id = run.env.rpartition(":")[2]  # without the module that registers it
    settings = ZOO[env_id]
    network = {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": nn.ReLU,
        "net_arch": {"pi": [256, 256], "vf": [256, 256]},
    }
    stated: dict[str, Any] = {"net_arch": [256, 256], "log_std_init": -2, "activation": "relu"}
    if env_id in ("Ant-v5", "Ant27-v5", "Walker2d-v5"):  # their entries name no policy_kwargs
        network, stated = {}, {}
    env = VecNormalize(make_vec_env(run.env, n_envs=1, seed=run.seed), gamma=settings["gamma"])
    agent = PPO("MlpPolicy", env, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    return agent, settings | stated | {"n_envs": 1}


def sb3_default(run: Run) -> tuple[Any, dict[str, Any]]:
    """SB3's PPO as it comes, one environment, VecNormalize: what a user has without tuning."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from driftrl.agents.registry import policy_alias

    env = VecNormalize(make_vec_env(run.env, n_envs=1, seed=run.seed))
    return PPO(policy_alias(env), env, seed=run.seed, device="cpu"), {"n_envs": 1}


def preset(env_id: str, **overrides: Any) -> tuple[int, Any]:
    """Number of environments and Config that `train.py` uses for this environment."""
    from driftrl.agents.registry import AGENTS

    run, config = AGENTS["policyflow"].settings(env_id, "standard", **overrides)
    return run["n_envs"], config


def sb3_preset(run: Run, presets_of: str | None = None, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """SB3's PPO with the hyperparameters of our preset, or that of another environment.

    VecNormalize is in place of our normalisers. The KL-adaptive learning rate, which SB3 lacks, is added.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn, optim

    from driftrl.agents.registry import policy_alias

    n_envs, config = preset(run.env if presets_of is None else presets_of, **overrides)

    class AdaptivePPO(PPO):
        """PPO whose learning rate keeps the mean KL of all minibatches within a factor of 2 of desired_kl."""

        rate = config.learning_rate

        def train(self) -> None:  # what Stable-Baselines3 logs is the mean of the last epoch
            found, batches, evaluate = list[float](), self.rollout_buffer.get, self.policy.evaluate_actions

            def watched_batches(size: int | None) -> Iterator[Any]:
                for self.batch in batches(size):
                    yield self.batch

            def watched(obs: Any, actions: Any) -> Any:
                values, log_prob, entropy = evaluate(obs, actions)
                change = (log_prob - self.batch.old_log_prob).detach()
                found.append((change.exp() - 1 - change).mean().item())
                return values, log_prob, entropy

            with (
                mock.patch.object(self.rollout_buffer, "get", watched_batches),
                mock.patch.object(self.policy, "evaluate_actions", watched),
            ):
                super().train()
            kl, goal = sum(found) / len(found), config.kl_goal(self._current_progress_remaining)
            factor = 1 / 1.5 if kl > 2 * goal else 1.5 if kl < goal / 2 else 1.0
            self.rate = min(max(self.rate * factor, config.lr_min), config.lr_max)

        def _update_learning_rate(self, optimizers: Any) -> None:
            if config.lr_schedule == "adaptive":
                for group in optimizers.param_groups:
                    group["lr"] = self.rate
            else:
                super()._update_learning_rate(optimizers)
            if config.critic_learning_rate is not None:
                falls = self._current_progress_remaining if config.lr_schedule == "linear" else 1.0
                optimizers.param_groups[1]["lr"] = config.critic_learning_rate * falls

    names = (
        "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "ent_coef",
        "vf_coef", "max_grad_norm", "normalize_advantage",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    rate = (lambda left: left * config.learning_rate) if config.lr_schedule == "linear" else config.learning_rate
    activation = {"silu": nn.SiLU, "mish": nn.Mish, "tanh": nn.Tanh, "elu": nn.ELU}[config.activation]
    # The spread of our first actions: base and action noise together.
    std = math.hypot(config.base_std, config.action_std)
    network = {
        "log_std_init": math.log(std),
        "activation_fn": activation,
        "net_arch": {"pi": list(config.actor_hidden), "vf": list(config.critic_hidden)},
    }
    env = VecNormalize(  # which adds epsilon to the variance of the returns, too
        make_vec_env(run.env, n_envs=n_envs, seed=run.seed), gamma=config.gamma, epsilon=config.observation_epsilon
    )
    agent = AdaptivePPO(policy_alias(env), env, rate, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    if config.critic_learning_rate is not None:
        own = [*agent.policy.mlp_extractor.value_net.parameters(), *agent.policy.value_net.parameters()]
        rest = [each for each in agent.policy.parameters() if all(each is not one for one in own)]
        groups = [{"params": rest}, {"params": own}]
        agent.policy.optimizer = optim.Adam(groups, config.learning_rate, eps=1e-5)
    adaptive = {
        name: getattr(config, name)
        for name in ("learning_rate", "critic_learning_rate", "lr_schedule", "desired_kl", "desired_kl_end")
    }
    return agent, settings | adaptive | {
        "n_envs": n_envs, "net_arch": network["net_arch"], "initial_std": std, "activation": config.activation
    }  # fmt: skip


def policyflow(run: Run, presets_of: str | None = None, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """PolicyFlow as `python train.py policyflow --env ENV` makes it, or by the preset of another environment."""
    from driftrl import PolicyFlow
    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    n_envs, config = preset(run.env if presets_of is None else presets_of, **overrides)
    env = make_vec(run.env, n_envs, run.seed)
    agent = PolicyFlow(policy_alias(env), env, config=config, seed=run.seed, device="cpu")
    return agent, asdict(config) | {"n_envs": n_envs}


def policyflow_default(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """PolicyFlow by the default preset as it was while it was tuned: kept results are named by what differs from it."""
    former = {"critic_learning_rate": None, "clip_range_vf": 0.2, "desired_kl_end": None}
    return policyflow(run, presets_of="", **(former | overrides))


def mbpo(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO as `python train.py mbpo --preset fast --env ENV` makes it; model=none is SAC alone."""
    from driftrl.agents.registry import AGENTS

    settings, config = AGENTS["mbpo"].settings(run.env, "fast", **overrides)
    return _model_based(run, config, settings["n_envs"])


def value_gradient(run: Run, late_noise: float = 0.0, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO as `python train.py mbpo --env ENV` makes it: value gradients through one model.

    late_noise is the actor_noise of the last LATE_NOISE_SHARE of the run: up to there it is that without.
    """
    from driftrl.agents.registry import AGENTS

    settings, config = AGENTS["mbpo"].settings(run.env, "standard", **overrides)
    env_kwargs = OBSERVATIONS.get(run.env, {})
    agent, stated = _model_based(run, config, settings["n_envs"], **env_kwargs)
    return agent, stated | {"env_kwargs": env_kwargs} | ({"late_noise": late_noise} if late_noise else {})


def _model_based(run: Run, config: Any, n_envs: int = 1, **env_kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO, and its settings."""
    from driftrl import LipschitzMBPO
    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    env = make_vec(run.env, n_envs, run.seed, **env_kwargs)
    agent = LipschitzMBPO(policy_alias(env), env, config=config, seed=run.seed, device="cpu")
    return agent, asdict(config) | {"n_envs": n_envs}


# The observations that model-based papers use: Ant's 27 and Humanoid's 45.
_WITHOUT = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
OBSERVATIONS: dict[str, dict[str, Any]] = {
    "Ant-v5": {"include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {f"include_{name}_in_observation": False for name in _WITHOUT},
}

# Of SAC alone against SB3's: SB3's defaults, but for widths that a small machine can train.
SAC: dict[str, Any] = {
    "learning_rate": 3e-4, "buffer_size": 1_000_000, "learning_starts": 100, "batch_size": 256, "gradient_steps": 1,
    "tau": 0.005, "gamma": 0.99,
}  # fmt: skip
SAC_HIDDEN = (128, 128)


def sac(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """LipschitzMBPO without model and regularizer, with the hyperparameters of the arm sb3-sac."""
    from driftrl import LipschitzMBPOConfig

    plain = {"model": "none", "regularizer": "none", "actor_hidden": SAC_HIDDEN, "critic_hidden": SAC_HIDDEN}
    return _model_based(run, LipschitzMBPOConfig(**(SAC | plain | overrides)))


def sb3_sac(run: Run, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    """SB3's SAC, one environment."""
    from stable_baselines3 import SAC as Peer

    from driftrl.agents.registry import policy_alias
    from driftrl.envs import make_vec

    settings = SAC | overrides
    network = {"net_arch": list(SAC_HIDDEN)}
    env = make_vec(run.env, 1, run.seed)
    agent = Peer(policy_alias(env), env, policy_kwargs=network, seed=run.seed, device="cpu", **settings)
    return agent, settings | network | {"n_envs": 1}


ARMS: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "policyflow": policyflow,
    "policyflow-default": policyflow_default,
    "mbpo": mbpo,
    "value-gradient": value_gradient,
    "sac": sac,
    "sb3-sac": sb3_sac,
    "sb3-preset": sb3_preset,
    "sb3-zoo": sb3_zoo,
    "sb3-default": sb3_default,
}
POLICYFLOW_ARMS = ("policyflow:ratio=interpolation", "policyflow:ratio=endpoint", "sb3-preset", "sb3-zoo")
LABELS = {
    "policyflow:ratio=interpolation": "PolicyFlow, interpolation ratio",
    "policyflow:ratio=endpoint": "PolicyFlow, endpoint ratio",
    "value-gradient": "LipschitzMBPO, value gradients",
    "sac": "SAC alone (LipschitzMBPO without model and regularizer)",
    "sb3-sac": "SB3 SAC",
    "sb3-preset": "SB3 PPO, our preset's hyperparameters",
    "sb3-zoo": "SB3 PPO, rl_zoo3's tuned hyperparameters",
    "sb3-default": "SB3 PPO, its defaults and VecNormalize",
}


def build(run: Run) -> tuple[Any, dict[str, Any]]:
    """The agent of an arm, "name" or "name:field=value,field=value", and the settings to keep.

    Kept results go on under the name they have: an arm may call fields as an earlier version did.
    """
    from driftrl.agents.registry import AGENTS

    name, _, overrides = run.arm.partition(":")
    pairs = re.split(r",(?=\w+=)", overrides)  # a value may be a list
    fields = {key: _value(text) for key, text in (pair.split("=", 1) for pair in pairs if pair)}
    upgraded = AGENTS["mbpo" if name in ("mbpo", "sac", "value-gradient") else "policyflow"].upgraded
    return ARMS[name](run, **upgraded(fields))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
