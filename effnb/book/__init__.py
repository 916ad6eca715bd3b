"""What authors need: building notebooks, the learners' edition, the web site.

Chapters never import it; it imports the lab.
"""
