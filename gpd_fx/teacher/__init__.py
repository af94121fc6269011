"""The dynamic teacher: the module that is trained."""
