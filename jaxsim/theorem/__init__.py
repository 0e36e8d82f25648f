"""Theorem 2: certified verdicts, the ladder of conditions that are enough, critical β, bounds."""
