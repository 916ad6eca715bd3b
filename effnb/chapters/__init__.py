"""What lies behind the chapters: one package for each notebook, with the same name.

A companion holds its chapter's verdicts, exercises and drawings, so that they have ordinary tests.
"""
