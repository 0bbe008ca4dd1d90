"""The groups of fields, in the order in which the help shows them."""

MODEL, DATA, ROLLOUT, ENGINE = "Model", "Data", "Rollouts and rewards", "Sampler"
LOSS, STEPS, RUN, PLAN = "Loss", "Optimisation", "Run", "Plan"
GROUPS = (PLAN, MODEL, DATA, ROLLOUT, ENGINE, LOSS, STEPS, RUN)
