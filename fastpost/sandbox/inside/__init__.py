"""What runs inside the sandbox: a program of its own (`python -I -S inside`), of the standard library alone.

It gives up its rights first (`confine`), then reads what it is to run. Its modules import one another by bare names:
here there is no fastpost, and nothing of the process that asks.
"""
