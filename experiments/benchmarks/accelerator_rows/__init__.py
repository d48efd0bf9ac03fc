"""What ``experiments.benchmarks.accelerator`` measures.

plan.py        which rows there are, and in which order
schedule.py    the clock: what is measured in the time given, and what is left out
process.py     a process that measures, as the command sees it; worker.py is the same from within
card.py, memory.py, speed.py, rebuild.py, slope.py, exactness.py, peer.py    the rows
"""
