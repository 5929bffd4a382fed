"""Where velocities are hidden, does a latent state of oscillators predict better than a GRU of equal size?

    OMP_NUM_THREADS=1 python benchmarks/latent_dynamics.py

Fits `LangevinFlow` with two KL weights, and a GRU, to sequences of positions that a policy saw, and writes the errors
of their predictions into docs/dynamics.md. The policy has learned for 30,000 steps from positions alone; its actions
are sampled. All models read 10 observations and predict the next 20. They see the same batches, are trained on the
likelihood of both parts, and have as many parameters within 5 %. No hyperparameter was tuned. Every fit is kept in
`benchmarks/results/latent_dynamics/` and not repeated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
import tyro
from learning import write_between
from paired import machine, write
from torch import Tensor, nn

from driftrl import PolicyFlow
from driftrl.dynamics.langevin_flow import Elbo, LangevinFlow
from driftrl.envs import ObservationMask, make_vec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "latent_dynamics"
POSITIONS = {"Hopper-v5": 5, "HalfCheetah-v5": 8}
"""Positions that the observation begins with; velocities follow."""
KL_WEIGHTS = {"langevin_kl_1": 1.0, "langevin_kl_0.1": 0.1}
NAMES = {
    "langevin_kl_1": "`LangevinFlow`, KL weight 1",
    "langevin_kl_0.1": "`LangevinFlow`, KL weight 0.1",
    "gru": "GRU",
}
ARMS = tuple(NAMES)
HISTORY, HORIZON = 10, 20
STEPS = (1, 5, 10, 20)
UPDATES, BATCH, LEARNING_RATE = 2500, 64, 1e-3


class Sequences(NamedTuple):
    """Windows of episodes, standardised; time is the second axis."""

    obs: Tensor  # [N, L, O]
    action: Tensor  # [N, L - 1, A]
    reward: Tensor  # [N, L - 1]


class GRU(nn.Module):
    """A deterministic latent state: one cell reads observations, another goes on with actions alone."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, head: int = 64) -> None:
        super().__init__()
        self.encoder = nn.GRUCell(obs_dim + action_dim, hidden)
        self.transition = nn.GRUCell(action_dim, hidden)
        self.decoder = nn.Sequential(nn.Linear(hidden, head), nn.SiLU(), nn.Linear(head, obs_dim))
        self.reward_head = nn.Sequential(nn.Linear(hidden + action_dim, head), nn.SiLU(), nn.Linear(head, 1))
        self.log_std = nn.Parameter(torch.zeros(obs_dim + 1))

    def decoded(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the observations and rewards at all actions, of a history and of what follows it."""
        memory = self.encoder(torch.cat([obs[0], torch.zeros_like(action[0])], 1))
        states = [memory]
        for t, act in enumerate(action):
            seen = torch.cat([obs[t + 1], act], 1) if t + 1 < len(obs) else None
            memory = self.transition(act, memory) if seen is None else self.encoder(seen, memory)
            states.append(memory)
        state = torch.stack(states)
        return self.decoder(state), self.reward_head(torch.cat([state[1:], action], 2)).squeeze(2)

    def elbo(self, obs: Tensor, action: Tensor, reward: Tensor, observed: int) -> Elbo:
        """Its log-likelihood; nothing diverges from a prior."""
        seen, paid = self.decoded(obs[:observed], action)
        errors = torch.cat([obs - seen, torch.zeros_like(obs[:, :, :1])], 2)
        errors[1:, :, -1] = reward - paid
        terms = torch.distributions.Normal(0.0, self.log_std.exp()).log_prob(errors)
        log_likelihood = terms.sum((0, 2)) - terms[0, :, -1]  # no reward before the first observation
        return Elbo(log_likelihood, torch.zeros_like(log_likelihood))

    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """As `LangevinFlow.predict`."""
        seen, paid = self.decoded(obs, action)
        return seen[len(obs) :], paid[len(obs) - 1 :]


def size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def build(arm: str, obs_dim: int, action_dim: int) -> LangevinFlow | GRU:
    """The model of an arm; the GRU is as wide as makes its size closest to that of `LangevinFlow`."""
    flow = LangevinFlow(obs_dim, action_dim)
    if arm != "gru":
        return flow
    width = min(range(16, 129), key=lambda hidden: abs(size(GRU(obs_dim, action_dim, hidden)) - size(flow)))
    return GRU(obs_dim, action_dim, width)


def masked(env_id: str) -> str:
    """The id of a task without its velocities."""
    name, bare = f"positions/{env_id}", gym.spec(env_id)
    if name not in gym.registry:
        mask = ObservationMask.wrapper_spec(hidden=slice(POSITIONS[env_id], None))
        limit = bare.max_episode_steps
        gym.register(name, bare.entry_point, max_episode_steps=limit, additional_wrappers=(mask,))
    return name


def episodes(env_id: str, rows: int, learned: int) -> Iterator[tuple[Any, Any, Any]]:
    """Observations [n + 1, O], actions [n, A] and rewards [n] of each episode of a sampled policy."""
    torch.manual_seed(0)
    agent = PolicyFlow("MlpPolicy", make_vec(masked(env_id), 16, 0), n_steps=64, batch_size=128, seed=0, device="cpu")
    agent.learn(learned)
    env = make_vec(masked(env_id), 16, 1)
    obs = cast(np.ndarray, env.reset())
    kept: list[tuple[list[Any], list[Any], list[Any]]] = [([first], [], []) for first in obs]
    for _ in range(rows // 16):
        action, _ = agent.predict(obs.astype(np.float32), deterministic=False)
        obs, reward, ended, infos = cast(Any, env.step(action))
        for i, (seen, acted, paid) in enumerate(kept):
            acted.append(action[i])
            paid.append(reward[i])
            seen.append(infos[i]["terminal_observation"] if ended[i] else obs[i])
            if ended[i]:
                yield np.array(seen), np.array(acted), np.array(paid)
                kept[i] = ([obs[i]], [], [])
    yield from ((np.array(seen), np.array(acted), np.array(paid)) for seen, acted, paid in kept if acted)


def windows(found: list[Any], stride: int, scales: list[Any]) -> Sequences:
    """Windows of a history and a horizon, in means and standard deviations `scales` of each column."""
    length = HISTORY + HORIZON
    cut = [
        [(each - mean) / std for each, (mean, std) in zip(episode, scales, strict=True)]
        for episode in found
        if len(episode[0]) >= length
    ]
    columns = zip(
        *(
            (obs[i : i + length], action[i : i + length - 1], reward[i : i + length - 1])
            for obs, action, reward in cut
            for i in range(0, len(obs) - length + 1, stride)
        ),
        strict=True,
    )
    return Sequences(*(torch.as_tensor(np.array(each), dtype=torch.float32) for each in columns))


def data(env_id: str, folder: Path, rows: int, learned: int) -> tuple[Sequences, Sequences]:
    """Windows of four fifths of the episodes, and every fifth window of the others, which are not trained on."""
    file = folder / f"{env_id}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = list(episodes(env_id, rows, learned))
        ends = np.cumsum([len(reward) for _, _, reward in found])
        obs, action, reward = (np.concatenate(each) for each in zip(*found, strict=True))
        np.savez(file, obs=obs, action=action, reward=reward, ends=ends)
    loaded = np.load(file)
    starts = [0, *loaded["ends"][:-1]]
    found = [
        (loaded["obs"][a + i : b + i + 1], loaded["action"][a:b], loaded["reward"][a:b])
        for i, (a, b) in enumerate(zip(starts, loaded["ends"], strict=True))
    ]
    trained = [episode for i, episode in enumerate(found) if i % 5 != 4]
    scales = [(each.mean(0), each.std(0) + 1e-6) for each in map(np.concatenate, zip(*trained, strict=True))]
    return windows(trained, 1, scales), windows(found[4::5], 5, scales)


def errors(predicted: tuple[Tensor, Tensor], sequences: Sequences) -> dict[str, list[float]]:
    """Root mean square errors after `STEPS`, in standard deviations."""
    obs, reward = predicted[0].transpose(0, 1), predicted[1].T
    places = [HISTORY - 1 + k for k in STEPS]
    at = [k - 1 for k in STEPS]
    wrong = (obs[:, at] - sequences.obs[:, places]).square().mean((0, 2)).sqrt()
    paid = (reward[:, at] - sequences.reward[:, [place - 1 for place in places]]).square().mean(0).sqrt()
    return {"obs": wrong.tolist(), "reward": paid.tolist()}


def fit(env_id: str, arm: str, seed: int, folder: Path, rows: int, learned: int, updates: int) -> dict[str, Any]:
    """Train one model and measure it."""
    train, held_out = data(env_id, folder, rows, learned)
    torch.manual_seed(seed)
    model = build(arm, train.obs.shape[2], train.action.shape[2])
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    batches, draws = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    start, loss, parts = time.process_time(), torch.tensor(math.nan), Elbo(torch.zeros(1), torch.zeros(1))
    for _ in range(updates):
        rows_of_batch = torch.randint(len(train.obs), (BATCH,), generator=batches)
        obs, action, reward = (each[rows_of_batch].transpose(0, 1) for each in train)
        if isinstance(model, GRU):
            parts = model.elbo(obs, action, reward, HISTORY)
        else:
            noise = torch.randn(len(obs) + 1, BATCH, model.latent_dim, generator=draws)
            parts = model.elbo(obs, action, reward, noise, HISTORY)
        loss = parts.loss(KL_WEIGHTS.get(arm, 0.0))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        predicted = model.predict(held_out.obs[:, :HISTORY].transpose(0, 1), held_out.action.transpose(0, 1))
        last = held_out.obs[:, HISTORY - 1].expand(HORIZON, -1, -1), torch.zeros(HORIZON, len(held_out.obs))
    return {
        "machine": machine("torch", "numpy", "gymnasium", "mujoco"), "env": env_id, "arm": arm, "seed": seed,
        "updates": updates, "parameters": size(model), "windows": [len(train.obs), len(held_out.obs)],
        "cpu_seconds": seconds, "loss": loss.item(), "kl": parts.kl.mean().item(), "steps": STEPS,
        "errors": errors(predicted, held_out), "last_observation": errors(last, held_out),
    }  # fmt: skip


def kept(env_id: str, arm: str) -> list[dict[str, Any]]:
    """The results of an arm, by seed."""
    return [json.loads(each.read_text()) for each in sorted((RESULTS / env_id / arm).glob("s*.json"))]


def table(envs: tuple[str, ...]) -> str:
    """Median and range over seeds of the errors in observations."""
    heads = ["task", "model", "seeds", "parameters", *(f"{k} step{'s' * (k > 1)}" for k in STEPS), "CPU seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for env_id in envs:
        for arm in ARMS:
            if not (found := kept(env_id, arm)):
                continue
            columns = zip(*(each["errors"]["obs"] for each in found), strict=True)
            cells = [f"{np.median(each):.3f} [{min(each):.3f}, {max(each):.3f}]" for each in columns]
            sizes = f"{len(found)} | {found[0]['parameters']:,}"
            seconds = f"{np.median([each['cpu_seconds'] for each in found]):.0f}"
            lines.append(f"| {env_id} | {NAMES[arm]} | {sizes} | {' | '.join(cells)} | {seconds} |")
        if any(kept(env_id, arm) for arm in ARMS):
            first = next(each for arm in ARMS for each in kept(env_id, arm))
            cells = [f"{each:.3f}" for each in first["last_observation"]["obs"]]
            lines.append(f"| {env_id} | the last observation | | 0 | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main(
    envs: tuple[str, ...] = tuple(POSITIONS), arms: tuple[str, ...] = ARMS, seeds: tuple[int, ...] = (0, 1, 2),
    rows: int = 20_000, learned: int = 30_000, updates: int = UPDATES,
    folder: Path = ROOT / "runs" / "latent_dynamics", page: Path = ROOT / "docs" / "dynamics.md",
) -> None:  # fmt: skip
    """Fit what is missing, print the table and write it into the page.

    Args:
        envs: tasks.
        arms: models.
        seeds: fits of each.
        rows: steps of the policy that are kept.
        learned: steps for which the policy has learned.
        updates: gradient steps of a fit.
        folder: where the data lie.
        page: what the table is written into.
    """
    torch.set_num_threads(1)
    for seed in seeds:
        for env_id in envs:
            for arm in arms:
                result = RESULTS / env_id / arm / f"s{seed}.json"
                if not result.exists():
                    write(result, fit(env_id, arm, seed, folder, rows, learned, updates))
                    print(env_id, arm, seed, json.loads(result.read_text())["errors"]["obs"], flush=True)
    text = table(tuple(POSITIONS))
    print(text)
    write_between(page, "latent", text)


if __name__ == "__main__":
    tyro.cli(main)
