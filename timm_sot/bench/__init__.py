"""What SOT attention costs, beside softmax attention and the form of the original experiments.

contenders.py has what is compared, timing.py times it in turns, memory.py weighs it, runner.py does all of it for a
device, and report.py puts it in tables and holds it against the bars.
"""
