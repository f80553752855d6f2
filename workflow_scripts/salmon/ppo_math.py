"""The mathematics of the RL stage: pure functions on tensors (paper section 3.4; Schulman et al. 2017).

Positions for a query of 4 tokens and a response of 4 (`E` is its EOS) in a batch whose longest
text has 10 tokens and whose longest response has 6:

    tokens       q  q  q  q  r0 r1 r2 E  .  .         query and response, padded on the right
    position     0  1  2  3  4  5  6  7  8  9
    logits at             3  4  5  6                  predict r0 r1 r2 E
    response t            0  1  2  3  4  5            the second axis of every [B, R] tensor below
    mask                  1  1  1  1  0  0            response tokens, EOS included
    logprobs              x  x  x  x  .  .            log pi(r_t | tokens before it)
    values                x  x  x  x  .  .            V(tokens before r_t), read at the same positions as the logits
    rewards               k  k  k  k+S                k: -coefficient * KL_t, S: reward of the response, at its end

Every mean uses the mask; values at masked positions have no effect (they may be anything finite). Losses are sums
divided by a total that the caller gives: the number of tokens of the whole minibatch over all passes and ranks. The sum
of their gradients is the gradient of the joint batch.
"""

import torch


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float, *, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log probabilities of tokens under the distribution they were sampled from, and its entropy on demand.

    With x = logits / temperature and log Z = log sum_v exp(x_v): log p_v = x_v - log Z, and the entropy is
    H = -sum_v p_v log p_v = log Z - E_p[x].

    Args:
        logits: [..., V], any float dtype; row t predicts token t.
        tokens: [...] int64.
        temperature: sampling temperature; PPO improves the tempered policy.
        with_entropy: whether to compute the entropy as well.

    Returns:
        Two float32 tensors [...], in nats; the entropy, if computed, has no gradient.
    """
    scaled = logits.float() / temperature
    log_total = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_total
    if not with_entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, log_total - (torch.softmax(scaled, -1) * scaled).sum(-1)


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled (Schulman 2020).

    Args:
        logprobs: [B, R], the policy's, in nats.
        reference: [B, R], the reference policy's.
        estimator: k1 = log ratio, unbiased and of either sign; k3 = ratio - 1 - log ratio, never negative.

    Returns:
        [B, R], in nats.
    """
    log_ratio = logprobs - reference  # log pi(r_t) - log pi_ref(r_t)
    if estimator == "k1":
        return log_ratio
    return torch.expm1(-log_ratio) + log_ratio  # exp(-log_ratio) - 1 + log_ratio


def sequence_rewards(
    scores: torch.Tensor,
    finished: torch.Tensor,
    lengths: torch.Tensor,
    length_bonus: torch.Tensor,
    *,
    max_length: int,
    stop_penalty: float,
    length_reward: float,
    length_reward_cap: float,
) -> torch.Tensor:
    """Reward of whole responses before the KL penalty (reference step 3, "reward shaping").

    Args:
        scores: [B], the reward model's.
        finished: [B] bool, whether the response ended by itself.
        lengths: [B] response tokens.
        length_bonus: [B], the factor of each prompt.
        max_length: number of tokens that counts as length 1.
        stop_penalty: added if a response did not end by itself.
        length_reward: factor of the length share.
        length_reward_cap: largest share (times bonus) that is rewarded.

    Returns:
        float32 [B].
    """
    # R = score + stop_penalty [not finished] + length_reward * min(length / max_length * bonus, cap)
    share = (lengths.float() / max_length * length_bonus.float()).clamp(max=length_reward_cap)
    return scores.float() + stop_penalty * (~finished).float() + length_reward * share


def token_rewards(
    sequence_reward: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Per-token rewards: the KL penalty everywhere, the sequence's reward at its last token.

    Args:
        sequence_reward: [B].
        kl: [B, R].
        mask: [B, R], 1 at response tokens, which are contiguous from 0; a row has at least one.
        kl_coefficient: the penalty's coefficient, fixed.

    Returns:
        float32 [B, R], 0 at masked positions.
    """
    # r_t = -kl_coefficient * KL_t + R [t is the last token]
    rewards = torch.where(mask.bool(), -kl_coefficient * kl.float(), 0.0)
    last = mask.sum(-1).long() - 1
    rewards[torch.arange(len(last), device=last.device), last] += sequence_reward.float()
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), with value 0 after the last token.

    Args:
        rewards: [B, R].
        values: [B, R], under the policy that sampled.
        mask: [B, R].
        gamma: discount per token.
        lam: discount of the temporal-difference errors.

    Returns:
        Advantages and returns (advantage + value), float32 [B, R], 0 at masked positions.
    """
    keep = mask.float()
    values = torch.where(mask.bool(), values.float(), 0.0)
    rewards = torch.where(mask.bool(), rewards.float(), 0.0)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + gamma * after - values[:, t]  # delta_t = r_t + gamma V_{t+1} - V_t
        # A_t = delta_t + gamma lambda A_{t+1}
        running = (error + gamma * lam * running) * keep[:, t]
        advantages[:, t] = running
        after = values[:, t]
    return advantages, (advantages + values) * keep


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and variance 1 over all real tokens.

    y = (x - mean) / sqrt(var + 1e-8), where var = mean((x - mean)^2) is the population variance.

    Args:
        values: [B, R].
        mask: [B, R].

    Returns:
        float32 [B, R], 0 at masked positions. Equal values become 0.
    """
    keep = mask.bool()
    real = values[keep].double()
    deviation = values.double() - real.mean()
    return torch.where(keep, (deviation * torch.rsqrt(real.var(correction=0) + 1e-8)).float(), 0.0)


def rollout_ratios(logprobs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ratio of the trainer's and the engine's probability of each token that the engine drew.

    Truncated at a cap, they are the weights of truncated importance sampling (Ionides 2008): the loss then equals that
    of tokens drawn from the trained policy, whatever the engine's arithmetic, with a bounded variance.

    Args:
        logprobs: [B, R] of the policy that sampled, computed by the trainer.
        sampled: [B, R], from the engine, for the tokens that it drew.
        mask: [B, R].

    Returns:
        pi_trainer / pi_engine, float32 [B, R], 1 at masked positions; no gradient.
    """
    return torch.exp(torch.where(mask.bool(), (logprobs - sampled).float(), 0.0)).detach()


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
    total: torch.Tensor | float,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7).

    Args:
        logprobs: [B, R], with gradient.
        old_logprobs: [B, R] of the policy that sampled.
        advantages: [B, R].
        mask: [B, R].
        clip: half width of the interval around ratio 1.
        total: real tokens in the whole minibatch.
        weights: token weights, [B, R]; see `rollout_ratios`.

    Returns:
        The loss (scalar), and the number of tokens for which the clipped term was the larger loss.
    """
    # max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = pi(r_t) / pi_old(r_t)
    ratio = torch.exp(torch.where(mask.bool(), logprobs - old_logprobs, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    keep = mask.float()
    loss = (torch.maximum(plain, clipped) * weights * keep).sum() / total
    return loss, ((clipped > plain) * keep).sum().detach()


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
    total: torch.Tensor | float,
) -> torch.Tensor:
    """Half the squared error against the returns, with new values clipped to a range around the old ones.

    Args:
        values: [B, R], with gradient.
        old_values: [B, R] of the value model at sampling time.
        returns: [B, R].
        mask: [B, R].
        clip: half width of the interval around the old value.
        total: real tokens in the whole minibatch.

    Returns:
        The loss (scalar).
    """
    # 0.5 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (torch.where(mask.bool(), worse, 0.0)).sum() / total
