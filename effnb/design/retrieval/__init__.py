"""Retrieval: a language model that looks things up in a datastore.

- `datastore`: keys and values, searched exactly or with FAISS.
- `knn_lm`: kNN-LM, next tokens mixed with those that followed the nearest contexts.
- `chunks`: a datastore of chunks of text and what followed them.
- `chunked_attention`, `neighbour_encoder`, `retro`: RETRO, a decoder that reads such chunks.
- `leakage`: how much of a text the datastore holds word for word.
- `worth`: how many parameters a datastore is worth.
"""
