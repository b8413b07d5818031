"""The map between eyes and eyeLook* coefficients, both ways."""

from __future__ import annotations

import torch

from pipeline.gaze import GAZE_RANGE_RAD, eyes_of, looking
from pipeline.heads import EXPRESSIONS


def test_eyes_come_back_from_their_coefficients() -> None:
    eyes = torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    eyes[..., 2] = 0
    expression = torch.rand(20, 52, generator=torch.Generator().manual_seed(1))
    told = looking(expression, EXPRESSIONS, eyes)
    torch.testing.assert_close(eyes_of(told, EXPRESSIONS), eyes)
    others = [i for i, name in enumerate(EXPRESSIONS) if not name.startswith("eyeLook")]
    assert torch.equal(told[:, others], expression[:, others])
    assert (told >= 0).all()


def test_coefficients_come_back_where_no_two_oppose() -> None:
    expression = torch.zeros(1, 52)
    for name, value in (("OutLeft", 0.7), ("InRight", 0.4), ("UpLeft", 1.0), ("DownRight", 0.2)):
        expression[0, EXPRESSIONS.index(f"eyeLook{name}")] = value
    eyes = eyes_of(expression, EXPRESSIONS)
    torch.testing.assert_close(looking(torch.zeros(1, 52), EXPRESSIONS, eyes), expression)
    # To the subject's left is positive for both eyes, up is negative pitch.
    torch.testing.assert_close(eyes[0, 0], torch.tensor([-GAZE_RANGE_RAD["Up"], 0.7 * GAZE_RANGE_RAD["Out"], 0]))
    torch.testing.assert_close(eyes[0, 1], torch.tensor([0.2 * GAZE_RANGE_RAD["Down"], 0.4 * GAZE_RANGE_RAD["In"], 0]))
