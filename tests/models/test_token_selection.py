import pytest
import torch
from torch.testing import assert_close

from vitrail.models.token_selection import (
    MaskedAttention,
    best_positions,
    draw_decisions,
    gather_tokens,
    keep_mask,
    kept_count,
    masked_softmax,
    restore_tokens,
    stage_ratios,
)


def test_counts__are_the_published_ones():
    counts = {
        0.9: [176, 158, 142],
        0.8: [156, 125, 100],
        0.7: [137, 96, 67],
        0.6: [117, 70, 42],
        0.5: [98, 49, 24],
    }
    for ratio, expected in counts.items():
        assert [kept_count(196, share) for share in stage_ratios(ratio, 3)] == expected
    assert kept_count(3, 0.1) == 1


@pytest.mark.parametrize("ratio", [0, 1.5, [0.5], [0.5, 0.5, 2]])
def test_ratios__invalid_ones_are_refused(ratio):
    with pytest.raises(ValueError, match=r"^keep_ratio="):
        stage_ratios(ratio, 3)


def test_gathered_tokens__are_the_best_in_image_order_and_can_be_restored():
    scores, x = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]]), torch.randn(2, 5, 3)
    positions = best_positions(scores, 2)
    assert positions.tolist() == [[1, 3], [0, 1]]
    kept = gather_tokens(x, positions, prefix=1)
    assert_close(kept, torch.stack((x[0, [0, 2, 4]], x[1, [0, 1, 2]])))
    before = x.clone()
    restored = restore_tokens(x, kept + 1, positions, prefix=1)
    assert_close(x, before)
    changed = torch.cat((torch.ones(2, 1), keep_mask(positions, 4)), 1)
    assert_close(restored, x + changed[..., None])


def test_decisions__a_dropped_token_stays_dropped_and_probabilities_get_gradients():
    torch.manual_seed(0)
    probabilities = torch.zeros(4, 50, 2, requires_grad=True)
    first = draw_decisions(probabilities, None)
    second = draw_decisions(probabilities, first)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (second <= first).all()
    assert 0.4 < first.mean() < 0.6
    second.sum().backward()
    assert probabilities.grad.abs().sum() > 0


def test_masked_softmax__kept_tokens_only():
    """Without epsilon it equals a softmax over the kept tokens and the token itself, however large other scores are."""
    scores, keep = torch.randn(2, 3, 5, 5), torch.tensor([[1.0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    scores[..., 2] += 60
    allowed = (keep[:, None, None] > 0) | torch.eye(5, dtype=torch.bool)
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    assert_close(masked_softmax(scores, keep, eps=0.0), expected)
    published = masked_softmax(scores, keep)
    assert_close(published[0, :, 0], torch.full((3, 5), 0.2))  # token 2 is dropped, and its score hides the others
    assert_close(masked_softmax(torch.randn(2, 3, 5, 5), torch.ones(2, 5)).sum(-1), torch.ones(2, 3, 5))


def test_masked_attention__equals_attention_among_the_kept_tokens():
    torch.manual_seed(0)
    attention, x = MaskedAttention(8, num_heads=2), torch.randn(1, 6, 8)
    keep = torch.tensor([[1.0, 0, 1, 1, 0, 1]])
    kept = keep[0].bool()
    assert_close(attention(x, keep=keep)[:, kept], attention(x[:, kept]), rtol=1e-4, atol=1e-5)
    assert_close(attention(x, keep=torch.ones(1, 6)), attention(x), rtol=1e-4, atol=1e-5)
