import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What makes the documented settings quick: the code is run as it stands otherwise.
QUICKER = [
    (r"total_timesteps=[\d_]+", "total_timesteps=64"),
    (r"n_steps=\d+, batch_size=\d+", "n_steps=16, batch_size=16"),
    (r'PolicyFlow\("MlpPolicy", "InvertedPendulum-v5"(?!, config)', r"\g<0>, n_steps=16, batch_size=16"),
    (r"_freq=[\d_]+", "_freq=8"),
]


@pytest.mark.parametrize("page", ["README.md", "docs/sb3.md"])
@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # of the progress bar of Stable-Baselines3
def test_code_of_the_documentation_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        for pattern, replacement in QUICKER:
            block = re.sub(pattern, replacement, block)
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/sb3.md"])
def test_links_of_the_documentation_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target
