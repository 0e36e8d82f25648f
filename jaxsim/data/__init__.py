"""Data files that the package ships; each has a data card beside it."""
