"""Steps around a model, as its manifest declares them: a JPEG in, labelled boxes out, and no code in any bundle.

`flow` checks at load that the steps fit together and fit the model; `images`, `numbers` and `boxes` are the steps;
`model` puts them around an engine, so that batching, golden vectors, the gate and warm-up see one model that takes
what clients send.
"""
