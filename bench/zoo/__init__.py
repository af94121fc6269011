"""Sweeps over the models of other libraries: is each expanded exactly, and how much of it?"""
