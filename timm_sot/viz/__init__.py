""" What the attention looks like: maps.py takes the matrices from a model, figures.py draws them """
