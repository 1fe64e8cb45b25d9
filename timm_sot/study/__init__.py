"""The experiment: models trained side by side, so that a difference between them is theirs and not the draw's.

data.py holds the images, augment.py turns them into epochs, engine.py trains a model on these (with coupled.py, where
the training step is a CUDA graph), store.py keeps what has been done, presets.py names the studies worth running,
runner.py runs them, cluster.py as tasks of Ray, and progress.py shows how far they are. sections.py reads what can be
compared, statistics.py compares, and report.py puts it in tables (tables.py) and figures (figures.py), beside controls
(controls.py) and what the original experiment published (original.py).
"""
