"""What a run takes in memory, part by part, before anything is loaded; what fits; and what to change.

source    where a model's config is, and how its weights are stored
outline   the model without its weights, on fake tensors
passes    a step acted out on it: every tensor's life is seen (timeline), nothing is computed
acted     of passes of any size, from few (growth)
head      the fused head, by its own planning
states    4-bit weights and the optimizer's moments, as formulas
plans     what rests, and what each moment of a step puts beside it
fit       by GPU and by method; and what to change
"""
