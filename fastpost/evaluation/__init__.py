"""How good models are, how sure that is, and which is better: `fastpost eval`.

Statistics, each a pure function of numbers
  intervals     an estimate with its confidence interval
  passing       pass@k
  voting        maj@k
  significance  whether two models differ
  winning       win rates, as they are and at equal length; `logistic` fits what the latter needs
  calibration   confidence against accuracy
  diversity     how much answers to one prompt differ
  refusal       whether an answer refuses
  pairs         how often a reward prefers the better answer, by length and format

What they are of
  samples       models -> answers, judged, through a journal
  divergence    entropy, and KL to a reference, along these answers
  duels         whose answer is better, by a judge or a reward
  extraction    what of an answer votes

What is made of it
  summary       one model's numbers
  comparison    models side by side
  table, plot   for a reader
"""
