""" What the attention looks like: inputs.py makes models and images, maps.py takes the matrices, figures.py draws them
"""
