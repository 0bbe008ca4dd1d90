"""Whether training on a file would be sound, before anything is trained; and what is odd about the file.

columns   what a file is, and which verbs can use it
checks    what is wrong with counts, with a chat template, with held-out rows; lines of text, for the trainers too
readings  the rows as each verb would read them, with a tokenizer
lengths   percentiles, and a histogram of text
masks     a sample, with what is trained of it in color
report    the verdict, for a terminal and as JSON
"""
