"""Every metric key: what it is, its unit, and how it is reduced. docs/metrics.md is tested against this page.

`objective/*`: sum over a response, mean over responses. `policy/* loss/* val/*`: mean over response tokens of all
ranks, never over padding (TRL averaged over padding). Everything that depends on the clock is under `perf/`.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PPO = {
    "ppo_step": "Rollouts done, this one included.",
    "episode": "Prompts answered so far, over all ranks.",
    "optimizer_step": "AdamW steps so far.",
    "learning_rate": "Of the last optimizer step.",
    "objective/kl": "KL(policy || reference) in nats: k1 summed over a response, mean over responses. Near 0 at step "
    "1; a single batch may dip below 0, a negative trend is a bug.",
    "objective/entropy": "Entropy of the policy in nats, summed over a response.",
    "objective/non_score_reward": "-kl_coef * KL (with ppo.kl_estimator) per response.",
    "objective/rlhf_reward": "objective/scores + objective/non_score_reward: what PPO maximises.",
    "objective/scores": "Mean score after weighting, normalisation, clipping and the missing-EOS rule.",
    "objective/scores_std": "Standard deviation of the scores over responses.",
    "objective/scores/<source>": "Mean score of one source before weighting; reward artifacts: SFT samples average 0.",
    "objective/kl_coef": "Coefficient used in this step.",
    "policy/approxkl_avg": "Mean of (new - old log-probability)^2 / 2 in nats per token: how far the update moved.",
    "policy/clipfrac_avg": "Share of tokens whose policy gradient the clip cut off.",
    "policy/grad_norm": "Global gradient norm before clipping.",
    "policy/bad_updates": "Updates not applied so far because of NaN or infinity.",
    "loss/policy_avg": "Clipped policy loss.",
    "loss/value_avg": "Clipped value loss, half a mean square, before vf_coef.",
    "val/clipfrac_avg": "Share of tokens whose value moved beyond cliprange_value.",
    "val/ratio": "Mean of new / old probability; 1 in the first mini-batch.",
    "val/explained_variance": "1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 one that says "
    "the mean.",
    "val/values_avg": "Mean value of the critic.",
    "rollout/response_length": "Tokens per response, EOS included.",
    "rollout/eos_rate": "Share of responses that ended by EOS or a stop string.",
    "rollout/logprob_drift": "Mean |sampler's - training forward's log-probability| in nats per token; numerical "
    "noise.",
    "rollout/distinct_2": "Different two-word sequences by all of them, over the responses of the step.",
    "rollout/refusal_rate": "Share of responses that refuse, by a list of English and Chinese phrases.",
    "alerts/kl": "1 where objective/kl is above ppo.alerts.kl (or ppo.max_kl), else 0.",
    "alerts/eos_rate": "1 where the EOS rate has collapsed: below ppo.alerts.eos_rate of step 1's.",
    "alerts/entropy": "1 where the entropy per token has collapsed: below ppo.alerts.entropy of step 1's.",
    "alerts/length": "1 where the length has drifted by a factor of ppo.alerts.length from step 1's.",
    "alerts/repetition": "1 where distinct-2 is below ppo.alerts.repetition of step 1's and the score above step 1's.",
    "alerts/refusals": "1 where the share of refusals is above step 1's by ppo.alerts.refusals.",
    "alerts/judge": "1 where a source of weight 0 fell by ppo.alerts.judge of its std and the score rose.",
    "eval/scores": "objective/scores on held-out prompts, every time with the same random numbers.",
    "eval/kl": "objective/kl on held-out prompts.",
    "eval/rlhf_reward": "eval/scores - ppo.kl_coef * eval/kl.",
    "eval/response_length": "rollout/response_length on held-out prompts.",
    "eval/eos_rate": "rollout/eos_rate on held-out prompts.",
    "perf/episodes_per_second": "Episodes of the step by its wall time, all ranks.",
    "perf/tokens_per_second": "Response tokens of the step by its wall time, all ranks.",
    "perf/generate_seconds": "Sampling.",
    "perf/score_seconds": "Scores, log-probabilities, values, advantages.",
    "perf/train_seconds": "Updates.",
    "perf/mfu": "Operations of the updates (6 per weight and real token) / time / measured matmul peak.",
    "perf/padding_share": "Share of a pass of updates over the rollout that is padding.",
    "perf/compilations": "Graphs that torch.compile has made so far in this process.",
    "perf/cuda_graphs": "CUDA graphs recorded so far in this process.",
    "perf/peak_memory_gib": "Peak memory of rank 0 so far, GiB: GPU if one is used, else resident memory.",
}

TRAINER = {
    "step": "Optimizer steps done.",
    "epoch": "Passes over the training rows.",
    "loss": "Mean training loss since the last row: nats per token (pretrain, sft), Bradley-Terry (reward).",
    "grad_norm": "Global gradient norm before clipping.",
    "learning_rate": "Of the last optimizer step.",
    "num_tokens": "Tokens read so far.",
    "entropy": "Mean entropy of the model in nats per token.",
    "mean_token_accuracy": "Share of tokens whose argmax is right.",
    "min_reward": "Smallest score since the last row (mean over batches of the batch minimum).",
    "mean_reward": "Mean score.",
    "max_reward": "Largest score (mean over batches of the batch maximum).",
    "accuracy": "Share of pairs with chosen above rejected.",
    "margin": "Mean of chosen minus rejected score.",
    "train_loss": "Mean loss of the whole training.",
    "eval_<key>": "The key above on held-out rows.",
    "perf/<key>": "transformers' clock: runtime (seconds), samples_per_second, steps_per_second, total_flos.",
}

EVALUATE = {
    "<policy>/<score>_mean": "Mean of a reward or judge score over held-out responses.",
    "<policy>/rlhf_reward_mean": "What PPO maximises: its score, clipped and with the missing-EOS rule, less kl_coef "
    "times the KL. Not there with kl_target or normalize_scores, whose numbers move, nor where sampled otherwise.",
    "<policy>/kl_mean": "KL to the reference in nats per response; 0 for the reference itself, "
    "unless it was sampled with top-p or a repetition penalty.",
    "<policy>/length_mean": "Tokens per response, EOS included.",
    "<policy>/eos_rate": "Share of responses that ended by EOS or a stop string.",
    "<policy>/refusal_rate": "Share of responses that refuse, by a list of English and Chinese phrases.",
    "<policy>/self_bleu": "Mean BLEU-4 of a response against all others: how alike they are.",
    "<policy>/perplexity": "Of held-out completions of the sft data, at temperature 1: the alignment tax.",
    "<policy>/strength_<score>": "Bradley-Terry strength among more than two policies, logits against the baseline.",
    "<policy>/distinct_2": "Different two-word sequences by all of them, over all responses together.",
    "<policy>/repetition_4": "Mean share of a response's four-word sequences that it had before.",
    "<policy>_vs_<baseline>/win_rate_<score>": "Share of responses that score above the baseline's, ties one half.",
    "<policy>_vs_<baseline>/lc_win_rate_<score>": "The same if both were equally long: a logistic regression.",
    "<policy>_vs_<baseline>/order_agreement_<score>": "Share of pairs with one verdict of an LLM in both orders, "
    "of those with a verdict in both.",
    "<policy>_vs_<baseline>/unread_<score>": "Share of an LLM's replies that say no verdict; each counts as a tie.",
    "<policy>_vs_<baseline>/refusal_rate_delta": "Mean paired difference of the refusal rate.",
    "<policy>_vs_<baseline>/perplexity_ratio": "perplexity of the policy by that of the baseline.",
    "<policy>_vs_<baseline>/<score>_delta": "Mean paired difference of a score, policy minus baseline.",
    "<policy>_vs_<baseline>/rlhf_reward_delta": "Mean paired difference of rlhf_reward.",
    "<policy>_vs_<baseline>/kl_delta": "Mean paired difference of the KL in nats per response.",
    "<policy>_vs_<baseline>/length_delta": "Mean paired difference of the length in tokens.",
    "<policy>_vs_<baseline>/eos_rate_delta": "Mean paired difference of the EOS rate.",
    "<policy>_vs_<baseline>/distinct_2_ratio": "distinct_2 of the policy by that of the baseline.",
    "<key>_low": "Lower end of the 95 % bootstrap interval over prompts, of every mean, rate, strength and delta.",
    "<key>_high": "Upper end of the same interval.",
}

ALL = PPO | TRAINER
_PLACEHOLDERS = {  # what the keys with <...> stand for
    "objective/scores/<source>": "objective/scores/[^/]+",
    "eval_<key>": f"eval_({'|'.join(key for key in TRAINER if '<' not in key)})",
    "perf/<key>": "perf/(train_|eval_)?(runtime|samples_per_second|steps_per_second|total_flos)",
}
_PATTERNS = [re.compile(_PLACEHOLDERS.get(key, re.escape(key))) for key in ALL]


def is_known(key: str) -> bool:
    """Whether this page describes `key`, as a metric of PPO or of transformers' trainers."""
    return any(pattern.fullmatch(key) for pattern in _PATTERNS)


def check_keys(keys: Iterable[str]) -> None:
    """Refuse a key that this page does not know: an undocumented number cannot be read.

    Raises:
        KeyError: naming the key.
    """
    for key in keys:
        if not is_known(key):
            raise KeyError(f"metric {key!r} is not in rlhf/metrics.py: describe it there")
