"""The mathematics of the RL stage against slow loops over plain Python numbers (float64)."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from salmon import ppo_math

SEEDS = range(5)
GARBAGE = (0.0, 1e6)
Rows = list[list[float]]


class Ragged:
    """Random rows of different lengths: as lists of floats, and padded with garbage as the functions want them."""

    def __init__(self, seed: int, garbage: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.garbage = garbage
        # A row of one token, one that fills the width, and others between.
        self.lengths = [1, 9, *self.rng.integers(1, 9, self.rng.integers(1, 5)).tolist()]
        self.mask = self.pad([[1.0] * length for length in self.lengths], 0.0)
        self.total = sum(self.lengths)

    def rows(self, scale: float = 1.0) -> Rows:
        # Rounded to float32, so that the reference sees what the function sees.
        return [np.float32(self.rng.normal(0, scale, n)).astype(float).tolist() for n in self.lengths]

    def pad(self, rows: Rows, fill: float | None = None) -> torch.Tensor:
        padding = (self.rng.uniform(-1, 1) * self.garbage if fill is None else fill for _ in itertools.count())
        return torch.tensor([row + list(itertools.islice(padding, max(self.lengths) - len(row))) for row in rows])

    def real(self, padded: torch.Tensor) -> Rows:
        return [row[:n].tolist() for row, n in zip(padded, self.lengths, strict=True)]


def flat(rows: Rows) -> list[float]:
    return [value for row in rows for value in row]


def close(found: torch.Tensor | Rows | list[float], expected: Rows | list[float], tolerance: float = 1e-5) -> None:
    as_list: Any = found.tolist() if isinstance(found, torch.Tensor) else found
    nested = bool(expected) and isinstance(expected[0], list)
    left, right = (flat(as_list), flat(expected)) if nested else (as_list, expected)  # type: ignore[arg-type]
    assert left == pytest.approx(right, rel=tolerance, abs=tolerance)


# -- log probabilities and KL


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_and_entropy(temperature: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 4, (3, 5, 11))).to(dtype)
    tokens = torch.tensor(rng.integers(0, 11, (3, 5)))
    logprobs, entropy = ppo_math.token_logprobs(logits, tokens, temperature, with_entropy=True)
    assert entropy is not None
    assert logprobs.dtype == entropy.dtype == torch.float32
    for row in range(3):
        for t in range(5):
            weights = [math.exp(value / temperature) for value in logits[row, t].tolist()]
            probabilities = [weight / sum(weights) for weight in weights]
            chosen = probabilities[int(tokens[row, t])]
            assert float(logprobs[row, t]) == pytest.approx(math.log(chosen), abs=1e-5)
            assert float(entropy[row, t]) == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-5)


def test_gradient_of_logprobs_is_that_of_the_tempered_softmax() -> None:
    """d log p(token) / d logit_v = (1[v = token] - p_v) / temperature; the entropy has no gradient."""
    temperature = 0.7
    logits = torch.tensor(np.random.default_rng(1).normal(0, 2, (1, 1, 6))).float().requires_grad_()
    logprobs, entropy = ppo_math.token_logprobs(logits, torch.tensor([[4]]), temperature, with_entropy=True)
    assert entropy is not None
    assert not entropy.requires_grad
    logprobs.sum().backward()
    weights = [math.exp(value / temperature) for value in logits.detach()[0, 0].tolist()]
    expected = [((v == 4) - weight / sum(weights)) / temperature for v, weight in enumerate(weights)]
    assert logits.grad is not None
    close(logits.grad[0, 0], expected)


def test_logits_far_apart_do_not_overflow() -> None:
    logprobs, entropy = ppo_math.token_logprobs(
        torch.tensor([[[3e4, 0.0, -3e4]]]), torch.tensor([[0]]), 0.7, with_entropy=True
    )
    assert entropy is not None
    assert (logprobs.item(), entropy.item()) == (0.0, 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_estimates(seed: int) -> None:
    data = Ragged(seed)
    policy, reference = data.rows(), data.rows()
    ratios = [[p - q for p, q in zip(*rows, strict=True)] for rows in zip(policy, reference, strict=True)]
    k1, k3 = (ppo_math.kl_estimate(data.pad(policy), data.pad(reference), name) for name in ("k1", "k3"))
    close(data.real(k1), ratios)
    close(data.real(k3), [[math.exp(-x) - 1 + x for x in row] for row in ratios])
    assert min(flat(ratios)) < 0  # k1 is of either sign, not clamped (reference, defect 11)
    assert float(k3.min()) >= 0


def test_k3_is_never_negative_where_policies_are_almost_equal() -> None:
    """exp(-x) - 1 + x computed as written is -6e-8 for some of these."""
    ratio = torch.linspace(-1e-3, 1e-3, 2001)
    assert float(ppo_math.kl_estimate(ratio, torch.zeros(2001), "k3").min()) >= 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased(estimator: str) -> None:
    """Their expectation under the policy, summed over the whole of a small vocabulary, is the KL divergence."""
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet([1] * 7), rng.dirichlet([1] * 7)
    exact = sum(p[v] * math.log(p[v] / q[v]) for v in range(7))
    estimates = ppo_math.kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator).tolist()
    assert sum(p[v] * estimates[v] for v in range(7)) == pytest.approx(exact, rel=1e-9)


# -- rewards


@pytest.mark.parametrize("cap", [0.8, 0.3])
def test_sequence_rewards(cap: float) -> None:
    rng = np.random.default_rng(3)
    n, longest = 40, 1024
    scores = rng.normal(0, 3, n)
    finished = rng.random(n) < 0.5
    lengths = rng.integers(1, longest + 1, n)
    bonus = rng.choice([1.0, -0.4, 0.0], n)
    found = ppo_math.sequence_rewards(
        torch.tensor(scores).bfloat16().float(),
        torch.tensor(finished),
        torch.tensor(lengths),
        torch.tensor(bonus),
        max_length=longest,
        stop_penalty=-6.0,
        length_reward=5.0,
        length_reward_cap=cap,
    )
    assert found.dtype == torch.float32
    capped, negative, unfinished = 0, 0, 0
    for i in range(n):
        share = lengths[i] / longest * bonus[i]
        expected = float(torch.tensor(scores[i]).bfloat16()) + 5.0 * min(share, cap) + (0.0 if finished[i] else -6.0)
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)
        capped, negative, unfinished = capped + (share > cap), negative + (share < 0), unfinished + (not finished[i])
    assert min(capped, negative, unfinished) > 0  # all three were tried


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("seed", SEEDS)
def test_token_rewards(seed: int, garbage: float) -> None:
    data = Ragged(seed, garbage)
    kl, reward = data.rows(), [float(i) - 1.5 for i in range(len(data.lengths))]
    found = ppo_math.token_rewards(torch.tensor(reward), data.pad(kl), data.mask, 0.25)
    expected = [[-0.25 * value for value in row] for row in kl]
    for row, whole in zip(expected, reward, strict=True):
        row[-1] += whole
    close(data.real(found), expected)
    assert not found[data.mask == 0].any()


# -- advantages


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5), (1.0, 0.95), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_advantages_and_returns(gamma: float, lam: float, garbage: float) -> None:
    """The definition, a double sum: A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})."""
    for seed in SEEDS:
        data = Ragged(seed, garbage)
        rewards, values = data.rows(), data.rows()
        advantages, returns = ppo_math.advantages_and_returns(
            data.pad(rewards), data.pad(values), data.mask, gamma, lam
        )
        expected = []
        for r, v in zip(rewards, values, strict=True):
            v_next = [*v[1:], 0.0]
            errors = [r[t] + gamma * v_next[t] - v[t] for t in range(len(r))]
            expected.append(
                [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(r))) for t in range(len(r))]
            )
        close(data.real(advantages), expected)
        close(
            data.real(returns),
            [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(expected, values, strict=True)],
        )
        assert not advantages[data.mask == 0].any()
        assert not returns[data.mask == 0].any()


def test_returns_without_discount_are_rewards_to_go() -> None:
    """gamma = lambda = 1 (the paper's): the sum of the rewards still to come, whatever the values."""
    data = Ragged(7)
    rewards = data.rows()
    _, returns = ppo_math.advantages_and_returns(data.pad(rewards), data.pad(data.rows(10.0)), data.mask, 1.0, 1.0)
    close(data.real(returns), [[sum(row[t:]) for t in range(len(row))] for row in rewards])


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_ignores_padding(seed: int, garbage: float) -> None:
    """Reference, defect 10."""
    data = Ragged(seed, garbage)
    values = [[3.0 + 2.0 * value for value in row] for row in data.rows()]
    found = ppo_math.whiten(data.pad(values), data.mask)
    every = flat(values)
    mean = sum(every) / len(every)
    spread = math.sqrt(sum((value - mean) ** 2 for value in every) / len(every) + 1e-8)
    close(data.real(found), [[(value - mean) / spread for value in row] for row in values])
    real = flat(data.real(found))
    assert sum(real) / len(real) == pytest.approx(0, abs=1e-6)
    assert sum(value**2 for value in real) / len(real) == pytest.approx(1, abs=1e-5)
    assert not found[data.mask == 0].any()


def test_whitening_of_equal_or_large_values() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert ppo_math.whiten(torch.tensor([[5.0, 5.0, 9.0]]), mask).tolist() == [[0.0, 0.0, 0.0]]
    close(ppo_math.whiten(torch.tensor([[1e6, 1e6 + 1, 0.0]]), mask), [[-1.0, 1.0, 0.0]], 1e-3)


# -- losses


def policy_terms(new: float, old: float, advantage: float, clip: float) -> tuple[float, float, bool]:
    """A token's loss, its derivative with respect to `new`, and whether the clipped term is the larger."""
    ratio = math.exp(new - old)
    plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)
    return max(plain, clipped), (-advantage * ratio if plain >= clipped else 0.0), clipped > plain


