"""What a run takes in memory, part by part, before anything is loaded; what fits; and what to change.

outline    the model without its weights, on fake tensors
passes     a step acted out on it: every tensor's life is seen, nothing is computed
timeline   live bytes over a pass, for any number of tokens
head       the fused head, by its own planning
states     4-bit weights and the optimizer's moments, as formulas
plans      what rests, and what each moment of a step puts beside it
fit        by GPU and by method
"""
