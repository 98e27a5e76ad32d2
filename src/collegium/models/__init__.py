"""Loading and calling Hugging Face causal language models, which no other package touches.

`selection` holds the options, `folder` validates files without reading weights, `loading` builds
models, `forward` runs them, `student` builds the student.
"""
