"""Below `fastpost.head`: a call becomes a problem (door), a schedule runs it (schedules, eager), visiting the logits
tile by tile (sweep, chunk), and row kernels do the mathematics (rows). Nothing here knows a loss or a model.

  door        checks of a call, and rows left out     <- checks, compaction, problem, lowrank
  schedules   statistics, frozen, lazy                <- once, shard
  eager       a loss with its gradients
  chunk       some rows: statistics, gradients        <- fused, kept, topk
  sweep       tiles of the logits, a chunk at a time  <- gemm, quantised
  rows        what is done to a row of a tile         <- native and fastpost.kernels do the same
  likeliest   what a teacher stores
"""
