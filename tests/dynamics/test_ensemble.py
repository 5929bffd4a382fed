from __future__ import annotations

import torch

from driftrl.dynamics.ensemble import Normalizer


def test_normalizer_standardises_and_leaves_constant_columns_in_their_unit() -> None:
    normalizer = Normalizer(3)
    data = torch.stack([torch.tensor([1.0, 3.0]), torch.tensor([7.0, 7.0]), torch.tensor([1e-4, 3e-4])], 1)
    assert torch.equal(normalizer(data), data)
    normalizer.fit(data)
    torch.testing.assert_close(normalizer(data), torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0]]))
    torch.testing.assert_close(normalizer.inverse(normalizer(data)), data)
