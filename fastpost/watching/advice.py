"""What usually helps, by the name of what is wrong."""

from __future__ import annotations

ADVICE = {
    "not a number": "Go back to a checkpoint before it, with a lower learning_rate or in float32; look at the reward "
    "functions and for rows without a token to learn.",
    "KL beyond the budget": "Raise beta (kl_coef), lower learning_rate, or keep the checkpoint whose held-out reward "
    "was best.",
    "entropy collapse": "Raise epsilon_high (to 0.28) or temperature, lower learning_rate, or add prompts that are "
    "solved sometimes.",
    "groups without variance": "Where that reward is the lowest there is: easier prompts, more num_generations, a "
    "reward with grades. Where it is the highest: harder prompts.",
    "gradient explodes": "Lower learning_rate, warm up longer, lower max_grad_norm; look for rows that are far longer "
    "than others.",
    "much is clipped": "Take fewer steps on the same samples (num_iterations, num_ppo_epochs) or a lower "
    "learning_rate.",
    "critic explains nothing": "Let the critic warm up before the policy moves, raise its learning rate or vf_coef, or "
    "begin it from the reward model.",
    "completions do not end": "Raise max_completion_length. If they ramble: does the SFT data end in EOS, and is the "
    "chat template the model's own?",
    "judge goes by place": "Read what it says; take a larger judge, reasons before the verdict, or a rubric that "
    "tells the answers apart.",
    "no better than a coin": "See whether chosen and rejected are swapped, or differ only past max_length; else raise "
    "learning_rate or train longer.",
    "sampler mismatch": "Give sampler and trainer the same dtype, temperature and top_p, or correct by the token "
    "(token_truncate).",
    "both log-probabilities fall": "SFT on the chosen answers first, add their likelihood to the loss (rpo_alpha, "
    "cpo_alpha), or lower learning_rate.",
    "reward is length": "Read the longest samples; punish length (a soft overlong penalty), take loss_type dr_grpo, or "
    "train the reward model on pairs of like length.",
    "overfits": "Take the checkpoint of that step; else fewer epochs, more data, a lower learning_rate or a smaller "
    "lora_r.",
}
