"""The fast forward of the BERT family on a CPU: the same weights, the same answers, less arithmetic and less memory.

dropout.py   random masks, drawn in bulk, a function of (seed, part, layer, site)
cores.py     a batch cut into two parts, one for each core
blocked.py   products of many tokens with weights in the layout of oneDNN
workspace.py memory that one batch hands to the next
layer.py     one encoder layer over packed tokens, with its backward written by hand
encoder.py   parameters by name -> encoder -> logits; says where a model is not one of the family
mixed.py     rows of many adapters in one pass through the base
"""
