"""The experiment: models trained side by side, so that a difference between them is theirs and not the draw's.

data.py holds the images, engine.py trains one model on them, runner.py runs the models of a study and reports.
"""
