"""Model design: the survey's section on architectures that need less computation or memory.

Attention that does not compare every token with every other, sparse layers of experts, shared
parameters, retrieval, recurrent forms of attention, and positions that reach beyond the trained
length: each changes what a model computes, before or instead of compressing a trained one.
"""
