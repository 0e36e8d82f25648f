"""Runs: what to compute (`config`), the directory it goes to (`directory`), doing it (`job`)."""