def value_terms(new: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """A token's loss, and its derivative with respect to `new`."""
    clipped = old + min(max(new - old, -clip), clip)
    plain, other = (new - target) ** 2, (clipped - target) ** 2
    moved = 1.0 if abs(new - old) < clip else 0.0  # derivative of the clipped value
    return 0.5 * max(plain, other), (new - target) if plain >= other else (clipped - target) * moved


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_and_gradient(seed: int, garbage: float) -> None:
    data = Ragged(seed, garbage)
    old, advantages = data.rows(), data.rows()
    new = [
        [value + change for value, change in zip(*rows, strict=True)] for rows in zip(old, data.rows(0.4), strict=True)
    ]
    leaf = data.pad(new).requires_grad_()
    loss, clipped = ppo_math.policy_loss(leaf, data.pad(old), data.pad(advantages), data.mask, 0.2, data.total)
    loss.backward()
    terms = [
        policy_terms(*values, 0.2) for values in zip(flat(data.real(leaf)), flat(old), flat(advantages), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(term[0] for term in terms) / data.total, abs=1e-5)
    assert int(clipped) == sum(term[2] for term in terms)
    assert leaf.grad is not None
    close(flat(data.real(leaf.grad)), [term[1] / data.total for term in terms])
    assert not leaf.grad[data.mask == 0].any()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_and_gradient(seed: int, garbage: float) -> None:
    data = Ragged(seed, garbage)
    old, returns = data.rows(), data.rows()
    new = [
        [value + change for value, change in zip(*rows, strict=True)] for rows in zip(old, data.rows(0.3), strict=True)
    ]
    leaf = data.pad(new).requires_grad_()
    loss = ppo_math.value_loss(leaf, data.pad(old), data.pad(returns), data.mask, 0.2, data.total)
    loss.backward()
    terms = [value_terms(*values, 0.2) for values in zip(flat(data.real(leaf)), flat(old), flat(returns), strict=True)]
    assert loss.item() == pytest.approx(sum(term[0] for term in terms) / data.total, abs=1e-5)
    assert leaf.grad is not None
    close(flat(data.real(leaf.grad)), [term[1] / data.total for term in terms])
    assert not leaf.grad[data.mask == 0].any()


def test_clipping_stops_what_moved_too_far() -> None:
    """A token already 30 % more likely and praised, or 30 % less likely and blamed, is not pushed further; in
    the opposite cases it is pulled back (Schulman et al. 2017, figure 1)."""
    old = torch.zeros(1, 4)
    ratios = torch.tensor([[1.3, 0.7, 1.3, 0.7]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    leaf = ratios.log().requires_grad_()
    loss, clipped = ppo_math.policy_loss(leaf, old, advantages, torch.ones(1, 4), 0.2, 4)
    loss.backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).tolist() == [[False, False, True, True]]
    assert int(clipped) == 2


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "policy": lambda *args: ppo_math.policy_loss(*args)[0],
    "value": ppo_math.value_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_of_micro_batches_sum_to_that_of_the_batch(loss: Callable[..., torch.Tensor]) -> None:
    """However rows of different lengths are split, and however wide each part is padded (reference, defect 10)."""
    data = Ragged(11, garbage=77.0)
    new, old, target = data.rows(), data.rows(), data.rows()

    def gradient(parts: list[list[int]]) -> list[float]:
        leaves = [torch.tensor(row).requires_grad_() for row in new]
        for part in parts:
            width = max(data.lengths[row] for row in part)
            stacked = torch.stack(
                [torch.nn.functional.pad(leaves[row], (0, width - data.lengths[row]), value=77.0) for row in part]
            )
            rest = (data.pad(rows)[part, :width] for rows in (old, target))
            loss(stacked, *rest, data.mask[part, :width], 0.2, data.total).backward()
        return flat([leaf.grad.tolist() for leaf in leaves if leaf.grad is not None])

    rows = list(range(len(new)))
    whole = gradient([rows])
    assert any(whole)
    for parts in ([[row] for row in rows], [rows[::2], rows[1::2]], [rows[:1], rows[1:][::-1]]):
        close(gradient(parts), whole, 1e-7)
