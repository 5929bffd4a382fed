"""What `sb3_tests.py` changes in Stable-Baselines3's tests, and which of them fail, with the reason."""

from __future__ import annotations

CHANGES = (
    ("CartPole-v1", "Pendulum-v1", "actions are a Box"),
    (
        "self.action_space = spaces.Discrete(2)\n        self.observation_space = spaces.Discrete(2)",
        "self.action_space = self.observation_space = spaces.Box(-1, 1, (2,))",
        "actions and observations are a Box",
    ),
    (
        'self.action_space = spaces.Discrete(2)\n        self.observation_space = spaces.Dict({"rgb"',
        'self.action_space = spaces.Box(-1, 1, (2,))\n        self.observation_space = spaces.Dict({"rgb"',
        "actions are a Box",
    ),
    ("pytest.raises(AssertionError", "pytest.raises((AssertionError, ValueError)", "ValueError where SB3 asserts"),
    ("action_noise=NormalActionNoise(np.zeros(1), np.zeros(1)),", "", "no action noise; this one is 0"),
    (
        "kwargs = dict(action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)))",
        "kwargs = {}",
        "no action noise; the test is about several environments",
    ),
    (
        '"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)), ',
        "",
        "no action noise; the test is about equal seeds",
    ),
    (
        '            kwargs["use_sde"] = True\n            kwargs["sde_sample_freq"] = 4\n',
        "            pass\n",
        "no gSDE",
    ),
    (
        "PPO: 1000, SAC",
        "PPO: 2000, SAC",
        "exploration begins at half the action range, not at 1: SB3's PPO with this start and SiLU takes as long",
    ),
    ("logname = model_name.upper()", "logname = MODEL_DICT[model_name][0].__name__", "the log has the agent's name"),
    (
        '    model = model_class("MlpPolicy", env, learning_rate=1e-3, **kwargs).learn(n_steps)',
        '    kwargs |= {"learning_starts": 100} if model_class == SAC else {}\n'
        '    model = model_class("MlpPolicy", env, learning_rate=1e-3, **kwargs).learn(n_steps)',
        "SAC's default of learning_starts; ours, 5000, is longer than the test",
    ),
)
"""Text before, text after, and why."""

_EXTRACTORS = "features extractors are not available"
_IMAGES = "observations are vectors, not images"
_DISCRETE = "actions are a Box"
_DISCRETE_OBS = "observations are Boxes"
_SDE = "gSDE is not available"
_CLASS = "the policy is an ActorCriticPolicy of the user's"
_HER = "no HER"
_INTEGERS = "the state of the transition model has integers, the test draws floats"
_ACTOR = "the actor alone is no policy: the agent's policy predicts"
_N_STEPS = "no returns of several steps: the model's rollouts serve the purpose"
_PICKLE = "files hold data only: no pickle in them to corrupt, functions are stored as values"
_BUFFER = "the replay buffer is the agent's own and always stores next observations and time limits"
_RAW = "the model learns from raw observations: normalize_observation=True takes the place of VecNormalize"

EXCEPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "PPO": (
        ("test_cnn.py::*", _IMAGES),
        ("test_save_load.py::test_save_load_policy[False-CnnPolicy-*", _IMAGES),
        ("test_dict_env.py::test_goal_env*", _DISCRETE),
        ("test_dict_env.py::*", _EXTRACTORS),
        ("test_train_eval_mode.py::*", _EXTRACTORS),
        ("test_distributions.py::test_squashed_gaussian*", _SDE),
        ("test_sde.py::*", _SDE),
        ("test_save_load.py::test_save_load_policy[True-*", _SDE),
        ("test_gae.py::test_gae_computation*", _CLASS),
        ("test_identity.py::test_discrete*", _DISCRETE),
        ("test_spaces.py::test_discrete_obs_space*", _DISCRETE),
        ("test_save_load.py::test_load_invalid_object", _PICKLE),
        ("test_save_load.py::test_save_load_backward_compatible*", _PICKLE),
        ("test_save_load.py::test_save_load_clip_range_portable*", "clip_range is a number, not a schedule"),
        (
            "test_run.py::test_ppo_warnings",
            "a last minibatch that is smaller gets no warning: advantages are standardised over the whole rollout",
        ),
    ),
    "SAC": (
        ("test_cnn.py::*", _IMAGES),
        ("test_save_load.py::test_save_load_policy[False-CnnPolicy-*", _IMAGES),
        ("test_dict_env.py::test_vec_normalize*", _RAW),
        ("test_vec_normalize.py::test_offpolicy_normalization*", _RAW),
        ("test_dict_env.py::*", _EXTRACTORS),
        ("test_train_eval_mode.py::*", _EXTRACTORS),
        ("test_her.py::*", _HER),
        ("test_vec_normalize.py::test_her_normalization", _HER),
        ("test_sde.py::*", _SDE),
        ("test_spaces.py::test_sde_multi_dim", _SDE),
        ("test_save_load.py::test_save_load_policy[True-*", _SDE),
        (
            "test_save_load.py::test_save_load_policy[False-MlpPolicy-*",
            _ACTOR,
        ),
        ("test_gae.py::test_infinite_horizon*", _DISCRETE_OBS),
        ("test_spaces.py::test_identity_spaces*", _DISCRETE_OBS),
        ("test_n_step_replay.py::*", _N_STEPS),
        (
            "test_save_load.py::test_save_load[*",
            _INTEGERS,
        ),
        ("test_save_load.py::test_save_load_replay_buffer*", _BUFFER),
        ("test_save_load.py::test_warn_buffer[True-*", _BUFFER),
    ),
}
"""Algorithm of Stable-Baselines3 -> patterns of its tests that fail, and why; the first that fits counts."""
