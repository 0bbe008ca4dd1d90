"""Stages that make data sets: a policy is asked, its answers are judged, and what is kept is an ordinary file of rows.

config    what every stage is told
policy    who is asked
jury      who judges
groups    what comes of a prompt
journal   finished work on the disk, so that a stage that was killed goes on
asking    prompts -> groups, through the journal
rows      files of rows, reports and tables

best_of_n  N answers a prompt, the best kept; by order_statistics
rejection  rounds of sampling, selecting and SFT; by selecting, hints, diversity
"""
