"""Loading and calling Hugging Face causal language models, which no other package touches.

`options` are the pretrained models of a recipe, `student` the model to train. `folder` validates
files without reading weights, `loading` builds models, `forward` runs them. A model, file, config,
tokenizer or device that cannot be used is a ModelError, which names the place and the remedy.
"""
