"""Stable-Baselines3's PPO with several seeds, logged so that compare.py can read it. Nothing here is of DriftRL.

    python docs/examples/train_ppo.py --env InvertedPendulum-v5 --seeds 0 1 2 --total-timesteps 30000

Each seed has a folder, logs/ppo/<env>/s<seed>: the log as CSV, every episode (Monitor's file, which tells the
environment), and evaluations of the deterministic policy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure


def train(env: str, seed: int, total_timesteps: int, folder: Path) -> None:
    """Train PPO with its default settings; evaluate it ten times on the way."""
    agent = PPO("MlpPolicy", make_vec_env(env, monitor_dir=str(folder)), seed=seed, device="cpu")
    agent.set_logger(configure(str(folder), ["csv"]))
    evaluation = EvalCallback(
        make_vec_env(env), log_path=str(folder), eval_freq=max(total_timesteps // 10, 1), n_eval_episodes=10, verbose=0
    )
    agent.learn(total_timesteps, callback=evaluation)
    agent.logger.close()


def main() -> None:
    """Read the command line and train one seed after the other."""
    parser = argparse.ArgumentParser(description="Train Stable-Baselines3's PPO, logged for compare.py.")
    parser.add_argument("--env", default="InvertedPendulum-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--total-timesteps", type=int, default=30_000, help="(default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("logs/ppo"), help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower with more
    for seed in args.seeds:
        folder = args.logs / args.env.replace("/", "_") / f"s{seed}"
        train(args.env, seed, args.total_timesteps, folder)
        print(f"PPO on {args.env}, seed {seed}: {args.total_timesteps:,} steps, logged in {folder}")


if __name__ == "__main__":
    main()
